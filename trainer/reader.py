"""Streaming scored blocks: which are trained on, in which order, and how they are read without holding the corpus.

The order of an epoch is a pure function of (seed, epoch). Row groups of all shards are put into a random order and
taken in windows of 32; the blocks of a window (8,192, some 42 MB with perplexities) are shuffled together. So a batch
mixes many shards, memory does not grow with the corpus, and any position is found by arithmetic:

    row groups   7 2 9 4 | 1 8 0 5 | …      windows, in the epoch's order
    blocks       ▒▒▒▒▒▒▒▒ | ▒▒▒▒▒▒▒▒ | …     shuffled within
    batches      [gB, (g+1)B)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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

WINDOW_ROW_GROUPS = 32
HELD_OUT_BLOCKS = 64
HELD_OUT_SHARE = 100
"""One block in this many is held out, where that is more than HELD_OUT_BLOCKS."""

Feature = dict[str, Any]
"""A row: `input_ids`, `forward_perplexity`, `backward_perplexity`, each [512], and `epoch`."""


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
        with self.open(group.shard) as reader:
            content = reader.read_row_group(group.index, self._perplexities)
        rows = slice(group.start, group.stop)
        return ShardContent(**{name: values[rows] for name, values in content.columns()})

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
        for entry in manifest.shards:
            path = files.join(folder, entry.name)
            found = files.size(path) if files.exists(path) else None
            if found != entry.bytes:
                raise ShardError(
                    f"{path} {'is missing' if found is None else f'has {found} bytes'}, the manifest says "
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
        blocks = sum(map(len, groups))
        self._epoch_length = steps_per_epoch(blocks, batch_size) * batch_size
        self._length = steps * batch_size
        self._epoch: tuple[int, list[RowGroup], npt.NDArray[np.int64]] | None = None
        self._window: tuple[tuple[int, int], ShardContent] | None = None

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, position: int) -> Feature:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[int]) -> list[Feature]:
        """Rows at several positions of the run: what a DataLoader's fetcher asks for, a batch at a time."""
        features: list[Feature] = []
        for position in positions:
            if not 0 <= position < self._length:
                raise IndexError(position)
            epoch, offset = divmod(position, self._epoch_length)
            _, _, ends = self._epoch_order(epoch)
            window = int(np.searchsorted(ends, offset, side="right"))
            row = offset - (int(ends[window - 1]) if window else 0)
            content = self._window_rows(epoch, window)
            features.append({name: values[row].copy() for name, values in content.columns()} | {"epoch": epoch})
        return features

    def _epoch_order(self, epoch: int) -> tuple[int, list[RowGroup], npt.NDArray[np.int64]]:
        """The epoch's row groups in order, and the position at which each window ends."""
        if self._epoch is None or self._epoch[0] != epoch:
            order = [self._groups[i] for i in noise.permutation(len(self._groups), self._seed, epoch)]
            sizes = [
                sum(map(len, order[start : start + WINDOW_ROW_GROUPS]))
                for start in range(0, len(order), WINDOW_ROW_GROUPS)
            ]
            self._epoch = epoch, order, np.cumsum(sizes)
        return self._epoch

    def _window_rows(self, epoch: int, window: int) -> ShardContent:
        """The blocks of one window, shuffled."""
        if self._window is None or self._window[0] != (epoch, window):
            self._window = None  # let go of the old one before the new one is read
            groups = self._epoch_order(epoch)[1][window * WINDOW_ROW_GROUPS : (window + 1) * WINDOW_ROW_GROUPS]
            self._window = (epoch, window), self._read_window(groups, epoch, window)
        return self._window[1]

    def _read_window(self, groups: Sequence[RowGroup], epoch: int, window: int) -> ShardContent:
        target = noise.permutation(sum(map(len, groups)), self._seed, epoch, window)
        columns: dict[str, npt.NDArray[Any]] = {}
        filled = 0
        for group in groups:
            content = self._corpus.read(group)
            for name, values in content.columns():
                if name not in columns:
                    columns[name] = np.empty((len(target), values.shape[1]), dtype=values.dtype)
                columns[name][target[filled : filled + len(content)]] = values
            filled += len(content)
        return ShardContent(**columns)


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
        if not 0 <= position < len(self):
            raise IndexError(position)
        index = int(np.searchsorted(self._ends, position, side="right"))
        if self._loaded is None or self._loaded[0] != index:
            self._loaded = index, self._corpus.read(self._groups[index])
        row = position - (int(self._ends[index - 1]) if index else 0)
        return {name: values[row] for name, values in self._loaded[1].columns()} | {"epoch": 0}


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
