"""The ALM behind Beam's RunInference: one element is a tokenized split, scored in micro-batches."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import apache_beam as beam
import numpy as np
import numpy.typing as npt
import torch
from apache_beam.ml.inference.base import ModelHandler, RunInference

from pipeline.publication import ScoredSplit
from pipeline.tokenization import TokenizedSplit
from scorer import files
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

    def __init__(self, settings: ScoringSettings, vocabulary: Vocabulary, folder: str):
        """Takes how to score, what is special, and the folder whose watchers want to know that it goes on."""
        super().__init__()
        self._settings = settings
        self._vocabulary = vocabulary
        self._folder = folder

    def load_model(self) -> BidirectionalALM:
        """Loads the ALM; raises where the device is missing, instead of falling back to the CPU."""
        return load_alm(self._settings.alm, self._settings.device, self._settings.dtype)

    def run_inference(
        self, batch: Sequence[TokenizedSplit], model: BidirectionalALM, inference_args: dict[str, Any] | None = None
    ) -> Iterator[ScoredSplit]:
        """Scores splits one by one; Beam's own batching is off, so `batch` holds one."""
        for tokenized in batch:
            heartbeat = Heartbeat(self._folder, tokenized)
            try:
                with _SCORING:
                    scored = score_split(model, tokenized, self._vocabulary, self._settings.micro_batch, heartbeat.beat)
            finally:
                heartbeat.stop()
            yield scored


class Heartbeat:
    """Says every few seconds that a split is being scored: in the log, and by a temporary file in the folder.

    A shard may take longer than the time after which a silent job counts as stalled.
    """

    def __init__(self, folder: str, tokenized: TokenizedSplit):
        """Starts the clock; nothing is written before it has run a while."""
        self._tokenized = tokenized
        self._path = files.join(folder, files.temporary_name(f"{tokenized.split.shard}.scoring"))
        self._began = self._reported = time.monotonic()

    def beat(self, done: int) -> None:
        """Tells how many blocks are scored, if the last report is long enough ago."""
        now = time.monotonic()
        if now - self._reported <= _REPORT_SECONDS:
            return
        self._reported, seconds = now, now - self._began
        files.replace(self._path, b"")
        total, length = self._tokenized.input_ids.shape
        logger.info(
            "%s: %d of %d blocks scored, %.0f tokens/s, %.0f s left",
            self._tokenized.split.shard,
            done,
            total,
            done * length / seconds,
            (total - done) * seconds / done,
        )

    def stop(self) -> None:
        """Removes the file."""
        files.remove(self._path)


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
    alm: BidirectionalALM,
    tokenized: TokenizedSplit,
    vocabulary: Vocabulary,
    micro_batch: int,
    report: Callable[[int], None] = lambda done: None,
) -> ScoredSplit:
    """Perplexities of all blocks of a split; 0 at every special token, whichever direction.

    Args:
        alm: both directions.
        tokenized: the blocks.
        vocabulary: says which ids are special.
        micro_batch: blocks a forward pass.
        report: told after each forward pass how many blocks are scored.

    Source: paper Eq. (1) and (2).
    """
    ids = tokenized.input_ids
    perplexities: list[npt.NDArray[np.float32]] = [np.empty(ids.shape, dtype=np.float32) for _ in range(2)]
    is_special = vocabulary.special_mask()[ids]
    clamped = 0
    for start in range(0, len(ids), micro_batch):
        rows = slice(start, start + micro_batch)
        nlls = score_nll(alm, torch.from_numpy(ids[rows].astype(np.int64)))
        for scores, nll in zip(perplexities, nlls, strict=True):
            clamped += int(np.count_nonzero((nll.cpu().numpy() > MAX_NLL) & ~is_special[rows]))
            scores[rows] = to_perplexity(nll).cpu().numpy()
        report(min(len(ids), start + micro_batch))
    for scores in perplexities:
        scores[is_special] = 0.0
    return ScoredSplit(tokenized, perplexities[0], perplexities[1], clamped)
