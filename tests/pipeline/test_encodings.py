"""`--encoding`: text in any encoding whose line endings are ASCII's."""

from __future__ import annotations

import codecs
import json
from itertools import pairwise
from pathlib import Path

import pytest

from pipeline.corpus import Document, FileRange, RangeReader, TextFormat
from scorer.errors import ConfigurationError

TEXTS = {
    "latin-1": ["Ein schöner Tag", "für Käse à la crème ÿ"],
    "cp1252": ["“curly” – dashes …", "€ 5"],
    "shift_jis": ["日本語テキスト", "表示ソ能"],  # with the byte of a backslash inside characters
    "gb18030": ["中文文本", "𠀀 and ASCII"],
    "euc-kr": ["한국어", "글"],
    "koi8-r": ["Привет", "мир"],
    "utf-8": ["é日🙂", "b"],
}


def read(path: Path, encoding: str, cuts: list[int] | None = None, **more: str) -> list[Document]:
    bounds = sorted({0, path.stat().st_size, *(cuts or [])})
    text_format = TextFormat(encoding=encoding, **more)  # type: ignore[arg-type]
    return [
        document
        for start, end in pairwise(bounds)
        for document in RangeReader(f"{path.parent}/", FileRange(path.name, start, end), text_format)
    ]


@pytest.mark.parametrize("encoding", TEXTS)
@pytest.mark.parametrize("form", ["jsonl", "txt"])
def test_text_comes_back_from_its_encoding_however_the_file_is_cut(tmp_path: Path, encoding: str, form: str) -> None:
    texts = [*TEXTS[encoding], "plain"] * 3
    lines = [json.dumps({"text": text}, ensure_ascii=False) if form == "jsonl" else text for text in texts]
    path = tmp_path / f"file.{form}"
    path.write_bytes(("\n" if form == "jsonl" else "\n\n").join(lines).encode(encoding))
    for cuts in ([], list(range(path.stat().st_size)), [7, 20]):
        assert [document.text for document in read(path, encoding, cuts)] == texts


def test_what_is_not_of_the_encoding_is_a_reject_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_bytes("gut\n\nschön\n\n".encode("latin-1") + b"\x81\n")
    assert [document.text for document in read(path, "utf-8")] == ["gut", None, None]
    assert read(path, "utf-8")[1].reason.startswith("not UTF-8: ")
    assert [document.text for document in read(path, "cp1252")] == ["gut", "schön", None]
    assert read(path, "cp1252")[2].reason.startswith("not CP1252: ")
    assert [document.text for document in read(path, "ascii")] == ["gut", None, None]


@pytest.mark.parametrize("encoding", ["utf-8", "UTF8", "utf-8-sig", "gb18030"])
def test_the_byte_order_mark_of_the_encoding_is_dropped_where_it_opens_a_file(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "file.txt"
    mark = b"\x84\x31\x95\x33" if encoding == "gb18030" else codecs.BOM_UTF8
    path.write_bytes(mark + b"first\n\nsecond " + mark)
    assert [document.text for document in read(path, encoding, [2, 5])] == ["first", "second \ufeff"]


def test_an_encoding_that_can_write_half_characters_crashes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_bytes(b"good\n\n+2AA-\n\ngood")
    assert [document.text for document in read(path, "utf-7")] == ["good", None, "good"]


def test_spellings_of_one_encoding_are_one() -> None:
    assert TextFormat(encoding="UTF8") == TextFormat() == TextFormat(encoding="utf-8-sig")
    assert TextFormat(encoding="latin1") == TextFormat(encoding="ISO-8859-1")


@pytest.mark.parametrize(
    "encoding", ["utf-16", "utf-16-be", "utf-32", "cp500", "punycode", "undefined", "unicode_escape"]
)
def test_encodings_whose_line_feed_is_not_asciis_are_refused(encoding: str) -> None:
    with pytest.raises(ConfigurationError, match="iconv"):
        TextFormat(encoding=encoding)


@pytest.mark.parametrize("encoding", ["klingon", "hex", "rot13", "zlib", ""])
def test_what_is_no_text_encoding_is_refused(encoding: str) -> None:
    with pytest.raises(ConfigurationError, match="text encoding that Python knows"):
        TextFormat(encoding=encoding)
