"""Documents out of a column of Parquet files, by ranges of rows.

Planning reads footers only; a range reads only the row groups that it touches, in batches of a few megabytes, however
large a row group is. A range that begins inside a row group decodes what stands before it there, and drops it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.documents.base import DEFAULT_ENCODING, Document, DocumentReader, decode
from scorer import files
from scorer.errors import ConfigurationError

logger = logging.getLogger(__name__)

_BATCH_BYTES = 4 << 20
_BATCH_ROWS = 64
"""At most: where a dictionary encodes the texts, a row group's size says little about theirs."""
_BUFFER_BYTES = 1 << 20
_FOOTERS_AT_ONCE = 16


@dataclass(frozen=True)
class RowGroup:
    """What planning needs to know of a row group."""

    rows: int
    text_bytes: int
    """Of the text column before compression."""


def read_row_groups(paths: Sequence[str], text_field: str) -> list[tuple[RowGroup, ...]]:
    """The row groups of each file, from the footers.

    Raises:
        ConfigurationError: a file is not Parquet, or has no column `text_field` of strings or bytes.
    """
    with ThreadPoolExecutor(_FOOTERS_AT_ONCE) as threads:
        return list(threads.map(lambda path: _row_groups(path, text_field), paths))


class RowReader(DocumentReader):
    """The documents of rows [start, end) of a Parquet file."""

    def __iter__(self) -> Iterator[Document]:
        """Reads the range."""
        start, end = self._range.start, self._range.end
        row = start
        try:
            with _open(self._path) as parquet:
                column = _Column(parquet, self._path, self._format.text_field)
                for cell in column.cells(start, end):
                    yield Document(row, None, *self._text(cell, column.encoding or self._format.encoding), unit="row")
                    row += 1
        except (pa.ArrowException, OSError) as error:
            if not _is_damage(error):
                raise
            logger.warning("%s is damaged: rows %d to %d cannot be read: %s", self._path, row, end - 1, _line(error))
            reason = f"the file is damaged here, and rows up to {end - 1} cannot be read: {_line(error)}"
            yield Document(row, None, None, reason, unit="row")
        self.count = end - start

    def _text(self, cell: Any, encoding: str) -> tuple[str | None, str]:
        if not cell.is_valid:
            return None, f"expected text in the column {self._format.text_field!r}, found null"
        data = (cell.value if isinstance(cell, pa.DictionaryScalar) else cell).as_buffer()
        if data.size > self._format.max_document_bytes:
            return None, self._too_long()
        return decode(data.to_pybytes(), encoding)


class _Column:
    """The column of a Parquet file that holds the text."""

    def __init__(self, parquet: Any, path: str, name: str):
        schema = parquet.schema_arrow
        if schema.names.count(name) != 1:
            raise ConfigurationError(
                f"{path}: expected one column {name!r}, found {schema.names.count(name)}; its columns are "
                f"{', '.join(schema.names) or 'none'}: name the one that holds the text with --text_field"
            )
        if (is_string := _is_string(schema.field(name).type)) is None:
            raise ConfigurationError(
                f"{path}: the column {name!r} holds {schema.field(name).type}: expected strings or bytes; name another "
                "with --text_field"
            )
        self._parquet = parquet
        self._name = name
        leaves = [parquet.schema.column(index) for index in range(len(parquet.schema))]
        # A field `b` in a struct `a` has the path of a column that is named `a.b`, but another name.
        self._index = next(index for index, leaf in enumerate(leaves) if leaf.path == leaf.name == name)
        self.encoding = DEFAULT_ENCODING if is_string else None
        """Of strings; bytes have that of the corpus."""

    def row_groups(self) -> Iterator[RowGroup]:
        metadata = self._parquet.metadata
        for index in range(metadata.num_row_groups):
            group = metadata.row_group(index)
            yield RowGroup(group.num_rows, group.column(self._index).total_uncompressed_size)

    def cells(self, start: int, end: int) -> Iterator[Any]:
        """The scalars of rows [start, end) of the file."""
        first = 0
        for index, group in enumerate(self.row_groups()):
            if first < end and first + group.rows > start:
                yield from self._cells_of(index, group, max(start - first, 0), min(end - first, group.rows))
            first += group.rows
        if first < end:
            raise pa.ArrowInvalid(f"the file has {first} rows, {end} were planned")

    def _cells_of(self, index: int, group: RowGroup, start: int, end: int) -> Iterator[Any]:
        batch_rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES * group.rows // max(1, group.text_bytes)))
        first = 0
        for batch in self._parquet.iter_batches(batch_rows, [index], [self._name], use_threads=False):
            cells = batch.column(self._name)
            cells = cells.storage if isinstance(cells, pa.ExtensionArray) else cells
            yield from cells[max(start - first, 0) : max(end - first, 0)]
            first += len(cells)
            if first >= end:
                return
        raise pa.ArrowInvalid(f"row group {index} has {first} rows, its footer says {group.rows}")


def _row_groups(path: str, text_field: str) -> tuple[RowGroup, ...]:
    try:
        with _open(path) as parquet:
            return tuple(_Column(parquet, path, text_field).row_groups())
    except (pa.ArrowException, OSError) as error:
        raise ConfigurationError(
            f"{path} cannot be read as Parquet ({_line(error)}): write or fetch it again, or leave it out of --input"
        ) from error


@contextmanager
def _open(path: str) -> Iterator[Any]:
    with (
        files.open_binary(path) as stream,
        pq.ParquetFile(stream, pre_buffer=False, buffer_size=_BUFFER_BYTES, page_checksum_verification=True) as parquet,
    ):
        yield parquet


def _is_string(type_: Any) -> bool | None:
    """True for strings, False for bytes, None for what is no text."""
    if isinstance(type_, pa.BaseExtensionType):
        return _is_string(type_.storage_type)
    if pa.types.is_dictionary(type_):
        return _is_string(type_.value_type)
    if pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_string_view(type_):
        return True
    is_bytes = pa.types.is_binary(type_) or pa.types.is_large_binary(type_) or pa.types.is_binary_view(type_)
    return False if is_bytes or pa.types.is_fixed_size_binary(type_) else None


def _is_damage(error: Exception) -> bool:
    """Whether Arrow found fault with the bytes; what a store raises has an error number or a type of its own."""
    return isinstance(error, pa.ArrowException) or (type(error) is OSError and error.errno is None)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
