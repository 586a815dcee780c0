"""What a job reads: `--input` resolved to text files or to block shards, and the vocabulary that goes with them."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from pipeline.corpus import SUFFIXES, FileRange, RowGroup, TextFormat, read_row_groups
from pipeline.expansion import expand
from pipeline.plan import (
    DEFAULT_SPLIT_BYTES,
    Split,
    common_folder,
    plan_path,
    read_plan,
    split_block_shards,
    split_files,
)
from pipeline.sources import BlockSource, Source, TextSource
from pipeline.tokenization import Ids
from scorer import files
from scorer.errors import ConfigurationError
from scorer.manifest import MANIFEST_NAME, TOKENIZER_FOLDER, Manifest, has_manifest, read_manifest
from scorer.shards import ShardReader
from scorer.tokenizer import describe, fingerprint
from scorer.vocabulary import Vocabulary, require_same_vocabulary

logger = logging.getLogger(__name__)

_LARGE_ARCHIVE_BYTES = 1 << 30


@dataclass(frozen=True)
class TextInput:
    """A corpus of text files, cut into splits."""

    root: str
    """The longest common folder of the files."""
    sizes: dict[str, int]
    """Bytes of each file, by its name below the root, in corpus order."""
    split_bytes: int
    text_format: TextFormat
    row_groups: dict[str, tuple[RowGroup, ...]] = field(default_factory=dict)
    """Of each Parquet file."""

    def splits(self) -> tuple[Split, ...]:
        """Cuts the corpus."""
        return split_files(self.sizes, self.split_bytes, self._is_one_document, self.row_groups)

    def _is_one_document(self, file: str) -> bool:
        return self.text_format.txt_document == "file" and file.lower().endswith(".txt")

    def describe(self) -> str:
        """For people."""
        return f"{len(self.sizes):,} file(s), {sum(self.sizes.values()) / 1e9:,.3f} GB"

    def source(self, folder: str, vocabulary: Vocabulary) -> Source:
        """How workers read it, with the tokenizer that the job saved in its output folder."""
        return TextSource(self.root, self.text_format, files.join(folder, TOKENIZER_FOLDER), vocabulary)

    def configuration(self) -> dict[str, Any]:
        """The corpus's part of the plan's configuration."""
        return {
            "source": "text",
            "split_bytes": self.split_bytes,
            "text_field": self.text_format.text_field,
            "txt_document": self.text_format.txt_document,
            "max_document_bytes": self.text_format.max_document_bytes,
            "encoding": self.text_format.encoding,
            "input_files": self.sizes,
        }


@dataclass(frozen=True)
class BlockInput:
    """A complete folder of block shards."""

    root: str
    manifest: Manifest
    vocabulary: Vocabulary
    """As the plan of the folder has it, frame tokens included."""

    def splits(self) -> tuple[Split, ...]:
        """One split a block shard."""
        return split_block_shards(self.manifest)

    def describe(self) -> str:
        """For people."""
        return f"{len(self.manifest.shards):,} block shard(s), {self.manifest.blocks:,} blocks"

    def sample_blocks(self) -> Iterator[Ids]:
        """Some blocks of each shard, uint16 or uint32 [N, 512]; shards without a row give none."""
        for shard in self.manifest.shards:
            if shard.blocks:
                with ShardReader(files.join(self.root, shard.name)) as reader:
                    yield reader.read_row_group(0, perplexities=False).input_ids

    def source(self, folder: str, vocabulary: Vocabulary) -> Source:
        """How workers read it."""
        return BlockSource(self.root)

    def configuration(self) -> dict[str, Any]:
        """The corpus's part of the plan's configuration."""
        return {
            "source": "block shards",
            "split_bytes": None,
            "text_field": None,
            "txt_document": None,
            "max_document_bytes": None,
            "encoding": None,
            "input_files": {shard.name: shard.content_sha256 for shard in self.manifest.shards},
        }


def find_text(patterns: list[str], split_bytes: int | None, text_format: TextFormat) -> TextInput:
    """Resolves `--input` to text files.

    Raises:
        ConfigurationError: something is missing, of a form that is not known, or the output of a job.
    """
    for folder in patterns:
        if files.exists(plan_path(folder)):
            raise ConfigurationError(
                f"{folder} is the output of a job, not text"
                + ("" if has_manifest(folder) else f", and it is not complete: it has no {MANIFEST_NAME}")
                + f"; see `python -m pipeline.status {folder}`"
            )
    found = expand(patterns, SUFFIXES)
    paths = list(found)
    if unknown := [path for path in paths if not path.lower().endswith(SUFFIXES)]:
        raise ConfigurationError(
            f"{unknown[0]}: expected a file that ends in {', '.join(SUFFIXES)} ({len(unknown)} input file(s) do not)"
        )
    if unnameable := [path for path in paths if not _is_utf8(path)]:
        raise ConfigurationError(f"{unnameable[0]!a}: the file's name is not UTF-8, which plans need: rename it")
    root = common_folder(paths)
    sizes = {path.removeprefix(root): size for path, size in found.items()}
    for name, size in sizes.items():
        if size > _LARGE_ARCHIVE_BYTES and FileRange(name, 0, size).is_whole:
            logger.warning(
                "%s%s has %.1f GB and cannot be cut: one worker reads all of it into one shard; "
                "smaller archives spread better",
                root,
                name,
                size / 1e9,
            )
    tables = [name for name, size in sizes.items() if FileRange(name, 0, size).form == "parquet"]
    row_groups = read_row_groups([files.join(root, name) for name in tables], text_format.text_field)
    return TextInput(
        root, sizes, split_bytes or DEFAULT_SPLIT_BYTES, text_format, dict(zip(tables, row_groups, strict=True))
    )


def find_input(patterns: list[str], split_bytes: int | None, text_format: TextFormat) -> TextInput | BlockInput:
    """Resolves `--input` to text files, or to a folder of block shards where it holds a manifest.

    Raises:
        ConfigurationError: something is missing or mixed.
    """
    folders = [pattern for pattern in patterns if files.is_folder(pattern) and has_manifest(pattern)]
    if not folders:
        return find_text(patterns, split_bytes, text_format)
    if len(patterns) > 1:
        raise ConfigurationError(f"{folders[0]} holds block shards: pass it as the only --input, one job a folder")
    if split_bytes is not None:
        raise ConfigurationError(f"--split_bytes has no meaning for {folders[0]}: its shards are the splits already")
    manifest = read_manifest(folders[0])
    if manifest.alm is not None:
        raise ConfigurationError(f"{folders[0]} holds hardness shards, which are scored already: pass block shards")
    plan = read_plan(folders[0])
    if plan is None:
        raise ConfigurationError(f"{folders[0]} has a manifest but no plan: expected the --output of tokenize_corpus")
    return BlockInput(folders[0], manifest, Vocabulary.from_json(plan.configuration.tokenizer))


def read_vocabulary(
    tokenizer: PreTrainedTokenizerBase, flags: argparse.Namespace, corpus: TextInput | BlockInput
) -> Vocabulary:
    """The vocabulary of a tokenizer, framed as the flags say or as the block shards are.

    Raises:
        ConfigurationError: there are no frame tokens, or block shards have others.
    """
    if isinstance(corpus, BlockInput):
        vocabulary = corpus.vocabulary
        framed = {"start": (flags.start_token, vocabulary.start_id), "end": (flags.end_token, vocabulary.end_id)}
        for name, (token, id_) in framed.items():
            if token is not None and vocabulary.special_ids.get(token) != id_:
                raise ConfigurationError(
                    f"--{name}_token {token} is not what the blocks in {corpus.root} are framed with: leave it out"
                )
        same = require_same_vocabulary(
            vocabulary.fingerprints,
            fingerprint(tokenizer),
            f"the block shards in {corpus.root} and the tokenizer",
            "score them with the ALM and tokenizer that they were made for",
        )
        if not same:
            logger.warning("merges or pre-tokenizer of the tokenizer differ from those of the block shards")
        return vocabulary
    vocabulary = describe(tokenizer, flags.start_token, flags.end_token)
    if vocabulary.mask_id is None:
        logger.warning("the tokenizer has no mask token: fine for an ALM, but a masked LM cannot be trained on these")
    return vocabulary


def _is_utf8(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True
