"""Some blocks of a corpus, evenly spaced, from a bounded number of its files: for what need not read all of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

import numpy as np
import numpy.typing as npt

from scorer.errors import ConfigurationError
from scorer.shards import ShardContent
from trainer.reader import RowGroup, ShardCorpus

MAX_SHARDS = 32
"""Shards read: the first read of a shard hashes its whole file."""
MAX_ROW_GROUPS = 128
"""Row groups read, over all shards: one is decoded whole, however few of its rows are wanted."""
_BATCH_BLOCKS = 256

Ints = npt.NDArray[np.int64]


def choose_rows(corpus: ShardCorpus, blocks: int) -> dict[RowGroup, Ints]:
    """Chooses blocks evenly spaced over the corpus; the same ones at each call.

    Where there are more than MAX_SHARDS shards, as many evenly spaced blocks choose theirs, so that a shard's chance
    grows with its size, and these shards give equally many blocks each. The row groups of a shard are chosen likewise.

    Args:
        corpus: whose shards to choose from; none is read.
        blocks: how many to choose, at most. There are fewer where the corpus, or a chosen shard, has no more.

    Returns:
        For each row group to read the rows to take, int64, ascending; in plan order.

    Raises:
        ConfigurationError: `blocks` is less than 1.
    """
    if blocks < 1:
        raise ConfigurationError(f"{blocks} blocks to sample: expected at least 1")
    all_groups = [group for groups in corpus.row_groups() for group in groups]
    shards = [list(groups) for _, groups in groupby(all_groups, key=lambda group: group.shard)]
    quotas = _shares([sum(map(len, groups)) for groups in shards], blocks, MAX_SHARDS)
    row_groups = MAX_ROW_GROUPS // max(1, sum(quota > 0 for quota in quotas))
    return {
        group: _evenly(len(group), share)
        for groups, quota in zip(shards, quotas, strict=True)
        if quota
        for group, share in zip(groups, _shares([len(group) for group in groups], quota, row_groups), strict=True)
        if share
    }


def read_batches(corpus: ShardCorpus, chosen: Mapping[RowGroup, Ints]) -> Iterator[ShardContent]:
    """Reads the chosen rows, in order, in batches of 256 to 511 blocks (the last one has what is left).

    Raises:
        ShardError: a shard is not the one in the manifest.
    """
    held: list[ShardContent] = []
    for group, rows in chosen.items():
        held.append(ShardContent(**{name: values[rows] for name, values in corpus.read(group).columns()}))
        if sum(map(len, held)) >= _BATCH_BLOCKS:
            yield _joined(held)
            held = []
    if held:
        yield _joined(held)


def _joined(parts: Sequence[ShardContent]) -> ShardContent:
    columns = zip(*(part.columns() for part in parts), strict=True)
    return ShardContent(**{same[0][0]: np.concatenate([values for _, values in same]) for same in columns})


def _shares(sizes: Sequence[int], wanted: int, limit: int) -> list[int]:
    """How many of `wanted` blocks each unit gives: in proportion to its size, but by at most `limit` units."""
    ends = np.cumsum([0, *sizes])
    length = int(ends[-1])
    wanted = min(wanted, length)
    if wanted == 0:
        return [0] * len(sizes)
    places = _evenly(length, min(wanted, limit) if np.count_nonzero(sizes) > limit else wanted)
    units = np.searchsorted(ends[1:], places, side="right")[np.arange(wanted) * len(places) // wanted]
    shares: list[int] = np.minimum(np.bincount(units, minlength=len(sizes)), sizes).tolist()
    return shares


def _evenly(length: int, count: int) -> Ints:
    """The middles of `count` equal parts of `range(length)`: int64 [count], ascending, distinct."""
    return (2 * np.arange(count, dtype=np.int64) + 1) * length // (2 * count)
