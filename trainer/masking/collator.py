"""From scored rows to masked-LM batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from scorer.vocabulary import Vocabulary
from trainer import noise
from trainer.batches import Batch, Feature, Floats, Ids
from trainer.masking.corruption import MaskingVocabulary, corrupted
from trainer.masking.schedule import AlphaSchedule
from trainer.masking.selection import Positions
from trainer.masking.strategies import Masking, ScoredBlocks

IGNORED_LABEL = -100
"""What cross-entropy leaves out."""


def draw(  # noqa: PLR0917 - DESIGN fixes the order
    forward: Floats, backward: Floats, input_ids: Ids, alpha: float, seed: int, epoch: int
) -> Positions:
    """Draws M distinct positions of each row from Eq. (4), without replacement.

    The noise depends on (seed, epoch, the row's ids) and on nothing else: it is common to all alphas and all ALMs.

    Args:
        forward: [B, T], exp(nats); 0 where a token is not eligible.
        backward: [B, T], likewise.
        input_ids: [B, T], the row's own token ids.
        alpha: from 0 (all hardness) to inf (uniform).
        seed: of the run.
        epoch: from 0.

    Returns:
        int64 [B, M], each row's positions ascending; where fewer are eligible, filled up with -1 at the end.

    Raises:
        ConfigurationError: alpha is negative or NaN.

    Source: paper Eq. (4).
    """
    return Masking().select(ScoredBlocks(input_ids, forward, backward, row_keys(input_ids, seed, epoch)), alpha)


def corrupt(
    input_ids: Ids, positions: Positions, vocabulary: MaskingVocabulary, seed: int, epoch: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Corrupts the drawn positions (see `corruption.corrupted`), and labels them.

    Returns:
        int64 [B, T], as the model sees the rows, and int64 [B, T] labels: the true id at the drawn positions, -100
        elsewhere.
    """
    seen = corrupted(input_ids, positions, vocabulary, row_keys(input_ids, seed, epoch))
    return seen, spread(labels_at(input_ids, positions), positions, input_ids.shape[1])


def row_keys(input_ids: Ids, seed: int, epochs: int | npt.NDArray[np.int64]) -> noise.UInt64:
    """The keys of the rows' noise: uint64 [B]."""
    if not isinstance(epochs, int | np.integer):
        if (epochs != epochs[0]).any():
            return noise.key(int(seed), epochs.astype(np.uint64), noise.digest(input_ids))
        epochs = epochs[0]
    return noise.key(int(seed), int(epochs), noise.digest(input_ids))


def labels_at(input_ids: Ids, positions: Positions) -> npt.NDArray[np.int64]:
    """The true ids at int64 positions [B, M]; -100 where there is none."""
    return np.where(positions >= 0, np.take_along_axis(input_ids, positions, axis=1).astype(np.int64), IGNORED_LABEL)


def spread(labels: npt.NDArray[np.int64], positions: Positions, length: int) -> npt.NDArray[np.int64]:
    """Labels [B, M] put at their positions among -100: int64 [B, T]."""
    everywhere = np.full((len(labels), length), IGNORED_LABEL)
    rows, slots = np.nonzero(positions >= 0)
    everywhere[rows, positions[rows, slots]] = labels[rows, slots]
    return everywhere


@dataclass(frozen=True)
class MaskedBatch:
    """A batch after masking."""

    input_ids: npt.NDArray[np.int64]
    """[B, T], as the model sees the rows."""
    positions: Positions
    """[B, M], ascending; 0 in slots that are not valid."""
    is_valid: npt.NDArray[np.bool_]
    """[B, M]: false in the last slots of a row of which fewer than M are masked."""
    labels: npt.NDArray[np.int64]
    """[B, M], the true ids; -100 in slots that are not valid."""


class HardnessCollator:
    """Makes masked-LM batches out of scored rows; stands where DataCollatorForLanguageModeling would.

    Takes features with `input_ids`, `forward_perplexity` and `backward_perplexity`, each [T], and the `epoch` they
    are read in. Where the reader gives no `epoch`, `set_epoch` does, as with a DistributedSampler.

    A Hugging Face Trainer drops the perplexities before a collator sees them unless `remove_unused_columns=False`.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        alpha: float | AlphaSchedule = 0.001,
        seed: int = 0,
        masking: Masking | None = None,
        at_positions: bool = False,
    ):
        """Fixes the law and the seed.

        Args:
            vocabulary: of the shards (`ShardReader.metadata`) or of a tokenizer (`scorer.tokenizer.describe`).
            alpha: from 0 (all hardness) to inf (uniform), or a schedule for it over the features' `step`.
            seed: of the masks.
            masking: the strategy; by default the paper's.
            at_positions: whether a batch holds `masked_positions` and labels [B, M], as trainer.head wants them,
                instead of labels [B, T].

        Raises:
            ConfigurationError: alpha is negative or NaN, or there is no mask token.
        """
        self.schedule = alpha if isinstance(alpha, AlphaSchedule) else AlphaSchedule(alpha)
        self.seed = seed
        self.masking = masking or Masking()
        self._vocabulary = MaskingVocabulary.of(vocabulary)
        self._at_positions = at_positions
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch of features that do not say theirs."""
        self._epoch = epoch

    def __call__(self, features: Sequence[Feature]) -> dict[str, torch.Tensor]:
        """Masks a batch.

        Returns:
            `input_ids` and `labels`, int64 [B, T]; labels are -100 except at masked positions. With `at_positions`
            `input_ids`, `masked_positions` and `labels`, the last two int64 [B, M].

        Raises:
            ConfigurationError: a feature lacks a column.
        """
        masked = self.mask(features if isinstance(features, Batch) else Batch.of(features, self._epoch))
        if self._at_positions:
            arrays = {"masked_positions": masked.positions, "labels": masked.labels}
        else:
            positions = np.where(masked.is_valid, masked.positions, -1)
            arrays = {"labels": spread(masked.labels, positions, masked.input_ids.shape[1])}
        return {name: torch.from_numpy(values) for name, values in {"input_ids": masked.input_ids, **arrays}.items()}

    def mask(self, batch: Batch) -> MaskedBatch:
        """Chooses positions and corrupts them.

        Raises:
            ConfigurationError: the batch has no perplexities.
        """
        forward, backward = batch.perplexities()
        keys = row_keys(batch.input_ids, self.seed, batch.epochs)
        blocks = ScoredBlocks(batch.input_ids, forward, backward, keys)
        positions = self._select(blocks, batch.steps)
        seen = corrupted(batch.input_ids, positions, self._vocabulary, keys)
        is_valid = positions >= 0
        return MaskedBatch(seen, np.where(is_valid, positions, 0), is_valid, labels_at(batch.input_ids, positions))

    def _select(self, blocks: ScoredBlocks, steps: npt.NDArray[np.int64]) -> Positions:
        if (steps == steps[0]).all():  # every batch of a run; others only where a plain DataLoader mixes steps
            return self.masking.select(blocks, self.schedule.at(int(steps[0])))
        positions = np.empty((len(steps), blocks.budget), dtype=np.int64)
        for step in np.unique(steps):
            positions[steps == step] = self.masking.select(blocks.rows(steps == step), self.schedule.at(int(step)))
        return positions
