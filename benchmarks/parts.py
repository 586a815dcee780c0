"""The parts of a benchmark one after another: what fails or comes too late is named, what is done is written."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.interleaved import Report, Table, console

T = TypeVar("T")


class Parts:
    """Runs parts, and keeps their results: tables and notes as Markdown, figures as JSON beside it."""

    def __init__(self, report: Report, output: Path | None, name: str, minutes: float = math.inf):
        """Takes an empty report.

        Args:
            report: where tables and notes go.
            output: a Markdown file, or none.
            name: of the files in `$OUT`, where there is that variable.
            minutes: after which no part is begun.
        """
        self.report = report
        self.figures: dict[str, Any] = {}
        """What goes into the JSON file, by snake_case names with units."""
        self._minutes = minutes
        self._deadline = time.monotonic() + 60 * minutes
        self._paths = [output] if output else []
        if path := self.out(f"{name}.md"):
            self._paths.append(path)

    @staticmethod
    def out(name: str) -> Path | None:
        """A file of `$OUT`, where there is that variable."""
        return Path(os.environ["OUT"]) / name if "OUT" in os.environ else None

    def attempt(self, what: str, function: Callable[[], T]) -> T | None:
        """Runs a part if there is time left; if it fails, says so, and the others go on."""
        try:
            self.require_time()
            return function()
        except Exception as error:  # whatever a driver, a compiler or a peer may raise
            reason = (str(error).strip().splitlines() or [""])[0]
            self.note(f"{what} left out: {type(error).__name__}: {reason}")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # not in the handler, where the traceback still holds tensors
        return None

    def require_time(self) -> None:
        """Raises TimeoutError once the minutes are over."""
        if time.monotonic() > self._deadline:
            raise TimeoutError(f"begun too late for --minutes {self._minutes:g}")

    def note(self, text: str) -> None:
        """Says something, now and in the results."""
        console.print(f"- {text}", highlight=False, markup=False)
        self.report.notes.append(text)

    def add(self, table: Table) -> None:
        """Shows a table, and keeps it."""
        table.show()
        self.report.tables.append(table)

    def save(self) -> None:
        """Writes what there is so far."""
        for path in self._paths:
            self.report.write(path)
            path.with_suffix(".json").write_text(json.dumps({**self.figures, "notes": self.report.notes}, indent=2))

    def say_where(self) -> None:
        """Names the files on standard output."""
        for path in self._paths:
            console.print(f"written: {path} and {path.with_suffix('.json').name}", highlight=False, markup=False)
