"""The shard format: what is written is what is read, by us and by any Parquet reader; what is damaged says so."""

import hashlib
import io
import json
import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scorer.errors import ShardError
from scorer.shard_writing import write_shard
from scorer.shards import ShardContent, ShardMetadata, ShardReader, round_mantissa, shard_name
from scorer.vocabulary import Vocabulary

ROOT = Path(__file__).parents[2]
FOOTER_KEYS = {
    *("format_version", "block_length", "vocabulary_size", "special_ids", "start_id", "end_id", "mask_id"),
    *("tokenizer", "alm", "split", "documents", "blocks", "tokens", "rejected_documents", "leftover_tokens"),
    *("clamped_values", "device", "dtype", "micro_batch", "versions", "content_sha256"),
}
FINGERPRINTS = {"forward_sha256": "f" * 64, "backward_sha256": "b" * 64}
repeatable = settings(derandomize=True, deadline=None, max_examples=500)


def vocabulary(size=50265):
    specials = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": size - 1}
    return Vocabulary(size, specials, 0, 2, size - 1, "v" * 64, "t" * 64)


def make_content(rows, size=50265, scored=True, seed=0):
    generator = np.random.default_rng(seed)
    dtype = np.uint16 if size <= 65536 else np.uint32
    ids = generator.integers(0, size, (rows, 512)).astype(dtype)
    ids[:, 0], ids[:, -1] = 0, 2
    scores = [np.exp(generator.exponential(4, (rows, 512))).astype(np.float32) for _ in range(2)]
    for values in scores:
        values[:, [0, -1]] = 0
    return ShardContent(ids, *(scores if scored else ()))


def make_metadata(content, size=50265, **changes):
    fields = {
        "vocabulary": vocabulary(size),
        "alm": None if content.forward_perplexity is None else FINGERPRINTS,
        "split": [{"file": "a b/ü.jsonl", "start": 0, "end": 10}],
        "documents": 3,
        "blocks": len(content),
        "rejected_documents": 1,
        "leftover_tokens": 17,
        "clamped_values": 2,
        "device": "cpu",
        "dtype": "float32",
        "micro_batch": 8,
        "versions": {"torch": "2"},
        "content_sha256": content.sha256(),
    }
    return ShardMetadata(**fields | changes)


@pytest.fixture
def write(tmp_path):
    def write(content, name="shard-00000-of-00001.parquet", size=50265, **changes):
        path = tmp_path / name
        write_shard(str(path), [content], make_metadata(content, size, **changes))
        return path

    return write


def assert_same_content(found, expected):
    assert [name for name, _ in found.columns()] == [name for name, _ in expected.columns()]
    for (_, values), (_, wanted) in zip(found.columns(), expected.columns(), strict=True):
        assert values.dtype == wanted.dtype
        np.testing.assert_array_equal(values, wanted)


class TestRoundTrip:
    @pytest.mark.parametrize("rows", [0, 1, 255, 256, 257, 600])
    @pytest.mark.parametrize("scored", [True, False])
    def test_gives_rows_and_footer_back(self, write, rows, scored):
        content = make_content(rows, scored=scored)
        with ShardReader(str(write(content))) as reader:
            assert len(reader) == rows
            assert reader.row_groups == -(-rows // 256) or (rows == 0 and reader.row_groups <= 1)
            assert_same_content(reader.read(), content)
            assert reader.metadata == make_metadata(content)

    @pytest.mark.parametrize(
        ("size", "dtype"), [(500, "uint16"), (65536, "uint16"), (65537, "uint32"), (250002, "uint32")]
    )
    def test_ids_are_as_wide_as_the_vocabulary_needs(self, write, size, dtype):
        content = make_content(3, size)
        content.input_ids[1, 7] = size - 1
        path = write(content, size=size)
        assert pq.read_schema(path).field("input_ids").type == pa.list_(pa.type_for_alias(dtype), 512)
        with ShardReader(str(path)) as reader:
            assert_same_content(reader.read(), content)

    def test_row_groups_are_read_one_by_one(self, write):
        content = make_content(600)
        with ShardReader(str(write(content))) as reader:
            parts = [reader.read_row_group(index) for index in range(reader.row_groups)]
        assert [len(part) for part in parts] == [256, 256, 88]
        for name, values in content.columns():
            np.testing.assert_array_equal(np.concatenate([getattr(part, name) for part in parts]), values)

    def test_ids_alone_can_be_read(self, write):
        content = make_content(5)
        with ShardReader(str(write(content))) as reader:
            assert_same_content(reader.read(perplexities=False), ShardContent(content.input_ids))

    def test_bytes_that_are_at_hand_are_not_read_again(self, write):
        content = make_content(3)
        path = write(content)
        stream = io.BytesIO(path.read_bytes())
        path.unlink()
        with ShardReader(str(path), stream) as reader:
            assert_same_content(reader.read(), content)
        assert stream.closed

    def test_same_content_gives_same_bytes(self, write):
        first, again = write(make_content(300), "a.parquet"), write(make_content(300), "b.parquet")
        assert first.read_bytes() == again.read_bytes()

    def test_memory_layout_does_not_change_the_bytes(self, write):
        content = make_content(4)
        other = ShardContent(*(np.asfortranarray(values) for _, values in content.columns()))
        assert write(content, "a.parquet").read_bytes() == write(other, "b.parquet").read_bytes()

    def test_a_path_with_spaces_and_glob_characters(self, write):
        content = make_content(2)
        with ShardReader(str(write(content, "shard [0] of *é ?.parquet"))) as reader:
            assert_same_content(reader.read(), content)

    def test_name(self):
        assert shard_name(0, 42) == "shard-00000-of-00042.parquet"
        assert shard_name(123456, 1000000) == "shard-123456-of-1000000.parquet"


class TestOtherReaders:
    def test_pyarrow_sees_plain_columns(self, write):
        content = make_content(3)
        table = pq.read_table(write(content))
        assert table.column_names == ["input_ids", "forward_perplexity", "backward_perplexity"]
        for name, values in content.columns():
            assert table[name].to_pylist() == values.tolist()

    def test_schema_encoding_and_checksums_are_as_documented(self, write):
        path = write(make_content(300))
        schema = pq.read_schema(path)
        assert schema.field("input_ids").type == pa.list_(pa.uint16(), 512)
        assert schema.field("forward_perplexity").type == pa.list_(pa.float32(), 512)
        metadata = pq.read_metadata(path)
        assert [metadata.row_group(i).num_rows for i in range(2)] == [256, 44]
        columns = [metadata.row_group(0).column(i) for i in range(3)]
        assert [column.compression for column in columns] == ["ZSTD"] * 3
        assert "BYTE_STREAM_SPLIT" not in columns[0].encodings
        assert all("BYTE_STREAM_SPLIT" in column.encodings for column in columns[1:])
        assert not any("DICTIONARY" in encoding for column in columns for encoding in column.encodings)

    def test_pandas_sees_the_same_values(self, write):
        pandas = pytest.importorskip("pandas")
        content = make_content(3)
        frame = pandas.read_parquet(write(content))
        for name, values in content.columns():
            np.testing.assert_array_equal(np.stack(frame[name].to_list()), values)


def documented_fingerprint(columns):
    """`content_sha256` as docs/shard-format.md has it, over names and arrays [N, 512]."""
    expected = hashlib.sha256()
    for name, values in columns:
        expected.update(f"{name} {values.dtype} {len(values)}\n".encode())
        expected.update(values.astype(values.dtype.newbyteorder("<")).tobytes())
    return expected.hexdigest()


class TestFooter:
    def test_is_json_under_the_key_hardness_with_the_documented_keys(self, write):
        content = make_content(3)
        value = json.loads(pq.read_schema(write(content)).metadata[b"hardness"])
        assert set(value) == FOOTER_KEYS
        assert value["format_version"] == 1
        assert value["block_length"] == 512
        assert value["blocks"] == 3
        assert value["tokens"] == 3 * 510
        assert value["vocabulary_size"] == 50265
        assert value["special_ids"] == {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 50264}
        assert (value["start_id"], value["end_id"], value["mask_id"]) == (0, 2, 50264)
        assert value["tokenizer"] == {"vocabulary_sha256": "v" * 64, "tokenizer_sha256": "t" * 64}
        assert value["alm"] == FINGERPRINTS
        assert value["split"] == [{"file": "a b/ü.jsonl", "start": 0, "end": 10}]

    def test_of_block_shards_names_no_alm(self, write):
        value = json.loads(pq.read_schema(write(make_content(3, scored=False))).metadata[b"hardness"])
        assert set(value) == FOOTER_KEYS
        assert value["alm"] is None

    @pytest.mark.parametrize("scored", [True, False])
    def test_content_fingerprint_is_the_documented_one(self, write, scored):
        path = write(make_content(3, scored=scored))
        expected = hashlib.sha256()
        table = pq.read_table(path)
        codes = {"input_ids": ("uint16", "<H"), "forward_perplexity": ("float32", "<f")}
        for name in table.column_names:
            dtype, code = codes.get(name, codes["forward_perplexity"])
            expected.update(f"{name} {dtype} 3\n".encode())
            for row in table[name].to_pylist():
                expected.update(b"".join(struct.pack(code, value) for value in row))
        assert json.loads(pq.read_schema(path).metadata[b"hardness"])["content_sha256"] == expected.hexdigest()

    @pytest.mark.parametrize("rows", [0, 1, 256, 600])
    @pytest.mark.parametrize("scored", [True, False])
    def test_reader_finds_the_content_fingerprint_row_group_by_row_group(self, write, rows, scored):
        content = make_content(rows, scored=scored)
        with ShardReader(str(write(content))) as reader:
            assert reader.content_sha256() == documented_fingerprint(content.columns())
            assert reader.content_sha256(perplexities=False) == documented_fingerprint(
                [("input_ids", content.input_ids)]
            )

    def test_content_fingerprint_does_not_depend_on_byte_order_or_layout(self):
        content = make_content(2)
        swapped = ShardContent(*(values.astype(values.dtype.newbyteorder(">")) for _, values in content.columns()))
        assert swapped.sha256() == content.sha256()
        assert ShardContent(*(np.asfortranarray(v) for _, v in content.columns())).sha256() == content.sha256()

    def test_content_fingerprint_changes_with_any_value(self):
        content = make_content(2)
        for name, _ in content.columns():
            changed = make_content(2)
            getattr(changed, name)[1, 100] += 1
            assert changed.sha256() != content.sha256()


def exact_round(value, bits):
    """`value`, a normal float32 as a Fraction, to `bits` bits of mantissa, half to even: by exact arithmetic."""
    if value == 0:
        return value
    exponent = 0
    while value / Fraction(2) ** exponent >= 2:
        exponent += 1
    while value / Fraction(2) ** exponent < 1:
        exponent -= 1
    unit = Fraction(2) ** (exponent - bits)
    return round(value / unit) * unit  # Fraction rounds half to even


def float32(bits_of_float):
    return struct.unpack("<f", struct.pack("<I", bits_of_float))[0]


positive_floats = st.integers(0x00800000, 0x7E7FFFFF).map(float32)


class TestBitRound:
    @repeatable
    @given(value=positive_floats, bits=st.integers(1, 23))
    def test_is_exact_rounding_half_to_even(self, value, bits):
        found = round_mantissa(np.array([value], dtype=np.float32), bits)[0]
        assert Fraction(float(found)) == exact_round(Fraction(value), bits)

    @repeatable
    @given(value=positive_floats)
    def test_of_10_bits_is_off_by_at_most_2_to_the_minus_11(self, value):
        found = Fraction(float(round_mantissa(np.array([value], dtype=np.float32))[0]))
        assert abs(found / Fraction(value) - 1) <= Fraction(1, 2**11)

    @pytest.mark.parametrize(
        ("value", "rounded"),
        [
            (1 + 2**-11, 1.0),  # half, to even: down
            (1 + 3 * 2**-11, 1 + 2**-9),  # half, to even: up
            (1 + 2**-11 + 2**-23, 1 + 2**-10),  # just above half
            (2 - 2**-23, 2.0),  # into the next exponent
            (0.0, 0.0),
            (1.0, 1.0),
        ],
    )
    def test_examples(self, value, rounded):
        assert round_mantissa(np.array([value], dtype=np.float32), 10)[0] == rounded

    @repeatable
    @given(value=st.integers(0x3F800000, 0x7E7FFFFF).map(float32), bits=st.integers(1, 23))
    def test_keeps_values_at_least_1(self, value, bits):
        assert round_mantissa(np.array([value], dtype=np.float32), bits)[0] >= 1

    def test_of_23_bits_changes_nothing(self):
        values = make_content(3).forward_perplexity
        np.testing.assert_array_equal(round_mantissa(values, 23), values)

    def test_of_the_largest_perplexity_is_finite(self):
        largest = np.array([np.exp(80.0)], dtype=np.float32)
        assert all(np.isfinite(round_mantissa(largest, bits)).all() for bits in range(1, 24))

    def test_leaves_its_argument_and_its_shape_alone(self):
        values = make_content(3).forward_perplexity
        before = values.copy()
        rounded = round_mantissa(values)
        np.testing.assert_array_equal(values, before)
        assert rounded.shape == values.shape
        assert rounded.dtype == np.float32
        np.testing.assert_array_equal(round_mantissa(rounded), rounded)
        np.testing.assert_array_equal(round_mantissa(values[:, ::2]), rounded[:, ::2])


class TestDamage:
    def test_a_flipped_bit_in_a_page_is_found_by_its_checksum(self, write):
        path = write(make_content(300))
        metadata = pq.read_metadata(path)
        for group in range(2):
            for column in range(3):
                chunk = metadata.row_group(group).column(column)
                data = bytearray(path.read_bytes())
                data[chunk.data_page_offset + chunk.total_compressed_size // 2] ^= 0x10
                damaged = path.with_name("damaged.parquet")
                damaged.write_bytes(data)
                with ShardReader(str(damaged)) as reader, pytest.raises(ShardError, match=r"damaged\.parquet"):
                    reader.read()

    def test_a_damaged_row_group_is_named_with_its_rows_and_the_others_can_be_read(self, write):
        content = make_content(600)
        path = write(content)
        chunk = pq.read_metadata(path).row_group(1).column(2)
        data = bytearray(path.read_bytes())
        data[chunk.data_page_offset + chunk.total_compressed_size // 2] ^= 0x10
        path.write_bytes(data)
        with ShardReader(str(path)) as reader:
            for read in (lambda: reader.read_row_group(1), reader.content_sha256):
                with pytest.raises(ShardError, match=r"shard-00000.*row group 1 \(rows 256:512\) cannot be read.*CRC"):
                    read()
            np.testing.assert_array_equal(reader.read_row_group(2).input_ids, content.input_ids[512:])

    @pytest.mark.parametrize(("rows", "size"), [(300, 1000), (300, 255), (10, 4)])
    def test_row_groups_that_readers_would_not_find_rows_in_are_refused(self, write, rows, size):
        path = write(make_content(rows))
        pq.write_table(pq.read_table(path), path, row_group_size=size)
        with pytest.raises(ShardError, match=f"{rows} rows in row groups of {min(rows, size)}.*expected 256"):
            ShardReader(str(path))

    @pytest.mark.parametrize("column", ["input_ids", "forward_perplexity"])
    def test_nulls_are_refused(self, write, column):
        path = write(make_content(3))
        table = pq.read_table(path)
        values = table[column].combine_chunks().flatten()
        holes = pa.array(values.to_numpy(), mask=np.arange(len(values)) == 700)
        lists = pa.FixedSizeListArray.from_arrays(holes, 512)
        pq.write_table(table.set_column(table.column_names.index(column), column, lists), path)
        with ShardReader(str(path)) as reader, pytest.raises(ShardError, match="nulls"):
            reader.read()

    def test_a_footer_that_pyarrow_shows_otherwise_than_other_readers_is_refused(self, write):
        """pyarrow takes a schema's metadata from its own copy of it."""
        path = write(make_content(3))
        footer = pq.read_metadata(path).metadata[b"hardness"]
        path.write_bytes(path.read_bytes().replace(footer, footer.replace(b'"documents": 3', b'"documents": 4')))
        assert json.loads(pq.read_schema(path).metadata[b"hardness"])["documents"] == 3
        with pytest.raises(ShardError, match="two 'hardness' entries"):
            ShardReader(str(path))

    @pytest.mark.parametrize("data", [b"", b"PAR1", b"not parquet at all", b"PAR1" + 100 * b"\0" + b"PAR1"])
    def test_a_file_that_is_not_parquet_is_named(self, tmp_path, data):
        path = tmp_path / "foreign.parquet"
        path.write_bytes(data)
        with pytest.raises(ShardError, match=r"foreign\.parquet cannot be read as Parquet"):
            ShardReader(str(path))

    @pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
    def test_a_file_that_is_cut_is_named(self, write, share):
        path = write(make_content(10))
        data = path.read_bytes()
        path.write_bytes(data[: int(share * len(data))])
        with pytest.raises(ShardError, match="shard-00000-of-00001"):
            ShardReader(str(path))

    def test_a_file_that_is_not_there_is_named(self, tmp_path):
        with pytest.raises(ShardError, match=r"nowhere\.parquet"):
            ShardReader(str(tmp_path / "nowhere.parquet"))

    def test_somebody_elses_parquet_is_no_shard(self, tmp_path):
        path = tmp_path / "foreign.parquet"
        pq.write_table(pa.table({"text": ["a"]}), path)
        with pytest.raises(ShardError, match=r"foreign\.parquet has no 'hardness' entry.*not a shard"):
            ShardReader(str(path))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"format_version": 2}, "format 2"),
            ({"block_length": 128}, "blocks of 128 tokens"),
            ({"tokenizer": {}}, "unreadable footer"),
            ({"tokens": 1}, "unreadable footer.*1 tokens"),
            ({"vocabulary_size": "50265"}, "unreadable footer"),
            ({"alm": None}, "other columns"),
            ({"vocabulary_size": 100_000}, "other columns"),
        ],
    )
    def test_a_footer_that_contradicts_the_file_or_this_version_is_refused(self, write, changes, message):
        path = write(make_content(2))
        table = pq.read_table(path)
        footer = json.loads(table.schema.metadata[b"hardness"]) | changes
        pq.write_table(table.replace_schema_metadata({b"hardness": json.dumps(footer)}), path)
        with pytest.raises(ShardError, match=message):
            ShardReader(str(path))

    @pytest.mark.parametrize("footer", [b"{", b"[]", b"{}", b'{"format_version": 1}', b"\xff"])
    def test_an_unreadable_footer_is_a_shard_error(self, write, footer):
        path = write(make_content(2))
        pq.write_table(pq.read_table(path).replace_schema_metadata({b"hardness": footer}), path)
        with pytest.raises(ShardError, match="footer"):
            ShardReader(str(path))

    def test_a_footer_of_a_later_version_with_other_keys_says_which_version(self, write):
        path = write(make_content(2))
        table = pq.read_table(path)
        footer = json.loads(table.schema.metadata[b"hardness"]) | {"format_version": 2, "a_new_key": 1}
        pq.write_table(table.replace_schema_metadata({b"hardness": json.dumps(footer)}), path)
        with pytest.raises(ShardError, match="format 2"):
            ShardReader(str(path))


READ_ALL = """
import sys, tracemalloc
import pandas, pyarrow  # pyarrow imports pandas at its first conversion, which is not what is measured
from scorer.shards import ShardReader

with ShardReader(sys.argv[1]) as reader:
    tracemalloc.start()
    before = pyarrow.default_memory_pool().max_memory()
    assert reader.content_sha256() == reader.metadata.content_sha256
    for index in range(reader.row_groups):
        reader.read_row_group(index)
    print(pyarrow.default_memory_pool().max_memory() - before + tracemalloc.get_traced_memory()[1])
"""


def test_memory_of_reading_by_row_groups_does_not_grow_with_the_shard(write):
    """40 row groups, in a process of its own: what Arrow and numpy hold at most is less than 10 of them."""
    row_group = 256 * 512 * (2 + 4 + 4)
    path = write(make_content(40 * 256))
    done = subprocess.run([sys.executable, "-c", READ_ALL, path], cwd=ROOT, capture_output=True, text=True, check=True)
    assert row_group < int(done.stdout) < 10 * row_group
