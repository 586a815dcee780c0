"""What all forms of input share: the range of a file, how files are read, and the documents that come out."""

from __future__ import annotations

import codecs
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from scorer.compression import Compression
from scorer.errors import ConfigurationError
from scorer.manifest import Unit

Form = Literal["txt", "jsonl", "parquet", "warc"]
TxtDocument = Literal["blank-line", "line", "file"]
DEFAULT_MAX_DOCUMENT_BYTES = 16 << 20
DEFAULT_ENCODING = "utf-8"

_FORMS: dict[str, Form] = {".txt": "txt", ".jsonl": "jsonl", ".parquet": "parquet", ".wet": "warc", ".warc": "warc"}
_COMPRESSIONS: dict[str, Compression] = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
SUFFIXES = tuple(
    suffix + compression
    for suffix, form in _FORMS.items()
    for compression in ("", *(_COMPRESSIONS if form != "parquet" else ()))
)
"""How the names of files end that can be read, in lower case. Parquet compresses inside."""
_ASCII_SAMPLE = '\n\r\t {"}'


@dataclass(frozen=True)
class FileRange:
    """Bytes [start, end) of a file, or rows [start, end) of a Parquet file; `end` of a whole file is its size."""

    file: str
    """Relative to the longest common folder of the inputs."""
    start: int
    end: int

    @property
    def form(self) -> Form:
        """What the file's name says it is."""
        name = self.file.lower()
        for suffix in _COMPRESSIONS:
            name = name.removesuffix(suffix)
        return _FORMS["." + name.rpartition(".")[2]]

    @property
    def compression(self) -> Compression | None:
        """How the whole file is compressed."""
        return next((name for suffix, name in _COMPRESSIONS.items() if self.file.lower().endswith(suffix)), None)

    @property
    def is_compressed(self) -> bool:
        """Compressed files are read as one stream from their beginning."""
        return self.compression is not None

    @property
    def is_whole(self) -> bool:
        """Whether the file cannot be cut; `start` is then 0 and `end` its size."""
        return self.is_compressed or self.form == "warc"


@dataclass(frozen=True)
class TextFormat:
    """How files are cut into documents.

    Raises:
        ConfigurationError: a value out of range, or an encoding in which a line feed is not the byte 0x0A.
    """

    text_field: str = "text"
    """The field of a JSON line, or the column of a Parquet file, that holds the document."""
    txt_document: TxtDocument = "blank-line"
    """What separates documents in `.txt`: blank lines, every line ending, or nothing."""
    max_document_bytes: int = DEFAULT_MAX_DOCUMENT_BYTES
    """A longer document (a longer JSON line) is rejected without being held in memory."""
    encoding: str = DEFAULT_ENCODING
    """Python's name of the encoding of all text that does not say its own, normalized."""

    def __post_init__(self) -> None:
        if self.max_document_bytes < 1:
            raise ConfigurationError(f"--max_document_bytes {self.max_document_bytes}: expected at least 1")
        object.__setattr__(self, "encoding", _normalized_encoding(self.encoding))


@dataclass(frozen=True)
class Document:
    """One document, or where one was and why it cannot be used."""

    line: int
    """Of its line, from 1 and relative to the first line that begins in the range; or of its row or record."""
    offset: int | None
    """Bytes from the beginning of the (decompressed) file to its first; None for rows."""
    text: str | None
    """None for a rejected document."""
    reason: str = ""
    """Why it was rejected."""
    unit: Unit = "line"
    """What `line` counts. Rows (from 0) and records (from 1) count from the beginning of the file."""


class DocumentReader(ABC):
    """The documents of one range of a file, in order. Iterate once."""

    def __init__(self, path: str, range_: FileRange, text_format: TextFormat):
        self._path = path
        self._range = range_
        self._format = text_format
        self.count = 0
        """After the iteration: how many lines, rows or records begin in the range."""

    @abstractmethod
    def __iter__(self) -> Iterator[Document]:
        """Reads the range."""

    def _too_long(self) -> str:
        return f"longer than --max_document_bytes {self._format.max_document_bytes}"


def decode(data: bytes, encoding: str) -> tuple[str | None, str]:
    """The text of some bytes and '', or None and the reason why they are none."""
    try:
        text = data.decode(encoding)
        if encoding != DEFAULT_ENCODING:
            text.encode("utf-8")  # UTF-7 and the like can write lone surrogates, which no tokenizer takes
    except UnicodeDecodeError as error:
        return None, f"not {encoding.upper()}: {error.reason} at its byte {error.start}"
    except UnicodeError as error:
        return None, f"not {encoding.upper()}: {error}"
    return text, ""


def _normalized_encoding(encoding: str) -> str:
    try:
        name = codecs.lookup(encoding).name
        name = DEFAULT_ENCODING if name == "utf-8-sig" else name  # a BOM that opens a file is dropped anyway
        encoded = _ASCII_SAMPLE.encode(name)
    except LookupError as error:
        raise ConfigurationError(
            f"--encoding {encoding}: {error}; expected a text encoding that Python knows"
        ) from error
    except UnicodeError:
        encoded = b""
    if encoded != _ASCII_SAMPLE.encode("ascii"):
        raise ConfigurationError(
            f"--encoding {encoding}: its line endings are not those of ASCII, at which files are cut: convert them, "
            f"as in `iconv -f {encoding} -t UTF-8 FILE > COPY`, and leave --encoding out"
        )
    return name
