"""The shard format: one Parquet file of 512-token blocks with both directions' perplexities.

docs/shard-format.md describes it for readers in other languages. Block shards are the same file with the first
column only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from scorer import files
from scorer.console import first_line
from scorer.errors import ShardError
from scorer.vocabulary import Vocabulary

FORMAT_VERSION = 1
BLOCK_LENGTH = 512
"""Tokens a block, its frame included."""
RUN_LENGTH = BLOCK_LENGTH - 2
"""Tokens of the corpus a block: the frame takes one at either end."""
ROW_GROUP_BLOCKS = 256
DEFAULT_MANTISSA_BITS = 10
_FLOAT32_MANTISSA_BITS = 23
FOOTER_KEY = b"hardness"
ID_COLUMN = "input_ids"
_UNREADABLE = (pa.ArrowException, OSError, ValueError)
"""What pyarrow raises on damaged bytes; a flipped bit in a footer may look like anything."""
PERPLEXITY_COLUMNS = ("forward_perplexity", "backward_perplexity")


@dataclass(frozen=True)
class ShardContent:
    """The rows of a shard, or some of them."""

    input_ids: npt.NDArray[np.unsignedinteger[Any]]
    """uint16 or uint32 [N, 512]."""
    forward_perplexity: npt.NDArray[np.float32] | None = None
    """float32 [N, 512]; 0 where the token has none. None in block shards."""
    backward_perplexity: npt.NDArray[np.float32] | None = None
    """float32 [N, 512]; 0 where the token has none. None in block shards."""

    def __len__(self) -> int:
        return len(self.input_ids)

    def columns(self) -> Iterator[tuple[str, npt.NDArray[Any]]]:
        """Name and values of each column, in schema order."""
        yield ID_COLUMN, self.input_ids
        for name in PERPLEXITY_COLUMNS:
            values = getattr(self, name)
            if values is not None:
                yield name, values

    def sha256(self) -> str:
        """Fingerprint of the values, whatever the file's encoding: the manifest's `content_sha256`.

        Per column in schema order: the line `name dtype rows`, then the values, little-endian, row by row.
        """
        digest = hashlib.sha256()
        for name, values in self.columns():
            digest.update(column_header(name, values.dtype, len(values)))
            digest.update(little_endian(values))
        return digest.hexdigest()


@dataclass(frozen=True)
class ShardMetadata:
    """A shard's footer: what it holds, what made it, and nothing of when or where."""

    vocabulary: Vocabulary
    alm: Mapping[str, str] | None
    """Fingerprints of the two directions; None in block shards."""
    split: list[dict[str, Any]]
    """The byte ranges this shard was made from: `file`, `start`, `end`."""
    documents: int
    """Documents that gave at least one token."""
    blocks: int
    rejected_documents: int
    leftover_tokens: int
    """Tokens after the last whole block of the split, fewer than 510; they are in no block."""
    clamped_values: int
    """How many NLLs exceeded 80 nats and were cut there."""
    device: str | None
    dtype: str | None
    micro_batch: int | None
    versions: Mapping[str, str]
    content_sha256: str
    """ShardContent.sha256 of the rows."""

    @property
    def tokens(self) -> int:
        """Tokens in blocks, document separators included, frames not."""
        return RUN_LENGTH * self.blocks

    def to_json(self) -> dict[str, Any]:
        """The footer's JSON object (DESIGN, section 2)."""
        fields = asdict(self) | {"special_ids": dict(self.vocabulary.special_ids)}
        del fields["vocabulary"]
        return fields | {
            "format_version": FORMAT_VERSION,
            "block_length": BLOCK_LENGTH,
            "vocabulary_size": self.vocabulary.size,
            "start_id": self.vocabulary.start_id,
            "end_id": self.vocabulary.end_id,
            "mask_id": self.vocabulary.mask_id,
            "tokenizer": self.vocabulary.fingerprints,
            "tokens": self.tokens,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ShardMetadata:
        """The inverse of `to_json`."""
        fields = dict(value)
        vocabulary = Vocabulary(
            size=fields.pop("vocabulary_size"),
            special_ids=fields.pop("special_ids"),
            start_id=fields.pop("start_id"),
            end_id=fields.pop("end_id"),
            mask_id=fields.pop("mask_id"),
            **fields.pop("tokenizer"),
        )
        for derived in ("format_version", "block_length", "tokens"):
            del fields[derived]
        return cls(vocabulary=vocabulary, **fields)


def shard_name(index: int, count: int) -> str:
    """`shard-00000-of-00042.parquet`."""
    return f"shard-{index:05d}-of-{count:05d}.parquet"


def round_mantissa(values: npt.NDArray[np.float32], bits: int = DEFAULT_MANTISSA_BITS) -> npt.NDArray[np.float32]:
    """Rounds float32 to `bits` bits of mantissa, half to even, so that zstd finds the zeros (BitRound).

    Relative error at most 2**-(bits + 1). Values stay at least 1 if they were, and 0 stays 0.
    Source: Kloewer et al. 2021, doi:10.1038/s43588-021-00156-2.
    """
    dropped = _FLOAT32_MANTISSA_BITS - bits
    if dropped == 0:
        return values
    raw = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    half_to_even = np.uint32((1 << (dropped - 1)) - 1) + ((raw >> np.uint32(dropped)) & np.uint32(1))
    rounded = (raw + half_to_even) & np.uint32(~((1 << dropped) - 1) & 0xFFFFFFFF)
    return rounded.view(np.float32)


def column_types(metadata: ShardMetadata) -> dict[str, pa.DataType]:
    """Name and type of each column of a shard, in schema order."""
    types = {ID_COLUMN: pa.list_(pa.from_numpy_dtype(metadata.vocabulary.id_dtype), BLOCK_LENGTH)}
    if metadata.alm is not None:
        types |= {name: pa.list_(pa.float32(), BLOCK_LENGTH) for name in PERPLEXITY_COLUMNS}
    return types


def column_header(name: str, dtype: np.dtype[Any], rows: int) -> bytes:
    """What goes into `content_sha256` before the values of a column."""
    return f"{name} {dtype.name} {rows}\n".encode()


def little_endian(values: npt.NDArray[Any]) -> memoryview:
    """The bytes of values, row by row, as `content_sha256` has them."""
    return np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<")).data


class ShardReader:
    """One open shard. Reads row groups on demand; page checksums are verified on the way."""

    def __init__(self, path: str, stream: BinaryIO | None = None):
        """Opens a shard and reads its footer.

        Args:
            path: of the shard, for opening and for messages.
            stream: its bytes, where the caller has them already; closed with the reader.

        Raises:
            ShardError: it cannot be opened, or is not a shard of this format.
        """
        self.path = path
        try:
            stream = stream or files.open_binary(path)
        except OSError as error:
            raise ShardError(f"{path} cannot be opened: {error}") from error
        try:
            self._file = pq.ParquetFile(stream, page_checksum_verification=True)
            self._schema = self._file.schema_arrow  # made anew at each look
            self.metadata = self._parse_footer()
            self._check_row_groups()
        except _UNREADABLE as error:
            stream.close()
            raise ShardError(f"{path} cannot be read as Parquet: {error}") from error
        except ShardError:
            stream.close()
            raise

    def __len__(self) -> int:
        return int(self._file.metadata.num_rows)

    @property
    def row_groups(self) -> int:
        """Number of row groups, of 256 blocks each but the last."""
        return int(self._file.num_row_groups)

    def read_row_group(self, index: int, perplexities: bool = True) -> ShardContent:
        """Reads one row group.

        Raises:
            ShardError: a checksum fails or a column has another shape; the message names the row group and its rows.
        """
        return ShardContent(**self._read([index], self._columns(perplexities)))

    def read(self, perplexities: bool = True) -> ShardContent:
        """Reads the whole shard.

        Raises:
            ShardError: a checksum fails or a column has another shape.
        """
        return ShardContent(**self._read(list(range(self.row_groups)), self._columns(perplexities)))

    def content_sha256(self, perplexities: bool = True) -> str:
        """`ShardContent.sha256` of all rows, without holding more than one column of one row group.

        Args:
            perplexities: False for the fingerprint that a block shard of the same `input_ids` has.

        Raises:
            ShardError: a checksum fails or a column has another shape; the message names the row group and its rows.
        """
        digest = hashlib.sha256()
        for name in self._columns(perplexities):
            dtype = np.dtype(self._schema.field(name).type.value_type.to_pandas_dtype())
            digest.update(f"{name} {dtype.name} {len(self)}\n".encode())
            for index in range(self.row_groups):
                values = self._read([index], [name])[name]
                digest.update(np.ascontiguousarray(values, dtype=dtype.newbyteorder("<")).data)
        return digest.hexdigest()

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close(force=True)

    def _columns(self, perplexities: bool) -> list[str]:
        wanted = (ID_COLUMN, *PERPLEXITY_COLUMNS) if perplexities else (ID_COLUMN,)
        return [name for name in wanted if name in self._schema.names]

    def _read(self, groups: list[int], columns: list[str]) -> dict[str, npt.NDArray[Any]]:
        try:
            table = self._file.read_row_groups(groups, columns=columns, use_threads=False)
            return {name: self._to_numpy(table[name]) for name in columns}
        except _UNREADABLE as error:
            what = self.path
            if len(groups) == 1:
                first = groups[0] * ROW_GROUP_BLOCKS
                what += f", row group {groups[0]} (rows {first}:{min(first + ROW_GROUP_BLOCKS, len(self))})"
            raise ShardError(f"{what} cannot be read: {first_line(error)}") from error

    def _to_numpy(self, column: pa.ChunkedArray) -> npt.NDArray[Any]:
        flat = [chunk.flatten() for chunk in column.chunks]
        if column.null_count or any(values.null_count for values in flat):
            raise ValueError(f"it holds nulls in {column.type}")
        arrays = [values.to_numpy() for values in flat]
        if len(arrays) != 1:
            arrays = [np.concatenate([np.empty(0, dtype=column.type.value_type.to_pandas_dtype()), *arrays])]
        values: npt.NDArray[Any] = arrays[0].reshape(-1, BLOCK_LENGTH)
        return values

    def _check_row_groups(self) -> None:
        """Readers find a row by arithmetic, so every row group but the last must be full."""
        rows = [self._file.metadata.row_group(index).num_rows for index in range(self.row_groups)]
        is_regular = all(count == ROW_GROUP_BLOCKS for count in rows[:-1]) and max(rows, default=0) <= ROW_GROUP_BLOCKS
        if not is_regular or sum(rows) != len(self):
            raise ShardError(
                f"{self.path} holds {len(self)} rows in row groups of {str(rows[:3])[1:-1]}{', …' * (len(rows) > 3)}: "
                f"expected {ROW_GROUP_BLOCKS} in each but the last"
            )

    def _parse_footer(self) -> ShardMetadata:
        raw = (self._file.metadata.metadata or {}).get(FOOTER_KEY)
        if raw is None:
            raise ShardError(f"{self.path} has no {FOOTER_KEY.decode()!r} entry in its footer: it is not a shard")
        if (self._schema.metadata or {}).get(FOOTER_KEY) != raw:
            # Arrow keeps a copy in its own schema entry, and shows that one to whoever reads with pyarrow.
            raise ShardError(f"{self.path} has two {FOOTER_KEY.decode()!r} entries in its footer that differ")
        try:
            value = json.loads(raw)
            version, length = value["format_version"], value["block_length"]
            if version != FORMAT_VERSION or length != BLOCK_LENGTH:
                raise ShardError(
                    f"{self.path} is of format {version} with blocks of {length} tokens; "
                    f"expected format {FORMAT_VERSION} with {BLOCK_LENGTH}"
                )
            metadata = ShardMetadata.from_json(value)
            types = column_types(metadata)
            if metadata.tokens != value["tokens"]:
                raise ValueError(f"{value['tokens']!r} tokens in {metadata.blocks!r} blocks")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ShardError(f"{self.path} has an unreadable footer: {error!r}") from error
        if self._schema.names != list(types) or any(
            not self._schema.field(name).type.equals(types[name]) for name in types
        ):
            raise ShardError(f"{self.path} has other columns than {', '.join(types)} of {BLOCK_LENGTH} values a row")
        return metadata
