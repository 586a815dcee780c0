"""Whether what was read from a JSON file is what its dataclass declares; `from_json` takes whatever it finds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def wrong_types(value: Any) -> Iterator[str]:
    """Yields where a dataclass holds another type than it declares, as in `rejects[0].line is 'x', expected int`.

    Knows the types that JSON has: dataclasses, lists, tuples of one type, mappings with keys of text, unions, literals
    and plain types. `bool` is no `int` here.
    """
    kind: Any = type(value)
    for name, hint in _fields(kind).items():
        yield from _mismatches(getattr(value, name), hint, name)


@cache
def _fields(dataclass: type) -> dict[str, Any]:
    return get_type_hints(dataclass)


def _mismatches(value: Any, hint: Any, where: str) -> Iterator[str]:
    origin, arguments = get_origin(hint) or hint, get_args(hint)
    if origin is Any or (origin is Literal and value in arguments):
        return
    if origin in (Union, UnionType):
        if all(next(_mismatches(value, option, where), None) for option in arguments):
            yield _describe(value, hint, where)
    elif origin is Literal or isinstance(value, bool) is not (origin is bool) or not isinstance(value, origin):
        yield _describe(value, hint, where)
    elif is_dataclass(origin):
        for what in wrong_types(value):
            yield f"{where}.{what}"
    elif issubclass(origin, Mapping):
        for key, item in value.items():
            yield from _mismatches(item, arguments[1], f"{where}[{key!r}]")
    elif issubclass(origin, Sequence) and arguments:
        for index, item in enumerate(value):
            yield from _mismatches(item, arguments[0], f"{where}[{index}]")


def _describe(value: Any, hint: Any, where: str) -> str:
    expected = hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)
    return f"{where} is {value!r:.60}, expected {'null' if hint is NoneType else expected}"
