"""Which positions are taken once every unit has its place in line: races without replacement, and budgets.

Drawing distinct units one after the other, each in proportion to its weight among those left, is the same as giving
unit i an arrival time E_i / w_i, E_i exponential, and taking them as they arrive (Efraimidis and Spirakis 2006,
doi:10.1016/j.ipl.2005.11.003). So a draw is a sort, for a whole batch at once, and a perplexity of 1e30 beside a
perplexity of 1 is nothing special.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from trainer import noise
from trainer.masking.law import Float64
from trainer.noise import Stream

Bools = npt.NDArray[np.bool_]
Positions = npt.NDArray[np.int64]


def arrivals(weights: Float64, keys: noise.UInt64) -> Float64:
    """When each position arrives in the race; inf where it never does.

    Args:
        weights: [B, T], at least 0.
        keys: uint64 [B], of the rows' noise.
    """
    times = noise.uniform(keys, Stream.SELECTION, weights.shape[1])
    np.log(times, out=times)
    with np.errstate(divide="ignore"):
        times /= weights
    return np.negative(times, out=times)


def first(times: Float64, count: int) -> Positions:
    """The `count` positions that come first: [B, T] -> int64 [B, count], ascending, -1 where fewer come at all."""
    rows = len(times)
    if not count:
        return np.empty((rows, 0), dtype=np.int64)
    last = np.partition(times, count - 1, axis=1)[:, count - 1, None]
    chosen = np.flatnonzero(times <= last)
    if len(chosen) == count * rows and np.isfinite(last).all():
        positions: Positions = chosen.reshape(rows, count) % times.shape[1]
        return positions
    return _first_of_few(times, count)


def _first_of_few(times: Float64, count: int) -> Positions:
    """`first`, where fewer than `count` come in some row, or two at the same time as the last."""
    length = times.shape[1]
    chosen = np.argsort(times, axis=1, kind="stable")[:, :count]
    ascending = np.sort(np.where(np.take_along_axis(times, chosen, axis=1) < np.inf, chosen, length), axis=1)
    return np.where(ascending < length, ascending, -1)


def first_units(times: Float64, starts: Bools, sizes: npt.NDArray[np.int64], count: int) -> Positions:
    """Whole units as they come, each that still fits into `count` positions; one that does not is skipped.

    Args:
        times: [B, T], when the unit that starts at a position comes; inf where none does.
        starts: [B, T], where units start; each runs to the next start.
        sizes: [B, T], positions of the unit that starts here.
        count: positions that may be taken.

    Returns:
        int64 [B, count], positions ascending, -1 where fewer are filled.
    """
    order = np.argsort(times, axis=1)
    in_line = np.take_along_axis(sizes, order, axis=1)
    is_waiting = np.take_along_axis(times, order, axis=1) < np.inf
    is_taken = np.zeros_like(is_waiting)
    left = np.full((len(times), 1), count)
    # A round takes all up to the first that does not fit. What is larger than the room left never fits again, so the
    # next round begins without it: few rounds, and the same units as one by one.
    while (is_waiting := is_waiting & (in_line <= left)).any():
        taken_now = is_waiting & (np.cumsum(np.where(is_waiting, in_line, 0), axis=1) <= left)
        left -= np.where(taken_now, in_line, 0).sum(axis=1, keepdims=True)
        is_taken |= taken_now
        is_waiting &= ~taken_now
    by_start = np.zeros_like(is_taken)
    np.put_along_axis(by_start, order, is_taken, axis=1)
    return as_positions(np.take_along_axis(by_start, unit_starts(starts), axis=1), count)


def unit_starts(starts: Bools) -> npt.NDArray[np.int64]:
    """For each position the start of its unit: bool [B, T], true at 0 -> int64 [B, T]."""
    return np.maximum.accumulate(np.where(starts, np.arange(starts.shape[1]), 0), axis=1)


def as_positions(is_masked: Bools, count: int) -> Positions:
    """Bool [B, T] with at most `count` true in a row -> int64 [B, count], ascending, -1 at the end."""
    rows, columns = np.nonzero(is_masked)
    positions = np.full((len(is_masked), count), -1, dtype=np.int64)
    positions[rows, (np.cumsum(is_masked, axis=1) - 1)[rows, columns]] = columns
    return positions
