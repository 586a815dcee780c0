"""A dataclass read from JSON says where it holds another type than it declares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from pipeline.wellformed import wrong_types


@dataclass(frozen=True)
class Inner:
    line: int


@dataclass(frozen=True)
class Outer:
    name: str
    count: int | None
    kind: Literal["a", "b"]
    sizes: Mapping[str, int | str]
    inner: list[Inner]
    pairs: tuple[Inner, ...]
    free: list[dict[str, Any]]


GOOD: dict[str, Any] = {
    "name": "x",
    "count": None,
    "kind": "a",
    "sizes": {"y": 1, "z": "2"},
    "inner": [Inner(1)],
    "pairs": (Inner(1), Inner(2)),
    "free": [{"anything": [None]}],
}


@pytest.mark.parametrize("count", [None, 0, -5])
def test_what_is_declared_is_right(count: int | None) -> None:
    assert list(wrong_types(Outer(**GOOD | {"count": count}))) == []


@pytest.mark.parametrize(
    ("field", "value", "where"),
    [
        ("name", None, "name is None, expected str"),
        ("name", ["x"], r"name is ['x'], expected str"),
        ("count", 1.0, "count is 1.0, expected int | None"),
        ("count", True, "count is True, expected int | None"),
        ("kind", "c", "kind is 'c', expected typing.Literal['a', 'b']"),
        ("kind", [], "kind is [], expected typing.Literal['a', 'b']"),
        ("sizes", [], "sizes is [], expected collections.abc.Mapping[str, int | str]"),
        ("sizes", {"y": 1, "z": None}, "sizes['z'] is None, expected int | str"),
        ("inner", {}, "inner is {}, expected list[test_wellformed.Inner]"),
        ("inner", [Inner(1), Inner("2")], "inner[1].line is '2', expected int"),  # type: ignore[arg-type]
        ("pairs", (Inner(1), 5), "pairs[1] is 5, expected Inner"),
        ("pairs", (Inner(1), Inner(None)), "pairs[1].line is None, expected int"),  # type: ignore[arg-type]
        ("free", [{}, 5], "free[1] is 5, expected dict[str, typing.Any]"),
    ],
)
def test_what_is_not_declared_is_named_with_its_place(field: str, value: object, where: str) -> None:
    (found,) = wrong_types(Outer(**GOOD | {field: value}))
    assert found.replace(f"{__name__}.", "test_wellformed.") == where
