"""Writing a shard: rows gathered in bounded memory, then one Parquet file."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from scorer.errors import StorageError
from scorer.shards import (
    BLOCK_LENGTH,
    FOOTER_KEY,
    ID_COLUMN,
    PERPLEXITY_COLUMNS,
    ROW_GROUP_BLOCKS,
    ShardContent,
    ShardMetadata,
    column_header,
    column_types,
    little_endian,
)

_SPOOL_BYTES = 32 << 20
"""What a column of an unfinished shard takes in memory at most: 16 k blocks of 4-byte values."""


class ShardBuffer:
    """Gathers the rows of a shard until all are there, in bounded memory: large columns go to unnamed files.

    A shard's footer holds a fingerprint that covers its rows column by column, their count first, so that nothing of
    the file can be written before the last row is known.
    """

    def __init__(self, id_dtype: npt.DTypeLike, scored: bool, folder: str | None = None):
        """Makes an empty shard.

        Args:
            id_dtype: uint16 or uint32 (`Vocabulary.id_dtype`).
            scored: whether there are perplexities beside the ids.
            folder: a local folder for what does not fit into memory (default: the system's for temporary files).
        """
        dtypes = {ID_COLUMN: np.dtype(id_dtype)} | dict.fromkeys(PERPLEXITY_COLUMNS if scored else (), np.dtype("f4"))
        self._columns = {name: _Spool(dtype, folder) for name, dtype in dtypes.items()}
        self._blocks = 0

    def __len__(self) -> int:
        return self._blocks

    def append(self, content: ShardContent) -> None:
        """Adds rows at the end.

        Raises:
            StorageError: there is no space for what does not fit into memory.
        """
        for name, values in content.columns():
            self._columns[name].append(values)
        self._blocks += len(content)

    def sha256(self) -> str:
        """`ShardContent.sha256` of all rows."""
        digest = hashlib.sha256()
        for name, column in self._columns.items():
            digest.update(column_header(name, column.dtype, self._blocks))
            for values in column.rows(self._blocks):
                digest.update(little_endian(values))
        return digest.hexdigest()

    def row_groups(self) -> Iterator[ShardContent]:
        """The rows again, in row groups of 256."""
        columns = [column.rows(self._blocks) for column in self._columns.values()]
        for group in zip(*columns, strict=True):
            yield ShardContent(**dict(zip(self._columns, group, strict=True)))

    def close(self) -> None:
        """Lets go of the rows."""
        for column in self._columns.values():
            column.close()

    def __enter__(self) -> ShardBuffer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Spool:
    """One column of a `ShardBuffer`: in memory while it is small, else in an unnamed file."""

    def __init__(self, dtype: np.dtype[Any], folder: str | None):
        self.dtype = dtype
        self._folder = folder
        self._file = tempfile.SpooledTemporaryFile(max_size=_SPOOL_BYTES, dir=folder)  # noqa: SIM115

    def append(self, values: npt.NDArray[Any]) -> None:
        try:
            self._file.write(np.ascontiguousarray(values).data)
            self._file.flush()
        except OSError as error:
            raise StorageError(
                f"{self._folder or tempfile.gettempdir()} has no room for the rows of an unfinished shard "
                f"({error.strerror}): make room, then run the same command again"
            ) from error

    def rows(self, count: int) -> Iterator[npt.NDArray[Any]]:
        """All rows, in row groups."""
        self._file.seek(0)
        for start in range(0, count, ROW_GROUP_BLOCKS):
            rows = min(ROW_GROUP_BLOCKS, count - start)
            data = self._file.read(rows * BLOCK_LENGTH * self.dtype.itemsize)
            yield np.frombuffer(data, dtype=self.dtype).reshape(rows, BLOCK_LENGTH)

    def close(self) -> None:
        self._file.close()


def write_shard(path: str, row_groups: Iterable[ShardContent], metadata: ShardMetadata) -> None:
    """Writes a shard's Parquet file; the same rows and metadata give the same bytes.

    Args:
        path: a local file, which is overwritten.
        row_groups: the rows, in pieces of 256 but for the last.
        metadata: the footer.
    """
    types = column_types(metadata)
    footer = json.dumps(metadata.to_json(), sort_keys=True, ensure_ascii=False).encode()
    leaf = "{}.list.element"
    with pq.ParquetWriter(
        path,
        pa.schema(list(types.items()), metadata={FOOTER_KEY: footer}),
        compression="zstd",
        compression_level=1,
        use_dictionary=False,
        # Spark 3.5 reads BYTE_STREAM_SPLIT for floats only.
        column_encoding={leaf.format(name): "PLAIN" if name == ID_COLUMN else "BYTE_STREAM_SPLIT" for name in types},
        write_page_checksum=True,
    ) as writer:
        for content in row_groups:
            arrays = [
                pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).reshape(-1)), type=types[name])
                for name, values in content.columns()
            ]
            writer.write_table(pa.table(arrays, schema=writer.schema), row_group_size=ROW_GROUP_BLOCKS)
