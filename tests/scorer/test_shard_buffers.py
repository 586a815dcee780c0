"""Unfinished shards: the rows come back as they went in, and memory stays bounded however many there are."""

import contextlib
import hashlib
import os
import resource
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scorer import files, shard_writing
from scorer.errors import StorageError
from scorer.shard_writing import ShardBuffer, write_shard
from scorer.shards import ShardContent, ShardMetadata
from scorer.vocabulary import Vocabulary

MIB = 1 << 20
COLUMNS = ("input_ids", "forward_perplexity", "backward_perplexity")


def make_columns(rows, dtype="uint16", scored=True, seed=0):
    generator = np.random.default_rng(seed)
    highest = 60_000 if dtype == "uint16" else 200_000
    ids = generator.integers(0, highest, (rows, 512)).astype(dtype)
    scores = [generator.exponential(9, (rows, 512)).astype(np.float32) for _ in range(2)]
    return dict(zip(COLUMNS, [ids, *scores] if scored else [ids], strict=False))


def documented_fingerprint(columns):
    """`content_sha256` as docs/shard-format.md has it."""
    digest = hashlib.sha256()
    for name, values in columns.items():
        digest.update(f"{name} {values.dtype} {len(values)}\n".encode())
        digest.update(values.astype(values.dtype.newbyteorder("<")).tobytes())
    return digest.hexdigest()


def fill(buffer, columns, piece=256):
    rows = len(columns["input_ids"])
    for start in range(0, rows, piece):
        buffer.append(ShardContent(**{name: values[start : start + piece] for name, values in columns.items()}))


def metadata_of(buffer, dtype="uint16", scored=True):
    size = 60_000 if dtype == "uint16" else 200_000
    vocabulary = Vocabulary(size, {"<s>": 0, "</s>": 2, "<mask>": size - 1}, 0, 2, size - 1, "v" * 64, "t" * 64)
    return ShardMetadata(
        vocabulary=vocabulary,
        alm={"forward_sha256": "f"} if scored else None,
        split=[],
        documents=0,
        blocks=len(buffer),
        rejected_documents=0,
        leftover_tokens=0,
        clamped_values=0,
        device=None,
        dtype=None,
        micro_batch=None,
        versions={},
        content_sha256=buffer.sha256(),
    )


@pytest.mark.parametrize("spool_bytes", [1, 100_000, 32 * MIB])
@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("scored", [True, False])
@pytest.mark.parametrize(("rows", "piece"), [(0, 256), (1, 256), (256, 256), (700, 256), (700, 37), (700, 700)])
def test_rows_come_back_in_row_groups_with_the_documented_fingerprint(
    *, tmp_path, monkeypatch, spool_bytes, dtype, scored, rows, piece
):
    """From memory, from files, and from some of both; as often as they are asked for; in pieces of any size."""
    monkeypatch.setattr(shard_writing, "_SPOOL_BYTES", spool_bytes)
    columns = make_columns(rows, dtype, scored)
    with ShardBuffer(dtype, scored, str(tmp_path)) as buffer:
        fill(buffer, columns, piece)
        assert len(buffer) == rows
        assert buffer.sha256() == documented_fingerprint(columns)
        for _ in range(2):
            groups = list(buffer.row_groups())
            assert [len(group) for group in groups] == [256] * (rows // 256) + ([rows % 256] if rows % 256 else [])
            for name, values in columns.items():
                found = np.concatenate([np.empty((0, 512), dtype=values.dtype)] + [getattr(g, name) for g in groups])
                assert found.dtype == values.dtype
                np.testing.assert_array_equal(found, values)
        assert buffer.sha256() == documented_fingerprint(columns)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize(("rows", "scored"), [(0, True), (0, False), (300, True), (300, False)])
def test_a_buffered_shard_is_written_as_any_parquet_reader_expects_it(*, tmp_path, monkeypatch, dtype, rows, scored):
    monkeypatch.setattr(shard_writing, "_SPOOL_BYTES", 100_000)
    columns = make_columns(rows, dtype, scored)
    path = str(tmp_path / "a.parquet")
    with ShardBuffer(dtype, scored) as buffer:
        fill(buffer, columns)
        write_shard(path, buffer.row_groups(), metadata_of(buffer, dtype, scored))
    table = pq.read_table(path)
    assert table.column_names == list(columns)
    assert table.schema.field("input_ids").type == pa.list_(pa.type_for_alias(dtype), 512)
    for name, values in columns.items():
        found = table[name].combine_chunks().flatten().to_numpy().reshape(-1, 512) if rows else values
        np.testing.assert_array_equal(found, values)
    assert table.num_rows == rows


def test_memory_does_not_grow_with_the_shard(tmp_path, monkeypatch):
    """60 row groups of 1.25 MiB each; what Python, numpy and Arrow hold at any time is less than 8 of them."""
    monkeypatch.setattr(shard_writing, "_SPOOL_BYTES", MIB)
    group = make_columns(256)
    arrow_before = pa.total_allocated_bytes()
    arrow_peak = 0

    def watched(groups):
        nonlocal arrow_peak
        for content in groups:
            yield content
            arrow_peak = max(arrow_peak, pa.total_allocated_bytes() - arrow_before)

    tracemalloc.start()
    try:
        with ShardBuffer("uint16", True, str(tmp_path)) as buffer:
            for _ in range(60):
                buffer.append(ShardContent(**group))
            write_shard(str(tmp_path / "a.parquet"), watched(buffer.row_groups()), metadata_of(buffer))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert os.path.getsize(tmp_path / "a.parquet") > 40 * MIB
    assert peak + arrow_peak < 10 * MIB


@contextlib.contextmanager
def file_size_limit(limit):
    """As a disk that is full after so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def fill_spools(folder, rows):
    with ShardBuffer("uint16", False, folder) as buffer:
        fill(buffer, make_columns(rows, scored=False))


@pytest.mark.parametrize("room", [1000, MIB])
def test_no_room_for_an_unfinished_shard_is_a_storage_error_that_names_the_folder(tmp_path, monkeypatch, room):
    monkeypatch.setattr(shard_writing, "_SPOOL_BYTES", 100_000)
    with file_size_limit(room), pytest.raises(StorageError, match=f"{tmp_path} has no room"):
        fill_spools(str(tmp_path), rows=256 * 9)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_at_the_last_byte_is_a_storage_error(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_writing, "_SPOOL_BYTES", 1 << 18)
    with (
        ShardBuffer("uint16", False, str(tmp_path)) as buffer,
        file_size_limit(10 * (1 << 18) - 1),
        pytest.raises(StorageError),
    ):
        fill(buffer, make_columns(2560, scored=False))


@pytest.mark.parametrize(("is_full", "cause"), [(True, "No space left on device"), (False, "File too large")])
def test_no_room_for_a_shard_is_a_storage_error_and_leaves_nothing(tmp_path, is_full, cause):
    path = str(tmp_path / "shard-00000-of-00001.parquet")

    def write(buffer, metadata):
        with files.staged(path) as temporary:
            if is_full:
                os.symlink("/dev/full", temporary)
            write_shard(temporary, buffer.row_groups(), metadata)

    with ShardBuffer("uint16", True) as buffer:
        fill(buffer, make_columns(300))
        metadata = metadata_of(buffer)
        with file_size_limit(100_000), pytest.raises(StorageError, match=f"{path} cannot be written: .*{cause}"):
            write(buffer, metadata)
    assert list(tmp_path.iterdir()) == []
