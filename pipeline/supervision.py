"""The supervisor of one machine's workers: feeds them splits, replaces those that die, sets aside what defeats them.

Beam hands splits to machines; on each, this hands them to one worker process a GPU or core. A process of their own is
what lets a job outlive a worker: a tokenizer that crashes or a GPU that fails takes one worker down, with its splits
named, and not the job.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from fractions import Fraction
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait

from pipeline.failures import SetAside, Tolerance, record
from pipeline.messages import Beat, Done, Failed, Hopeless, Ready, Task
from pipeline.plan import Split
from pipeline.progress import IN_FLIGHT_NAME
from pipeline.publication import PublishedShard
from pipeline.shard_making import PackedRecipe
from pipeline.worker import Worker
from scorer import files
from scorer.errors import CorpusError, StorageError, WorkerError

logger = logging.getLogger(__name__)

_ATTEMPTS = 3
"""Of a split, before it is set aside."""
_MAX_SET_ASIDE_IN_A_ROW = 10
"""Splits that fail one after the other: then it is not the splits."""
_MAX_FAILED_STARTS = 3
_RETRY_SECONDS = 1.0
"""Before the second attempt, and four times as long before the third: storage has hiccups."""
_SILENT_SECONDS = 1800.0
"""From then on a worker hangs: at the speed of one CPU core, a row group takes a minute or two."""
_REPORT_SECONDS = 5.0
_STOP_SECONDS = 5.0

Outcome = PublishedShard | SetAside


@dataclass(frozen=True)
class Crew:
    """The workers of one machine."""

    processes: int
    """Worker processes; 0 for threads of this process alone, which die with it and cannot be replaced."""
    threads: int
    """Shards that each worker makes at a time: one scores while others read, tokenize and write."""
    cores: int | None
    """Threads that each worker process uses for arithmetic; None: as the libraries decide."""


@dataclass(frozen=True)
class Limits:
    """What ends a job before its end."""

    tolerance: Tolerance
    splits: int
    """All that the plan has, which a share of bad documents is extrapolated to."""
    shard_bytes: int
    """What has to be free on the disk before a shard is begun."""


@dataclass(eq=False)
class _Job:
    """A split on its way to a shard."""

    split: Split
    attempts: int = 0
    not_before: float = 0.0
    """Monotonic seconds."""
    began: float = 0.0
    """Monotonic seconds."""
    place: str = ""
    blocks: int = 0


@dataclass(eq=False)
class _Handle:
    """What the supervisor knows of one worker."""

    connection: Connection
    process: subprocess.Popen[bytes] | None
    is_ready: bool = False
    is_ending: bool = False
    """It said what went wrong, and ends itself."""
    jobs: dict[int, _Job] = field(default_factory=dict)
    heard: float = field(default_factory=time.monotonic)
    """Monotonic seconds of its last word, or of when it was given work."""

    @property
    def name(self) -> str:
        return "the worker thread" if self.process is None else f"worker {self.process.pid}"


class Supervisor:
    """Makes shards by workers; give it splits by `submit`, take what is left by `drain`."""

    def __init__(self, recipe: PackedRecipe, crew: Crew, limits: Limits):
        """Starts nothing yet: workers start when there is work for them."""
        self._recipe = recipe
        self._crew = crew
        self._limits = limits
        self._waiting: deque[_Job] = deque()
        self._handles: list[_Handle] = []
        self._outcomes: list[Outcome] = []
        self._failed_starts = self._set_aside_in_a_row = 0
        self._published = self._documents = self._rejected = 0
        self._is_closed = False
        self._reported = time.monotonic()
        self._report = files.join(recipe.folder, files.temporary_name(IN_FLIGHT_NAME))
        _supervisors.add(self)

    def submit(self, split: Split) -> list[Outcome]:
        """Takes on a split as soon as a worker can, and gives what became of others meanwhile.

        Raises:
            HardnessError: the job cannot go on; the message says why.
        """
        job = _Job(split)
        self._waiting.append(job)
        self._assign()
        while job in self._waiting:
            self._listen()
            self._assign()
        return self._take_outcomes()

    def drain(self) -> Iterator[Outcome]:
        """Waits for all that was submitted; errors as in `submit`."""
        yield from self._take_outcomes()
        while self._waiting or any(handle.jobs for handle in self._handles):
            self._listen()
            self._assign()
            yield from self._take_outcomes()
        self._write_report()

    def close(self) -> None:
        """Ends all workers, whatever they do, and for good."""
        self._is_closed = True
        handles, self._handles = self._handles, []
        for handle in handles:
            handle.connection.close()
        processes = [handle.process for handle in handles if handle.process is not None]
        for process in processes:
            process.terminate()
        deadline = time.monotonic() + _STOP_SECONDS
        for process in processes:
            _end(process, deadline - time.monotonic())
        with suppress(StorageError):  # it counts for a minute only
            files.remove(self._report)

    def _take_outcomes(self) -> list[Outcome]:
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def _assign(self) -> None:
        """Gives waiting splits to workers; one that failed before gets a worker for itself alone."""
        now = time.monotonic()
        for job in [job for job in self._waiting if job.not_before <= now]:
            handle = self._find_worker(alone=job.attempts > 0)
            if handle is None:
                continue
            self._require_space()
            self._waiting.remove(job)
            handle.jobs[job.split.index], handle.heard = job, now
            job.began, job.place, job.blocks = now, "", 0
            with suppress(OSError):  # it has died; `_listen` finds out, and what it was to do
                handle.connection.send(Task(job.split, careful=job.attempts > 0))

    def _find_worker(self, alone: bool) -> _Handle | None:
        capacity = 1 if alone else self._crew.threads
        open_ = [
            handle
            for handle in self._handles
            if len(handle.jobs) < capacity
            and not handle.is_ending
            and not any(job.attempts for job in handle.jobs.values())
        ]
        # An idle worker, else a new one, else the one with the least to do.
        best = min(open_, key=lambda handle: len(handle.jobs), default=None)
        if (best is None or best.jobs) and len(self._handles) < max(1, self._crew.processes):
            best = self._start()
        return best

    def _start(self) -> _Handle:
        if self._is_closed:
            raise WorkerError("the job was stopped: run the same command again to go on")
        ours, theirs = Pipe()
        if self._crew.processes == 0:
            worker = Worker(theirs, is_process=False)
            threading.Thread(
                target=worker.serve, args=(self._recipe.unpack(), self._crew.threads), name="worker", daemon=True
            ).start()
            handle = _Handle(ours, None)
        else:
            handle = _Handle(ours, self._start_process(theirs))
            theirs.close()
            with suppress(OSError):  # it has died already; `_listen` finds out
                ours.send_bytes(self._recipe.packed)
        self._handles.append(handle)
        return handle

    def _start_process(self, connection: Connection) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        if self._crew.cores is not None:
            environment |= dict.fromkeys(("OMP_NUM_THREADS", "RAYON_NUM_THREADS"), str(self._crew.cores))
            environment["TOKENIZERS_PARALLELISM"] = "true" if self._crew.cores > 1 else "false"
        descriptor = connection.fileno()
        flags = ["--connection", str(descriptor), "--threads", str(self._crew.threads)]
        return subprocess.Popen(
            [sys.executable, "-m", "pipeline.worker", *flags], pass_fds=[descriptor], env=environment
        )

    def _listen(self) -> None:
        """Hears what workers have to say, for a while."""
        by_connection = {handle.connection: handle for handle in self._handles}
        for connection in wait(list(by_connection), timeout=_RETRY_SECONDS):
            assert isinstance(connection, Connection)
            handle = by_connection[connection]
            handle.heard = time.monotonic()
            try:
                report = connection.recv()
            except (EOFError, OSError):
                self._bury(handle)
            else:
                self._hear(handle, report)
        for handle in self._handles:
            if handle.process is not None and handle.jobs and time.monotonic() - handle.heard > _SILENT_SECONDS:
                logger.warning("%s has said nothing for %.0f s: it is killed", handle.name, _SILENT_SECONDS)
                handle.process.kill()
        if time.monotonic() - self._reported > _REPORT_SECONDS:
            self._write_report()

    def _hear(self, handle: _Handle, report: object) -> None:
        match report:
            case Ready():
                handle.is_ready, self._failed_starts = True, 0
            case Beat(index, place, blocks):
                handle.jobs[index].place, handle.jobs[index].blocks = place, blocks
            case Done(shard):
                del handle.jobs[shard.index]
                self._set_aside_in_a_row = 0
                self._outcomes.append(shard)
                self._tally(shard)
            case Failed(index, message, place, is_final, is_last):
                handle.is_ending = is_last
                job = handle.jobs.pop(index)
                if is_final:
                    self._set_aside(job, message, place)
                else:
                    self._retry(job, message, place)
            case Hopeless(error):
                raise error
            case _:
                raise TypeError(f"a worker said {report!r}")

    def _tally(self, shard: PublishedShard) -> None:
        """Holds the bad documents of this run to the limit; the manifest is held to that of all runs."""
        self._published += 1
        self._rejected += shard.rejected_documents
        self._documents += shard.documents + shard.rejected_documents
        expected = Fraction(self._documents * self._limits.splits, self._published)
        self._limits.tolerance.check(self._rejected, expected)

    def _require_space(self) -> None:
        place = files.staging_folder(self._recipe.folder)
        free = files.free_bytes(place)
        if free is not None and free < self._limits.shard_bytes:
            raise StorageError(
                f"{place} has {free / 1e6:,.0f} MB free, and a shard may take "
                f"{self._limits.shard_bytes / 1e6:,.0f} MB: make room, then run the same command again"
            )

    def _bury(self, handle: _Handle) -> None:
        """Takes note of a worker's death, and of what it leaves undone."""
        self._handles.remove(handle)
        handle.connection.close()
        how = "" if handle.process is None else _how_it_ended(handle.process)
        if not handle.is_ready:
            self._failed_starts += 1
            if self._failed_starts == _MAX_FAILED_STARTS:
                raise WorkerError(f"worker processes end while they start ({how}): see what they wrote above")
        for job in handle.jobs.values():
            if handle.is_ready and not handle.is_ending:
                self._retry(job, f"{handle.name} died ({how})", job.place)
            else:
                self._waiting.append(job)

    def _retry(self, job: _Job, message: str, place: str) -> None:
        job.attempts += 1
        at = f" at {place}" if place else ""
        if job.attempts < _ATTEMPTS:
            job.not_before = time.monotonic() + _RETRY_SECONDS * 4 ** (job.attempts - 1)
            self._waiting.append(job)
            logger.warning("%s%s: %s; it is tried again", job.split.shard, at, message)
        else:
            self._set_aside(job, message, place)

    def _set_aside(self, job: _Job, message: str, place: str) -> None:
        failure = SetAside(job.split.index, job.split.shard, place, message)
        record(self._recipe.folder, failure)
        logger.warning("%s; it is set aside", failure.describe())
        self._outcomes.append(failure)
        self._set_aside_in_a_row += 1
        if self._set_aside_in_a_row == _MAX_SET_ASIDE_IN_A_ROW:
            raise CorpusError(
                f"{_MAX_SET_ASIDE_IN_A_ROW} splits in a row failed, so the job was stopped; the last was "
                f"{failure.describe()}. Mend the cause, then run the same command again"
            )

    def _write_report(self) -> None:
        """Leaves word in the folder of what is in flight, for whoever watches."""
        self._reported = now = time.monotonic()
        in_flight = [
            {
                "shard": job.split.shard,
                "seconds": round(now - job.began, 1),
                "blocks": job.blocks,
                "attempt": job.attempts + 1,
            }
            for handle in self._handles
            for job in handle.jobs.values()
        ]
        report = {"host": socket.gethostname(), "pid": os.getpid(), "in_flight": in_flight}
        files.replace(self._report, files.to_json(report))


_supervisors: weakref.WeakSet[Supervisor] = weakref.WeakSet()


def close_all() -> None:
    """Ends the workers of this process's supervisors, as after Ctrl-C."""
    for supervisor in list(_supervisors):
        supervisor.close()


def _end(process: subprocess.Popen[bytes], seconds: float) -> None:
    try:
        process.wait(max(0.0, seconds))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _how_it_ended(process: subprocess.Popen[bytes]) -> str:
    try:
        code = process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        _end(process, 0.0)
        return "it hung up, and was ended"
    return f"signal {-code}" if code < 0 else f"exit code {code}"
