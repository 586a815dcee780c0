"""One device for several threads: it has its next blocks before it is done with the last ones.

    threads   read, tokenize ─▶ ids ┐                            ┌─▶ NLLs: round, hash, write
    feeder                          └─▶ copy, launch, copy back ─┘   and on to the next blocks, without waiting
    device                              ▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓

Only the feeder, a thread of its own, speaks to the device. It waits for nothing: copies go through pinned memory, and
the thread that asked waits for its own results alone.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from scorer.alm import BidirectionalALM
from scorer.engine import Settings
from scorer.scoring import broken, enqueue_nll

Nll = npt.NDArray[np.float32]


class DeviceQueue:
    """Both directions of an ALM on its device."""

    def __init__(self, alm: BidirectionalALM, micro_batch: int, float8: bool = False):
        """Starts the feeder.

        Args:
            alm: on its device.
            micro_batch: blocks of a forward pass on a GPU. A CPU takes as many as its caches hold.
            float8: whether linear layers multiply in 8 bits.
        """
        self._alm = alm
        self._is_cuda = alm.device.type == "cuda"
        settings = Settings.default(alm.device, next(alm.parameters()).dtype)
        self._settings = replace(settings, float8=float8, micro_batch=micro_batch if self._is_cuda else 0)
        self._feeder = ThreadPoolExecutor(1, "feeder")

    def score(self, ids: npt.NDArray[np.integer]) -> tuple[Nll, Nll]:
        """NLLs in nats, forward and backward; several threads may ask at a time.

        Args:
            ids: [N, T], any number of blocks.

        Returns:
            Float32 [N, T] twice; NaN where a direction has no context.

        Raises:
            ScoringError: the ALM returned NaN or infinity.
        """
        forward, backward = self._feeder.submit(self._enqueue, ids).result().wait()
        if not (np.isfinite(forward[:, 1:]).all() and np.isfinite(backward[:, :-1]).all()):
            raise broken(self._alm)
        return forward, backward

    def _enqueue(self, ids: npt.NDArray[np.integer]) -> _Pending:
        blocks = torch.from_numpy(ids.astype(np.int32))
        if not self._is_cuda:
            return _Pending(enqueue_nll(self._alm, blocks, self._settings), None)
        nlls = enqueue_nll(self._alm, blocks.pin_memory().to(self._alm.device, non_blocking=True), self._settings)
        hosts = [torch.empty(nll.shape, pin_memory=True).copy_(nll, non_blocking=True) for nll in nlls]
        copied = torch.cuda.Event(blocking=True)
        copied.record()
        return _Pending((hosts[0], hosts[1]), copied)


@dataclass(frozen=True)
class _Pending:
    """Results on their way."""

    nlls: tuple[Tensor, Tensor]
    copied: torch.cuda.Event | None
    """None: they are there."""

    def wait(self) -> tuple[Nll, Nll]:
        """The results, once they are in this machine's memory."""
        if self.copied is not None:
            self.copied.synchronize()
        forward, backward = self.nlls
        return forward.numpy(), backward.numpy()
