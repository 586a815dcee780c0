"""What makes a folder of shards a corpus: the receipt of each shard, and the manifest of them all."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from scorer import files
from scorer.errors import ConfigurationError, ShardError
from scorer.shards import BLOCK_LENGTH, FORMAT_VERSION, RUN_LENGTH

MANIFEST_NAME = "_manifest.json"
RECEIPTS_FOLDER = "_receipts"
REJECTS_NAME = "_rejects.jsonl"
TOKENIZER_FOLDER = "tokenizer"
_UNREADABLE = (AttributeError, KeyError, TypeError, ValueError)
"""What JSON raises that is not what was written."""

Unit = Literal["line", "row", "record"]
"""What the places of a file count: lines of text, rows of a Parquet file, records of a web archive."""
_UNITS: tuple[Unit, ...] = ("line", "row", "record")


@dataclass(frozen=True)
class Reject:
    """A document that could not be used, and where it stands."""

    file: str
    """Relative to the longest common folder of the inputs."""
    line: int
    """Number of the line, row or record. Lines count from 1, in a receipt from the beginning of the split's range of
    the file and in `_rejects.jsonl` from that of the file; rows from 0 and records from 1, always in the file."""
    offset: int | None
    """Bytes from the beginning of the (decompressed) file; None for rows."""
    reason: str
    unit: Unit = "line"
    """What `line` counts."""

    def to_json(self) -> dict[str, Any]:
        """The reject's JSON object, in which the number stands under the name of its unit."""
        offset = {} if self.offset is None else {"offset": self.offset}
        return {"file": self.file, self.unit: self.line, **offset, "reason": self.reason}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Reject:
        """The inverse of `to_json`.

        Raises:
            KeyError: it names no place.
        """
        unit: Unit = next((unit for unit in _UNITS if unit in value), "line")
        return cls(value["file"], value[unit], value.get("offset"), value["reason"], unit)


@dataclass(frozen=True)
class ShardEntry:
    """One shard, as the manifest lists it."""

    name: str
    blocks: int
    bytes: int
    sha256: str
    content_sha256: str


@dataclass(frozen=True)
class Receipt:
    """What a shard's publisher vouches for; published just before the shard itself."""

    shard: str
    sha256: str
    """Of the shard's file."""
    bytes: int
    """Of the shard's file."""
    content_sha256: str
    documents: int
    blocks: int
    rejected_documents: int
    leftover_tokens: int
    lines: Mapping[str, int] = field(default_factory=dict)
    """Lines (rows, records) that begin in the split's range of each file: what makes the rejects' lines absolute."""
    rejects: list[Reject] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens in blocks, frames not counted."""
        return RUN_LENGTH * self.blocks

    @property
    def entry(self) -> ShardEntry:
        """The shard as the manifest lists it."""
        return ShardEntry(self.shard, self.blocks, self.bytes, self.sha256, self.content_sha256)

    def to_json(self) -> dict[str, Any]:
        """The receipt's JSON object."""
        return {**asdict(self), "rejects": [reject.to_json() for reject in self.rejects], "tokens": self.tokens}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Receipt:
        """The inverse of `to_json`."""
        fields = {key: item for key, item in value.items() if key != "tokens"}
        fields["rejects"] = [Reject.from_json(reject) for reject in fields["rejects"]]
        return cls(**fields)


@dataclass(frozen=True)
class Manifest:
    """The list of a complete folder's shards; its presence means that the folder is complete."""

    documents: int
    rejected_documents: int
    leftover_tokens: int
    tokenizer: Mapping[str, str]
    """Fingerprints (Vocabulary.fingerprints)."""
    alm: Mapping[str, str] | None
    """Fingerprints of the two directions; None for block shards."""
    shards: list[ShardEntry]

    @property
    def blocks(self) -> int:
        """Blocks of all shards."""
        return sum(shard.blocks for shard in self.shards)

    @property
    def tokens(self) -> int:
        """Tokens of all blocks, frames not counted."""
        return RUN_LENGTH * self.blocks

    def to_json(self) -> dict[str, Any]:
        """The manifest's JSON object (DESIGN, section 2)."""
        return asdict(self) | {
            "format_version": FORMAT_VERSION,
            "block_length": BLOCK_LENGTH,
            "blocks": self.blocks,
            "tokens": self.tokens,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Manifest:
        """The inverse of `to_json`."""
        derived = ("format_version", "block_length", "blocks", "tokens")
        fields = {key: item for key, item in value.items() if key not in derived}
        fields["shards"] = [ShardEntry(**shard) for shard in fields["shards"]]
        return cls(**fields)


def receipt_path(folder: str, index: int) -> str:
    """Where the receipt of shard `index` lies."""
    return files.join(folder, RECEIPTS_FOLDER, f"{index:05d}.json")


def read_receipt(folder: str, index: int) -> Receipt | None:
    """The receipt of shard `index`, or None where there is none that can be read."""
    try:
        return Receipt.from_json(files.read_json(receipt_path(folder, index)))
    except (FileNotFoundError, IsADirectoryError, *_UNREADABLE):
        return None


def read_receipts(folder: str, indices: Iterable[int]) -> Iterator[Receipt | None]:
    """`read_receipt` of many shards, in order."""
    for data in files.read_many(receipt_path(folder, index) for index in indices):
        try:
            yield None if data is None else Receipt.from_json(json.loads(data))
        except _UNREADABLE:
            yield None


def has_manifest(folder: str) -> bool:
    """Says whether `folder` is a complete folder of shards."""
    return files.exists(files.join(folder, MANIFEST_NAME))


def read_manifest(folder: str) -> Manifest:
    """Reads the manifest of a complete folder.

    Raises:
        ConfigurationError: there is no folder, or no manifest in it.
        ShardError: the manifest cannot be read, or is of another format.
    """
    path = files.join(folder, MANIFEST_NAME)
    if not files.is_folder(folder):
        raise ConfigurationError(f"there is no folder {folder}: expected a folder of shards")
    try:
        value = files.read_json(path)
        if value["format_version"] != FORMAT_VERSION or value["block_length"] != BLOCK_LENGTH:
            raise ShardError(f"{path} is of another format: expected {FORMAT_VERSION} with {BLOCK_LENGTH}-token blocks")
        return Manifest.from_json(value)
    except FileNotFoundError as error:
        raise ConfigurationError(
            f"{folder} has no {MANIFEST_NAME}, so its shards are not complete: see "
            f"`python -m pipeline.status {folder}`, and run the command that writes them again to finish it"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{path} cannot be read ({error!r}): run the command that wrote it again") from error
