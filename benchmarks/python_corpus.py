"""A corpus that every machine with Python has: its language reference and the docstrings of its standard library."""

from __future__ import annotations

import ast
import hashlib
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

_LEFT_OUT = {"site-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__", "pydoc_data"}


def write_corpus(path: Path) -> int:
    """Writes the corpus as JSON lines, one document a topic or module, and returns the number of documents.

    The order is by a hash of the name, so that what is held out at the end is like the rest.
    """
    documents = [*_topics(), *_modules()]
    documents.sort(key=lambda document: hashlib.sha256(document[0].encode()).digest())
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("w", encoding="utf-8") as stream:
        for name, text in documents:
            stream.write(json.dumps({"name": name, "text": text}, ensure_ascii=False) + "\n")
    unfinished.rename(path)
    return len(documents)


def _topics() -> Iterator[tuple[str, str]]:
    for name, text in topics.items():
        yield f"topic {name}", text.strip()


def _modules() -> Iterator[tuple[str, str]]:
    """Each module's docstrings in the order of its source; nothing is imported."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if _LEFT_OUT.intersection(path.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue  # sources that are broken or encoded otherwise on purpose
        text = "\n\n".join(_docstrings(tree))
        if text:
            yield f"module {path.relative_to(root)}", text


def _docstrings(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node)
        if docstring and not _has_surrogates(docstring):
            yield docstring
    for child in ast.iter_child_nodes(node):
        yield from _docstrings(child)


def _has_surrogates(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)
