"""What becomes of a job on its engine while a driver waits for it: errors of ours end it, and all others are named.

An engine takes whatever fails for a lost machine and begins again. An error of ours stands for what no other attempt
would mend, a full disk for instance, and the supervisor has made its attempts already; so the driver ends the job.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import grpc

from pipeline.engines.flink_rest import Flink, FlinkJob, NoAnswerError
from pipeline.engines.placement import Placement
from scorer import errors
from scorer.errors import HardnessError, WorkerError

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 2.0
_AGAIN = "run the same command again"


class Watch:
    """A look at one job on Flink; on other engines it sees nothing."""

    def __init__(self, placement: Placement | None):
        """Looks at nothing yet."""
        self._placement = placement
        self._is_over = threading.Event()
        self._error: HardnessError | None = None
        self._failures = 0

    @contextmanager
    def looking(self) -> Iterator[Watch]:
        """Looks again and again while the body runs."""
        thread = threading.Thread(target=self._look_on, name="engine", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._is_over.set()
            thread.join()

    def explain(self, error: Exception) -> HardnessError | None:
        """What a runner's error stands for, where that can be told to a user; None where it is a bug."""
        found = self._error or find_error(str(error))
        if found is not None or self._placement is None:
            return found
        if isinstance(error, (grpc.RpcError, grpc.FutureTimeoutError)):
            return WorkerError(f"Beam's job server has died, or cannot be reached: {self._way_on}")
        if self._placement.page is None or "Traceback (most recent call last)" in str(error):
            return None
        return self._explain_by_flink(Flink(self._placement.page))

    def _explain_by_flink(self, flink: Flink) -> HardnessError:
        assert self._placement is not None
        try:
            job = flink.find(self._placement.job)
            if job is None:
                return WorkerError(f"Flink's JobManager was started anew, and has forgotten the job: {_AGAIN}")
            traces = flink.failures(job)
            told = f"the job is {job.state} on Flink: {root_cause(traces[0]) if traces else 'it was ended there'}"
            ours = next(filter(None, map(find_error, traces)), None)
            return ours or WorkerError(f"{told}; see {flink.page(job)}, then {_AGAIN}")
        except NoAnswerError:
            return WorkerError(f"Flink's JobManager at {flink.url} has died, and the job with it: {self._way_on}")

    @property
    def _way_on(self) -> str:
        is_flink = self._placement is not None and self._placement.runner == "FlinkRunner"
        return f"start it (make flink-up, where that started the cluster), then {_AGAIN}" if is_flink else _AGAIN

    def _look_on(self) -> None:
        if self._placement is None or self._placement.page is None:
            return
        flink = Flink(self._placement.page)
        while self._error is None and not self._is_over.wait(_LOOK_SECONDS):
            with suppress(NoAnswerError):
                job = flink.find(self._placement.job)
                if job is not None:
                    self._look(flink, job)

    def _look(self, flink: Flink, job: FlinkJob) -> None:
        failures = flink.failures(job)
        new, self._failures = failures[: len(failures) - self._failures], len(failures)
        for trace in reversed(new):
            found = find_error(trace)
            # Workers that do not start, or were stopped with their machine, may do better on another one.
            if found is not None and not isinstance(found, WorkerError):
                self._error = found
                flink.cancel(job)
                return
            logger.warning("Flink begins again what was in flight: %s", found or root_cause(trace))


def find_error(text: str) -> HardnessError | None:
    """Finds our own error in what an engine made of it: it reports failures as the text of a traceback."""
    found = re.findall(r"scorer\.errors\.(\w+): (.*?)(?: \[while running|\\n|\n|$)", text)
    kind = getattr(errors, found[-1][0], None) if found else None
    return kind(found[-1][1]) if kind is not None else None


def root_cause(trace: str) -> str:
    """The message at the bottom of a stack trace of Java's."""
    causes = re.findall(r"^(?:Caused by: )?(?:[\w$]+\.)*([\w$]+(?:: .*)?)$", trace, re.MULTILINE)
    return causes[-1] if causes else trace.strip().partition("\n")[0]
