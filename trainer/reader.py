"""Streaming scored blocks: which are trained on, in which order, and how they are read without holding the corpus.

The order of an epoch is a pure function of (seed, epoch). Row groups of all shards are put into a random order and
taken in windows of 32; the blocks of a window (8,192, some 42 MB with perplexities) are shuffled together. So a batch
mixes many shards, memory does not grow with the corpus, and any position is found by arithmetic. A thread reads the
next window while this one is trained on: a process that reads holds two, 84 MB.

    row groups   7 2 9 4 | 1 8 0 5 | …      windows, in the epoch's order
    blocks       ▒▒▒▒▒▒▒▒ | ▒▒▒▒▒▒▒▒ | …     shuffled within
    batches      [gB, (g+1)B)
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from scorer import files
from scorer.errors import ConfigurationError, ShardError
from scorer.manifest import Manifest, ShardEntry, read_manifest
from scorer.shards import ROW_GROUP_BLOCKS, ShardContent, ShardReader
from scorer.vocabulary import Vocabulary, require_same_vocabulary
from trainer import noise
from trainer.batches import Batch, Feature

WINDOW_ROW_GROUPS = 32
HELD_OUT_BLOCKS = 64
HELD_OUT_SHARE = 100
"""One block in this many is held out, where that is more than HELD_OUT_BLOCKS."""


@dataclass(frozen=True)
class RowGroup:
    """Rows [start, stop) of one row group of one shard."""

    shard: int
    """Counted over the folders in order."""
    index: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


class ShardCorpus:
    """One or more complete folders of shards, checked by names and sizes at the start and by hash when first read."""

    def __init__(self, folders: Sequence[str], perplexities: bool = True):
        """Opens the folders.

        Args:
            folders: each with a manifest; shards are counted over them in order.
            perplexities: whether to read more than `input_ids`.

        Raises:
            ConfigurationError: a folder is not complete, not scored where it has to be, or of another vocabulary.
            ShardError: a shard is missing or has another size than the manifest says.
        """
        self.folders = list(folders)
        self.manifests = [read_manifest(folder) for folder in folders]
        self._perplexities = perplexities
        self._shards: list[tuple[str, ShardEntry]] = []
        for folder, manifest in zip(self.folders, self.manifests, strict=True):
            self._check_folder(folder, manifest)
            self._shards += [(files.join(folder, entry.name), entry) for entry in manifest.shards]
        self._sound: set[int] = set()
        self.vocabulary = self._read_vocabulary()

    def __len__(self) -> int:
        """Number of shards."""
        return len(self._shards)

    @property
    def fingerprint(self) -> list[str]:
        """Content fingerprints of all shards, in order: two runs over the same data have the same."""
        return [entry.content_sha256 for _, entry in self._shards]

    def row_groups(self) -> list[list[RowGroup]]:
        """For each folder the row groups of its shards, in plan order."""
        groups: list[list[RowGroup]] = []
        shard = 0
        for manifest in self.manifests:
            groups.append([])
            for entry in manifest.shards:
                groups[-1] += [
                    RowGroup(shard, index, 0, min(ROW_GROUP_BLOCKS, entry.blocks - index * ROW_GROUP_BLOCKS))
                    for index in range(-(-entry.blocks // ROW_GROUP_BLOCKS))
                ]
                shard += 1
        return groups

    def read(self, group: RowGroup) -> ShardContent:
        """Reads the rows of one row group; the first read of a shard holds its file to the manifest's hash.

        Raises:
            ShardError: the file is not the one in the manifest.
        """
        return next(content for _, content in self.read_all([group]))

    def read_all(self, groups: Sequence[RowGroup]) -> Iterator[tuple[int, ShardContent]]:
        """Reads several row groups, shard by shard, so that each is opened once.

        Yields:
            The place of a row group in `groups`, and its rows.

        Raises:
            ShardError: a file is not the one in the manifest.
        """
        places = sorted(range(len(groups)), key=lambda place: (groups[place].shard, groups[place].index))
        for shard, same in groupby(places, key=lambda place: groups[place].shard):
            with self.open(shard) as reader:
                for place in same:
                    content = reader.read_row_group(groups[place].index, self._perplexities)
                    rows = slice(groups[place].start, groups[place].stop)
                    yield place, ShardContent(**{name: values[rows] for name, values in content.columns()})

    def open(self, shard: int) -> ShardReader:
        """Opens one shard.

        Raises:
            ConfigurationError: there are not so many shards.
            ShardError: the file is not the one in the manifest.
        """
        if not 0 <= shard < len(self._shards):
            raise ConfigurationError(f"there is no shard {shard}: the folders hold shards 0 to {len(self) - 1}")
        path, entry = self._shards[shard]
        if shard not in self._sound:
            if files.sha256(path)[0] != entry.sha256:
                raise ShardError(
                    f"{path} is not the file that the manifest lists (SHA-256 differs): "
                    "run the command that wrote the folder again; it makes damaged shards anew"
                )
            self._sound.add(shard)
        return ShardReader(path)

    def _check_folder(self, folder: str, manifest: Manifest) -> None:
        if self._perplexities and manifest.alm is None:
            raise ConfigurationError(
                f"{folder} holds block shards without perplexities: score them with pipeline.score_corpus first"
            )
        require_same_vocabulary(
            self.manifests[0].tokenizer,
            manifest.tokenizer,
            f"{self.folders[0]} and {folder}",
            "train on shards of one tokenizer",
        )
        present = files.listing(folder)
        for entry in manifest.shards:
            found = present.get(entry.name)
            if found is None or found.bytes != entry.bytes:
                raise ShardError(
                    f"{files.join(folder, entry.name)} "
                    f"{'is missing' if found is None else f'has {found.bytes} bytes'}, the manifest says "
                    f"{entry.bytes} bytes: run the command that wrote the folder again; it makes damaged shards anew"
                )

    def _read_vocabulary(self) -> Vocabulary:
        if not self._shards:
            raise ConfigurationError(f"{', '.join(self.folders)} hold no shards")
        with ShardReader(self._shards[0][0]) as reader:
            return reader.metadata.vocabulary


def hold_out(folders: Sequence[Sequence[RowGroup]]) -> tuple[list[RowGroup], list[RowGroup]]:
    """Splits each folder's blocks into those to train on and those held out.

    Held out are the last max(64, 1 %) blocks in plan order, at most half, of each folder.

    Returns:
        Row groups for training, and for evaluation; a group that the border cuts is in both, with its own rows.
    """
    training: list[RowGroup] = []
    held_out: list[RowGroup] = []
    for groups in folders:
        blocks = sum(map(len, groups))
        left = blocks - min(max(HELD_OUT_BLOCKS, blocks // HELD_OUT_SHARE), blocks // 2)
        for group in groups:
            border = group.start + min(len(group), left)
            left -= border - group.start
            if border > group.start:
                training.append(RowGroup(group.shard, group.index, group.start, border))
            if border < group.stop:
                held_out.append(RowGroup(group.shard, group.index, border, group.stop))
    return training, held_out


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
        self._epoch: _EpochOrder | None = None
        self._window: tuple[_Window, ShardContent] | None = None
        self._ahead: tuple[_Window, Future[ShardContent]] | None = None
        self._reader: ThreadPoolExecutor | None = None

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
            pieces.append(_take(self._window_rows(window), order[start:stop] - begin))
            start = stop
        return Batch(_concatenated(pieces), order // self._epoch_length, order // self._batch_size)

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
        if self._epoch is None or self._epoch.epoch != epoch:
            order = [self._groups[i] for i in noise.permutation(len(self._groups), self._seed, epoch)]
            sizes = [
                sum(map(len, order[start : start + WINDOW_ROW_GROUPS]))
                for start in range(0, len(order), WINDOW_ROW_GROUPS)
            ]
            self._epoch = _EpochOrder(epoch, order, np.cumsum(sizes))
        return self._epoch

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
        if self._reader is None:  # made here, in the process that reads: threads do not survive a loader's fork
            self._reader = ThreadPoolExecutor(1, thread_name_prefix="window")
        return self._reader.submit(self._read_window, *self._shuffle(window), spare)

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
    """The row groups of an epoch in order, and the position in it at which each window ends."""

    epoch: int
    groups: list[RowGroup]
    ends: npt.NDArray[np.int64]


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _take(content: ShardContent, rows: npt.NDArray[np.int64]) -> ShardContent:
    """A copy of some rows; of rows that follow each other, as a run reads them, in one piece."""
    first, count = int(rows[0]), len(rows)
    if rows[-1] - first == count - 1 and (np.diff(rows) == 1).all():
        return ShardContent(**{name: values[first : first + count].copy() for name, values in content.columns()})
    return ShardContent(**{name: values[rows] for name, values in content.columns()})


def _concatenated(pieces: Sequence[ShardContent]) -> ShardContent:
    if len(pieces) == 1:
        return pieces[0]
    names = [name for name, _ in pieces[0].columns()]
    return ShardContent(**{name: np.concatenate([getattr(piece, name) for piece in pieces]) for name in names})


class HeldOutBlocks(Dataset[Feature]):
    """Blocks for evaluation, in plan order; their epoch is always 0, so that their masks are."""

    def __init__(self, corpus: ShardCorpus, groups: Sequence[RowGroup]):
        """Fixes the blocks; one row group is held in memory at a time."""
        self._corpus = corpus
        self._groups = list(groups)
        self._ends = np.cumsum([len(group) for group in groups])
        self._loaded: tuple[int, ShardContent] | None = None

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, position: int) -> Feature:
        feature: Feature = self.__getitems__([position])[0]
        return feature

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        """Rows at several positions, as TrainingStream gives them."""
        none = np.zeros(len(positions), dtype=np.int64)
        return Batch(_concatenated([self._row(position) for position in positions]), none, none)

    def _row(self, position: int) -> ShardContent:
        if not 0 <= position < len(self):
            raise IndexError(position)
        index = int(np.searchsorted(self._ends, position, side="right"))
        if self._loaded is None or self._loaded[0] != index:
            self._loaded = index, self._corpus.read(self._groups[index])
        first = int(self._ends[index - 1]) if index else 0
        return _take(self._loaded[1], np.array([position - first]))


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


def open_corpus(
    folders: Sequence[str], validation_folders: Sequence[str] | None, perplexities: bool
) -> tuple[ShardCorpus, list[RowGroup], HeldOutBlocks]:
    """Opens what a run trains on, and what it is evaluated on.

    Args:
        folders: to train on.
        validation_folders: to evaluate on; without them the last blocks of each training folder are held out.
        perplexities: whether to read more than `input_ids`.

    Returns:
        The training corpus, its row groups to train on, and the blocks to evaluate on.

    Raises:
        ConfigurationError: the two are of different vocabularies, or there is nothing to evaluate on.
    """
    corpus = ShardCorpus(folders, perplexities)
    if validation_folders:
        validation = ShardCorpus(validation_folders, perplexities)
        require_same_vocabulary(
            corpus.manifests[0].tokenizer,
            validation.manifests[0].tokenizer,
            f"{folders[0]} and {validation_folders[0]}",
            "evaluate on shards of the tokenizer that you train with",
        )
        training = [group for groups in corpus.row_groups() for group in groups]
        held_out = HeldOutBlocks(validation, [group for groups in validation.row_groups() for group in groups])
    else:
        training, groups = hold_out(corpus.row_groups())
        held_out = HeldOutBlocks(corpus, groups)
    if not len(held_out):
        raise ConfigurationError(f"{', '.join(validation_folders or folders)}: no block to evaluate on")
    return corpus, training, held_out
