"""Compressed files as streams of bounded memory that never end in silence before their end.

gzip members and Zstandard frames that follow one another (`cat`, pigz, pzstd) read as one file. The memory is that of
the window, which a Zstandard frame may set to as much as 2 GiB, and some 20 MiB beside it, whatever a file expands to.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from gzip import BadGzipFile, GzipFile
from typing import TYPE_CHECKING, BinaryIO, Literal, cast

from zstandard import ZstdDecompressor, ZstdError

from scorer.errors import ArchiveError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

Compression = Literal["gzip", "zstd"]

_CHUNK_BYTES = 1 << 20
_ZSTD_MAX_WINDOW_BYTES = 1 << 31
_ZSTD_PIECE_BYTES = 256
"""Fed to the decompressor at a time: all of its output is held, and four bytes may stand for 128 KiB."""


def decompressed(stream: BinaryIO, compression: Compression) -> BinaryIO:
    """The decompressed bytes of a stream, which is closed with it.

    `read1` gives what comes before a fault, and only its next call raises; `read` may lose some of that.

    Raises:
        ArchiveError: from the reading methods, where the stream is cut or damaged.
    """
    chunks = _gzip_chunks(stream) if compression == "gzip" else _zstd_chunks(stream)
    return cast(BinaryIO, io.BufferedReader(_Decompressed(stream, chunks), _CHUNK_BYTES))


class _Decompressed(io.RawIOBase):
    """Makes a file of chunks, and one error of all that decompressors raise."""

    def __init__(self, compressed: BinaryIO, chunks: Iterator[bytes]):
        self._compressed = compressed
        self._chunks = chunks
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        try:
            while not self._rest:
                self._rest = memoryview(next(self._chunks))
        except StopIteration:
            return 0
        except (EOFError, BadGzipFile, zlib.error, ZstdError) as error:
            raise ArchiveError(f"{error}") from error
        target = memoryview(buffer)
        count = min(len(target), len(self._rest))
        target[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count

    def close(self) -> None:
        self._compressed.close()
        super().close()


def _gzip_chunks(stream: BinaryIO) -> Iterator[bytes]:
    with GzipFile(fileobj=stream) as archive:
        while chunk := archive.read1(_CHUNK_BYTES):
            yield chunk


def _zstd_chunks(stream: BinaryIO) -> Iterator[bytes]:
    """Feeds a decompressor that knows where frames end; the library's own reader takes a cut for the end."""
    decompressor = ZstdDecompressor(max_window_size=_ZSTD_MAX_WINDOW_BYTES)
    frame = decompressor.decompressobj()
    is_inside_frame = False
    while chunk := stream.read(_CHUNK_BYTES):
        for begin in range(0, len(chunk), _ZSTD_PIECE_BYTES):
            piece = chunk[begin : begin + _ZSTD_PIECE_BYTES]
            while piece:
                if frame.eof:
                    frame = decompressor.decompressobj()
                yield frame.decompress(piece)
                is_inside_frame, piece = not frame.eof, frame.unused_data
    if is_inside_frame:
        raise EOFError("Compressed file ended before the end of a frame")
