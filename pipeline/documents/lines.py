"""Documents out of lines of text: `.txt` and `.jsonl`, plain or compressed, whole or by byte range.

A document belongs to the byte range that holds its first byte, so any cutting of a file gives each document once.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, cast

from pipeline.documents.base import Document, DocumentReader, FileRange, TextFormat, decode
from scorer import files
from scorer.errors import ArchiveError

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 1 << 20
_LOOK_BACK_BYTES = 4096


class LineReader(DocumentReader):
    """The documents of one byte range of a text file."""

    def __iter__(self) -> Iterator[Document]:
        """Reads the range."""
        with files.open_binary(self._path, self._range.compression) as stream:
            lines = _Lines(stream, self._range, self._format)
            try:
                yield from self._documents(lines)
            except ArchiveError as error:
                # What stands before the cut has been yielded; the document that was being read is lost.
                logger.warning("%s is cut or damaged after line %d: %s", self._path, lines.count, error)
                yield Document(lines.count + 1, lines.position, None, f"the archive is cut or damaged here: {error}")
            self.count = lines.count

    def _documents(self, lines: _Lines) -> Iterator[Document]:
        lines.open()
        if self._range.form == "jsonl":
            return self._one_a_line(lines, self._parse_json)
        if self._format.txt_document == "line":
            return self._one_a_line(lines, lambda line: self._decode(line, _without_ending(line.data)))
        if self._format.txt_document == "file":
            return self._whole_file(lines)
        return self._paragraphs(lines)

    def _one_a_line(self, lines: _Lines, parse: Callable[[_Line], Document]) -> Iterator[Document]:
        for line in lines:
            if line.offset >= lines.end:
                return
            if line.is_blank or line.number == 0:
                continue
            yield self._reject_long(line) if line.is_too_long else parse(line)

    def _paragraphs(self, lines: _Lines) -> Iterator[Document]:
        """Runs of non-blank lines, each ours if it begins in the range."""
        is_foreign = lines.is_inside_line or not lines.follows_blank_line
        paragraph = _Paragraph(self._format.max_document_bytes)
        for line in lines:
            if line.is_blank:
                if paragraph.first is not None:
                    yield self._finish(paragraph)
                    paragraph = _Paragraph(self._format.max_document_bytes)
                is_foreign = False
            elif paragraph.first is not None or (not is_foreign and line.offset < lines.end):
                paragraph.add(line)
            if paragraph.first is None and line.offset + line.length >= lines.end:
                return
        if paragraph.first is not None:
            yield self._finish(paragraph)

    def _whole_file(self, lines: _Lines) -> Iterator[Document]:
        document = _Paragraph(self._format.max_document_bytes)
        for line in lines:
            document.add(line)
        if document.first is not None:
            yield self._finish(document, keep_ending=True)

    def _finish(self, paragraph: _Paragraph, keep_ending: bool = False) -> Document:
        assert paragraph.first is not None
        data = paragraph.join(keep_ending)
        return self._reject_long(paragraph.first) if data is None else self._decode(paragraph.first, data)

    def _reject_long(self, line: _Line) -> Document:
        return Document(line.number, line.offset, None, self._too_long())

    def _decode(self, line: _Line, data: bytes) -> Document:
        return Document(line.number, line.offset, *decode(data, self._format.encoding))

    def _parse_json(self, line: _Line) -> Document:
        text, reason = decode(line.data, self._format.encoding)
        if text is not None:
            text, reason = _text_of_json(text, self._format.text_field)
        return Document(line.number, line.offset, text, reason)


@dataclass(frozen=True, slots=True)
class _Line:
    number: int
    """From 1 in the range; 0 for the rest of a line that began before it."""
    offset: int
    length: int
    """Bytes, the ending included."""
    data: bytes
    """Empty where the line is too long to hold."""
    is_blank: bool
    is_too_long: bool


class _Lines:
    """The lines of a byte range and beyond, as long as they are asked for; only a line feed ends a line."""

    def __init__(self, stream: BinaryIO, range_: FileRange, text_format: TextFormat):
        self._stream = stream
        self._max_line_bytes = text_format.max_document_bytes
        self._bom = _bom(text_format.encoding)
        self._unread = b""
        self._is_compressed = range_.is_compressed
        self.end = sys.maxsize if range_.is_compressed else range_.end
        self.position = 0 if range_.is_compressed else range_.start
        """Offset of the next line."""
        self.count = 0
        """Lines so far that begin in the range."""
        self.follows_blank_line = True
        """Whether the line that holds the byte before the range is blank up to the range."""
        self.is_inside_line = False
        """Whether the next line began before the range."""
        self._held, self._length, self._is_blank = bytearray(), 0, True

    def open(self) -> None:
        """Goes to the beginning of the range: past a BOM, and with a look back at what it cuts through."""
        head = b""
        while len(head) < len(self._bom) and (more := self._read(len(self._bom) - len(head))):
            head += more
        origin = len(self._bom) if head == self._bom else 0
        if self.position <= origin:
            self.position = origin
            self._unread = head[origin:]
            return
        self._stream.seek(self.position - 1)
        self.is_inside_line = self._stream.read(1) != b"\n"
        self.follows_blank_line = self._is_blank_before(self.position - (not self.is_inside_line), origin)
        self._stream.seek(self.position)

    def __iter__(self) -> Iterator[_Line]:
        # The rest of a line that began before the range is blank only if all of that line is.
        self._is_blank = self.follows_blank_line or not self.is_inside_line
        while chunk := self._read(_CHUNK_BYTES):
            begin = 0
            while (newline := chunk.find(b"\n", begin)) >= 0:
                self._hold(chunk[begin : newline + 1])
                yield self._finish_line()
                begin = newline + 1
            self._hold(chunk[begin:])
            if self.is_inside_line and self.position + self._length >= self.end:
                return  # a line longer than the range: nothing begins in it, and others read the line
        if self._length:
            yield self._finish_line()

    def _read(self, count: int) -> bytes:
        if self._unread:
            head, self._unread = self._unread, b""
            return head
        # read1 returns what was decompressed before an archive breaks off; read would lose it with the exception.
        return cast(bytes, self._stream.read1(count)) if self._is_compressed else self._stream.read(count)  # type: ignore[attr-defined]

    def _hold(self, piece: bytes) -> None:
        self._length += len(piece)
        self._is_blank = self._is_blank and (not piece or piece.isspace())
        # Two more bytes, for the ending; beyond that the line is counted but no longer kept.
        if self._length <= self._max_line_bytes + 2:
            self._held += piece
        else:
            self._held.clear()

    def _finish_line(self) -> _Line:
        is_ours = not self.is_inside_line and self.position < self.end
        self.count += is_ours
        data = bytes(self._held)
        too_long = self._length > self._max_line_bytes + 2 or len(_without_ending(data)) > self._max_line_bytes
        number = 0 if self.is_inside_line else self.count
        line = _Line(number, self.position, self._length, data, self._is_blank, too_long)
        self.position += self._length
        self._held.clear()
        self._length, self._is_blank, self.is_inside_line = 0, True, False
        return line

    def _is_blank_before(self, position: int, origin: int) -> bool:
        while position > origin:
            begin = max(origin, position - _LOOK_BACK_BYTES)
            self._stream.seek(begin)
            _, newline, after = self._stream.read(position - begin).rpartition(b"\n")
            if after.strip():
                return False
            if newline:
                return True
            position = begin
        return True


class _Paragraph:
    """Gathers the lines of a document, and lets go of them once there are too many bytes."""

    def __init__(self, max_bytes: int):
        self._max_bytes = max_bytes
        self._data = bytearray()
        self._length = 0
        self._ending = 0
        self.first: _Line | None = None

    def add(self, line: _Line) -> None:
        self.first = self.first or line
        self._length += line.length
        self._ending = len(line.data) - len(_without_ending(line.data))
        if self._length <= self._max_bytes + 2:
            self._data += line.data
        else:
            self._data.clear()

    def join(self, keep_ending: bool) -> bytes | None:
        """The document's bytes, or None if it is too long."""
        length = self._length - (0 if keep_ending else self._ending)
        return bytes(self._data[:length]) if length <= self._max_bytes else None


def _bom(encoding: str) -> bytes:
    """The byte order mark as the encoding writes it; nothing where it has none."""
    try:
        return "\ufeff".encode(encoding)
    except UnicodeError:
        return b""


def _without_ending(line: bytes) -> bytes:
    return line.removesuffix(b"\n").removesuffix(b"\r") if line.endswith(b"\n") else line


def _text_of_json(line: str, field: str) -> tuple[str | None, str]:
    """The text in a field of a JSON line and '', or None and the reason why there is none."""
    text, reason = None, ""
    try:
        value = json.loads(line)
        if not isinstance(value, dict):
            reason = f"expected a JSON object, found {type(value).__name__}"
        elif not isinstance(value.get(field), str):
            found = type(value[field]).__name__ if field in value else "no such field"
            reason = f"expected text in the field {field!r}, found {found}"
        else:
            value[field].encode("utf-8")
            text = value[field]
    except json.JSONDecodeError as error:
        reason = f"not JSON: {error.msg} at column {error.colno}"
    except UnicodeEncodeError as error:
        reason = f"a lone surrogate escape at character {error.start} of {field!r}: not text"
    except RecursionError:
        reason = "JSON nested too deeply"
    except ValueError as error:
        reason = f"not JSON: {error}"
    return text, reason
