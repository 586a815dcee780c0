"""Keyed noise: random bits that are a pure function of what they are for.

A counter-based generator in the manner of SplitMix64 (Steele, Lea, Flood 2014, doi:10.1145/2660193.2660195): the key
names the row, the counter names the use and the position, and a finalizer mixes them. Nothing is carried from one
draw to the next, so order, batch size, workers and ranks cannot matter; and nothing of it is numpy's, so neither can
numpy's version.
"""

from __future__ import annotations

from enum import IntEnum
from functools import lru_cache
from itertools import takewhile
from typing import Any

import numpy as np
import numpy.typing as npt

UInt64 = npt.NDArray[np.uint64]

_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_WORD = (1 << 64) - 1


class Stream(IntEnum):
    """What noise is for; each use reads its own stream, so that none of them can lean on another."""

    SELECTION = 0
    """Which positions are masked."""
    CORRUPTION = 1
    """Which of these become `<mask>`, a random token, or stay."""
    REPLACEMENT = 2
    """Which random token."""
    ORDER = 3
    """In which order blocks are read."""
    LENGTH = 4
    """How long a span is that starts here."""
    OVERLAP = 5
    """Which of two overlapping n-grams is kept."""


def mix(words: UInt64, out: UInt64 | None = None) -> UInt64:
    """The finalizer: a bijection of 64-bit words in which every input bit moves about half of the output bits.

    Args:
        words: uint64, of any shape.
        out: where to put the result; may be `words`.
    """
    shifted = words >> np.uint64(30)
    mixed: UInt64 = np.bitwise_xor(words, shifted, out=out)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    np.right_shift(mixed, np.uint64(27), out=shifted)
    mixed ^= shifted
    mixed *= np.uint64(0x94D049BB133111EB)
    np.right_shift(mixed, np.uint64(31), out=shifted)
    mixed ^= shifted
    return mixed


def key(*parts: int | UInt64) -> UInt64:
    """Folds integers and uint64 arrays [N], broadcast against each other, into keys: uint64 [N] (or [1])."""
    numbers = tuple(takewhile(lambda part: isinstance(part, int), parts))
    folded = _key_of_numbers(numbers)
    for part in parts[len(numbers) :]:
        folded = _folded(folded, part)
    return folded


@lru_cache(maxsize=1024)
def _key_of_numbers(parts: tuple[int, ...]) -> UInt64:
    """The beginning of a key, which all batches of an epoch have in common."""
    folded = np.zeros(1, dtype=np.uint64)
    for part in parts:
        folded = _folded(folded, part)
    folded.flags.writeable = False
    return folded


def _folded(key: UInt64, part: int | UInt64) -> UInt64:
    # At least one dimension: numpy warns of the intended overflow for scalars only.
    word = np.atleast_1d(np.asarray(part & _WORD if isinstance(part, int) else part, dtype=np.uint64))
    return mix((key ^ mix(word + _GOLDEN_GAMMA)) + _GOLDEN_GAMMA)


def digest(input_ids: npt.NDArray[np.integer[Any]]) -> UInt64:
    """One 64-bit word a row, a function of its token ids and their places alone: integers [B, T] -> uint64 [B]."""
    words = input_ids.astype(np.uint64)
    words ^= np.arange(1, input_ids.shape[1] + 1, dtype=np.uint64) * _GOLDEN_GAMMA
    return mix(mix(words, out=words).sum(axis=1, dtype=np.uint64))


def bits(keys: UInt64, stream: Stream, counters: int | npt.NDArray[np.integer[Any]]) -> UInt64:
    """Words for each key: uint64 [N] -> uint64 [N, count].

    Args:
        keys: uint64 [N].
        stream: what they are for.
        counters: which of the stream's words: the first so many of each key, or those at integers [N, count].
    """
    places = np.arange(counters) if isinstance(counters, int) else counters
    words = keys[:, None] + (places.astype(np.uint64) + np.uint64(int(stream) << 32)) * _GOLDEN_GAMMA
    return mix(mix(words, out=words), out=words)


def uniform(keys: UInt64, stream: Stream, counters: int | npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.float64]:
    """Uniform numbers in the open interval (0, 1), float64 [N, count]; arguments as for `bits`.

    The upper 52 bits, each interval represented by its middle, so that neither 0 nor 1 comes out. With one bit more
    the middle of the last interval would round to 1.
    """
    words = bits(keys, stream, counters)
    words >>= np.uint64(12)
    numbers = words.astype(np.float64)
    numbers += 0.5
    numbers *= 2.0**-52
    return numbers


def integers(
    keys: UInt64, stream: Stream, counters: int | npt.NDArray[np.integer[Any]], below: int
) -> npt.NDArray[np.int64]:
    """Uniform integers in [0, below), below at most 2**31, int64 [N, count]; arguments as for `bits`.

    Multiply and shift; no value's probability is off by more than 2**-32.
    """
    words = bits(keys, stream, counters) >> np.uint64(32)
    return ((words * np.uint64(below)) >> np.uint64(32)).astype(np.int64)


def permutation(length: int, *parts: int) -> npt.NDArray[np.int64]:
    """An order of `range(length)` that depends on `parts` alone: int64 [length]."""
    return np.argsort(bits(key(*parts), Stream.ORDER, length)[0], kind="stable").astype(np.int64)
