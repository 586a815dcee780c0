"""A stand-in for a GPU: takes its time for each block and does nothing, and knows how long it had nothing to do."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks.trivial_scorer import Nll, trivial_nll
from pipeline.tokenization import Ids


class Device:
    """Takes its time, one call's blocks after the other's."""

    def __init__(self, seconds_per_block: float):
        self._seconds_per_block = seconds_per_block
        self._queue = threading.Lock()
        self.began = 0.0
        self.free_at = 0.0
        """Monotonic seconds."""
        self.idle = 0.0
        """Seconds since it began."""
        self.blocks = 0

    def score(self, ids: Ids) -> tuple[Nll, Nll]:
        """Returns when the blocks' turn has come and gone."""
        with self._queue:
            now = time.monotonic()
            if not self.blocks:
                self.began = self.free_at = now
            self.idle += max(0.0, now - self.free_at)
            self.free_at = end = max(now, self.free_at) + len(ids) * self._seconds_per_block
            self.blocks += len(ids)
        nll = trivial_nll(ids)
        time.sleep(max(0.0, end - time.monotonic()))
        return nll

    def idle_share(self) -> float:
        """Of the time from its first blocks to its last."""
        return self.idle / (self.free_at - self.began)


DEVICES: dict[str, Device] = {}
"""Of this process: a scorer travels as its recipe."""


@dataclass(frozen=True)
class DeviceScorer:
    """Scores on a `Device` of this process."""

    name: str
    micro_batch: int = 64
    device: str = "cpu"
    dtype: str = "float32"

    @property
    def alm(self) -> Mapping[str, str]:
        """Stands for the fingerprints of a model."""
        return {"forward": self.name, "backward": self.name}

    def open(self) -> Callable[[Ids], tuple[Nll, Nll]]:
        """The device's function."""
        return DEVICES[self.name].score
