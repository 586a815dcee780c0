"""Processes of their own, watched from outside: wall-clock, CPU time and memory of a command and its workers."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

_GONE = (psutil.NoSuchProcess, psutil.AccessDenied)


@dataclass(frozen=True)
class Finished:
    """How a command ended."""

    exit_code: int
    began: float
    """Seconds since the epoch."""
    seconds: float
    """Wall-clock."""
    cpu_seconds: float
    """User and system time of the process and of all its children."""
    output: str
    """Standard output and standard error together."""

    def require(self, *codes: int) -> Finished:
        """Ends the benchmark unless the command ended with one of these exit codes."""
        if self.exit_code not in codes:
            sys.exit(f"a command ended with exit code {self.exit_code}:\n{self.output[-4000:]}")
        return self


Look = Callable[[psutil.Process], None]
"""Called again and again with the command's process while it runs."""


def run(
    module: str,
    *arguments: object,
    log: Path,
    look: Look = lambda _: None,
    interval: float = 0.2,
    core: int | None = None,
    environment: dict[str, str] | None = None,
) -> Finished:
    """Runs `python -m module arguments…`, and looks at it.

    Args:
        module: what to run.
        arguments: its command line.
        log: a file for what it writes.
        look: called with the process.
        interval: seconds between two looks.
        core: the only core that it and its children may use; None: any.
        environment: variables beside those of this process.
    """
    began_at, began = time.time(), time.monotonic()
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *map(str, arguments)],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            preexec_fn=None if core is None else lambda: os.sched_setaffinity(0, {core}),  # noqa: PLW1509
        )
        handle = psutil.Process(process.pid)
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            with suppress(*_GONE):
                look(handle)
            time.sleep(interval)
    process.returncode = os.waitstatus_to_exitcode(status)
    cpu_seconds = usage.ru_utime + usage.ru_stime
    output = log.read_text(errors="replace")
    return Finished(process.returncode, began_at, time.monotonic() - began, cpu_seconds, output)


def cpu_seconds(process: psutil.Process) -> float:
    """User and system time so far of a process and its descendants, the living and those that it waited for."""
    total = 0.0
    for member in [process, *process.children(recursive=True)]:
        with suppress(*_GONE):
            total += sum(member.cpu_times()[:4])
    return total


class MemoryWatch:
    """The most memory that a driver and its workers held, for `run`'s `look`."""

    def __init__(self) -> None:
        self.driver = Memory()
        self.workers: dict[int, Memory] = {}
        self.together = 0
        """Most proportional bytes of all processes at one time."""

    def __call__(self, process: psutil.Process) -> None:
        """Takes a sample."""
        together = self.driver.sample(process)
        for child in process.children(recursive=True):
            with suppress(*_GONE):
                if child.pid not in self.workers:
                    self.workers[child.pid] = Memory(child.create_time())
                together += self.workers[child.pid].sample(child)
        self.together = max(self.together, together)


@dataclass
class Memory:
    """The most memory that one process held, in bytes."""

    began: float = 0.0
    """When the process began, in seconds since the epoch; of the driver it is not asked."""
    resident: int = 0
    """RSS: pages that are shared with other processes count in full."""
    proportional: int = 0
    """PSS: pages that are shared with other processes are divided by their number."""

    def sample(self, process: psutil.Process) -> int:
        """Looks once; returns the proportional bytes."""
        memory = process.memory_full_info()
        self.resident = max(self.resident, memory.rss)
        self.proportional = max(self.proportional, memory.pss)
        return int(memory.pss)
