"""Documents out of files: any cutting of a file gives each document once, and bad ones never take good ones down."""

from __future__ import annotations

import gzip
import io
import json
import re
import struct
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from itertools import chain, pairwise, repeat
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.corpus import Document, FileRange, RangeReader, TextFormat
from pipeline.documents import lines as lines_module
from scorer import files
from scorer.errors import ConfigurationError

BOM = b"\xef\xbb\xbf"
WHITESPACE = b" \t\n\r\x0b\x0c"
Found = tuple[int, int, str | None]
"""Line and offset of a document, both absolute, and its text (None where rejected)."""


def without_ending(line: bytes) -> bytes:
    for ending in (b"\r\n", b"\n"):
        if line.endswith(ending):
            return line[: -len(ending)]
    return line


def decode(data: bytes) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def json_text(data: bytes) -> str | None:
    try:
        text = json.loads(data.decode())["text"]
        text.encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return text if isinstance(text, str) else None


def numbered_lines(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Number, offset and bytes of every line of a whole file, without the BOM."""
    offset = len(BOM) if data.startswith(BOM) else 0
    for number, line in enumerate(re.findall(rb"[^\n]*\n|[^\n]+", data[offset:]), start=1):
        yield number, offset, line
        offset += len(line)


def whole_file_documents(data: bytes, mode: str, limit: int) -> list[Found]:
    """The definition, read plainly: all documents of a file that is held in memory whole."""
    if mode == "file":
        text = data.removeprefix(BOM)
        return [(1, len(data) - len(text), decode(text) if len(text) <= limit else None)] if text else []
    parse = json_text if mode == "jsonl" else decode
    paragraphs: list[list[tuple[int, int, bytes]]] = []
    is_open = False
    for number, offset, line in numbered_lines(data):
        is_blank = not line.strip(WHITESPACE)
        if not is_blank:
            if not is_open or mode != "blank-line":
                paragraphs.append([])
            paragraphs[-1].append((number, offset, line))
        is_open = not is_blank
    found = []
    for paragraph in paragraphs:
        document = without_ending(b"".join(line for _, _, line in paragraph))
        found.append((*paragraph[0][:2], parse(document) if len(document) <= limit else None))
    return found


def read(path: Path, text_format: TextFormat, cuts: list[int]) -> tuple[list[Found], int]:
    """Reads a file range by range; documents with absolute lines, and the number of lines."""
    found: list[Found] = []
    lines = 0
    for start, end in pairwise(cuts):
        reader = RangeReader(f"{path.parent}/", FileRange(path.name, start, end), text_format)
        found += [(document.line + lines, document.offset, document.text) for document in reader]
        lines += reader.lines
    return found, lines


def read_whole(path: Path, text_format: TextFormat = TextFormat()) -> list[Document]:  # noqa: B008
    return list(RangeReader(f"{path.parent}/", FileRange(path.name, 0, path.stat().st_size), text_format))


def format_of(mode: str, limit: int) -> TextFormat:
    return TextFormat(txt_document="blank-line" if mode == "jsonl" else mode, max_document_bytes=limit)  # type: ignore[arg-type]


PIECES = [
    *(b"\n", b"\n", b"\n\n", b"\r\n", b"\r\n\r\n", b"\r", b" ", b"\t\n", b"  \n", b"\x0b", b"\x0c"),
    *(b"a", b"bc def", BOM, "é".encode(), "\u2028".encode(), b"\xff", b"\xe2\x82", b"\x00"),
    *(b'{"text": "x"}', b'{"text": "two\\nlines"}', b'{"text": 1}', b'{"text": "\\ud83d"}', b"{"),
]
file_bytes = st.lists(st.sampled_from(PIECES) | st.binary(max_size=3), max_size=25).map(b"".join)


@settings(max_examples=400, deadline=None)
@given(
    data=st.tuples(st.sampled_from([b"", b"", BOM]), file_bytes).map(b"".join),
    cut_fractions=st.lists(st.floats(0, 1), max_size=8),
    mode=st.sampled_from(["blank-line", "line", "jsonl"]),
    limit=st.sampled_from([1, 2, 5, 13, 1000]),
    chunk_bytes=st.integers(1, 7),
    look_back_bytes=st.integers(1, 5),
)
@example(BOM + b"a\n\nb", [0.2, 0.4, 0.6], "blank-line", 1000, 1, 1)
@example(b"a\n  x\n \n\r\n  b \r\nc\r\n\r\n", [i / 20 for i in range(20)], "blank-line", 1000, 2, 1)
@example(b"12345\r\n12345\n123456\r\n123456\n12345", [0.3], "line", 5, 3, 1)
def test_any_cutting_gives_every_document_once(  # noqa: PLR0917
    data: bytes, cut_fractions: list[float], mode: str, limit: int, chunk_bytes: int, look_back_bytes: int
) -> None:
    cuts = sorted({0, len(data), *(round(fraction * len(data)) for fraction in cut_fractions)})
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(lines_module, "_CHUNK_BYTES", chunk_bytes)
        patch.setattr(lines_module, "_LOOK_BACK_BYTES", look_back_bytes)
        path = Path(folder, "file.jsonl" if mode == "jsonl" else "file.txt")
        path.write_bytes(data)
        found, lines = read(path, format_of(mode, limit), cuts)
    assert found == whole_file_documents(data, mode, limit)
    if data:
        assert lines == len(list(numbered_lines(data)))


@settings(max_examples=150, deadline=None)
@given(data=file_bytes, mode=st.sampled_from(["blank-line", "line"]))
def test_cutting_at_every_byte_gives_every_document_once(data: bytes, mode: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "file.txt")
        path.write_bytes(data)
        found, _ = read(path, format_of(mode, 1000), list(range(len(data) + 1)))
    assert found == whole_file_documents(data, mode, 1000)


@settings(max_examples=100, deadline=None)
@given(
    data=st.tuples(st.sampled_from([b"", BOM]), file_bytes).map(b"".join),
    limit=st.sampled_from([4, 1000]),
    chunk_bytes=st.integers(1, 9),
)
def test_file_mode_keeps_everything_but_the_bom(data: bytes, limit: int, chunk_bytes: int) -> None:
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(lines_module, "_CHUNK_BYTES", chunk_bytes)
        path = Path(folder, "file.txt")
        path.write_bytes(data)
        found, _ = read(path, TextFormat(txt_document="file", max_document_bytes=limit), [0, len(data)])
    assert found == whole_file_documents(data, "file", limit)


SKIPPABLE_FRAME = struct.pack("<II", 0x184D2A50, 5) + b"hello"
COMPRESS: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "zst": zstandard.ZstdCompressor().compress}


@settings(max_examples=300, deadline=None)
@given(
    data=st.tuples(st.sampled_from([b"", BOM]), file_bytes).map(b"".join),
    part_fractions=st.lists(st.floats(0, 1), max_size=4),
    mode=st.sampled_from(["blank-line", "line", "jsonl", "file"]),
    suffix=st.sampled_from(["gz", "zst"]),
    has_skippable=st.booleans(),
)
@example(BOM + b"a\n\nb\n", [0.15, 0.3], "blank-line", "gz", False)
@example(BOM + b"a\n\nb\n", [0.15, 0.3], "blank-line", "zst", True)
def test_archives_of_several_parts_give_the_same_documents_as_plain(
    data: bytes, part_fractions: list[float], mode: str, suffix: str, has_skippable: bool
) -> None:
    """Members of gzip, or frames of Zstandard, cut anywhere, empty ones too, as `cat`, pigz and pzstd write them."""
    cuts = sorted({0, len(data), *(round(fraction * len(data)) for fraction in part_fractions)})
    parts = [COMPRESS[suffix](data[start:end]) for start, end in pairwise(cuts)] or [COMPRESS[suffix](b"")]
    between = SKIPPABLE_FRAME if has_skippable and suffix == "zst" else b""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"file.{'jsonl' if mode == 'jsonl' else 'txt'}.{suffix}")
        path.write_bytes(between.join([b"", *parts, b""]))
        found, lines = read(path, format_of(mode, 1000), [0, path.stat().st_size])
    assert found == whole_file_documents(data, mode, 1000)
    assert lines == len(list(numbered_lines(data)))


def test_document_ends_are_stripped_of_one_line_ending_only(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_bytes(BOM + b"  one \r\ntwo\t\r\n \t \r\n\n\nthree\n\nfour")
    assert [(document.line, document.offset, document.text) for document in read_whole(path)] == [
        (1, 3, "  one \r\ntwo\t"),
        (6, 24, "three"),
        (8, 31, "four"),
    ]


def test_only_a_line_feed_ends_a_line(tmp_path: Path, real_data: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_bytes("a\u2028b\u0085c\rd\x0be\n\nf".encode())
    assert [document.text for document in read_whole(path)] == ["a\u2028b\u0085c\rd\x0be", "f"]
    separators = real_data / "stress" / "synthetic" / "unicode_separators.txt"
    line_mode = TextFormat(txt_document="line")
    assert [document.text for document in read_whole(separators, line_mode)] == [separators.read_bytes().decode()[:-1]]


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "txt.gz", "jsonl.gz", "txt.zst", "jsonl.zst"])
def test_empty_files_hold_no_document(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"empty.{suffix}"
    path.write_bytes(b"")
    assert read_whole(path) == []
    if compress := COMPRESS.get(suffix.rpartition(".")[2]):
        path.write_bytes(compress(b""))
        assert read_whole(path) == []


@pytest.mark.parametrize("name", ["FILE.JSONL.GZ", "file.Jsonl.zst", "file.jsonl.ZSTD"])
def test_suffixes_are_recognized_in_any_case(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(COMPRESS["gz" if name.endswith("GZ") else "zst"](b'{"text": "a"}\n{"text": "b"}\n'))
    assert [document.text for document in read_whole(path)] == ["a", "b"]


# --- Too long


@pytest.mark.parametrize("mode", ["blank-line", "line", "file"])
@pytest.mark.parametrize("ending", [b"", b"\n", b"\r\n"])
def test_longest_document_is_exactly_max_document_bytes(tmp_path: Path, mode: str, ending: bytes) -> None:
    path = tmp_path / "file.txt"
    kept = len(ending) if mode == "file" else 0
    for length, is_good in ((99, True), (100, True), (101, False), (102, False), (103, False)):
        path.write_bytes(b"x" * (length - kept) + ending)
        (document,) = read_whole(path, format_of(mode, 100))
        assert (document.text is not None) == is_good, length
        assert is_good or ("max_document_bytes" in document.reason and "100" in document.reason)


def test_longest_paragraph_counts_inner_line_endings(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    for second, is_good in ((48, True), (49, False), (50, False), (51, False)):
        path.write_bytes(b"x" * 50 + b"\r\n" + b"y" * second + b"\r\n\r\nnext\n")
        first, following = read_whole(path, format_of("blank-line", 100))
        assert (first.text is not None) == is_good, second
        assert following.text == "next"


def test_longest_json_line_is_exactly_max_document_bytes(tmp_path: Path) -> None:
    path = tmp_path / "file.jsonl"
    line = b'{"text": "' + b"x" * 88 + b'"}'
    assert len(line) == 100
    path.write_bytes(line + b"\r\n" + line[:20] + b"x" + line[20:] + b"\n" + line)
    assert [document.text is None for document in read_whole(path, TextFormat(max_document_bytes=100))] == [
        False,
        True,
        False,
    ]


@pytest.mark.parametrize(
    ("name", "mode", "unit"),
    [
        ("file.jsonl", "blank-line", b"x"),
        ("file.txt", "line", b"x"),
        ("file.txt", "blank-line", b"x"),
        ("file.txt", "blank-line", b"x" * 999 + b"\n"),
        ("file.txt", "file", b"x" * 998 + b"\n\n"),
        ("file.jsonl.gz", "blank-line", b"x"),
        ("file.txt.gz", "blank-line", b"x" * 999 + b"\n"),
    ],
)
def test_too_long_document_is_rejected_without_being_held(tmp_path: Path, name: str, mode: str, unit: bytes) -> None:
    path = tmp_path / name
    is_jsonl = "jsonl" in name
    with gzip.open(path, "wb", compresslevel=1) if name.endswith("gz") else path.open("wb") as stream:
        stream.write(b'{"text": "first"}\n' if is_jsonl else b"first\n\n")
        for _ in range(10):
            stream.write(unit * (5_000_000 // len(unit)))
        stream.write(b'\n{"text": "last"}\n' if is_jsonl else b"\n\nlast\n")
    limit = 1_000_000
    text_format = TextFormat(txt_document=mode, max_document_bytes=limit)  # type: ignore[arg-type]
    range_ = FileRange(name, 0, path.stat().st_size)
    tracemalloc.start()
    try:
        documents = list(RangeReader(f"{tmp_path}/", range_, text_format))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    expected = [None] if mode == "file" else ["first", None, "last"]
    assert [document.text for document in documents] == expected
    assert peak < 4 * limit + (4 << 20)


class OneLongLine(io.RawIOBase):
    """A file of a short line, one of many bytes that are never held, and a short one."""

    def __init__(self, count: int):
        self._parts: Iterator[bytes] = chain([b"first\n"], repeat(b"x" * 65_536, count // 65_536), [b"\nlast\n"])

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        part = next(self._parts, b"")
        buffer[: len(part)] = part
        return len(part)


def test_a_line_of_gigabytes_is_rejected_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "open_binary", lambda *_: io.BufferedReader(OneLongLine(1 << 30), 1 << 20))
    tracemalloc.start()
    try:
        reader = RangeReader("nowhere/", FileRange("file.txt", 0, 1 << 31), TextFormat(txt_document="line"))
        documents = list(reader)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [document.text for document in documents] == ["first", None, "last"]
    assert reader.lines == 3
    assert peak < 64 << 20  # twice --max_document_bytes and some


def test_documents_after_a_too_long_one_keep_their_lines_when_the_file_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    data = b"a\n\n" + b"x" * 500 + b"\n" + b"y" * 500 + b"\n\nb\n\nc"
    path.write_bytes(data)
    found, _ = read(path, format_of("blank-line", 600), [0, 1, 2, 3, 4, 300, 504, 505, 900, len(data)])
    assert found == [(1, 0, "a"), (3, 3, None), (6, 1006, "b"), (8, 1009, "c")]


def test_max_document_bytes_below_one_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="max_document_bytes"):
        TextFormat(max_document_bytes=0)


# --- Bad documents


def test_bad_json_lines_are_rejected_one_by_one(real_data: Path) -> None:
    path = real_data / "stress" / "synthetic" / "bad.jsonl"
    documents = read_whole(path)
    good = {document.line: document.text for document in documents if document.text is not None}
    assert good == {1: "good", 3: "", 9: "second", 11: "nul \0 inside", 14: "good again"}
    reasons = {document.line: document.reason for document in documents if document.text is None}
    expected = {
        4: "'text'.*NoneType",
        5: "'text'.*int",
        6: "no such field",
        7: "object.*list",
        8: "not JSON",
        10: "surrogate",
        12: "UTF-8",
        13: "object.*float",
    }
    assert reasons.keys() == expected.keys()
    for line, reason in reasons.items():
        assert re.search(expected[line], reason), (line, reason)
    offsets = {number: offset for number, offset, _ in numbered_lines(path.read_bytes())}
    assert all(document.offset == offsets[document.line] for document in documents)


def test_text_field_names_the_field_of_the_document(tmp_path: Path) -> None:
    path = tmp_path / "file.jsonl"
    path.write_text('{"text": "no", "body": "yes"}\n{"text": "no"}\n')
    first, second = read_whole(path, TextFormat(text_field="body"))
    assert first.text == "yes"
    assert second.text is None
    assert "'body'" in second.reason


@pytest.mark.parametrize(
    "line",
    [
        b"[" * 200_000,
        b'{"text": ' + b"9" * 10_000 + b"}",
        b'{"text": "a"} {"text": "b"}',
        b'{"text": "tab\tinside"}',
        b"{'text': 'single quotes'}",
        b'{"text": ["list"]}',
        b'"text"',
        b"\x00",
    ],
)
def test_odd_json_is_a_reject_and_the_next_line_is_read(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "file.jsonl"
    path.write_bytes(line + b'\n{"text": "next"}\n')
    assert [document.text for document in read_whole(path)] == [None, "next"]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b'{"text": "first", "text": "last"}', "last"),
        (b'{"score": NaN, "text": "a", "other": -Infinity}', "a"),
        (b'{"other": "\\ud800", "text": "a"}', "a"),
        (b'{"text": "\\ud83d\\ude42"}', "🙂"),
        (b'{"text": "\\u0000\\u2028"}', "\0\u2028"),
        (b'{"other": ' + b"[" * 900 + b"]" * 900 + b', "text": "a"}', "a"),
        (b'{"other": ' + b"9" * 4000 + b', "text": "a"}', "a"),
        (b'{"other": 1e999999, "text": "a"}', "a"),
        (b'  {"text": "a"}\t\r', "a"),
        (b'{"other": ' + b'{"a":' * 200_000 + b"1" + b"}" * 200_000 + b', "text": "a"}', None),
        (b'{"other": ' + b"9" * 100_000 + b', "text": "a"}', None),
    ],
)
def test_json_at_the_edge_is_text_or_a_reject(tmp_path: Path, line: bytes, text: str | None) -> None:
    path = tmp_path / "file.jsonl"
    path.write_bytes(line + b'\n{"text": "next"}\n')
    assert [document.text for document in read_whole(path)] == [text, "next"]


def test_invalid_utf8_rejects_whole_documents(real_data: Path, tmp_path: Path) -> None:
    synthetic = real_data / "stress" / "synthetic"
    for name in ("invalid_utf8.txt", "kuhn_malformed.txt"):
        (document,) = read_whole(synthetic / name)
        assert document.text is None
        assert "UTF-8" in document.reason
        assert (document.line, document.offset) == (1, 0)
    lines = read_whole(synthetic / "invalid_utf8.txt", TextFormat(txt_document="line"))
    assert [document.text for document in lines] == ["ok line", None, None, None, None]
    path = tmp_path / "file.txt"
    path.write_bytes(b"good\n\nbad \xff\nstill the bad one\n\ngood again\n")
    assert [(document.line, document.text) for document in read_whole(path)] == [
        (1, "good"),
        (3, None),
        (6, "good again"),
    ]


def test_stress_texts_are_read_to_the_byte(real_data: Path) -> None:
    synthetic = real_data / "stress" / "synthetic"
    expected = {
        "crlf_bom.txt": ["Line one\r\nLine two", "Doc two"],
        "empty.txt": [],
        "no_final_newline.txt": ["last line has no newline"],
        "nul_bytes.txt": ["abc\0def\n\0\0"],
        "only_newlines.txt": [],
    }
    for name, texts in expected.items():
        assert [document.text for document in read_whole(synthetic / name)] == texts, name
    for name in ("emoji_zwj.txt", "one_huge_line.txt", "one_huge_word.txt", "special_token_text.txt"):
        (document,) = read_whole(synthetic / name)
        assert document.text == (synthetic / name).read_bytes().decode().removesuffix("\n"), name
