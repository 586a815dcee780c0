"""Scored blocks of complete folders: which are trained on and which held out, and how they are read."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from scorer import files
from scorer.errors import ConfigurationError, ShardError
from scorer.manifest import Manifest, read_manifest
from scorer.shards import ROW_GROUP_BLOCKS, ShardContent, ShardReader
from scorer.vocabulary import Vocabulary, require_same_vocabulary
from trainer.batches import Batch, Feature
from trainer.shard_cache import NOT_LISTED, ShardCache, StoredShard

logger = logging.getLogger(__name__)

HELD_OUT_BLOCKS = 64
_PREFETCHED_GROUPS = 256
"""Held-out row groups whose shards are fetched ahead: those of some eight shards."""
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
    """One or more complete folders of shards, checked by names and sizes at the start and by hash when first read.

    Shards of object stores are read from a cache on a local disk.
    """

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
        self._shards: list[StoredShard] = []
        for folder, manifest in zip(self.folders, self.manifests, strict=True):
            self._check_folder(folder, manifest)
            self._shards += [StoredShard(files.join(folder, entry.name), entry) for entry in manifest.shards]
        self._sound: set[int] = set()
        self._stored = {index for index, shard in enumerate(self._shards) if files.local_path(shard.path) is None}
        self._cache: ShardCache | None = None
        if self._stored:
            self._cache = ShardCache.from_environment()
            logger.info(
                "shards are read from a cache in %s, of %.1f GB at most", self._cache.folder, self._cache.limit / 1e9
            )
        self.vocabulary = self._read_vocabulary()

    def __len__(self) -> int:
        """Number of shards."""
        return len(self._shards)

    @property
    def fingerprint(self) -> list[str]:
        """Content fingerprints of all shards, in order: two runs over the same data have the same."""
        return [shard.entry.content_sha256 for shard in self._shards]

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
        found = self._shards[shard]
        if self._cache is not None and shard in self._stored:
            return ShardReader(found.path, self._cache.open(found))
        if shard not in self._sound:
            if files.sha256(found.path)[0] != found.entry.sha256:
                raise ShardError(f"{found.path} {NOT_LISTED}")
            self._sound.add(shard)
        return ShardReader(found.path)

    def prefetch(self, shards: Iterable[int]) -> None:
        """Names the shards that will be read next, in that order, so that those of stores can be fetched meanwhile."""
        if self._cache is not None:
            distinct = dict.fromkeys(shards)
            self._cache.prefetch([self._shards[shard] for shard in distinct if shard in self._stored])

    def require_room(self, blocks: int) -> None:
        """Holds the cache to what has to be in it at a time: that many blocks, and two shards.

        Raises:
            ConfigurationError: it has less room.
        """
        if self._cache is not None:
            entries = [self._shards[shard].entry for shard in self._stored]
            total = sum(entry.bytes for entry in entries)
            share = blocks / max(1, sum(entry.blocks for entry in entries))
            self._cache.require_room(min(total, round(share * total) + 2 * max(entry.bytes for entry in entries)))

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
        with ShardReader(self._shards[0].path) as reader:
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
        return Batch(concatenated([self._row(position) for position in positions]), none, none)

    def _row(self, position: int) -> ShardContent:
        if not 0 <= position < len(self):
            raise IndexError(position)
        index = int(np.searchsorted(self._ends, position, side="right"))
        if self._loaded is None or self._loaded[0] != index:
            self._corpus.prefetch(group.shard for group in self._groups[index : index + _PREFETCHED_GROUPS])
            self._loaded = index, self._corpus.read(self._groups[index])
        first = int(self._ends[index - 1]) if index else 0
        return take(self._loaded[1], np.array([position - first]))


def take(content: ShardContent, rows: npt.NDArray[np.int64]) -> ShardContent:
    """A copy of some rows; of rows that follow each other, as a run reads them, in one piece."""
    first, count = int(rows[0]), len(rows)
    if rows[-1] - first == count - 1 and (np.diff(rows) == 1).all():
        return ShardContent(**{name: values[first : first + count].copy() for name, values in content.columns()})
    return ShardContent(**{name: values[rows] for name, values in content.columns()})


def concatenated(pieces: Sequence[ShardContent]) -> ShardContent:
    """The rows of all pieces, in order."""
    if len(pieces) == 1:
        return pieces[0]
    names = [name for name, _ in pieces[0].columns()]
    return ShardContent(**{name: np.concatenate([getattr(piece, name) for piece in pieces]) for name in names})


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
