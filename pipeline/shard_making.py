"""What a worker does with one split: read its blocks, fill in what the shard holds of them, publish.

    split ─▶ blocks, 256 at a time ─▶ rows ─▶ buffer ─▶ receipt, shard

Memory is that of a row group and a bounded buffer, however large the split.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import cloudpickle

from pipeline.plan import Split
from pipeline.publication import Draft, Provenance, PublishedShard, publish_split
from pipeline.sources import ReadSplit, Report, Source
from pipeline.tokenization import Ids
from scorer import files
from scorer.shard_writing import ShardBuffer
from scorer.shards import ShardContent


@dataclass(frozen=True)
class Rows:
    """Rows of a shard."""

    content: ShardContent
    clamped_values: int = 0
    """NLLs of ordinary tokens that exceeded 80 nats and were cut there."""


FillRows = Callable[[Ids], Rows]
"""Blocks [N, 512] to the rows of the shard; may be called from several threads."""


class Step(Protocol):
    """Recipe for a `FillRows`; each worker opens it once, when its first split is there."""

    def open(self) -> FillRows:
        """Loads what it needs."""


@dataclass(frozen=True)
class KeepBlocks:
    """The step of tokenize_corpus: block shards hold the blocks and nothing else."""

    def open(self) -> FillRows:
        """Nothing is needed."""
        return lambda ids: Rows(ShardContent(ids))


@dataclass(frozen=True)
class Recipe:
    """All that a worker must know to make the shards of a job."""

    folder: str
    """Of the shards."""
    source: Source
    step: Step
    provenance: Provenance

    def open(self) -> ShardMaker:
        """Loads tokenizer and model, and tidies up after makers that were killed on this machine."""
        files.sweep_staging(self.folder)
        return ShardMaker(self.folder, self.source.open(), self.step.open(), self.provenance)


@dataclass(frozen=True)
class PackedRecipe:
    """A recipe on its way: whoever hands it on need not import what its step needs, torch among it."""

    folder: str
    """Of the shards."""
    packed: bytes

    @classmethod
    def of(cls, recipe: Recipe) -> PackedRecipe:
        """Packs it."""
        return cls(recipe.folder, cloudpickle.dumps(recipe))

    def unpack(self) -> Recipe:
        """The recipe."""
        recipe: Recipe = cloudpickle.loads(self.packed)
        return recipe


class ShardMaker:
    """An open recipe; one serves several threads."""

    def __init__(self, folder: str, read: ReadSplit, fill: FillRows, provenance: Provenance):
        self._folder = folder
        self._read = read
        self._fill = fill
        self._provenance = provenance

    def make(
        self, split: Split, careful: bool, at: Report = lambda _: None, done: Callable[[int], None] = lambda _: None
    ) -> PublishedShard:
        """Makes and publishes one shard.

        Args:
            split: which.
            careful: go document by document, so that `at` names the very one where it fails.
            at: told the place in the corpus that is about to be read.
            done: told how many blocks are ready to be written.
        """
        provenance = self._provenance
        blocks = self._read(split, careful, at)
        clamped = 0
        with ShardBuffer(
            provenance.vocabulary.id_dtype, provenance.alm is not None, files.local_path(self._folder)
        ) as buffer:
            for ids in blocks:
                rows = self._fill(ids)
                buffer.append(rows.content)
                clamped += rows.clamped_values
                done(len(buffer))
            return publish_split(self._folder, Draft(split, buffer, blocks.account, clamped), provenance)
