"""Where a job of a cluster runs, written into its folder: to look at, to end, and to end what an earlier run left."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass

from pipeline.engines.flink_rest import Flink, NoAnswerError
from scorer import files
from scorer.errors import HardnessError, StorageError

logger = logging.getLogger(__name__)

ENGINE_NAME = "_engine.json"
"""In a folder of shards while a cluster works on it: which one, and under which name."""


@dataclass(frozen=True)
class Placement:
    """Where a job runs."""

    runner: str
    job: str
    """What the engine calls it."""
    page: str | None
    """The engine's own, with or without scheme; None where it has none that is known."""


@dataclass(frozen=True)
class EngineState:
    """What an engine says of a job, as `pipeline.status` shows it."""

    runner: str
    state: str | None
    """RUNNING, RESTARTING, …; None where the engine has no word for it, or does not answer."""
    page: str | None


@contextmanager
def watched(folder: str, placement: Placement | None) -> Iterator[None]:
    """Says in a folder where its job runs, and ends the job there if the body is left before it has ended.

    What an earlier driver left running is ended first: it would hold the slots, and do the same work.
    """
    path = files.join(folder, ENGINE_NAME)
    earlier = _read(folder)
    is_over = earlier is None or _end(earlier)
    if placement is not None:
        files.replace(path, files.to_json(asdict(placement)))
    try:
        yield
        is_over = True
    except BaseException:
        is_over = is_over if placement is None else _end(placement)
        raise
    finally:
        if is_over:  # else the next driver ends it
            with suppress(StorageError):
                files.remove(path)


def read_state(folder: str) -> EngineState | None:
    """What the engine of a folder says of its job; None where no job of a cluster is at work on it."""
    placement = _read(folder)
    if placement is None:
        return None
    state, page = None, placement.page
    if placement.runner == "FlinkRunner" and placement.page:
        flink = Flink(placement.page)
        with suppress(NoAnswerError):
            job = flink.find(placement.job)
            state, page = (job.state, flink.page(job)) if job else (None, page)
    return EngineState(placement.runner, state, page)


def is_current(folder: str, job: str) -> bool:
    """Whether a job of that name is still the one at work on a folder, as far as the folder can be read."""
    try:
        placement = _read(folder)
    except (OSError, HardnessError):
        return True
    return placement is not None and placement.job == job


def _read(folder: str) -> Placement | None:
    try:
        return Placement(**files.read_json(files.join(folder, ENGINE_NAME)))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _end(placement: Placement) -> bool:
    """Ends a job on its engine; False where it may still be running."""
    if placement.runner != "FlinkRunner" or placement.page is None:
        return True  # Spark's jobs end with their job server, and that with its driver
    flink = Flink(placement.page)
    try:
        job = flink.find(placement.job)
        if job is None or job.has_ended:
            return True
        if not flink.cancel(job):
            logger.warning("Flink has not let go of %s yet: see %s", job.name, flink.page(job))
            return False
    except NoAnswerError as error:
        logger.warning("%s; if it comes back, the next run ends the job %s there", error, placement.job)
        return False
    logger.info("ended %s on Flink", job.name)
    return True
