"""What each alpha would mask, from scored shards alone: no model, no training.

    shards ──▶ evenly spaced blocks ──▶ masks of some epochs, for each alpha ──▶ means over blocks

The masks are drawn by `trainer.masking.draw`, as in training: same seed, same epochs, same masks. So what is counted
here is what a run would do, and all alphas share their noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from scorer.errors import ConfigurationError
from scorer.shards import BLOCK_LENGTH, ShardContent
from trainer.block_sample import choose_rows, read_batches
from trainer.masking import budget, check_alpha, draw, hardness, probabilities
from trainer.reader import ShardCorpus

EPOCHS = 6
"""Of the paper; each block is drawn once for each, with the masks of a run's epochs 0 to 5."""
DECILES = 10
TOP_TYPES = 10

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Measures:
    """What an alpha does to a block: means over the sampled blocks, or the standard errors of these means."""

    masked_tokens_per_decile: tuple[float, ...]
    """Masked tokens a block in each decile of its eligible tokens by Eq. (3), the easiest first; they sum to M."""
    overlap_with_uniform: float
    """Share of the masked positions that alpha = inf masks too, with the same noise."""
    masked_again: float
    """Share of the masked positions that were masked in the epoch before."""
    effective_candidates: float
    """exp(entropy in nats) of Eq. (4): that many tokens of equal probability would be as hard to foretell."""
    uniform_share: float
    """n alpha / (1 + n alpha) of n eligible tokens: how much of Eq. (4) is its constant part."""


@dataclass(frozen=True)
class TypeShare:
    """A token type, and how much of the masks it takes."""

    id: int
    share: float
    """Of all masked tokens."""
    uniform_share: float
    """Of all tokens that alpha = inf masks."""


@dataclass(frozen=True)
class Outcome:
    """What one alpha would mask."""

    alpha: float
    mean: Measures
    standard_error: Measures | None
    """Over blocks, so that it covers both the draws and the choice of blocks; None for a single block."""
    top_types: tuple[TypeShare, ...]
    """The most masked token types, ten at most; ties by id."""

    @property
    def top_types_share(self) -> float:
        """Share of all masked tokens that the most masked types take together."""
        return math.fsum(kind.share for kind in self.top_types)


@dataclass(frozen=True)
class Simulation:
    """What several alphas would mask in the same blocks."""

    blocks: int
    """In the sample; those without an eligible token are not counted."""
    shards: int
    """That the sample is from."""
    eligible_tokens: float
    """A block, mean."""
    masked_tokens: float
    """M, a block, mean; 77 of 512 where so many are eligible."""
    chance_overlap: float
    """M / n, mean: the overlap of any masks with uniform ones of independent noise."""
    uniform_top_types_share: float
    """Share of the tokens masked by alpha = inf that its own ten most masked types take."""
    outcomes: tuple[Outcome, ...]
    """One for each alpha, in the order asked for."""


def simulate(
    corpus: ShardCorpus,
    alphas: Sequence[float],
    blocks: int,
    seed: int,
    on_progress: Callable[[int, int], object] = lambda done, total: None,
) -> Simulation:
    """Draws the masks of a sample of blocks for each alpha, and says what they hit.

    Costs some 50 microseconds a block, alpha and epoch; holds one batch of at most 511 blocks at a time.

    Args:
        corpus: scored shards; at most 32 of them are read (trainer.block_sample).
        alphas: each from 0 (all hardness) to inf (uniform).
        blocks: how many to sample, at most; all, where there are no more.
        seed: of the masks, as the trainer's.
        on_progress: called with the blocks done and all blocks of the sample, after each batch.

    Returns:
        Means over the sampled blocks that have an eligible token.

    Raises:
        ConfigurationError: an alpha is negative or NaN, `blocks` is less than 1, or no block has an eligible token.
        ShardError: a shard is not the one in the manifest.
    """
    tallies = {check_alpha(alpha): _Tally(corpus.vocabulary.size) for alpha in [*alphas, math.inf]}
    chosen = choose_rows(corpus, blocks)
    total, done = sum(map(len, chosen.values())), 0
    eligible: list[Ints] = [np.empty(0, dtype=np.int64)]
    for content in read_batches(corpus, chosen):
        batch = _Batch.of(content, seed)
        uniform = batch.masks(math.inf)
        for alpha, tally in tallies.items():
            tally.add(batch, alpha, uniform if math.isinf(alpha) else batch.masks(alpha), uniform)
        eligible.append(batch.eligible)
        done += len(content)
        on_progress(done, total)
    n = np.concatenate(eligible)
    m = np.minimum(n, budget(BLOCK_LENGTH))
    if not len(n):
        raise ConfigurationError(
            f"{', '.join(corpus.folders)}: no eligible token in {total} sampled blocks, so there is nothing to mask: "
            "expected scored blocks of ordinary text, with perplexities of at least 1"
        )
    types = tallies[math.inf].types
    return Simulation(
        blocks=len(n),
        shards=len({group.shard for group in chosen}),
        eligible_tokens=float(n.mean()),
        masked_tokens=float(m.mean()),
        chance_overlap=float((m / n).mean()),
        uniform_top_types_share=float(np.sort(types)[-TOP_TYPES:].sum() / types.sum()),
        outcomes=tuple(tallies[alpha].outcome(alpha, types) for alpha in alphas),
    )


@dataclass(frozen=True)
class _Batch:
    """Rows that have an eligible token, and their deciles."""

    input_ids: npt.NDArray[np.integer[Any]]
    forward: npt.NDArray[np.float32]
    backward: npt.NDArray[np.float32]
    eligible: Ints
    """int64 [B]: n, the eligible tokens of each row."""
    deciles: Ints
    """int64 [B, T]: from 0 (easiest) to 9 (hardest) of the row's eligible tokens; -1 where not eligible."""
    seed: int

    @classmethod
    def of(cls, content: ShardContent, seed: int) -> _Batch:
        input_ids, forward, backward = (values for _, values in content.columns())
        law = hardness(forward, backward)
        eligible = (law > 0).sum(axis=1)
        kept = eligible > 0
        return cls(input_ids[kept], forward[kept], backward[kept], eligible[kept], _deciles(law[kept]), seed)

    def masks(self, alpha: float) -> Bools:
        """What epochs 0 to EPOCHS - 1 mask: bool [E, B, T]."""
        rows, length = self.input_ids.shape
        masks = np.zeros((EPOCHS, rows, length + 1), dtype=np.bool_)  # "no position" is -1: the column that is cut off
        for epoch in range(EPOCHS):
            positions = draw(self.forward, self.backward, self.input_ids, alpha, self.seed, epoch)
            np.put_along_axis(masks[epoch], positions, True, axis=1)
        return masks[:, :, :length]


def _deciles(law: Floats) -> Ints:
    """Ranks each row's positive entries: floor(10 rank / n), equal ones by place; -1 elsewhere. int64 [B, T]."""
    length = law.shape[1]
    eligible = (law > 0).sum(axis=1, keepdims=True)
    ranks = np.empty(law.shape, dtype=np.int64)
    order = np.argsort(law, axis=1, kind="stable")  # those that are not eligible come first
    np.put_along_axis(ranks, order, np.arange(length) - (length - eligible), axis=1)
    return np.where(law > 0, ranks * DECILES // eligible, -1)


class _Tally:
    """What one alpha has masked so far."""

    def __init__(self, vocabulary_size: int):
        self.types = np.zeros(vocabulary_size, dtype=np.int64)
        """How often each token type was masked."""
        self._blocks: list[Floats] = []
        """[B, 10 + 4] for each batch: the fields of Measures, in order."""

    def add(self, batch: _Batch, alpha: float, masks: Bools, uniform: Bools) -> None:
        """Counts what `masks`, bool [E, B, T], hit."""
        rows = len(batch.input_ids)
        cells = np.arange(rows)[:, None] * DECILES + batch.deciles
        hits = np.bincount(np.broadcast_to(cells, masks.shape)[masks], minlength=rows * DECILES)
        masked = masks[0].sum(axis=1)  # as many in each epoch
        measures = [
            hits.reshape(rows, DECILES) / EPOCHS,
            (masks & uniform).sum(axis=(0, 2)) / (EPOCHS * masked),
            (masks[1:] & masks[:-1]).sum(axis=(0, 2)) / ((EPOCHS - 1) * masked),
            np.exp(_entropy(probabilities(batch.forward, batch.backward, alpha))),
            1 - 1 / (1 + batch.eligible * alpha),  # n alpha / (1 + n alpha), where alpha = inf gives 1
        ]
        self._blocks.append(np.column_stack(measures))
        self.types += np.bincount(np.broadcast_to(batch.input_ids, masks.shape)[masks], minlength=len(self.types))

    def outcome(self, alpha: float, uniform_types: Ints) -> Outcome:
        """Means over all blocks added; `uniform_types` are the counts of alpha = inf."""
        blocks = np.concatenate(self._blocks)
        count = len(blocks)
        errors = blocks.std(axis=0, ddof=1) / math.sqrt(count) if count > 1 else None
        top = [int(id_) for id_ in np.argsort(-self.types, kind="stable")[:TOP_TYPES] if self.types[id_]]
        shares, uniform_shares = self.types / self.types.sum(), uniform_types / uniform_types.sum()
        return Outcome(
            alpha=alpha,
            mean=_measures(blocks.mean(axis=0)),
            standard_error=None if errors is None else _measures(errors),
            top_types=tuple(TypeShare(id_, float(shares[id_]), float(uniform_shares[id_])) for id_ in top),
        )


def _measures(values: Floats) -> Measures:
    """The inverse of a row of _Tally._blocks."""
    numbers: list[float] = values.tolist()
    return Measures(tuple(numbers[:DECILES]), *numbers[DECILES:])


def _entropy(law: Floats) -> Floats:
    """Of each row, in nats; 0 log 0 = 0. float64 [B, T] -> float64 [B]."""
    logs = np.log(law, out=np.zeros_like(law), where=law > 0)
    entropy: Floats = -(law * logs).sum(axis=1)
    return entropy
