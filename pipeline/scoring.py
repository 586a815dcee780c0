"""Scoring rows of blocks, and what a scorer is: the bidirectional ALM, or any object that gives NLLs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from transformers.utils.logging import disable_progress_bar

from pipeline.shard_making import FillRows, Rows
from pipeline.tokenization import Ids
from scorer.alm import load_alm
from scorer.device_queue import DeviceQueue
from scorer.devices import claim_device
from scorer.scoring import MAX_NLL, to_perplexity
from scorer.shards import ShardContent, round_mantissa
from scorer.vocabulary import Vocabulary

FLOAT8 = "float8"

Nll = npt.NDArray[np.float32]
ScoreBlocks = Callable[[Ids], tuple[Nll, Nll]]
"""Blocks [N, 512] to the NLL of each token in nats, forward and backward: float32 [N, 512], NaN where there is none.

Any number of blocks comes at a time, and from several threads.
"""


class Scorer(Protocol):
    """Recipe for scoring. It travels to every worker process, which opens it once."""

    @property
    def alm(self) -> Mapping[str, str]:
        """Fingerprints of what gives the scores; another one is refused on resume."""

    @property
    def device(self) -> str:
        """The kind of device, for the footer: 'cpu' or 'cuda'."""

    @property
    def dtype(self) -> str:
        """Of the computation, for the footer; another one is refused on resume."""

    @property
    def micro_batch(self) -> int:
        """Blocks of a forward pass, for the footer."""

    def open(self) -> ScoreBlocks:
        """Loads what scoring needs; claims the device."""


@dataclass(frozen=True)
class AlmScorer:
    """Both directions of an ALM on one device."""

    folder: str
    """Holds forward/ and backward/."""
    alm: Mapping[str, str]
    device_name: str
    """'cpu', 'cuda' (any that no other process scores on) or 'cuda:1'."""
    dtype: str
    """One of `DTYPES`, or `FLOAT8`: bfloat16, with linear layers in 8 bits."""
    micro_batch: int

    @property
    def device(self) -> str:
        """'cpu' or 'cuda'."""
        return self.device_name.partition(":")[0]

    def open(self) -> ScoreBlocks:
        """Loads the ALM on a device of its own; never falls back to another one."""
        disable_progress_bar()  # of the weights' loading: one a direction and worker
        float8 = self.dtype == FLOAT8
        alm = load_alm(self.folder, claim_device(self.device_name), "bfloat16" if float8 else self.dtype)
        return DeviceQueue(alm, self.micro_batch, float8).score


@dataclass(frozen=True)
class Scoring:
    """The step from blocks to the rows of hardness shards."""

    scorer: Scorer
    vocabulary: Vocabulary
    mantissa_bits: int
    """Of the stored perplexities."""

    def open(self) -> FillRows:
        """Opens the scorer."""
        score = self.scorer.open()
        return lambda ids: score_rows(score, ids, self.vocabulary, self.mantissa_bits)


def score_rows(score: ScoreBlocks, ids: Ids, vocabulary: Vocabulary, mantissa_bits: int) -> Rows:
    """Perplexities of blocks, rounded for storage; 0 at every special token, whichever direction.

    Args:
        score: gives NLLs.
        ids: uint16 or uint32 [N, 512].
        vocabulary: says which ids are special.
        mantissa_bits: of the stored perplexities.

    Source: paper Eq. (1) and (2).
    """
    is_special = vocabulary.special_mask()[ids]
    nlls = score(ids)
    clamped = sum(int(np.count_nonzero((nll > MAX_NLL) & ~is_special)) for nll in nlls)
    forward, backward = (_perplexities(nll, is_special, mantissa_bits) for nll in nlls)
    return Rows(ShardContent(ids, forward, backward), clamped)


def _perplexities(nll: Nll, is_special: npt.NDArray[np.bool_], mantissa_bits: int) -> Nll:
    """As they are stored."""
    perplexities = to_perplexity(torch.from_numpy(nll)).numpy()
    perplexities[is_special] = 0.0
    return round_mantissa(perplexities, mantissa_bits)
