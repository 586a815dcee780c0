"""Comparisons turn by turn (A B A B …), so that what else the machine does meets all sides; and their results file."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table as RichTable

ENVIRONMENT = ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "THP_MEM_ALLOC_ENABLE")
"""What changes the speed of torch on a CPU: shown before the command where it is set."""

console = Console(width=None if sys.stdout.isatty() else 160)


@dataclass(frozen=True)
class Sample:
    """One run of one side."""

    seconds: float
    """Wall-clock."""
    cpu_seconds: float
    """Of all threads of this process."""


@dataclass(frozen=True)
class Ratio:
    """How much longer one side takes than another."""

    of_medians: float
    lowest: float
    """Of the turns' own ratios."""
    highest: float

    def __str__(self) -> str:
        return f"{self.of_medians:.2f} ({self.lowest:.2f} to {self.highest:.2f})"


@dataclass(frozen=True)
class Table:
    """Rows for the console and for the results file; the first column is text, the others are figures."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def show(self) -> None:
        """Prints it."""
        table = RichTable(title=self.title)
        for number, column in enumerate(self.header):
            table.add_column(column, justify="right" if number else "left")
        for row in self.rows:
            table.add_row(*row)
        console.print(table)

    def to_markdown(self) -> str:
        """Its title as a heading, and a pipe table."""
        lines = [self.header, ["---", *["---:"] * (len(self.header) - 1)], *self.rows]
        return f"## {self.title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


@dataclass(frozen=True)
class Report:
    """A results file: where and how it was measured, and what came out."""

    title: str
    module: str
    arguments: Sequence[str]
    method: str
    """Warm-up, repeats, what the clock covers."""
    packages: Sequence[str]
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_markdown(self) -> str:
        """The whole file."""
        versions = ", ".join(f"{name} {_version(name)}" for name in self.packages)
        parts = [
            f"# {self.title}\n",
            f"Hardware: {hardware()}. Versions: Python {platform.python_version()}, {versions}. Commit: {_commit()}. "
            f"Date: {date.today().isoformat()}.\n",
            f"```\n{command(self.module, self.arguments)}\n```\n",
            f"{self.method}\n",
            *(table.to_markdown() for table in self.tables),
            "\n".join(f"- {note}" for note in self.notes) + "\n" if self.notes else "",
        ]
        return "\n".join(part for part in parts if part)

    def write(self, path: Path | None) -> None:
        """Writes the file, where one was asked for; again and again as results come in."""
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(self.to_markdown())


def timed(function: Callable[[], object], device: torch.device | None = None) -> Sample:
    """Runs a function once; on a GPU, seconds are between device events before and after. Its result does not count."""
    began, cpu_began = time.perf_counter(), time.process_time()
    if device is not None and device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        result = function()
        end.record()
        torch.cuda.synchronize()
        sample = Sample(start.elapsed_time(end) / 1e3, time.process_time() - cpu_began)
    else:
        result = function()
        sample = Sample(time.perf_counter() - began, time.process_time() - cpu_began)
    del result
    return sample


def interleave(sides: Mapping[str, Callable[[], Sample]], turns: int, warmups: int = 1) -> dict[str, list[Sample]]:
    """Runs all sides in order, turn after turn; the first turns, which warm them up, do not count."""
    samples: dict[str, list[Sample]] = {name: [] for name in sides}
    for turn in range(warmups + turns):
        for name, run in sides.items():
            sample = run()
            if turn >= warmups:
                samples[name].append(sample)
    return samples


def ratio(slow: Sequence[Sample], fast: Sequence[Sample], figure: str = "seconds") -> Ratio:
    """The medians' ratio, and the range of the ratios of the turns."""
    numerators, denominators = ([getattr(sample, figure) for sample in side] for side in (slow, fast))
    pairs = [one / other for one, other in zip(numerators, denominators, strict=True)]
    return Ratio(statistics.median(numerators) / statistics.median(denominators), min(pairs), max(pairs))


def median(samples: Sequence[Sample], figure: str = "seconds") -> float:
    """The median of a figure, in seconds."""
    return float(statistics.median(getattr(sample, figure) for sample in samples))


def verdict(value: float, at_least: float, aim: float | None = None) -> str:
    """In words, how a ratio stands to its bound and to what is aimed at."""
    words = f"at least {at_least:g}: {'pass' if value >= at_least else 'FAIL'}"
    return words if aim is None else f"{words}; aim {aim:g}: {'reached' if value >= aim else 'not reached'}"


# --- Where it was measured


def hardware() -> str:
    """CPU model, cores and threads of arithmetic, and the accelerator if there is one."""
    cores = len(os.sched_getaffinity(0))
    words = f"{_cpu_model()}, {os.cpu_count()} cores of which this process may use {cores}"
    words += f", {torch.get_num_threads()} threads of arithmetic"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        words += f"; {device.name}, {device.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    return words


def command(module: str, arguments: Sequence[str]) -> str:
    """The command line; of absolute paths the last part only, since where a folder lies is nobody's concern."""
    settings = [f"{name}={os.environ[name]}" for name in ENVIRONMENT if name in os.environ]
    shown = [f"…/{Path(argument).name}" if argument.startswith("/") else argument for argument in arguments]
    return " ".join([*settings, "python -m", module, *(f"'{word}'" if " " in word else word for word in shown)])


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(absent)"


def _commit() -> str:
    """Of the working tree; 'unknown' outside one."""
    try:
        found, changes = (
            subprocess.run(["git", *words], capture_output=True, text=True, check=True).stdout.strip()
            for words in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{found} with changes" if changes else found
