"""Web archives as input: the records of plain text in WET and WARC files."""

from __future__ import annotations

import gzip
import io
import logging
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from pipeline.corpus import Document, FileRange, RangeReader, TextFormat

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}
TEXTS = ["one\n\nof two paragraphs\n", "zwei ü\r\n", "three 🙂", "x" * 70_000, "five"]


def record(kind: str, body: bytes, content_type: str, http: dict[str, str] | None = None) -> bytes:
    """One record as warcio writes it, with the blank lines behind it."""
    stream = io.BytesIO()
    writer = WARCWriter(stream, gzip=False)
    headers = StatusAndHeaders("200 OK", list(http.items()), protocol="HTTP/1.1") if http is not None else None
    writer.write_record(
        writer.create_warc_record(
            "http://example.org/a b",
            kind,
            payload=io.BytesIO(body),
            length=len(body),
            warc_content_type=content_type,
            http_headers=headers,
        )
    )
    return stream.getvalue()


def wet(texts: list[str]) -> list[bytes]:
    """The records of a WET file: first of all, what wrote it."""
    info = record("warcinfo", b"software: none\r\n", "application/warc-fields")
    return [info, *(record("conversion", text.encode(), "text/plain") for text in texts)]


def response(body: bytes, **headers: str) -> bytes:
    http = {name.replace("_", "-"): value for name, value in headers.items()}
    return record("response", body, "application/http; msgtype=response", http)


def read(path: Path, data: bytes, **text_format: Any) -> list[Document]:
    path.write_bytes(data)
    reader = RangeReader(f"{path.parent}/", FileRange(path.name, 0, len(data)), TextFormat(**text_format))
    documents = list(reader)
    assert {document.unit for document in documents} <= {"record"}
    return documents


@pytest.mark.parametrize("name", ["file.wet", "file.warc.wet", "FILE.WARC"])
@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("is_part_a_record", [True, False])
def test_text_records_are_documents(tmp_path: Path, name: str, suffix: str, is_part_a_record: bool) -> None:
    """Compressed record by record, as the standard asks, or as one."""
    records = wet(TEXTS)
    compress = COMPRESS[suffix]
    data = b"".join(map(compress, records)) if is_part_a_record else compress(b"".join(records))
    documents = read(tmp_path / (name + suffix), data)
    assert [document.text for document in documents] == TEXTS
    assert [document.line for document in documents] == [2, 3, 4, 5, 6]
    plain = b"".join(records)
    assert [document.offset for document in documents] == [
        sum(map(len, records[:index])) for index in range(1, len(records))
    ]
    assert all(plain[document.offset or 0 :].startswith(b"WARC/1.") for document in documents)


def test_only_text_is_read_and_everything_else_is_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = b"".join(
        [
            record("warcinfo", b"x: y\r\n", "application/warc-fields"),
            record("request", b"GET / HTTP/1.1\r\n\r\n", "application/http; msgtype=request"),
            response(b"<html>", Content_Type="text/html; charset=utf-8"),
            response(b"body text", Content_Type="Text/Plain; charset=utf-8", Content_Length="9"),
            response(b"no type"),
            record("resource", b"resource text", "text/plain; charset=utf-8"),
            record("resource", b"GIF89a", "image/gif"),
            record("conversion", b"<p>", "text/html"),
            record("metadata", b"a: b", "text/plain"),
            record("conversion", b"NOT HTTP", "text/plain").replace(b"Type: conversion", b"Type: response"),
            record("conversion", b"converted text", "text/plain"),
        ]
    )
    with caplog.at_level(logging.WARNING):
        documents = read(tmp_path / "file.warc", data)
    assert [(document.line, document.text) for document in documents] == [
        (4, "body text"),
        (6, "resource text"),
        (11, "converted text"),
    ]
    assert caplog.text == ""


def test_an_archive_without_text_is_one_warning_that_says_what_was_found(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    page = response(b"<html>", Content_Type="text/html")
    with caplog.at_level(logging.WARNING):
        assert read(tmp_path / "pages.warc.gz", gzip.compress(wet([])[0] + page * 3)) == []
    assert len(caplog.records) == 1
    for words in ("pages.warc.gz", "3 response text/html", "1 warcinfo", "HTML", "extract"):
        assert words in caplog.text


@pytest.mark.parametrize("suffix", COMPRESS)
def test_empty_archives_hold_no_document(tmp_path: Path, suffix: str) -> None:
    assert read(tmp_path / f"file.wet{suffix}", COMPRESS[suffix](b"")) == []


def test_bodies_are_taken_out_of_their_http_encodings(tmp_path: Path) -> None:
    text = "ü" * 1000
    chunked = b"".join(f"{len(part):x}\r\n".encode() + part + b"\r\n" for part in (b"first ", b"second", b""))
    kind = {"Content_Type": "text/plain"}
    data = b"".join(
        [
            response(gzip.compress(text.encode()), Content_Encoding="gzip", **kind),
            response(zlib.compress(text.encode()), Content_Encoding="deflate", **kind),
            response(chunked, Transfer_Encoding="chunked", **kind),
            response(gzip.compress(text.encode())[:-9], Content_Encoding="gzip", **kind),
            response(b"garbage", Content_Encoding="gzip", **kind),
            response(b"garbage", Content_Encoding="br", **kind),
            response(gzip.compress(b"a" * 200_000_000), Content_Encoding="gzip", **kind),
            response(b"plain", Content_Encoding="identity", **kind),
        ]
    )
    tracemalloc.start()
    try:
        documents = read(tmp_path / "file.warc", data, max_document_bytes=1_000_000)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [document.text for document in documents] == [text, text, "first second", None, None, None, None, "plain"]
    reasons = [document.reason for document in documents if document.text is None]
    assert ["damaged" in reason for reason in reasons] == [True, True, False, False]
    assert "'br'" in reasons[2]
    assert "max_document_bytes" in reasons[3]
    assert peak < 8 << 20


def test_bad_records_are_rejected_one_by_one(tmp_path: Path) -> None:
    records = [
        record("conversion", b"good", "text/plain"),
        record("conversion", b"bad \xff", "text/plain"),
        record("conversion", b"x" * 100, "text/plain"),
        record("conversion", b"x" * 101, "text/plain"),
        record("conversion", b"", "text/plain"),
        record("conversion", b"good", "text/plain"),
    ]
    documents = read(tmp_path / "file.wet", b"".join(records), max_document_bytes=100)
    assert [document.text for document in documents] == ["good", None, "x" * 100, None, "", "good"]
    assert documents[1].reason.startswith("not UTF-8: ")
    assert (documents[1].line, documents[1].offset) == (2, len(records[0]))
    assert "max_document_bytes 100" in documents[3].reason


def test_records_are_decoded_by_the_encoding(tmp_path: Path) -> None:
    data = record("conversion", "schön".encode("latin-1"), "text/plain")
    assert [document.text for document in read(tmp_path / "file.wet", data, encoding="latin-1")] == ["schön"]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_record_that_is_too_long_is_never_held(tmp_path: Path, suffix: str) -> None:
    long = record("conversion", b"a" * 60_000_000, "text/plain")
    records = [*wet(["first"]), long, *wet(["last"])]
    data = b"".join(map(COMPRESS[suffix], records))
    del long, records
    tracemalloc.start()
    try:
        documents = read(tmp_path / f"file.wet{suffix}", data, max_document_bytes=1_000_000)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [document.text for document in documents] == ["first", None, "last"]
    assert peak < 24 << 20


# --- Cut and damaged


def cut_archive(suffix: str) -> tuple[bytes, list[str], set[int]]:
    """Many records of which some are skipped, their texts, and where records end (their ids differ from run to run)."""
    letters = np.random.default_rng(0).integers(97, 123, (300, 1500), dtype=np.uint8)
    texts = [f"{number} {row.tobytes().decode()}" for number, row in enumerate(letters)]
    pages = [record("metadata", b"m" * 500, "text/x"), response(b"<html>" * 100, Content_Type="text/html")]
    parts = [part for text in texts for part in (*wet([text])[1:], *pages)]
    packed = [COMPRESS[suffix](part) for part in parts]
    return b"".join(packed), texts, set(np.cumsum([len(part) for part in packed]).tolist())


@pytest.mark.parametrize("suffix", COMPRESS)
def test_cut_archive_keeps_the_documents_before_the_cut(
    tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    data, texts, ends = cut_archive(suffix)
    for place in np.linspace(len(data) * 0.3, len(data) * 0.7, 40).astype(int):
        kept = place + 1 if place in ends else place  # between two records nothing would be cut
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            *good, reject = read(tmp_path / f"file.wet{suffix}", data[:kept])
        found = [document.text for document in good]
        assert found == texts[: len(found)]
        assert len(found) >= len(texts) * kept // len(data) - 2
        assert reject.text is None
        assert reject.line > good[-1].line
        assert "cut" in reject.reason
        assert f"file.wet{suffix} is cut" in caplog.text


def test_an_archive_cut_anywhere_never_gives_half_a_document(tmp_path: Path) -> None:
    records = [*wet(["alpha beta", "gamma delta"]), response(b"plain", Content_Type="text/plain")]
    data = b"".join(records)
    ends = [sum(map(len, records[: index + 1])) for index in range(len(records))]
    for kept in range(1, len(data)):
        documents = read(tmp_path / "file.wet", data[:kept])
        good = [document.text for document in documents if document.text is not None]
        assert good == ["alpha beta", "gamma delta", "plain"][: len(good)]
        whole = sum(end - len(b"\r\n\r\n") <= kept for end in ends[1:])
        assert len(good) == whole, kept
        is_between = any(end - len(b"\r\n\r\n") <= kept <= end for end in ends)
        assert len(documents) - len(good) == (0 if is_between else 1), kept


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_cut_behind_a_record_does_not_cost_it(tmp_path: Path, suffix: str) -> None:
    data = b"".join(map(COMPRESS[suffix], wet(TEXTS)))
    documents = read(tmp_path / f"file.wet{suffix}", data[:-1])
    assert [document.text for document in documents] == [*TEXTS, None]
    assert documents[-1].line == len(TEXTS) + 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data.replace(b"Content-Length: 7", b"Content-Length: 6"),
        lambda data: data.replace(b"Content-Length: 7", b"Content-Length: 4"),
        lambda data: data.replace(b"Content-Length: 7", b"Content-Length: 9999999999999"),
        lambda data: data.replace(b"Content-Length: 7", b"Content-Length: -7"),
        lambda data: data.replace(b"Content-Length: 7", b"Content-Length: seven"),
        lambda data: data.replace(b"Content-Length: 7", b"Content-Length: " + b"7" * 5000),
        lambda data: data.replace(b"Content-Length: 7", b"Content-Width: 7"),
        lambda data: data.replace(b"damaged", b"dam"),
    ],
)
def test_a_record_of_the_wrong_length_is_one_reject_and_ends_the_archive(
    tmp_path: Path, damage: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    before, after = wet(["before"]), wet(["after"])
    damaged = damage(record("conversion", b"damaged", "text/plain"))
    with caplog.at_level(logging.WARNING):
        documents = read(tmp_path / "file.wet", b"".join([*before, damaged, *after]))
    assert documents[0].text == "before"
    assert documents[-1].text is None
    assert documents[-1].line in (3, 4)
    assert {document.text for document in documents[1:-1]} <= {"damaged"}
    assert "file.wet is cut or damaged" in caplog.text


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("unit", [b"\0", b"x", b"\n", b"WARC/1.0\r\n", b"a: b\r\n", b" "])
def test_what_is_no_archive_is_one_reject_in_bounded_memory(tmp_path: Path, suffix: str, unit: bytes) -> None:
    data = COMPRESS[suffix](unit * (30_000_000 // len(unit)))
    tracemalloc.start()
    try:
        (reject,) = read(tmp_path / f"file.warc{suffix}", data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (reject.text, reject.line) == (None, 1)
    assert peak < 16 << 20


def test_damaged_bytes_never_crash(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    texts = [f"{number} text of a record" for number in range(30)]
    data = b"".join([*wet(texts), response(b"plain", Content_Type="text/plain")])
    for _ in range(300):
        damaged = bytearray(data)
        for position in generator.integers(0, len(data), generator.integers(1, 6)):
            damaged[position] = generator.integers(256)
        documents = read(tmp_path / "file.wet", bytes(damaged))
        assert all(document.text is not None or document.reason for document in documents)
