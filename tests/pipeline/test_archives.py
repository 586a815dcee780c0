"""Compressed files: a fault costs what stands behind it and no more, and no archive takes the memory of a machine."""

from __future__ import annotations

import gzip
import json
import logging
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pytest
import zstandard

from pipeline.corpus import Document, FileRange, RangeReader, TextFormat
from scorer import files
from scorer.errors import ArchiveError

COMPRESS: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "zst": zstandard.ZstdCompressor().compress}
CHECKSUM_BYTES = {"gz": 8, "zst": 4}
NAMES = [f"file.{form}.{suffix}" for form in ("jsonl", "txt") for suffix in COMPRESS]


def read_whole(path: Path, **text_format: int) -> list[Document]:
    range_ = FileRange(path.name, 0, path.stat().st_size)
    return list(RangeReader(f"{path.parent}/", range_, TextFormat(**text_format)))  # type: ignore[arg-type]


def write_archive(path: Path, documents: int = 4000) -> list[str]:
    """An archive of many documents that do not compress well, of several blocks in one part."""
    letters = np.random.default_rng(0).integers(97, 123, (documents, 200), dtype=np.uint8)
    texts = [f"{number} {row.tobytes().decode()}" for number, row in enumerate(letters)]
    separator = "\n" if "jsonl" in path.name else "\n\n"
    lines = [json.dumps({"text": text}) if "jsonl" in path.name else text for text in texts]
    data = (separator.join(lines) + "\n").encode()
    path.write_bytes(
        gzip.compress(data) if path.suffix == ".gz" else zstandard.ZstdCompressor(write_checksum=True).compress(data)
    )
    return texts


def good_and_rejected(documents: list[Document]) -> tuple[list[str], list[Document]]:
    good = [document.text for document in documents if document.text is not None]
    return good, [document for document in documents if document.text is None]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9])
def test_cut_archive_keeps_the_documents_before_the_cut(
    tmp_path: Path, name: str, kept: float, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / name
    texts = write_archive(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: max(5, int(kept * len(whole)))])
    with caplog.at_level(logging.WARNING):
        *good, reject = read_whole(path)
    assert reject.text is None
    assert "cut" in reject.reason
    assert [document.text for document in good] == texts[: len(good)]
    assert len(good) >= (kept - 0.2) * len(texts)
    assert name in caplog.text
    assert "cut" in caplog.text


@pytest.mark.parametrize("name", NAMES)
def test_cut_checksum_loses_no_document(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    texts = write_archive(path, 50)
    for missing in range(1, CHECKSUM_BYTES[name.rpartition(".")[2]] + 1):
        path.write_bytes(path.read_bytes()[:-1])
        good, rejected = good_and_rejected(read_whole(path))
        assert good in (texts, texts[:-1]), missing  # whether the last paragraph is whole is known only at the end
        assert len(rejected) == 1


@pytest.mark.parametrize("name", NAMES)
def test_archive_cut_between_parts_is_sound(tmp_path: Path, name: str) -> None:
    """What was never written cannot be missed: no part is torn."""
    path = tmp_path / name
    texts = write_archive(path, 50)
    path.write_bytes(path.read_bytes() * 2)
    assert (
        [document.text for document in read_whole(path)] == texts * 2
        if "jsonl" in name
        else [
            *texts[:-1],
            f"{texts[-1]}\n{texts[0]}",
            *texts[1:],
        ]
    )


@pytest.mark.parametrize("name", NAMES)
def test_corrupted_archive_is_one_reject_and_keeps_what_stands_before(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / name
    texts = write_archive(path)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 4096] = b"\xff" * 4096
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        good, rejected = good_and_rejected(read_whole(path))
    assert "damaged" in rejected[-1].reason
    assert good[:1000] == texts[:1000]
    assert len(good) < len(texts)
    assert name in caplog.text


@pytest.mark.parametrize("name", NAMES)
def test_garbage_behind_an_archive_costs_no_document(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    texts = write_archive(path, 20)
    path.write_bytes(path.read_bytes() + b"garbage")
    good, rejected = good_and_rejected(read_whole(path))
    assert good in (texts, texts[:-1])
    assert len(rejected) == 1


@pytest.mark.parametrize("suffix", COMPRESS)
def test_plain_text_that_is_called_an_archive_is_one_reject(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"file.txt.{suffix}"
    path.write_bytes(b"plain\n\ntext\n")
    (reject,) = read_whole(path)
    assert reject.text is None
    assert (reject.line, reject.offset) == (1, 0)


def test_windows_of_two_gibibytes_are_read(tmp_path: Path) -> None:
    """As `zstd --long=31` declares them; a frame by RFC 8878, of one raw block, made by hand."""
    text = b'{"text": "long"}\n'
    header = b"\x28\xb5\x2f\xfd" + bytes([0, (31 - 10) << 3])
    path = tmp_path / "file.jsonl.zst"
    path.write_bytes(header + (1 | len(text) << 3).to_bytes(3, "little") + text)
    assert [document.text for document in read_whole(path)] == ["long"]


def write_bomb(path: Path, unit: bytes, count: int) -> None:
    """One line of many units, between two that are good, in little more than a thousandth of its size."""
    if path.suffix == ".gz":
        compressor = zlib.compressobj(9, wbits=31)
        parts = [compressor.compress(b'{"text": "a"}\n'), *(compressor.compress(unit) for _ in range(count))]
        path.write_bytes(b"".join([*parts, compressor.compress(b'\n{"text": "b"}\n'), compressor.flush()]))
    else:
        zstd = zstandard.ZstdCompressor(level=19).compressobj()
        parts = [zstd.compress(b'{"text": "a"}\n'), *(zstd.compress(unit) for _ in range(count))]
        path.write_bytes(b"".join([*parts, zstd.compress(b'\n{"text": "b"}\n'), zstd.flush()]))


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("byte", [b"\0", b"a", b" "])
def test_an_archive_that_expands_a_thousandfold_stays_in_bounded_memory(
    tmp_path: Path, suffix: str, byte: bytes
) -> None:
    path = tmp_path / f"bomb.jsonl.{suffix}"
    write_bomb(path, byte * (10 << 20), 20)
    assert path.stat().st_size < 1 << 20
    tracemalloc.start()
    try:
        documents = read_whole(path, max_document_bytes=1_000_000)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [document.text for document in documents if document.text is not None] == ["a", "b"]
    assert len(documents) == (2 if byte == b" " else 3)
    assert peak < 24 << 20


@pytest.mark.parametrize("suffix", COMPRESS)
def test_archives_are_read_from_object_stores(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"file.jsonl.{suffix}"
    texts = write_archive(path, 100)
    memory = fsspec.filesystem("memory")
    memory.pipe_file(f"/archives/{path.name}", path.read_bytes())
    reader = RangeReader("memory://archives/", FileRange(path.name, 0, path.stat().st_size), TextFormat())
    assert [document.text for document in reader] == texts
    memory.pipe_file(f"/archives/{path.name}", path.read_bytes()[:-20])
    stream = files.open_binary(f"memory://archives/{path.name}", "gzip" if suffix == "gz" else "zstd")
    with stream, pytest.raises(ArchiveError):
        stream.read()
    memory.rm("/archives", recursive=True)
