"""Documents out of the files of a corpus, whatever their form: a file's name says which reader takes it."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.documents.base import (
    DEFAULT_ENCODING,
    DEFAULT_MAX_DOCUMENT_BYTES,
    SUFFIXES,
    Document,
    DocumentReader,
    FileRange,
    Form,
    TextFormat,
    TxtDocument,
)
from pipeline.documents.lines import LineReader
from pipeline.documents.parquet import RowGroup, RowReader, read_row_groups
from pipeline.documents.warc import RecordReader
from scorer import files

__all__ = [
    "DEFAULT_ENCODING",
    "DEFAULT_MAX_DOCUMENT_BYTES",
    "SUFFIXES",
    "Document",
    "FileRange",
    "RangeReader",
    "RowGroup",
    "TextFormat",
    "TxtDocument",
    "read_row_groups",
]

_READERS: dict[Form, type[DocumentReader]] = {
    "txt": LineReader,
    "jsonl": LineReader,
    "parquet": RowReader,
    "warc": RecordReader,
}


class RangeReader:
    """The documents of one range of a file, in order; those that cannot be used come with the reason.

    A document belongs to the range that holds its first byte or its row, so any cutting gives each document once.
    """

    def __init__(self, root: str, range_: FileRange, text_format: TextFormat):
        self._reader = _READERS[range_.form](files.join(root, range_.file), range_, text_format)

    def __iter__(self) -> Iterator[Document]:
        """Iterate once."""
        return iter(self._reader)

    @property
    def lines(self) -> int:
        """After the iteration: how many lines, rows or records begin in the range."""
        return self._reader.count
