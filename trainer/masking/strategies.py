"""Masking strategies: one function each, one table.

Each takes scored blocks and gives at most M positions of each. What is masked together is a unit (a token, a word, a
span, an n-gram); units come in the order of one race (trainer.masking.selection), whose noise belongs to the position
where a unit starts and is common to all strategies. A unit that no longer fits into the budget is skipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from scorer.errors import ConfigurationError
from trainer import noise
from trainer.batches import Floats, Ids
from trainer.masking.law import PERPLEXITY, Float64, budget, normalized, shifted
from trainer.masking.ngrams import Ngrams
from trainer.masking.selection import Bools, Positions, arrivals, as_positions, first, first_units
from trainer.masking.words import Words
from trainer.noise import Stream

SPAN_P = 0.2
SPAN_WORDS = 10
"""SpanBERT (Joshi et al. 2020, doi:10.1162/tacl_a_00300): words of a span, geometric with p = 0.2, at most 10."""


@dataclass(frozen=True)
class ScoredBlocks:
    """Blocks to mask, and the keys of their noise."""

    input_ids: Ids
    """[B, T]"""
    forward: Floats
    """[B, T], exp(nats); 0 where a token is not eligible."""
    backward: Floats
    """[B, T], likewise."""
    keys: noise.UInt64
    """uint64 [B]"""

    @cached_property
    def is_eligible(self) -> Bools:
        """Bool [B, T]."""
        return (self.forward > 0) | (self.backward > 0)

    @property
    def budget(self) -> int:
        """M."""
        return budget(self.input_ids.shape[1])

    def rows(self, chosen: Bools) -> ScoredBlocks:
        """Some of the blocks: bool [B]."""
        return ScoredBlocks(self.input_ids[chosen], self.forward[chosen], self.backward[chosen], self.keys[chosen])


@dataclass(frozen=True)
class Masking:
    """How positions are chosen: a strategy and what it needs, alpha aside."""

    strategy: str = "hardness"
    """One of STRATEGIES."""
    hardness: str = "arithmetic"
    """One of PERPLEXITY: what hardness is made of."""
    relative_alpha: bool = False
    """Whether alpha counts in shares of 1/n, n the eligible positions (or words) of a block."""
    words: Words | None = None
    ngrams: Ngrams | None = None

    def __post_init__(self) -> None:
        """Checks that the strategy exists and has what it needs.

        Raises:
            ConfigurationError: otherwise.
        """
        if self.strategy not in STRATEGIES:
            raise ConfigurationError(f"masking strategy {self.strategy!r}: expected one of {', '.join(STRATEGIES)}")
        if self.hardness not in PERPLEXITY:
            raise ConfigurationError(f"hardness {self.hardness!r}: expected one of {', '.join(PERPLEXITY)}")
        if self.needs.words and self.words is None:
            raise ConfigurationError(f"masking strategy {self.strategy} needs the tokenizer's words (Words.of)")
        if self.needs.ngrams and self.ngrams is None:
            raise ConfigurationError(f"masking strategy {self.strategy} needs a list of n-grams (--pmi_ngrams FILE)")

    @property
    def needs(self) -> Strategy:
        """The strategy's entry in the table."""
        return STRATEGIES[self.strategy]

    def select(self, blocks: ScoredBlocks, alpha: float) -> Positions:
        """Chooses positions: int64 [B, M], ascending, -1 where fewer are eligible or fit."""
        return self.needs.select(blocks, self, alpha)


@dataclass(frozen=True)
class Strategy:
    """An entry of the table."""

    select: Callable[[ScoredBlocks, Masking, float], Positions]
    alpha: bool = False
    """Whether it takes alpha."""
    hardness: bool = False
    """Whether it reads perplexities for more than eligibility."""
    words: bool = False
    ngrams: bool = False


def by_hardness(blocks: ScoredBlocks, masking: Masking, alpha: float) -> Positions:
    """Tokens, in proportion to P + alpha. Source: paper Eq. (4)."""
    return first(
        arrivals(shifted(_hardness(blocks, masking), alpha, masking.relative_alpha), blocks.keys), blocks.budget
    )


def by_chance(blocks: ScoredBlocks, masking: Masking, alpha: float) -> Positions:
    """Tokens, all alike: the paper's Random Mask, and what alpha = inf gives."""
    return first(arrivals(blocks.is_eligible.astype(np.float64), blocks.keys), blocks.budget)


def hardest(blocks: ScoredBlocks, masking: Masking, alpha: float) -> Positions:
    """The M hardest tokens, always the same; between equals the race of equals decides."""
    law = _hardness(blocks, masking)
    order = np.lexsort((arrivals(np.ones_like(law), blocks.keys), -law), axis=1)
    ranks = np.empty(law.shape)
    np.put_along_axis(ranks, order, np.arange(law.shape[1], dtype=np.float64)[None], axis=1)
    return first(np.where(law > 0, ranks, np.inf), blocks.budget)


def whole_words(blocks: ScoredBlocks, masking: Masking, alpha: float) -> Positions:
    """Words, all alike: whole-word masking, as of BERT's."""
    return _units(blocks, _words(blocks, masking), np.ones(blocks.input_ids.shape))


def hard_words(blocks: ScoredBlocks, masking: Masking, alpha: float) -> Positions:
    """Words, each as hard as its hardest token: Eq. (3) and (4) with words in the place of tokens."""
    starts = _words(blocks, masking)
    perplexity = PERPLEXITY[masking.hardness](blocks.forward, blocks.backward)
    of_word = np.zeros_like(perplexity)
    # One run over all rows: every row begins with a start, so no word reaches from one into the next.
    of_word[starts] = np.maximum.reduceat(perplexity.ravel(), np.flatnonzero(starts))
    return _units(blocks, starts, shifted(normalized(of_word), alpha, masking.relative_alpha))


def spans(blocks: ScoredBlocks, masking: Masking, alpha: float) -> Positions:
    """Runs of words, their lengths geometric: SpanBERT's.

    A span starts at a word that is not masked yet, each alike, and runs over as many words as was drawn for it, at most
    to the next token that is not eligible; what of it is masked already costs nothing.
    """
    starts = _words(blocks, masking) & blocks.is_eligible
    line = np.argsort(arrivals(starts.astype(np.float64), blocks.keys), axis=1)
    uniform = noise.uniform(blocks.keys, Stream.LENGTH, starts.shape[1])
    # The inverse of the geometric distribution's, cut at 10 words and normalized: their mean is 3.8.
    within = 1 - (1 - SPAN_P) ** SPAN_WORDS
    lengths = np.ceil(np.log1p(-uniform * within) / math.log(1 - SPAN_P)).astype(np.int64).clip(1, SPAN_WORDS)
    is_masked = np.zeros(starts.shape, dtype=bool)
    for row, order in enumerate(line):
        first_tokens = np.flatnonzero(starts[row])
        ends = _span_ends(first_tokens, lengths[row, first_tokens], blocks.is_eligible[row])
        _fill(is_masked[row], order[: len(first_tokens)].tolist(), ends, blocks.budget)
    return as_positions(is_masked, blocks.budget)


def ngrams(blocks: ScoredBlocks, masking: Masking, alpha: float) -> Positions:
    """N-grams of a list, and whole words elsewhere, all alike: PMI-Masking (Levine et al. 2021, arXiv:2010.01825).

    An n-gram within a longer one is not counted; of those that overlap otherwise some are kept by chance.
    """
    assert masking.ngrams is not None  # Masking holds that
    starts = _words(blocks, masking)
    numbers = masking.ngrams.number(blocks.input_ids, starts & blocks.is_eligible, _sizes(starts))
    chance = noise.bits(blocks.keys, Stream.OVERLAP, starts.shape[1])
    for row, numbered in enumerate(numbers):
        begins = np.flatnonzero(starts[row])
        found = masking.ngrams.occurrences(numbered[begins].tolist())
        free = np.ones(len(begins), dtype=bool)
        for begin, end in sorted(found, key=lambda found: chance[row, begins[found[0]]]):
            if free[begin:end].all():
                free[begin:end] = False
                starts[row, begins[begin + 1 : end]] = False
    return _units(blocks, starts, np.ones(starts.shape))


STRATEGIES = {
    "hardness": Strategy(by_hardness, alpha=True, hardness=True),
    "random": Strategy(by_chance),
    "topk": Strategy(hardest, hardness=True),
    "whole-word": Strategy(whole_words, words=True),
    "hardness-whole-word": Strategy(hard_words, alpha=True, hardness=True, words=True),
    "span": Strategy(spans, words=True),
    "pmi": Strategy(ngrams, words=True, ngrams=True),
}


def _hardness(blocks: ScoredBlocks, masking: Masking) -> Float64:
    return normalized(PERPLEXITY[masking.hardness](blocks.forward, blocks.backward))


def _words(blocks: ScoredBlocks, masking: Masking) -> Bools:
    assert masking.words is not None  # Masking holds that
    return masking.words.starts(blocks.input_ids, blocks.is_eligible)


def _units(blocks: ScoredBlocks, starts: Bools, weights: Float64) -> Positions:
    """Races the units that begin at eligible starts, for the weights that stand there."""
    times = arrivals(np.where(starts & blocks.is_eligible, weights, 0.0), blocks.keys)
    return first_units(times, starts, _sizes(starts), blocks.budget)


def _sizes(starts: Bools) -> npt.NDArray[np.int64]:
    """Positions from each start to the next, 0 elsewhere: bool [B, T], true at 0 -> int64 [B, T]."""
    begins = np.flatnonzero(starts)
    sizes = np.zeros(starts.shape, dtype=np.int64)
    sizes[starts] = np.diff(begins, append=starts.size)
    return sizes


def _span_ends(starts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], is_eligible: Bools) -> dict[int, int]:
    """Where the span of so many words that starts at each word ends, in one row."""
    length = len(is_eligible)
    barriers = np.append(np.flatnonzero(~is_eligible), length)
    words_on = np.minimum(np.arange(len(starts)) + lengths, len(starts))
    ends = np.append(starts, length)[words_on]
    return dict(
        zip(starts.tolist(), np.minimum(ends, barriers[np.searchsorted(barriers, starts)]).tolist(), strict=True)
    )


def _fill(is_masked: Bools, order: list[int], ends: dict[int, int], left: int) -> None:
    """Masks spans of one row in order while they fit."""
    for start in order:
        if is_masked[start]:
            continue
        span = is_masked[start : ends[start]]
        new = len(span) - int(np.count_nonzero(span))
        if new <= left:
            span[:] = True
            left -= new
            if not left:
                return
