"""Parquet as input: a column of text, cut by rows."""

from __future__ import annotations

import json
import logging
import tempfile
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.corpus import Document, FileRange, RangeReader, RowGroup, TextFormat, read_row_groups
from pipeline.documents import parquet as parquet_module
from pipeline.plan import Split, split_files
from scorer import files
from scorer.errors import ConfigurationError


def read(path: Path, cuts: Sequence[int], **text_format: Any) -> list[Document]:
    documents = []
    for start, end in pairwise(cuts):
        reader = RangeReader(f"{path.parent}/", FileRange(path.name, start, end), TextFormat(**text_format))
        documents += list(reader)
        assert reader.lines == end - start
    return documents


def write(path: Path, texts: Sequence[Any], type_: Any = None, **options: Any) -> None:
    """A table with columns on either side of the text."""
    table = pa.table({"id": range(len(texts)), "text": pa.array(texts, type=type_), "url": ["u"] * len(texts)})
    pq.write_table(table, path, **options)


@settings(max_examples=120, deadline=None)
@given(
    texts=st.lists(st.none() | st.text(max_size=12), max_size=60),
    row_group_rows=st.integers(1, 25),
    cut_fractions=st.lists(st.floats(0, 1), max_size=8),
    batch_rows=st.integers(1, 7),
    is_dictionary=st.booleans(),
)
def test_any_cutting_gives_every_row_once(
    texts: list[str | None], row_group_rows: int, cut_fractions: list[float], batch_rows: int, is_dictionary: bool
) -> None:
    cuts = sorted({0, len(texts), *(round(fraction * len(texts)) for fraction in cut_fractions)})
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(parquet_module, "_BATCH_ROWS", batch_rows)
        path = Path(folder, "file.parquet")
        write(path, texts, pa.string(), row_group_size=row_group_rows, use_dictionary=is_dictionary)
        documents = read(path, cuts)
    assert [document.text for document in documents] == texts
    assert [document.line for document in documents] == list(range(len(texts)))
    assert {document.unit for document in documents} <= {"row"}


@pytest.mark.parametrize(
    "type_",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.dictionary(pa.int32(), pa.string()),
        pa.dictionary(pa.int8(), pa.large_string()),
    ],
)
def test_every_type_of_strings_is_read(tmp_path: Path, type_: Any) -> None:
    texts = ["one", "", None, "zwei ü\n\nlines", "one", None, "three 🙂"]
    column = pa.array(texts, pa.string())
    is_dictionary = isinstance(type_, pa.DictionaryType)
    column = column.dictionary_encode().cast(type_) if is_dictionary else pa.array(texts, type_)
    pq.write_table(pa.table({"text": column}), tmp_path / "file.parquet")
    assert [document.text for document in read(tmp_path / "file.parquet", [0, 3, 7])] == texts


@pytest.mark.parametrize("type_", [pa.binary(), pa.large_binary(), pa.binary_view(), pa.binary(5)])
def test_bytes_are_decoded_by_the_encoding(tmp_path: Path, type_: Any) -> None:
    path = tmp_path / "file.parquet"
    write(path, [b"sch\xf6n", b"plain", None], type_)
    assert [document.text for document in read(path, [0, 3], encoding="latin-1")] == ["schön", "plain", None]
    rejected, plain, null = read(path, [0, 3])
    assert (rejected.text, plain.text, null.text) == (None, "plain", None)
    assert rejected.reason.startswith("not UTF-8: ")
    assert "null" in null.reason


def test_strings_are_utf8_whatever_the_encoding_of_bytes(tmp_path: Path) -> None:
    write(tmp_path / "file.parquet", ["schön"])
    assert [document.text for document in read(tmp_path / "file.parquet", [0, 1], encoding="latin-1")] == ["schön"]


def test_strings_that_are_not_utf8_are_rejects(tmp_path: Path) -> None:
    """Parquet promises UTF-8, and nobody holds writers to it."""
    column = pa.array([b"good", b"bad \xff", b"good"]).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "file.parquet")
    documents = read(tmp_path / "file.parquet", [0, 3])
    assert [document.text for document in documents] == ["good", None, "good"]
    assert documents[1].reason.startswith("not UTF-8: ")


def test_longest_cell_is_exactly_max_document_bytes(tmp_path: Path) -> None:
    write(tmp_path / "file.parquet", ["ü" * 50, "ü" * 50 + "x", "x"])
    documents = read(tmp_path / "file.parquet", [0, 3], max_document_bytes=100)
    assert [document.text for document in documents] == ["ü" * 50, None, "x"]
    assert "max_document_bytes 100" in documents[1].reason


@pytest.mark.parametrize("name", ["body", "a.b", "Text"])
def test_text_field_names_the_column(tmp_path: Path, name: str) -> None:
    table = pa.table({"a": [{"b": "nested"}], "text": ["no"], name: ["yes"], "z": [1]})
    pq.write_table(table, tmp_path / "file.parquet")
    assert [document.text for document in read(tmp_path / "file.parquet", [0, 1], text_field=name)] == ["yes"]


def test_a_row_group_of_any_size_is_read_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "file.parquet"
    letters = np.random.default_rng(0).integers(97, 123, (64_000, 1000), dtype=np.uint8)
    write(path, [row.tobytes().decode() for row in letters], row_group_size=64_000)
    del letters
    before, peak, rows = pa.total_allocated_bytes(), 0, 0
    for document in RangeReader(f"{tmp_path}/", FileRange(path.name, 0, 64_000), TextFormat()):
        rows += document.text is not None
        peak = max(peak, pa.total_allocated_bytes() - before)
    assert rows == 64_000
    assert peak < 16 << 20


class CountedReads:
    """A file that remembers how much of which file was read."""

    def __init__(self, stream: Any, name: str, counts: Counter[str]):
        self._stream = stream
        self._name = name
        self._counts = counts

    def read(self, *arguments: int) -> bytes:
        data: bytes = self._stream.read(*arguments)
        self._counts[self._name] += len(data)
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __enter__(self) -> CountedReads:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()


def test_planning_reads_footers_and_a_range_its_own_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.parquet"
    letters = np.random.default_rng(0).integers(97, 123, (4000, 5000), dtype=np.uint8)
    write(path, [row.tobytes().decode() for row in letters], row_group_size=400)
    size, counts, opened = path.stat().st_size, Counter[str](), files.open_binary
    monkeypatch.setattr(files, "open_binary", lambda path: CountedReads(opened(path), path, counts))
    (groups,) = read_row_groups([str(path)], "text")
    assert [group.rows for group in groups] == [400] * 10
    assert all(400 * 5000 <= group.text_bytes < 1.01 * 400 * 5000 for group in groups)
    assert counts[str(path)] < size / 50
    counts.clear()
    assert len(read(path, [800, 1200])) == 400
    assert counts[str(path)] < 1.3 * size / 10


# --- Splits


def row_ranges(splits: tuple[Split, ...]) -> list[tuple[str, int, int]]:
    return [(range_.file, range_.start, range_.end) for split in splits for range_ in split.ranges]


groups_of_a_file = st.lists(st.builds(RowGroup, st.integers(0, 50), st.integers(0, 5000)), max_size=6)


@given(groups=st.lists(groups_of_a_file, max_size=5), split_bytes=st.integers(1, 3000))
def test_splits_cover_every_row_once_in_order(groups: list[list[RowGroup]], split_bytes: int) -> None:
    row_groups = {f"{index}.parquet": tuple(of_file) for index, of_file in enumerate(groups)}
    splits = split_files(dict.fromkeys(row_groups, 9), split_bytes, row_groups=row_groups)
    covered = [(file, row) for file, start, end in row_ranges(splits) for row in range(start, end)]
    assert covered == [
        (name, row) for name, of_file in row_groups.items() for row in range(sum(group.rows for group in of_file))
    ]
    for split in splits:  # neighbours are one range: a file is read once in a split
        assert len({range_.file for range_ in split.ranges}) == len(split.ranges)


def test_splits_of_rows_hold_about_split_bytes_of_text() -> None:
    groups = {"a.parquet": (RowGroup(1000, 500_000), RowGroup(10, 500_000)), "b.parquet": (RowGroup(100_000, 400_000),)}
    splits = split_files({"a.parquet": 1, "b.parquet": 1, "c.txt": 30_000}, 100_000, row_groups=groups)
    assert len(splits) == 15
    assert [range_.end - range_.start for split in splits[:5] for range_ in split.ranges] == [200] * 5
    assert [range_.end - range_.start for split in splits[5:10] for range_ in split.ranges] == [2] * 5
    assert row_ranges(splits[-1:]) == [("c.txt", 0, 30_000)]


# --- Faults


def test_files_without_the_column_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "file.parquet"
    pq.write_table(pa.table({"id": [1], "body": ["text"]}), path)
    with pytest.raises(ConfigurationError, match=r"file\.parquet.*'text'.*id, body.*--text_field"):
        read_row_groups([str(path)], "text")
    with pytest.raises(ConfigurationError, match=r"file\.parquet.*'id'.*int64.*--text_field"):
        read_row_groups([str(path)], "id")


@pytest.mark.parametrize("damage", ["empty", "cut", "not Parquet", "footer"])
def test_files_whose_footer_cannot_be_read_are_refused_by_name(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "file.parquet"
    write(path, ["text"] * 100)
    data = path.read_bytes()
    footer_bytes = int.from_bytes(data[-8:-4], "little")
    damaged = {
        "empty": b"",
        "cut": data[:-20],
        "not Parquet": b"text\n" * 50,
        "footer": data[: -8 - footer_bytes] + b"\xff" * footer_bytes + data[-8:],
    }
    path.write_bytes(damaged[damage])
    with pytest.raises(ConfigurationError, match=r"file\.parquet cannot be read as Parquet"):
        read_row_groups([str(path)], "text")


@pytest.mark.parametrize("has_checksums", [True, False])
def test_a_damaged_page_is_one_reject_and_keeps_the_rows_before(
    tmp_path: Path, has_checksums: bool, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "file.parquet"
    texts = [f"{number} {json.dumps([number**3, number**5])}" for number in range(6000)]
    options = {"use_dictionary": False, "data_page_size": 10_000, "write_page_checksum": has_checksums}
    write(path, texts, row_group_size=2000, **options)
    column = pq.ParquetFile(path).metadata.row_group(1).column(1)
    data = bytearray(path.read_bytes())
    middle = column.data_page_offset + column.total_compressed_size // 2
    data[middle : middle + 500] = b"\xff" * 500
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        *good, reject = read(path, [0, 6000])
    assert [document.text for document in good] == texts[: len(good)]
    assert 2000 <= len(good) < 4000
    assert (reject.text, reject.line, reject.unit) == (None, len(good), "row")
    assert "5999" in reject.reason
    assert "file.parquet is damaged" in caplog.text
    assert [document.text for document in read(path, [4000, 5000, 6000])] == texts[4000:]


def test_fewer_rows_than_planned_are_a_reject(tmp_path: Path) -> None:
    path = tmp_path / "file.parquet"
    write(path, ["a", "b"])
    documents = read(path, [0, 5])
    assert [document.text for document in documents] == ["a", "b", None]
    assert documents[2].line == 2


def test_what_a_store_raises_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.parquet"
    write(path, ["a", "b"])

    class Unreachable(CountedReads):
        def read(self, *arguments: int) -> bytes:
            raise TimeoutError("the store does not answer")

    opened = files.open_binary
    monkeypatch.setattr(files, "open_binary", lambda path: Unreachable(opened(path), path, Counter()))
    with pytest.raises(TimeoutError):
        read(path, [0, 2])


def test_damaged_bytes_never_crash_and_lose_no_row_in_silence(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    texts = [f"{number} " + "é" * int(generator.integers(0, 50)) for number in range(1500)]
    path = tmp_path / "file.parquet"
    for attempt in range(60):
        write(path, texts, row_group_size=500, compression=["none", "snappy", "zstd"][attempt % 3], data_page_size=2000)
        data = bytearray(path.read_bytes())
        for position in generator.integers(4, int(len(data) * 0.9), 5):
            data[position] = generator.integers(256)
        path.write_bytes(data)
        try:
            (groups,) = read_row_groups([str(path)], "text")
        except ConfigurationError:
            continue
        documents = read(path, [0, sum(group.rows for group in groups)])
        is_damaged = bool(documents) and "rows up to" in documents[-1].reason
        assert len(documents) == 1500 or is_damaged, attempt
