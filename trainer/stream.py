"""The order in which a run reads its blocks, and the reading of them, ahead of need.

The order of an epoch is a pure function of (seed, epoch). Shards are put into a random order and taken in pools of
half a million blocks (some 64 shards of 16 MiB of text, 1.4 GB); the row groups of a pool are put into a random order
and taken in windows of 32; the blocks of a window (8,192, some 42 MB with perplexities) are shuffled together. So a
batch mixes many shards, memory and what has to be fetched ahead do not grow with the corpus, and any position is found
by arithmetic. A thread reads the next window while this one is trained on: a process that reads holds two, 84 MB.

    shards       3 0 7 … | 5 1 2 … | …      pools: the next one is fetched while this one is read
    row groups   7 2 9 4 | 1 8 0 5 | …      windows
    blocks       ▒▒▒▒▒▒▒▒ | ▒▒▒▒▒▒▒▒ | …     shuffled within
    batches      [gB, (g+1)B)
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from scorer.errors import ConfigurationError
from scorer.shards import ROW_GROUP_BLOCKS, ShardContent
from trainer import noise
from trainer.batches import Batch, Feature
from trainer.reader import RowGroup, ShardCorpus, concatenated, take

WINDOW_ROW_GROUPS = 32
POOL_BLOCKS = 1 << 19
_POOLS = -1
"""Stands in the key of the order of shards where that of blocks has the index of their window."""


class TrainingStream(Dataset[Feature]):
    """All blocks that a run will read, in the order in which it reads them, as one long map-style dataset.

    Item i is position i of the run: epochs follow each other, each without its last partial batch. It is read
    sequentially; a run that resumes goes to its position without reading what comes before.
    """

    def __init__(self, corpus: ShardCorpus, groups: Sequence[RowGroup], batch_size: int, steps: int, seed: int):
        """Fixes the order.

        Args:
            corpus: where the rows are read.
            groups: the row groups to train on.
            batch_size: blocks a global batch.
            steps: global batches of the whole run.
            seed: of the order.

        Raises:
            ConfigurationError: there are fewer blocks than one batch.
        """
        self._corpus = corpus
        self._groups = list(groups)
        self._seed = seed
        self._batch_size = batch_size
        self.steps_per_epoch = steps_per_epoch(sum(map(len, groups)), batch_size)
        self._epoch_length = self.steps_per_epoch * batch_size
        self._length = steps * batch_size
        self._orders: dict[int, _EpochOrder] = {}
        self._window: tuple[_Window, ShardContent] | None = None
        self._ahead: tuple[_Window, Future[ShardContent]] | None = None

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, position: int) -> Feature:
        feature: Feature = self.__getitems__([position])[0]
        return feature

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        """Rows at several positions of the run: what a DataLoader's fetcher asks for, a batch at a time."""
        order = np.asarray(positions, dtype=np.int64)
        pieces: list[ShardContent] = []
        start = 0
        while start < len(order):
            window, begin, end = self._window_of(int(order[start]))
            is_inside = (order[start:] >= begin) & (order[start:] < end)
            stop = start + (len(is_inside) if is_inside.all() else int(is_inside.argmin()))
            pieces.append(take(self._window_rows(window), order[start:stop] - begin))
            start = stop
        return Batch(concatenated(pieces), order // self._epoch_length, order // self._batch_size)

    def origin(self, position: int) -> tuple[int, int]:
        """Where the block at a position of the run is from: its shard, counted over the folders, and its row there."""
        window, begin, _ = self._window_of(position)
        groups, targets = self._shuffle(window)
        index = int(np.flatnonzero(targets == position - begin)[0])
        for group in groups:
            if index < len(group):
                return group.shard, group.index * ROW_GROUP_BLOCKS + group.start + index
            index -= len(group)
        raise IndexError(position)

    def _window_of(self, position: int) -> tuple[_Window, int, int]:
        """The window of a position of the run, and the positions [begin, end) that it holds."""
        if not 0 <= position < self._length:
            raise IndexError(position)
        epoch, offset = divmod(position, self._epoch_length)
        ends = self._epoch_order(epoch).ends
        index = int(np.searchsorted(ends, offset, side="right"))
        first = epoch * self._epoch_length
        end = min(int(ends[index]), self._epoch_length)
        return _Window(epoch, index), first + (int(ends[index - 1]) if index else 0), first + end

    def _epoch_order(self, epoch: int) -> _EpochOrder:
        if epoch not in self._orders:
            pools = self._pools(epoch)
            order = [self._groups[i] for i in noise.permutation(len(self._groups), self._seed, epoch)]
            order.sort(key=lambda group: pools[group.shard])
            sizes = [
                sum(map(len, order[start : start + WINDOW_ROW_GROUPS]))
                for start in range(0, len(order), WINDOW_ROW_GROUPS)
            ]
            pool_ends = np.unique(np.cumsum(np.bincount([pools[group.shard] for group in order])))
            near = {known: found for known, found in self._orders.items() if abs(known - epoch) <= 1}
            self._orders = near | {epoch: _EpochOrder(order, np.cumsum(sizes), pool_ends)}
        return self._orders[epoch]

    def _pools(self, epoch: int) -> list[int]:
        """In which pool each shard is in an epoch; by shard."""
        sizes = [len(group) for group in self._groups]
        blocks = np.bincount([group.shard for group in self._groups], sizes).astype(np.int64)
        order = noise.permutation(len(blocks), self._seed, epoch, _POOLS)
        pools = np.empty_like(blocks)
        pools[order] = (np.cumsum(blocks[order]) - blocks[order]) // POOL_BLOCKS
        found: list[int] = pools.tolist()
        return found

    def _shuffle(self, window: _Window) -> tuple[list[RowGroup], npt.NDArray[np.int64]]:
        """The window's row groups, and the place of each of their blocks in the window."""
        start = window.index * WINDOW_ROW_GROUPS
        groups = self._epoch_order(window.epoch).groups[start : start + WINDOW_ROW_GROUPS]
        return groups, noise.permutation(sum(map(len, groups)), self._seed, window.epoch, window.index)

    def _window_rows(self, window: _Window) -> ShardContent:
        """The blocks of one window, shuffled."""
        if self._window is None or self._window[0] != window:
            spare = None if self._window is None else self._window[1]
            self._window = None  # it may be written over, also by a read that fails
            ahead, self._ahead = self._ahead, None
            if ahead is None or ahead[0] != window:
                ahead, spare = (window, self._read_ahead(window, spare)), None
            self._window = window, ahead[1].result()
            # On a single core reading ahead saves no time, and drives what is masked out of the caches.
            if (following := self._after(window)) is not None and _cores() > 1:
                self._ahead = following, self._read_ahead(following, spare)
        return self._window[1]

    def _after(self, window: _Window) -> _Window | None:
        """The window that the run needs next; None at its end."""
        ends = self._epoch_order(window.epoch).ends
        # The last partial batch of an epoch is dropped, and so may be its last windows.
        if (stop := int(ends[window.index])) < self._epoch_length:
            following, begins = _Window(window.epoch, window.index + 1), window.epoch * self._epoch_length + stop
        else:
            following, begins = _Window(window.epoch + 1, 0), (window.epoch + 1) * self._epoch_length
        return following if begins < self._length else None

    def _read_ahead(self, window: _Window, spare: ShardContent | None) -> Future[ShardContent]:
        self._corpus.prefetch(self._upcoming_shards(window))
        groups, targets = self._shuffle(window)
        rows: Future[ShardContent] = Future()

        def read() -> None:
            try:
                rows.set_result(self._read_window(groups, targets, spare))
            except BaseException as error:
                rows.set_exception(error)

        # An executor's thread would have to end before the process can, also after Ctrl-C in a slow download.
        threading.Thread(target=read, name="window", daemon=True).start()
        return rows

    def _upcoming_shards(self, window: _Window) -> Iterator[int]:
        """The shards of what is left of a window's pool, and of the next pool, in the order of their first use."""
        order, start = self._epoch_order(window.epoch), window.index * WINDOW_ROW_GROUPS
        following = int(np.searchsorted(order.pool_ends, start, side="right")) + 1
        end = int(order.pool_ends[min(following, len(order.pool_ends) - 1)])
        yield from (group.shard for group in order.groups[start:end])
        if following == len(order.pool_ends) and (window.epoch + 1) * self._epoch_length < self._length:
            order = self._epoch_order(window.epoch + 1)
            yield from (group.shard for group in order.groups[: order.pool_ends[0]])

    def _read_window(
        self, groups: Sequence[RowGroup], targets: npt.NDArray[np.int64], spare: ShardContent | None
    ) -> ShardContent:
        """Reads the blocks of row groups to their places, into the memory of a window that is done with.

        Fresh memory would cost as much as reading: each of its pages is a fault.
        """
        columns: dict[str, npt.NDArray[Any]] = {} if spare is None else dict(spare.columns())
        ends = np.cumsum([len(group) for group in groups])
        for place, content in self._corpus.read_all(groups):
            rows = targets[ends[place] - len(content) : ends[place]]
            for name, values in content.columns():
                if name not in columns or len(columns[name]) < len(targets):
                    columns[name] = np.empty((len(targets), values.shape[1]), dtype=values.dtype)
                columns[name][rows] = values
        return ShardContent(**columns)


@dataclass(frozen=True)
class _Window:
    """The blocks that are shuffled together."""

    epoch: int
    index: int


@dataclass(frozen=True)
class _EpochOrder:
    """The row groups of an epoch in order."""

    groups: list[RowGroup]
    ends: npt.NDArray[np.int64]
    """The position in the epoch at which each window ends."""
    pool_ends: npt.NDArray[np.int64]
    """The number of row groups before the end of each pool."""


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def steps_per_epoch(blocks: int, batch_size: int) -> int:
    """Whole global batches in `blocks`.

    Raises:
        ConfigurationError: not even one.
    """
    if blocks < batch_size:
        raise ConfigurationError(
            f"{blocks} blocks to train on are fewer than one global batch of {batch_size}: "
            "set --global_batch_size lower"
        )
    return blocks // batch_size
