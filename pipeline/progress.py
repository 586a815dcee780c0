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

from pipeline.plan import Plan, plan_path
from scorer import files
from scorer.errors import HardnessError
from scorer.manifest import (
    MANIFEST_NAME,
    RECEIPTS_FOLDER,
    Receipt,
    has_manifest,
    read_manifest,
    read_receipt,
)

logger = logging.getLogger(__name__)

STALLED_SECONDS = 600.0
_RATE_WINDOW_SHARDS = 32
_REPORT_SECONDS = 10.0

State = Literal["complete", "running", "stalled", "damaged"]


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
    """Over the last shards that were published; None where fewer than two were."""
    seconds_left: float | None
    damage: tuple[str, ...] = ()
    """What is wrong with shards that should be there."""


def measure(folder: str, plan: Plan) -> Progress:
    """Reads a folder's progress from receipts, names and sizes; no shard is opened."""
    published, damage = _published(folder, plan)
    is_complete = has_manifest(folder)
    if is_complete:
        damage += _missing_from(folder)
    receipts = [receipt for receipt, _ in published]
    tokens = sum(receipt.tokens for receipt in receipts)
    rate = _rate(published)
    state: State = "running"
    if damage:
        state = "damaged"
    elif is_complete:
        state = "complete"
    elif time.time() - _last_change(folder, [modified for _, modified in published]) > STALLED_SECONDS:
        state = "stalled"
    seconds_left = 0.0 if state == "complete" else None
    if state == "running" and rate and receipts:
        seconds_left = (len(plan.splits) - len(published)) * tokens / len(receipts) / rate
    return Progress(
        state=state,
        planned=len(plan.splits),
        done=len(published),
        documents=sum(receipt.documents for receipt in receipts),
        blocks=sum(receipt.blocks for receipt in receipts),
        tokens=tokens,
        rejected_documents=sum(receipt.rejected_documents for receipt in receipts),
        tokens_per_second=rate,
        seconds_left=seconds_left,
        damage=tuple(damage),
    )


@contextmanager
def reporting_progress(folder: str, plan: Plan) -> Iterator[None]:
    """Logs the folder's progress every few seconds while the body runs."""
    finished = threading.Event()

    def report() -> None:
        shown = -1
        while not finished.wait(_REPORT_SECONDS):
            progress = measure(folder, plan)
            if progress.done != shown:
                shown = progress.done
                logger.info("%s", describe_progress(progress))

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
    rate = f", {progress.tokens_per_second:,.0f} tokens/s" if progress.tokens_per_second else ""
    left = f", {progress.seconds_left:,.0f} s left" if progress.seconds_left else ""
    return f"{progress.done} of {progress.planned} shards, {progress.tokens:,} tokens{rate}{left}"


def _published(folder: str, plan: Plan) -> tuple[list[tuple[Receipt, float]], list[str]]:
    """Receipts of published shards with the shards' times, and what does not fit."""
    published, damage = [], []
    present = set(files.names(folder))
    for split in plan.splits:
        if split.shard not in present:
            continue
        path = files.join(folder, split.shard)
        receipt = read_receipt(folder, split.index)
        try:
            size, modified = files.size(path), files.modified(path)
        except FileNotFoundError:
            continue  # renamed aside since the folder was listed
        if receipt is None:
            damage.append(f"{split.shard} has no receipt that can be read")
        elif size != receipt.bytes:
            damage.append(f"{split.shard} has {size} bytes, its receipt says {receipt.bytes}")
        else:
            published.append((receipt, modified))
    return published, damage


def _missing_from(folder: str) -> list[str]:
    present = set(files.names(folder))
    try:
        manifest = read_manifest(folder)
    except HardnessError as error:
        return [str(error)]
    return [
        f"{shard.name} is in {MANIFEST_NAME} but not in the folder"
        for shard in manifest.shards
        if shard.name not in present
    ]


def _rate(published: list[tuple[Receipt, float]]) -> float | None:
    """Tokens a second between the first and the last of the latest shards; pauses between two runs do not count."""
    latest = sorted(published, key=lambda item: item[1])[-_RATE_WINDOW_SHARDS:]
    tokens, seconds = 0, 0.0
    for (_, before), (receipt, after) in pairwise(latest):
        if after - before < STALLED_SECONDS:
            tokens += receipt.tokens
            seconds += after - before
    return tokens / seconds if seconds > 0 else None


def _last_change(folder: str, times: list[float]) -> float:
    """When anything of the job was last written; files may vanish while they are looked at."""
    latest = max(times, default=0.0)
    unfinished = [files.join(folder, name) for name in files.names(folder) if files.is_temporary(name)]
    for path in (plan_path(folder), files.join(folder, RECEIPTS_FOLDER), *unfinished):
        with suppress(FileNotFoundError):
            latest = max(latest, files.modified(path))
    return latest
