"""The ALM behind Beam's RunInference: one element is a tokenized split, scored in micro-batches."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import apache_beam as beam
import numpy as np
import numpy.typing as npt
import torch
from apache_beam.ml.inference.base import ModelHandler, RunInference

from pipeline.publication import ScoredSplit
from pipeline.tokenization import TokenizedSplit
from scorer.alm import BidirectionalALM, load_alm
from scorer.scoring import MAX_NLL, score_nll, to_perplexity
from scorer.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

_REPORT_SECONDS = 15.0
_SCORING = threading.Lock()
"""One call at a time on one model, however many threads a worker process has."""


@dataclass(frozen=True)
class ScoringSettings:
    """How to load and run the ALM."""

    alm: str
    """Its folder."""
    device: str
    dtype: str
    micro_batch: int
    """Blocks a forward pass."""


class AlmHandler(ModelHandler[TokenizedSplit, ScoredSplit, BidirectionalALM]):
    """Loads both directions once a process, on the device that was asked for and no other."""

    def __init__(self, settings: ScoringSettings, vocabulary: Vocabulary):
        super().__init__()
        self._settings = settings
        self._vocabulary = vocabulary

    def load_model(self) -> BidirectionalALM:
        """Loads the ALM; raises where the device is missing, instead of falling back to the CPU."""
        return load_alm(self._settings.alm, self._settings.device, self._settings.dtype)

    def run_inference(
        self, batch: Sequence[TokenizedSplit], model: BidirectionalALM, inference_args: dict[str, Any] | None = None
    ) -> Iterator[ScoredSplit]:
        """Scores splits one by one; Beam's own batching is off, so `batch` holds one."""
        for tokenized in batch:
            with _SCORING:
                yield score_split(model, tokenized, self._vocabulary, self._settings.micro_batch)


class Score(beam.PTransform):
    """Tokenized splits to scored ones through RunInference, one split a call."""

    def __init__(self, handler: AlmHandler):
        super().__init__()
        self._handler = handler

    def expand(self, tokenized: beam.PCollection) -> beam.PCollection:
        """Applies the transform."""
        return (
            tokenized
            | "One split a batch" >> beam.Map(lambda split: [split])
            | "ALM" >> RunInference(self._handler.with_no_batching())
        )


def score_split(
    alm: BidirectionalALM, tokenized: TokenizedSplit, vocabulary: Vocabulary, micro_batch: int
) -> ScoredSplit:
    """Perplexities of all blocks of a split; 0 at every special token, whichever direction.

    Source: paper Eq. (1) and (2).
    """
    ids = tokenized.input_ids
    perplexities: list[npt.NDArray[np.float32]] = [np.empty(ids.shape, dtype=np.float32) for _ in range(2)]
    is_special = vocabulary.special_mask()[ids]
    clamped = 0
    began = reported = time.monotonic()
    for start in range(0, len(ids), micro_batch):
        rows = slice(start, start + micro_batch)
        nlls = score_nll(alm, torch.from_numpy(ids[rows].astype(np.int64)))
        for scores, nll in zip(perplexities, nlls, strict=True):
            clamped += int(np.count_nonzero((nll.cpu().numpy() > MAX_NLL) & ~is_special[rows]))
            scores[rows] = to_perplexity(nll).cpu().numpy()
        if (now := time.monotonic()) - reported > _REPORT_SECONDS:
            reported = now
            _report(tokenized, min(len(ids), start + micro_batch), now - began)
    for scores in perplexities:
        scores[is_special] = 0.0
    return ScoredSplit(tokenized, perplexities[0], perplexities[1], clamped)


def _report(tokenized: TokenizedSplit, done: int, seconds: float) -> None:
    total, length = tokenized.input_ids.shape
    logger.info(
        "%s: %d of %d blocks scored, %.0f tokens/s, %.0f s left",
        tokenized.split.shard,
        done,
        total,
        done * length / seconds,
        (total - done) * seconds / done,
    )
