"""Flink's REST interface, as far as a job needs it: slots, the job's state, its failure, its end."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

from scorer.errors import HardnessError

_ANSWER_SECONDS = 5.0
_END_SECONDS = 60.0
ENDED = ("FINISHED", "FAILED", "CANCELED")


class NoAnswerError(HardnessError):
    """Flink's JobManager does not answer, or not as one does."""


@dataclass(frozen=True)
class FlinkJob:
    """A job that the JobManager remembers."""

    id: str
    name: str
    state: str
    """As Flink calls it: CREATED, RUNNING, RESTARTING, FINISHED, …"""

    @property
    def has_ended(self) -> bool:
        """Whether it holds no slots any more."""
        return self.state in ENDED


@dataclass(frozen=True)
class Slots:
    """What a cluster has for jobs."""

    taskmanagers: int
    total: int
    free: int


class Flink:
    """One cluster, by the address of its JobManager's REST interface. Every method may raise NoAnswerError."""

    def __init__(self, address: str):
        """Takes 'host:port', with or without a scheme; asks nothing yet."""
        self.url = (address if "://" in address else f"http://{address}").rstrip("/")

    def slots(self) -> Slots:
        """As they are now."""
        overview = self._ask("/overview")
        return Slots(overview["taskmanagers"], overview["slots-total"], overview["slots-available"])

    def find(self, name: str) -> FlinkJob | None:
        """The job of that name."""
        for job in self._ask("/jobs/overview")["jobs"]:
            if job["name"] == name:
                return FlinkJob(job["jid"], job["name"], job["state"])
        return None

    def page(self, job: FlinkJob) -> str:
        """Where people look at a job."""
        return f"{self.url}/#/job/{'completed' if job.has_ended else 'running'}/{job.id}/overview"

    def failures(self, job: FlinkJob) -> list[str]:
        """Stack traces of what failed in a job, the newest first, also of what it recovered from."""
        history = self._ask(f"/jobs/{job.id}/exceptions").get("exceptionHistory", {})
        return [entry["stacktrace"] for entry in history.get("entries", [])]

    def cancel(self, job: FlinkJob) -> bool:
        """Ends a job, and says whether it has let go of its slots."""
        self._ask(f"/jobs/{job.id}?mode=cancel", "PATCH")
        deadline = time.monotonic() + _END_SECONDS
        while time.monotonic() < deadline:
            found = self.find(job.name)
            if found is None or found.has_ended:
                return True
            time.sleep(0.2)
        return False

    def _ask(self, path: str, method: str = "GET") -> Any:
        request = urllib.request.Request(self.url + path, method=method)
        try:
            with urllib.request.urlopen(request, timeout=_ANSWER_SECONDS) as answer:
                return json.loads(answer.read() or b"{}")
        except (OSError, ValueError) as error:
            raise NoAnswerError(f"Flink's JobManager at {self.url} does not answer: {error}") from error
