"""How far a folder of shards has come, read from the folder itself: the runner is not asked.

`run()` of most runners blocks without live metrics, and a job may be watched from another machine.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from pipeline.engines.placement import EngineState, read_state
from pipeline.failures import SetAside, read_set_aside
from pipeline.lease import living_driver
from pipeline.plan import PLAN_NAME, Plan
from scorer import files
from scorer.errors import HardnessError
from scorer.manifest import MANIFEST_NAME, RECEIPTS_FOLDER, Receipt, read_manifest, read_receipts
from scorer.shards import RUN_LENGTH

logger = logging.getLogger(__name__)

STALLED_SECONDS = 600.0
IN_FLIGHT_NAME = "in-flight"
"""What supervisors call the temporary file in which they say what they are at."""
_RATE_WINDOW_SHARDS = 32
_REPORT_SECONDS = 10.0
_FRESH_SECONDS = 60.0
"""From then on a word about what is in flight is that of a process that was killed."""

State = Literal["complete", "running", "stalled", "damaged"]


@dataclass(frozen=True)
class InFlight:
    """A shard that some worker is at."""

    shard: str
    seconds: float
    """Since it was begun."""
    blocks: int
    """Ready to be written."""
    attempt: int
    """1, or more where the split failed before."""

    @property
    def tokens_per_second(self) -> float:
        """Since it was begun."""
        return self.blocks * RUN_LENGTH / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True)
class Progress:
    """What `pipeline.status` reports."""

    state: State
    planned: int
    """Shards."""
    done: int
    """Shards."""
    documents: int
    blocks: int
    tokens: int
    rejected_documents: int
    tokens_per_second: float | None
    """Over the last shards that were published, else over those in flight; None where nothing was done yet."""
    seconds_left: float | None
    driver: str | None
    """Which process is at work on the folder; None where none is, or none that is known to live."""
    engine: EngineState | None = None
    """What the cluster says that works on the folder; None where none does."""
    in_flight: tuple[InFlight, ...] = ()
    """Longest first: the first one is the slowest."""
    set_aside: tuple[SetAside, ...] = ()
    """Splits that the last run could not make."""
    damage: tuple[str, ...] = ()
    """What is wrong with shards that should be there."""


@dataclass(frozen=True)
class _Published:
    """A sound shard, less its rejects, and when it was published."""

    documents: int
    blocks: int
    tokens: int
    rejected_documents: int
    modified: float


class Watch:
    """Looks at a folder again and again; each receipt is read once."""

    def __init__(self, folder: str, plan: Plan):
        self._folder = folder
        self._plan = plan
        self._known: dict[tuple[str, files.Entry, files.Entry | None], _Published | str] = {}
        """By shard, its entry and its receipt's: what was read of it, or what is wrong."""

    def look(self) -> Progress:
        """Reads progress from receipts, names and sizes; no shard is opened."""
        present = files.listing(self._folder)
        receipts = files.listing(files.join(self._folder, RECEIPTS_FOLDER))
        found = self._examine(present, receipts)
        published = [item for item in found if isinstance(item, _Published)]
        damage = [item for item in found if isinstance(item, str)]
        is_complete = MANIFEST_NAME in present
        if is_complete:
            damage += _missing(self._folder, present)
        driver = living_driver(self._folder)
        planned = {split.shard for split in self._plan.splits} - present.keys()
        set_aside = tuple(failure for failure in read_set_aside(self._folder) if failure.shard in planned)
        state: State = "running"
        if damage or (set_aside and driver is None):
            state = "damaged"
        elif is_complete:
            state = "complete"
        elif time.time() - self._last_change(present) > STALLED_SECONDS:
            state = "stalled"
        in_flight = _in_flight(self._folder, present)
        tokens = sum(item.tokens for item in published)
        rate = _rate(published, len(in_flight)) or sum(shard.tokens_per_second for shard in in_flight) or None
        seconds_left = 0.0 if state == "complete" else None
        if state == "running" and rate and published:
            remaining = (len(self._plan.splits) - len(published)) * tokens / len(published)
            seconds_left = max(0.0, remaining - sum(shard.blocks * RUN_LENGTH for shard in in_flight)) / rate
        return Progress(
            state=state,
            planned=len(self._plan.splits),
            done=len(published),
            documents=sum(item.documents for item in published),
            blocks=sum(item.blocks for item in published),
            tokens=tokens,
            rejected_documents=sum(item.rejected_documents for item in published),
            tokens_per_second=rate,
            seconds_left=seconds_left,
            driver=driver,
            engine=read_state(self._folder),
            in_flight=in_flight,
            set_aside=set_aside,
            damage=tuple(damage),
        )

    def _examine(self, present: dict[str, files.Entry], receipts: dict[str, files.Entry]) -> list[_Published | str]:
        """What is known of each shard that is there; receipts are read where they, or their shards, are new."""
        splits = [split for split in self._plan.splits if split.shard in present]
        keys = [(split.shard, present[split.shard], receipts.get(f"{split.index:05d}.json")) for split in splits]
        new = [(key, split.index) for key, split in zip(keys, splits, strict=True) if key not in self._known]
        for (key, _), receipt in zip(new, read_receipts(self._folder, (index for _, index in new)), strict=True):
            self._known[key] = _hold(receipt, key[0], key[1])
        return [self._known[key] for key in keys]

    def _last_change(self, present: dict[str, files.Entry]) -> float:
        """When anything of the job was last written."""
        signs = {split.shard for split in self._plan.splits} | {PLAN_NAME, RECEIPTS_FOLDER}
        times = [entry.modified for name, entry in present.items() if name in signs or files.is_temporary(name)]
        return max(times, default=0.0)


def measure(folder: str, plan: Plan) -> Progress:
    """One look at a folder."""
    return Watch(folder, plan).look()


@contextmanager
def reporting_progress(folder: str, plan: Plan) -> Iterator[None]:
    """Logs the folder's progress every few seconds while the body runs."""
    finished = threading.Event()
    watch = Watch(folder, plan)

    def report() -> None:
        shown = ""
        while not finished.wait(_REPORT_SECONDS):
            with suppress(HardnessError, OSError):  # storage that is gone for a while must not end the reports
                line = describe_progress(watch.look())
                if line != shown:
                    logger.info("%s", line)
                shown = line

    logger.info("%d shards planned in %s", len(plan.splits), folder)
    thread = threading.Thread(target=report, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()


def describe_progress(progress: Progress) -> str:
    """One line for people."""
    parts = [f"{progress.done} of {progress.planned} shards", f"{progress.tokens:,} tokens"]
    if progress.in_flight:
        blocks = sum(shard.blocks for shard in progress.in_flight)
        parts.append(f"{len(progress.in_flight)} in flight ({blocks:,} blocks)")
    if progress.tokens_per_second:
        parts.append(f"{progress.tokens_per_second:,.0f} tokens/s")
    if progress.seconds_left:
        parts.append(f"{progress.seconds_left:,.0f} s left")
    if progress.set_aside:
        parts.append(f"{len(progress.set_aside)} set aside")
    return ", ".join(parts)


def _hold(receipt: Receipt | None, shard: str, entry: files.Entry) -> _Published | str:
    """Holds a shard's size to its receipt."""
    if receipt is None:
        return f"{shard} has no receipt that can be read"
    if entry.bytes != receipt.bytes:
        return f"{shard} has {entry.bytes} bytes, its receipt says {receipt.bytes}"
    return _Published(receipt.documents, receipt.blocks, receipt.tokens, receipt.rejected_documents, entry.modified)


def _missing(folder: str, present: dict[str, files.Entry]) -> list[str]:
    try:
        manifest = read_manifest(folder)
    except HardnessError as error:
        return [str(error)]
    return [
        f"{shard.name} is in {MANIFEST_NAME} but not in the folder"
        for shard in manifest.shards
        if shard.name not in present
    ]


def _in_flight(folder: str, present: dict[str, files.Entry]) -> tuple[InFlight, ...]:
    """What the supervisors of the folder last said of their work, as long as that is no older than a minute."""
    found: list[InFlight] = []
    for name, entry in present.items():
        is_word = files.is_temporary(name) and name.startswith(f".{IN_FLIGHT_NAME}.")
        if is_word and time.time() - entry.modified < _FRESH_SECONDS:
            with suppress(FileNotFoundError, ValueError, KeyError, TypeError):  # gone, or being written
                word = files.read_json(files.join(folder, name))
                found += [InFlight(**shard) for shard in word["in_flight"] if shard["shard"] not in present]
    return tuple(sorted(found, key=lambda shard: -shard.seconds))


def _rate(published: list[_Published], workers: int) -> float | None:
    """Tokens a second between the latest shards; pauses between two runs do not count.

    Workers that began together publish together, so that the time between the first shards, one a worker, says nothing.
    """
    latest = sorted(published, key=lambda item: item.modified)
    latest = latest[max(0, workers - 1) :][-max(_RATE_WINDOW_SHARDS, 2 * workers) :]
    tokens, seconds = 0, 0.0
    for before, after in pairwise(latest):
        if after.modified - before.modified < STALLED_SECONDS:
            tokens += after.tokens
            seconds += after.modified - before.modified
    return tokens / seconds if seconds > 0 else None
