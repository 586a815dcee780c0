"""Hardness masking: Eq. (3), Eq. (4), and the corruption of what they select.

Everything is a function of a batch of rows; randomness is an argument (see trainer.noise). Drawing M distinct
positions one after the other, each in proportion to its weight among those left, is the same as giving every
position the score log(weight) + Gumbel noise and taking the M best (Efraimidis and Spirakis 2006,
doi:10.1016/j.ipl.2005.11.003): that is what `draw` does, for a whole batch at once and on the log scale, where a
perplexity of 1e30 beside a perplexity of 1 is nothing special.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from scorer.errors import ConfigurationError
from scorer.vocabulary import Vocabulary
from trainer import noise
from trainer.noise import Stream

MASK_RATE = 0.15
MASK_SHARE, RANDOM_SHARE = 0.8, 0.1
"""Of the drawn positions; the rest stays as it is."""
IGNORED_LABEL = -100

Floats = npt.NDArray[np.floating[Any]]
Ids = npt.NDArray[np.integer[Any]]


def check_alpha(alpha: float) -> float:
    """Returns `alpha` if Eq. (4) is defined for it.

    Raises:
        ConfigurationError: it is negative or NaN.
    """
    if math.isnan(alpha) or alpha < 0:
        raise ConfigurationError(
            f"alpha = {alpha}: expected a number from 0 (all hardness) to inf (uniform); the paper uses 0, 0.001, 0.005"
        )
    return alpha


def budget(block_length: int) -> int:
    """M, the number of positions masked in a block: 15 % of its length, rounded; 77 of 512."""
    return round(MASK_RATE * block_length)


def hardness(forward: Floats, backward: Floats) -> npt.NDArray[np.float64]:
    """P(X): the mean of the two perplexities, over its L1 norm.

    Args:
        forward: [B, T], exp(nats); 0 where a token is not eligible (special tokens).
        backward: [B, T], likewise.

    Returns:
        float64 [B, T]; each row sums to 1, or to 0 where no token is eligible.

    Source: paper Eq. (3).
    """
    mean = (forward.astype(np.float64) + backward.astype(np.float64)) / 2
    return _normalized(mean)


def probabilities(forward: Floats, backward: Floats, alpha: float) -> npt.NDArray[np.float64]:
    """The law from which masked positions are drawn: (P(X) + alpha) / ||P(X) + alpha||_1 over the eligible positions.

    Args:
        forward: [B, T], exp(nats); 0 where a token is not eligible. Such a token gets no share of alpha either.
        backward: [B, T], likewise.
        alpha: from 0 (all hardness) to inf (uniform).

    Returns:
        float64 [B, T]; each row sums to 1, or to 0 where no token is eligible.

    Raises:
        ConfigurationError: alpha is negative or NaN.

    Source: paper Eq. (4).

    >>> one, four = np.array([[0, 1, 3, 4, 0.0]]), np.array([[0, 1, 1, 6, 0.0]])
    >>> probabilities(one, four, 0.0)
    array([[0.   , 0.125, 0.25 , 0.625, 0.   ]])
    """
    return _normalized(_weights(forward, backward, alpha))


def draw(  # noqa: PLR0917 - DESIGN fixes the order
    forward: Floats, backward: Floats, input_ids: Ids, alpha: float, seed: int, epoch: int
) -> npt.NDArray[np.int64]:
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
    weights = _weights(forward, backward, alpha)
    uniform = noise.uniform(_row_keys(input_ids, seed, epoch), Stream.SELECTION, weights.shape[1])
    with np.errstate(divide="ignore"):
        scores = np.log(weights) - np.log(-np.log(uniform))
    rows, length = scores.shape
    count = budget(length)
    best = np.argpartition(-scores, count - 1, axis=1)[:, :count] if count else np.empty((rows, 0), dtype=np.int64)
    is_drawn = np.take_along_axis(scores, best, axis=1) > -np.inf
    ascending = np.sort(np.where(is_drawn, best, length), axis=1)
    return np.where(ascending < length, ascending, -1).astype(np.int64)


def corrupt(
    input_ids: Ids, positions: npt.NDArray[np.int64], vocabulary: MaskingVocabulary, seed: int, epoch: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Replaces the drawn positions: 80 % by the mask token, 10 % by a random ordinary token, 10 % stay.

    Which of the three a position gets depends on where it is, not on when it was drawn: with weighted draws the first
    drawn are the hardest.

    Args:
        input_ids: [B, T].
        positions: int64 [B, M]; -1 is no position.
        vocabulary: the mask token's id, and the ids of ordinary tokens.
        seed: of the run.
        epoch: from 0.

    Returns:
        int64 [B, T], as the model sees the rows, and int64 [B, T] labels: the true id at the drawn positions, -100
        elsewhere.
    """
    keys = _row_keys(input_ids, seed, epoch)
    rows, slots = np.nonzero(positions >= 0)
    columns = positions[rows, slots]
    length = input_ids.shape[1]
    action = noise.uniform(keys, Stream.CORRUPTION, length)[rows, columns]
    drawn = noise.integers(keys, Stream.REPLACEMENT, length, len(vocabulary.ordinary_ids))[rows, columns]
    corrupted = input_ids.astype(np.int64)
    labels = np.full_like(corrupted, IGNORED_LABEL)
    true_ids = corrupted[rows, columns]
    labels[rows, columns] = true_ids
    corrupted[rows, columns] = np.select(
        [action < MASK_SHARE, action < MASK_SHARE + RANDOM_SHARE],
        [np.full_like(true_ids, vocabulary.mask_id), vocabulary.ordinary_ids[drawn]],
        default=true_ids,
    )
    return corrupted, labels


@dataclass(frozen=True)
class MaskingVocabulary:
    """What corruption needs to know of a tokenizer; made once, used for every batch."""

    mask_id: int
    ordinary_ids: npt.NDArray[np.int64]
    """Every id that is not special, ascending."""

    @classmethod
    def of(cls, vocabulary: Vocabulary) -> MaskingVocabulary:
        """Takes it from what a shard or a tokenizer says.

        Raises:
            ConfigurationError: the tokenizer has no mask token.
        """
        if vocabulary.mask_id is None:
            raise ConfigurationError(
                "the tokenizer has no mask token, which masked-LM training needs: add one "
                "(tokenizer.add_special_tokens({'mask_token': '<mask>'})) before the corpus is tokenized"
            )
        return cls(vocabulary.mask_id, vocabulary.ordinary_ids())


class HardnessCollator:
    """Makes masked-LM batches out of scored rows; stands where DataCollatorForLanguageModeling would.

    Takes features with `input_ids`, `forward_perplexity` and `backward_perplexity`, each [T], and the `epoch` they
    are read in. Where the reader gives no `epoch`, `set_epoch` does, as with a DistributedSampler.

    A Hugging Face Trainer drops the perplexities before a collator sees them unless `remove_unused_columns=False`.
    """

    _COLUMNS = ("input_ids", "forward_perplexity", "backward_perplexity")

    def __init__(self, vocabulary: Vocabulary, alpha: float, seed: int = 0):
        """Fixes the law and the seed.

        Args:
            vocabulary: of the shards (`ShardReader.metadata`) or of a tokenizer (`scorer.tokenizer.describe`).
            alpha: from 0 (all hardness) to inf (uniform).
            seed: of the masks.

        Raises:
            ConfigurationError: alpha is negative or NaN, or there is no mask token.
        """
        self.alpha = check_alpha(alpha)
        self.seed = seed
        self._vocabulary = MaskingVocabulary.of(vocabulary)
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch of features that do not say theirs."""
        self._epoch = epoch

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Masks a batch.

        Returns:
            `input_ids` and `labels`, int64 [B, T]; labels are -100 except at masked positions.

        Raises:
            ConfigurationError: a feature lacks a column.
        """
        if missing := [name for name in self._COLUMNS if any(name not in feature for feature in features)]:
            raise ConfigurationError(
                f"the batch has no {', '.join(missing)}: pass remove_unused_columns=False to the Trainer, "
                "and read hardness shards, not block shards"
            )
        input_ids, forward, backward = (stack(features, name) for name in self._COLUMNS)
        epochs = np.array([int(feature.get("epoch", self._epoch)) for feature in features])
        masked = np.empty(input_ids.shape, dtype=np.int64)
        labels = np.empty(input_ids.shape, dtype=np.int64)
        for epoch in np.unique(epochs):  # a batch holds more than one only where a plain DataLoader crosses epochs
            rows = epochs == epoch
            masked[rows], labels[rows] = self.mask(input_ids[rows], forward[rows], backward[rows], int(epoch))
        return {"input_ids": torch.from_numpy(masked), "labels": torch.from_numpy(labels)}

    def mask(
        self, input_ids: Ids, forward: Floats, backward: Floats, epoch: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Draws and corrupts: rows [B, T] -> (input_ids, labels), int64 [B, T]."""
        positions = draw(forward, backward, input_ids, self.alpha, self.seed, epoch)
        return corrupt(input_ids, positions, self._vocabulary, self.seed, epoch)


def stack(features: Sequence[Mapping[str, Any]], name: str) -> npt.NDArray[Any]:
    """One column of a list of rows: [B, T]."""
    return np.stack([np.asarray(feature[name]) for feature in features])


def _row_keys(input_ids: Ids, seed: int, epoch: int) -> noise.UInt64:
    return noise.key(seed, epoch, noise.digest(input_ids))


def _weights(forward: Floats, backward: Floats, alpha: float) -> npt.NDArray[np.float64]:
    """Eq. (4) before it is normalized: P + alpha where P > 0, else 0; ones for alpha = inf. float64 [B, T]."""
    law = hardness(forward, backward)
    return np.where(law > 0, 1.0 if math.isinf(check_alpha(alpha)) else law + alpha, 0.0)


def _normalized(weights: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Rows over their L1 norm; rows of zeros stay. Scaled by the largest first, so that no sum overflows."""
    largest = weights.max(axis=1, keepdims=True)
    scaled = np.zeros_like(weights)
    np.divide(weights, largest, out=scaled, where=largest > 0)
    norm = scaled.sum(axis=1, keepdims=True)
    np.divide(scaled, norm, out=scaled, where=norm > 0)
    return scaled
