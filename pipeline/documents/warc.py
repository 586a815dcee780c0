"""Documents out of web archives: the records of WET and WARC files that hold plain text.

An archive is read as one stream from its beginning, whatever it is compressed with. Records that are no text (requests,
metadata, HTML) are skipped; an archive that holds nothing else is worth a warning.
"""

from __future__ import annotations

import logging
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

from warcio.archiveiterator import WARCIterator
from warcio.bufferedreaders import BufferedReader, ChunkedDataReader
from warcio.exceptions import ArchiveLoadFailed
from warcio.limitreader import LimitReader
from warcio.statusandheaders import StatusAndHeadersParser

from pipeline.documents.base import Document, DocumentReader, decode
from scorer import files
from scorer.errors import ArchiveError

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 1 << 16
_MAX_HEADER_BYTES = 1 << 20
"""What is not a record's header by then is none: a line of a damaged archive may never end."""
_TEXT_RECORDS = ("conversion", "resource")
_ZLIB_OR_GZIP = zlib.MAX_WBITS | 32


class RecordReader(DocumentReader):
    """The documents of a web archive."""

    def __iter__(self) -> Iterator[Document]:
        """Reads the archive."""
        skipped: Counter[str] = Counter()
        texts = 0
        with files.open_binary(self._path, self._range.compression) as stream:
            archive = _Archive(stream)
            try:
                while record := archive.next_record():
                    kind, content_type = record.kind()
                    text, reason = self._text(record) if content_type == "text/plain" else (None, "")
                    archive.finish(record)  # before its text is given away: it may be cut
                    if content_type == "text/plain":
                        texts += 1
                        yield Document(archive.sound_records, archive.offset, text, reason, "record")
                    else:
                        skipped[f"{kind} {content_type}".strip()] += 1
            except ArchiveError as error:
                logger.warning("%s is cut or damaged after record %d: %s", self._path, archive.sound_records, error)
                reason = f"the archive is cut or damaged here: {error}"
                yield Document(archive.sound_records + 1, archive.offset, None, reason, "record")
            self.count = archive.records
        if not texts:
            self._warn_of_no_text(skipped)

    def _warn_of_no_text(self, skipped: Counter[str]) -> None:
        found = ", ".join(f"{count} {kind}" for kind, count in skipped.most_common(5)) or "no whole record"
        logger.warning(
            "%s holds no record of plain text (found: %s): extract the text of HTML first, into WET or .jsonl",
            self._path,
            found,
        )

    def _text(self, record: _Record) -> tuple[str | None, str]:
        limit = self._format.max_document_bytes
        if record.remaining > limit:
            return None, self._too_long()
        try:
            data = record.read(limit)
        except zlib.error as error:
            return None, f"its HTTP content encoding is damaged: {error}"
        if data is None:
            return None, f"its HTTP content encoding {record.content_encoding!r} is not known: expected gzip or deflate"
        return (None, self._too_long()) if len(data) > limit else decode(data, self._format.encoding)


class _Source:
    """The stream as warcio reads it: without losing what precedes a fault, and with an end to headers."""

    def __init__(self, stream: BinaryIO):
        self._stream = stream
        self._position = 0
        self.allowance = sys.maxsize
        """Bytes that may still be read before a record must have begun."""

    def read(self, count: int) -> bytes:
        if self.allowance <= 0:
            raise ArchiveError(f"no record begins within {_MAX_HEADER_BYTES} bytes")
        # read1 of a decompressed stream returns what stands before a cut; read would lose it with the exception.
        data = cast(bytes, getattr(self._stream, "read1", self._stream.read)(count))
        self._position += len(data)
        self.allowance -= len(data)
        return data

    def tell(self) -> int:
        return self._position


class _Archive:
    """The records of a web archive, each of which is finished before the next."""

    def __init__(self, stream: BinaryIO):
        # It warns of every space in an address, and nobody can mend those; addresses are not read here.
        logging.getLogger("warcio.recordloader").setLevel(logging.ERROR)
        self._source = _Source(stream)
        self._archive = WARCIterator(self._source, no_record_parse=True)
        # warcio would decompress by itself, and take a cut for the end.
        self._archive.reader = BufferedReader(self._source)
        self.records = 0
        """How many have begun."""
        self.sound_records = 0
        """How many have been read to their end."""
        self.offset = 0
        """Of the last record that began, or should have, in the decompressed archive."""
        self._fault: ArchiveError | None = None
        """What was met behind the last record."""

    def next_record(self) -> _Record | None:
        """The next record, of which only the headers are read; None at the end.

        Raises:
            ArchiveError: there is something else, or the stream is cut or damaged.
        """
        if self._fault is not None:
            self.offset = self._source.tell()
            raise self._fault
        self.offset = self._archive.offset
        self._source.allowance = _MAX_HEADER_BYTES
        try:
            record = next(self._archive)
        except StopIteration:
            return None
        except ArchiveLoadFailed as error:
            raise ArchiveError(f"expected a WARC record ({' '.join(str(error).split())[:200]})") from error
        self._source.allowance = sys.maxsize
        self.records += 1
        length = record.rec_headers.get_header("Content-Length") or ""
        if not (length.isascii() and length.isdigit()):
            raise ArchiveError(f"a record whose Content-Length is {length!r}")
        return _Record(record)

    def finish(self, record: _Record) -> None:
        """Reads on to where the next record begins; what is wrong behind the record does not cost the record.

        Raises:
            ArchiveError: the record is shorter or longer than it says, or the stream is cut or damaged inside it.
        """
        record.skip()
        if record.remaining:
            raise ArchiveError(f"the record ends {record.remaining} bytes before its Content-Length")
        self._source.allowance = _MAX_HEADER_BYTES
        try:
            self._archive.read_to_end()
        except ArchiveError as error:
            self._fault = error
        if self._archive.err_count:
            raise ArchiveError("the record does not end where its Content-Length says")
        self.sound_records += 1


class _Record:
    """One record of a web archive."""

    def __init__(self, record: Any):
        self._record = record
        self._http: Any = None

    @property
    def remaining(self) -> int:
        """Bytes of the record that are not read yet."""
        return int(self._record.raw_stream.limit)

    @property
    def content_encoding(self) -> str:
        """How the server compressed the body."""
        return _token(self._http, "Content-Encoding")

    def kind(self) -> tuple[str, str]:
        """WARC-Type, and the media type of the body where the record could hold a document."""
        kind = _token(self._record.rec_headers, "WARC-Type")
        if kind in _TEXT_RECORDS:
            return kind, _token(self._record.rec_headers, "Content-Type")
        if kind != "response":
            return kind, ""
        parser = StatusAndHeadersParser(["HTTP/"], verify=False)
        try:
            self._http = parser.parse(LimitReader(self._record.raw_stream, _MAX_HEADER_BYTES))
        except EOFError:
            return kind, ""
        return kind, _token(self._http, "Content-Type")

    def skip(self) -> None:
        """Reads what remains, and forgets it."""
        while self._record.raw_stream.read(_CHUNK_BYTES):
            pass

    def read(self, limit: int) -> bytes | None:
        """The body, or of one that is longer its first `limit` + 1 bytes; None where its encoding is not known.

        Raises:
            zlib.error: it is compressed, and damaged.
        """
        stream = self._record.raw_stream
        if _token(self._http, "Transfer-Encoding") == "chunked":
            stream = ChunkedDataReader(stream)
        data = bytearray()
        while len(data) <= limit and (chunk := stream.read(min(_CHUNK_BYTES, limit + 1 - len(data)))):
            data += chunk
        if self.content_encoding in ("", "identity"):
            return bytes(data)
        if self.content_encoding not in ("gzip", "x-gzip", "deflate"):
            return None
        decompressor = zlib.decompressobj(_ZLIB_OR_GZIP)
        text = decompressor.decompress(bytes(data), limit + 1)
        if len(text) <= limit and not decompressor.eof:
            raise zlib.error("it ends before its end-of-stream marker")
        return text


def _token(headers: Any, name: str) -> str:
    """A header without its parameters, in lower case; '' where there is none."""
    value = headers.get_header(name) if headers is not None else None
    return (value or "").partition(";")[0].strip().lower()
