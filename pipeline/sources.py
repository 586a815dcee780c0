"""Where the blocks of a split come from: text, tokenized now, or block shards that were tokenized before.

A source is a small recipe that travels to the workers; each opens it once, and then reads split after split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from pipeline.corpus import TextFormat
from pipeline.plan import Split
from pipeline.tokenization import Account, BlockStream, Ids, SplitTokenizer
from scorer import files
from scorer.errors import ShardError
from scorer.manifest import Receipt, read_manifest, read_receipt
from scorer.shards import ShardReader
from scorer.tokenizer import load_tokenizer
from scorer.vocabulary import Vocabulary

Report = Callable[[str], None]
"""Told the place in the corpus that is about to be read."""


class ReadSplit(Protocol):
    """An open source."""

    def __call__(self, split: Split, careful: bool = False, report: Report = ...) -> BlockStream:
        """Opens one split; see `SplitTokenizer.tokenize`."""


class Source(Protocol):
    """Recipe for reading splits."""

    def open(self) -> ReadSplit:
        """Loads what reading needs, once a worker."""


@dataclass(frozen=True)
class TextSource:
    """Text files, cut by byte ranges."""

    root: str
    """The folder that the plan's file names are relative to."""
    text_format: TextFormat
    tokenizer: str
    """The folder in which the job saved it."""
    vocabulary: Vocabulary

    def open(self) -> ReadSplit:
        """Loads the tokenizer."""
        return SplitTokenizer(self.root, self.text_format, load_tokenizer(self.tokenizer), self.vocabulary).tokenize


@dataclass(frozen=True)
class BlockSource:
    """A complete folder of block shards, one a split."""

    folder: str

    def open(self) -> ReadSplit:
        """Reads the manifest."""
        entries = {shard.name: shard for shard in read_manifest(self.folder).shards}

        def read(split: Split, careful: bool = False, report: Report = lambda _: None) -> BlockStream:
            report(split.shard)
            path, entry = files.join(self.folder, split.shard), entries[split.shard]
            receipt = read_receipt(self.folder, split.index)
            if receipt is None or files.sha256(path) != (entry.sha256, entry.bytes):
                raise ShardError(
                    f"{path} or its receipt is not what the manifest lists: "
                    "run tokenize_corpus again; it makes damaged shards anew"
                )
            return ShardBlocks(path, receipt)

        return read


class ShardBlocks:
    """The `BlockStream` of a block shard, with its account of documents and rejects."""

    def __init__(self, path: str, receipt: Receipt):
        """Reads the account; blocks are read row group by row group."""
        self._path = path
        with ShardReader(path) as reader:
            source = reader.metadata.split
        self.account = Account(
            source=source,
            documents=receipt.documents,
            leftover_tokens=receipt.leftover_tokens,
            rejected_documents=receipt.rejected_documents,
            lines=receipt.lines,
            rejects=receipt.rejects,
        )

    def __iter__(self) -> Iterator[Ids]:
        with ShardReader(self._path) as reader:
            for index in range(reader.row_groups):
                yield reader.read_row_group(index, perplexities=False).input_ids
