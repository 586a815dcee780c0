"""`verify` finds every fault, each by its own name, however carefully somebody hid it."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import tokenize_corpus, verify
from pipeline.verify import find_faults
from scorer.errors import ShardError
from scorer.shards import ShardReader

IN_THREADS = ("--direct_running_mode", "in_memory")

Run = Callable[..., tuple[int, str]]
EditJson = Callable[..., None]
Arrays = dict[str, npt.NDArray[Any]]
Footer = dict[str, Any]


def shard_paths(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.parquet"))


def faults_of(folder: Path) -> list[str]:
    return list(map(str, find_faults(str(folder))))


def check_faults(folder: Path, *patterns: str) -> None:
    """Each pattern is found, and nothing else is."""
    found = faults_of(folder)
    for pattern in patterns:
        assert any(re.search(pattern, fault) for fault in found), (pattern, found)
    for fault in found:
        assert any(re.search(pattern, fault) for pattern in patterns), (fault, patterns)


# --- The table of faults in a shard


@dataclass(frozen=True)
class Damage:
    """Something done to a shard's file, and what `verify` must say of it."""

    name: str
    do: Callable[[Path], object]
    words: tuple[str, ...]
    """Found even where receipt and manifest were made to vouch for the damaged file."""


def truncate(path: Path, keep: float = 0.9) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


def flip_in_page(path: Path, column: int) -> None:
    chunk = pq.read_metadata(path).row_group(0).column(column)
    data = bytearray(path.read_bytes())
    data[chunk.data_page_offset + chunk.total_compressed_size // 2] ^= 8
    path.write_bytes(data)


def flip_at(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 8
    path.write_bytes(data)


def content_fingerprint(table: pa.Table) -> str:
    """`content_sha256` as docs/shard-format.md defines it."""
    digest = hashlib.sha256()
    for name in table.column_names:
        values = table[name].combine_chunks().flatten()
        dtype = {"float": "float32", "double": "float64"}.get(str(values.type), str(values.type))
        digest.update(f"{name} {dtype} {len(table)}\n".encode())
        digest.update(np.asarray(values).tobytes())
    return digest.hexdigest()


def write(path: Path, table: pa.Table, footer: Footer | None, **options: Any) -> None:
    metadata = {} if footer is None else {b"hardness": json.dumps(footer).encode()}
    layout = {"row_group_size": 256, "compression": "zstd", "use_dictionary": False, "write_page_checksum": True}
    pq.write_table(table.replace_schema_metadata(metadata), path, **layout | options)


def rewrite(change: Callable[[Arrays], object] = lambda _: None, **footer_changes: Any) -> Callable[[Path], None]:
    """The file with other values or another footer, sound in itself: `content_sha256` in the footer fits."""

    def do(path: Path) -> None:
        table = pq.read_table(path)
        footer = json.loads(table.schema.metadata[b"hardness"])
        arrays = {name: table[name].combine_chunks().flatten().to_numpy().copy() for name in table.column_names}
        rows = {name: values.reshape(-1, 512) for name, values in arrays.items()}
        change(rows)
        columns = {
            name: pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
            for name, values in rows.items()
        }
        changed = pa.table(columns)
        footer["content_sha256"] = content_fingerprint(changed)
        for key, value in footer_changes.items():
            outer, _, inner = key.partition("__")
            if inner:
                footer[outer][inner] = value
            else:
                footer[outer] = value
        write(path, changed, footer)

    return do


def reshape(change: Callable[[pa.Table], pa.Table], **options: Any) -> Callable[[Path], None]:
    """The file with another table, and its footer as it was."""

    def do(path: Path) -> None:
        table = pq.read_table(path)
        write(path, change(table), json.loads(table.schema.metadata[b"hardness"]), **options)

    return do


def replace_column(name: str, make: Callable[[npt.NDArray[Any]], pa.Array]) -> Callable[[pa.Table], pa.Table]:
    """A table whose column is what `make` gives for its values [N, 512]."""

    def change(table: pa.Table) -> pa.Table:
        values = table[name].combine_chunks().flatten().to_numpy().reshape(-1, 512)
        return table.set_column(table.column_names.index(name), name, make(values))

    return change


def fixed_lists(values: npt.NDArray[Any]) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


def with_null_element(values: npt.NDArray[Any]) -> pa.Array:
    mask = np.zeros(values.size, dtype=bool)
    mask[700] = True
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1), mask=mask), 512)


def with_null_row(values: npt.NDArray[Any]) -> pa.Array:
    rows = values.tolist()
    return pa.array([*rows[:-1], None], pa.list_(pa.from_numpy_dtype(values.dtype), 512))


def without_footer(path: Path) -> None:
    write(path, pq.read_table(path), None)


def with_two_footers(path: Path) -> None:
    """Another value in the footer's own entry than in the copy of it that Arrow keeps in its schema."""
    data = path.read_bytes()
    footer = pq.read_metadata(path).metadata[b"hardness"]
    path.write_bytes(data.replace(footer, footer.replace(b'"clamped_values": 0', b'"clamped_values": 1')))


def set_at(column: str, row: int, position: int, value: float) -> Callable[[Arrays], None]:
    def change(arrays: Arrays) -> None:
        arrays[column][row, position] = value

    return change


def set_at_ordinary(column: str, value: float) -> Callable[[Arrays], None]:
    """At the hundredth ordinary token of row 3."""

    def change(arrays: Arrays) -> None:
        position = np.flatnonzero(arrays["forward_perplexity"][3])[99]
        arrays[column][3, position] = value

    return change


def set_at_separator(arrays: Arrays) -> None:
    position = 1 + np.flatnonzero(arrays["input_ids"][2, 1:511] == 2)[0]
    arrays["backward_perplexity"][2, position] = 7.0


def drop_row(arrays: Arrays) -> None:
    for name in arrays:
        arrays[name] = np.delete(arrays[name], 5, axis=0)


def exchange_rows(arrays: Arrays) -> None:
    for values in arrays.values():
        values[[4, 5]] = values[[5, 4]]


FORWARD, BACKWARD = "forward_perplexity", "backward_perplexity"
OTHER_IDS = "its input_ids are not those of the block shard in the plan"
DAMAGES = [
    Damage("empty", lambda path: path.write_bytes(b""), ("cannot be read as Parquet",)),
    Damage("truncated", truncate, ("cannot be read as Parquet",)),
    Damage("truncated to a tenth", lambda path: truncate(path, 0.1), ("cannot be read as Parquet",)),
    Damage("text", lambda path: path.write_text("no Parquet, but text\n" * 9), ("cannot be read as Parquet",)),
    Damage("bit in the ids", lambda path: flip_in_page(path, 0), (r"row group 0 \(rows 0:\d+\) cannot be read.*CRC",)),
    Damage("bit in forward", lambda path: flip_in_page(path, 1), (r"row group 0 \(rows 0:\d+\) cannot be read.*CRC",)),
    Damage("bit in backward", lambda path: flip_in_page(path, 2), (r"row group 0 \(rows 0:\d+\) cannot be read.*CRC",)),
    Damage("bit in the magic", lambda path: flip_at(path, -1), ("cannot be read as Parquet.*magic",)),
    Damage("bit in the footer's length", lambda path: flip_at(path, -6), ("cannot be read as Parquet",)),
    Damage("bit in the footer", lambda path: flip_at(path, -300), ("footer|cannot be read as Parquet",)),
    # Fingerprints and format in the footer
    *(
        Damage(f"footer: {name}", rewrite(**{name: value}), (words,))
        for name, value, words in [
            ("tokenizer__vocabulary_sha256", "0" * 64, "its footer names another tokenizer"),
            ("tokenizer__tokenizer_sha256", "0" * 64, "its footer names another tokenizer"),
            ("special_ids", {"<s>": 0, "</s>": 2}, "its footer names another tokenizer"),
            ("mask_id", None, "its footer names another tokenizer"),
            ("start_id", 1, "its footer names another tokenizer"),
            ("vocabulary_size", 501, "its footer names another tokenizer"),
            ("alm__forward_sha256", "0" * 64, "its footer names another ALM"),
            ("alm__backward_sha256", "0" * 64, "its footer names another ALM"),
            ("dtype", "bfloat16", "its footer names dtype bfloat16, the plan float32"),
            ("format_version", 2, "is of format 2"),
            ("block_length", 128, "with blocks of 128 tokens"),
            ("tokens", 1, "unreadable footer.*1 tokens"),
            ("documents", 1, r"its footer says 1 documents, its receipt \d+"),
            ("rejected_documents", 77, "its footer says 77 rejected_documents, its receipt 0"),
            ("leftover_tokens", 509, "its footer says 509 leftover_tokens, its receipt"),
            ("clamped_values", "many", "its footer's clamped_values is 'many', expected int"),
            ("vocabulary_size", "500", "unreadable footer"),
            ("special_ids", [0, 2], r"its footer's vocabulary.special_ids is \[0, 2\]|names another tokenizer"),
            ("content_sha256", "0" * 64, "not those that its footer vouches for"),
        ]
    ),
    Damage("footer: none", without_footer, ("has no 'hardness' entry in its footer",)),
    Damage("footer: two", with_two_footers, ("two 'hardness' entries in its footer that differ",)),
    # Rows and columns
    Damage("row dropped", rewrite(drop_row), ("rows, its footer", "rows, the manifest", "rows, the plan", OTHER_IDS)),
    Damage("rows exchanged", rewrite(exchange_rows), (OTHER_IDS,)),
    Damage(
        "511 ids a row",
        reshape(replace_column("input_ids", lambda values: fixed_lists(values[:, :511]))),
        ("other columns than input_ids.*of 512 values",),
    ),
    Damage(
        "lists of any length",
        reshape(replace_column(FORWARD, lambda values: pa.array(values.tolist(), pa.list_(pa.float32())))),
        ("other columns than",),
    ),
    Damage(
        "wider ids",
        reshape(replace_column("input_ids", lambda values: fixed_lists(values.astype(np.uint32)))),
        ("other columns than",),
    ),
    Damage(
        "wider perplexities",
        reshape(replace_column(BACKWARD, lambda values: fixed_lists(values.astype(np.float64)))),
        ("other columns than",),
    ),
    Damage("a column missing", reshape(lambda table: table.drop_columns([BACKWARD])), ("other columns than",)),
    Damage("a column more", reshape(lambda table: table.append_column("x", table[FORWARD])), ("other columns than",)),
    Damage("row that is null", reshape(replace_column(FORWARD, with_null_row)), (r"row group 0.* cannot be read",)),
    Damage("value that is null", reshape(replace_column(FORWARD, with_null_element)), ("holds nulls",)),
    Damage("id that is null", reshape(replace_column("input_ids", with_null_element)), ("holds nulls",)),
    Damage("small row groups", reshape(lambda table: table, row_group_size=10), ("row groups of 10, 10, 10, …",)),
    # Values
    *(
        Damage(
            f"{column} {value}", rewrite(set_at_ordinary(column, value)), (rf"row 3, position \d+: {column}.*{words}",)
        )
        for column in (FORWARD, BACKWARD)
        for value, words in [
            (0.0, "ordinary token is below 1"),
            (0.5, "ordinary token is below 1"),
            (-3.0, "ordinary token is below 1"),
            (np.nan, "not finite"),
            (np.inf, "not finite"),
        ]
    ),
    Damage("score at <s>", rewrite(set_at(FORWARD, 1, 0, 2.0)), ("row 1, position 0: forward.*special token",)),
    Damage("score at </s>", rewrite(set_at(BACKWARD, 1, 511, 2.0)), ("row 1, position 511: backward.*special token",)),
    Damage("score at a separator", rewrite(set_at_separator), (r"row 2, position \d+: backward.*special token",)),
    *(
        Damage(
            f"frame token {token} at {position}",
            rewrite(set_at("input_ids", 1, position, token)),
            (rf"row 1, position {position}: not the frame token", OTHER_IDS),
        )
        for position, token in [(0, 2), (0, 3), (511, 0), (511, 1)]
    ),
    Damage(
        "foreign id",
        rewrite(set_at("input_ids", 4, 9, 500)),
        (r"row 4, position 9: an id that the tokenizer does not have \(1 row", OTHER_IDS),
    ),
    Damage(
        "foreign ids in three rows",
        rewrite(lambda arrays: arrays["input_ids"].__setitem__((slice(2, 5), 7), 60_000)),
        (r"row 2, position 7: an id that the tokenizer does not have \(3 row", OTHER_IDS),
    ),
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.name)
def test_a_shard_that_was_changed_is_found(shards: Path, damage: Damage, run_command: Run) -> None:
    """Receipt and manifest are as they were, so the file's hash is wrong, and so is whatever else is wrong."""
    hurt = shard_paths(shards)[1]
    length = hurt.stat().st_size
    damage.do(hurt)
    hashes = f"{hurt.stat().st_size} bytes, the manifest says {length}|its bytes are not those of the manifest"
    content = "not those that the manifest vouches for"  # where the content can still be read
    found = faults_of(shards)
    for words in (hashes, *damage.words):
        assert any(re.search(rf"^{hurt.name}: .*({words})", fault) for fault in found), (words, found)
    for fault in found:
        assert re.search(rf"^{hurt.name}: .*({'|'.join((hashes, content, *damage.words))})", fault), fault
    code, err = run_command(verify.main, shards)
    assert code == 1
    for fault in found:
        assert f"fault: {fault}\n" in err


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.name)
def test_a_shard_that_was_forged_is_found(shards: Path, damage: Damage, vouch: Callable[..., None]) -> None:
    """Receipt and manifest vouch for the file as it is now: only a look into it can find what is wrong."""
    hurt = shard_paths(shards)[1]
    damage.do(hurt)
    try:
        content = {"content_sha256": content_fingerprint(pq.read_table(hurt, page_checksum_verification=True))}
    except (OSError, pa.ArrowException):
        content = {}
    vouch(shards, 1, **content)
    check_faults(shards, *(f"^{hurt.name}: .*({words})" for words in damage.words))


# --- The folder


def test_sound_folders_pass(block_folder: Path, hardness_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (block_folder, hardness_folder):
        manifest = json.loads((folder / "_manifest.json").read_bytes())
        assert faults_of(folder) == []
        assert verify.main([str(folder)]) == 0
        out = capsys.readouterr().out
        assert out == f"{folder} is sound: 3 shards, {manifest['blocks']:,} blocks, {manifest['tokens']:,} tokens\n"


def test_shards_that_other_tools_rewrote_alike_pass(shards: Path, rewrite_shard: Callable[..., None]) -> None:
    rewrite_shard(shards, 0)
    assert faults_of(shards) == []


def test_unfinished_folders_exit_1(shards: Path, run_command: Run) -> None:
    (shards / "_manifest.json").unlink()
    code, err = run_command(verify.main, shards)
    assert code == 1
    assert "_manifest.json" in err
    assert "not complete" in err


def test_a_folder_of_something_else_exits_1(tmp_path: Path, run_command: Run) -> None:
    (tmp_path / "notes.txt").write_text("nothing to see here")
    code, err = run_command(verify.main, tmp_path)
    assert code == 1
    assert f"{tmp_path} has no _manifest.json" in err
    assert "_plan.json: missing" in err


def test_faults_are_counted_and_the_way_out_mends_them(
    blocks: Path, run_command: Run, corpus_folder: Path, tokenizer_folder: Path
) -> None:
    first, second, third = shard_paths(blocks)
    truncate(first)
    rewrite(set_at("input_ids", 4, 9, 500))(second)
    third.unlink()
    (blocks / "_rejects.jsonl").write_text("{}\n")
    code, err = run_command(verify.main, blocks)
    assert code == 1
    assert re.search(r"\d+ fault\(s\) in 4 file\(s\); remove these files and run the job .* again\n$", err)
    for path in (first, second, blocks / "_rejects.jsonl"):
        path.unlink()
    arguments = ["--input", str(corpus_folder), "--tokenizer", str(tokenizer_folder), "--output", str(blocks)]
    assert tokenize_corpus.main([*arguments, "--split_bytes", "100000", *IN_THREADS]) == 0
    assert faults_of(blocks) == []


def test_missing_shard_is_found(shards: Path) -> None:
    gone = shard_paths(shards)[1]
    gone.unlink()
    assert faults_of(shards) == [f"{gone.name}: missing"]


def test_extra_shard_is_found(shards: Path) -> None:
    shutil.copy(shard_paths(shards)[0], shards / "shard-00003-of-00003.parquet")
    assert faults_of(shards) == ["shard-00003-of-00003.parquet: not in _manifest.json"]


def test_extra_shard_that_the_manifest_lists_is_found(shards: Path, edit_json: EditJson) -> None:
    extra = "shard-00003-of-00003.parquet"
    shutil.copy(shard_paths(shards)[0], shards / extra)
    edit_json(
        shards / "_manifest.json", lambda manifest: manifest["shards"].append(manifest["shards"][0] | {"name": extra})
    )
    check_faults(shards, f"^{extra}: _manifest.json lists it, the plan does not")


def test_shard_that_is_gone_from_the_manifest_is_found(shards: Path, edit_json: EditJson) -> None:
    edit_json(shards / "_manifest.json", lambda manifest: manifest["shards"].pop())
    check_faults(shards, "^shard-00002-of-00003.parquet: _manifest.json does not list it, the plan does")


def test_shard_that_is_gone_from_manifest_and_folder_is_found(shards: Path, edit_json: EditJson) -> None:
    edit_json(shards / "_manifest.json", lambda manifest: manifest["shards"].pop())
    shard_paths(shards)[2].unlink()
    check_faults(shards, "^shard-00002-of-00003.parquet: (missing|_manifest.json does not list it)")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda shards: shards.reverse(), "another order"),
        (lambda shards: shards.append(shards[0]), "a shard twice"),
    ],
)
def test_manifest_that_lists_shards_wrongly_is_found(
    shards: Path, edit_json: EditJson, change: Callable[[list[Any]], object], words: str
) -> None:
    edit_json(shards / "_manifest.json", lambda manifest: change(manifest["shards"]))
    check_faults(shards, f"^_manifest.json: .*{words}")


def exchange(*paths: Path) -> None:
    one, other = (path.read_bytes() for path in paths)
    paths[0].write_bytes(other)
    paths[1].write_bytes(one)


@pytest.mark.parametrize("kind", ["blocks", "hardness"])
def test_exchanged_shards_are_found(blocks: Path, shards: Path, kind: str) -> None:
    folder = blocks if kind == "blocks" else shards
    first, second = shard_paths(folder)[:2]
    exchange(first, second)
    hashes = r"\d+ bytes, the manifest|bytes are not those of the manifest"
    found = faults_of(folder)
    for path in (first, second):
        assert any(re.search(rf"^{path.name}: .*({hashes})", fault) for fault in found)
    assert {fault.split(":")[0] for fault in found} == {first.name, second.name}


@pytest.mark.parametrize(
    ("kind", "words"), [("blocks", "made from another split"), ("hardness", "in the plan|the plan has")]
)
def test_exchanged_shards_are_found_although_receipts_and_manifest_fit(
    blocks: Path, shards: Path, edit_json: EditJson, kind: str, words: str
) -> None:
    """The plan says which bytes of the corpus, or which block shard, each shard is made from."""
    folder = blocks if kind == "blocks" else shards
    first, second = shard_paths(folder)[:2]
    receipts = [folder / "_receipts" / f"{index:05d}.json" for index in range(2)]
    exchange(first, second)
    exchange(*receipts)

    def swap(manifest: dict[str, Any]) -> None:
        one, other = manifest["shards"][:2]
        manifest["shards"][:2] = [other | {"name": one["name"]}, one | {"name": other["name"]}]

    edit_json(folder / "_manifest.json", swap)
    for path, name in zip(receipts, (first.name, second.name), strict=True):
        edit_json(path, lambda receipt, name=name: receipt.update(shard=name))
    check_faults(folder, f"^{first.name}: .*({words})", f"^{second.name}: .*({words})")


@pytest.mark.parametrize("in_memory", [True, False])
def test_shards_too_large_for_memory_are_checked_alike(
    shards: Path, monkeypatch: pytest.MonkeyPatch, in_memory: bool
) -> None:
    monkeypatch.setattr(verify, "_HELD_BYTES", 1 << 30 if in_memory else 1000)
    assert faults_of(shards) == []
    hurt = shard_paths(shards)[0]
    flip_in_page(hurt, 1)
    check_faults(shards, f"^{hurt.name}: its bytes are not", rf"^{hurt.name}: .*row group 0 \(rows")


@pytest.fixture(scope="module")
def long_shard(
    tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path, random_text: Callable[[int, int], str]
) -> Path:
    """A folder of one block shard of three row groups."""
    folder = tmp_path_factory.mktemp("long")
    (folder / "long.txt").write_text(random_text(320_000, 1))
    flags = ["--input", folder / "long.txt", "--tokenizer", tokenizer_folder, "--output", folder / "blocks"]
    assert tokenize_corpus.main([*map(str, flags), *IN_THREADS]) == 0
    metadata = pq.read_metadata(shard_paths(folder / "blocks")[0])
    assert [metadata.row_group(index).num_rows for index in range(2)] == [256, 256]
    assert metadata.num_row_groups == 3
    return folder / "blocks"


def test_damaged_row_groups_are_named_and_the_others_checked(
    long_shard: Path, tmp_path: Path, vouch: Callable[..., None]
) -> None:
    folder = Path(shutil.copytree(long_shard, tmp_path / "blocks"))
    (hurt,) = shard_paths(folder)
    rewrite(set_at("input_ids", 530, 9, 500))(hurt)
    for group in (0, 1):
        chunk = pq.read_metadata(hurt).row_group(group).column(0)
        flip_at(hurt, chunk.data_page_offset + chunk.total_compressed_size // 2)
    vouch(folder, 0)
    check_faults(
        folder,
        r"row group 0 \(rows 0:256\) cannot be read: .*CRC",
        r"row group 1 \(rows 256:512\) cannot be read: .*CRC",
        r"row 530, position 9: an id that the tokenizer does not have \(1 row",
    )
    assert len(faults_of(folder)) == 3


def test_rows_are_counted_over_all_row_groups(long_shard: Path, tmp_path: Path, vouch: Callable[..., None]) -> None:
    folder = Path(shutil.copytree(long_shard, tmp_path / "blocks"))

    def change(arrays: Arrays) -> None:
        arrays["input_ids"][[300, 301, 600], 0] = 3

    (hurt,) = shard_paths(folder)
    rewrite(change)(hurt)
    vouch(folder, 0, content_sha256=content_fingerprint(pq.read_table(hurt)))
    check_faults(folder, r"row 300, position 0: not the frame token \(3 row\(s\) in all\)")


def test_row_groups_that_are_not_those_of_the_format_are_found(
    long_shard: Path, tmp_path: Path, vouch: Callable[..., None]
) -> None:
    """Trainers find a row by arithmetic: with other row groups they would read the wrong ones."""
    folder = Path(shutil.copytree(long_shard, tmp_path / "blocks"))
    (hurt,) = shard_paths(folder)
    reshape(lambda table: table, row_group_size=1000)(hurt)
    vouch(folder, 0)
    check_faults(folder, r"rows in row groups of 6\d\d: expected 256 in each but the last")


# --- Manifest, plan, receipts, rejects, tokenizer

TEARS: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: truncate(path, 0.5),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "not UTF-8": lambda path: path.write_bytes(b"\xff\xfe" + path.read_bytes()),
    "a list": lambda path: path.write_text("[]"),
    "an object": lambda path: path.write_text("{}"),
    "a number": lambda path: path.write_text("5"),
    "null": lambda path: path.write_text("null"),
    "missing": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("tear", TEARS)
@pytest.mark.parametrize(
    ("file", "where"),
    [
        ("_manifest.json", "_manifest.json"),
        ("_plan.json", "_plan.json"),
        ("_receipts/00001.json", "shard-00001-of-00003.parquet: its receipt .*/_receipts/00001.json"),
        ("tokenizer/tokenizer.json", "tokenizer/"),
    ],
)
def test_torn_accounts_are_found(shards: Path, run_command: Run, file: str, where: str, tear: str) -> None:
    TEARS[tear](shards / file)
    check_faults(shards, f"^{where}")
    assert run_command(verify.main, shards)[0] == 1


@pytest.fixture(scope="module")
def folder_with_rejects(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("rejects")
    (folder / "bad.jsonl").write_text('{"text": "good"}\n{bad\n{"text": "good"}\n[]\n')
    flags = ["--input", folder / "bad.jsonl", "--tokenizer", tokenizer_folder, "--output", folder / "blocks"]
    assert tokenize_corpus.main([*map(str, flags), *IN_THREADS]) == 0
    assert faults_of(folder / "blocks") == []
    return folder / "blocks"


@pytest.mark.parametrize("tear", TEARS)
def test_torn_rejects_are_found(folder_with_rejects: Path, tmp_path: Path, tear: str) -> None:
    folder = Path(shutil.copytree(folder_with_rejects, tmp_path / "blocks"))
    TEARS[tear](folder / "_rejects.jsonl")
    check_faults(folder, "^_rejects.jsonl: ")


def test_a_changed_reject_is_found_with_its_line(folder_with_rejects: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folder_with_rejects, tmp_path / "blocks"))
    path = folder / "_rejects.jsonl"
    path.write_text(path.read_text().replace('"line": 4', '"line": 3'))
    assert faults_of(folder) == ["_rejects.jsonl: line 2 is not what the receipts say"]


def test_a_reject_that_is_gone_from_its_receipt_is_found(
    folder_with_rejects: Path, tmp_path: Path, edit_json: EditJson
) -> None:
    folder = Path(shutil.copytree(folder_with_rejects, tmp_path / "blocks"))
    edit_json(folder / "_receipts" / "00000.json", lambda receipt: receipt["rejects"].pop())
    check_faults(folder, "its receipt says 2 rejected_documents, and lists 1", "^_rejects.jsonl: line 2")


@pytest.mark.parametrize(
    "key", ["documents", "blocks", "tokens", "rejected_documents", "leftover_tokens", "tokenizer", "alm"]
)
def test_edited_manifest_is_found(shards: Path, edit_json: EditJson, key: str) -> None:
    def change(manifest: dict[str, Any]) -> None:
        value = manifest[key]
        manifest[key] = value + 1 if isinstance(value, int) else dict.fromkeys(value, "0" * 64)

    edit_json(shards / "_manifest.json", change)
    check_faults(shards, f"^_manifest.json: .*({'fingerprints' if key in {'tokenizer', 'alm'} else key})")


@pytest.mark.parametrize("file", ["_manifest.json", "_receipts/00000.json"])
@pytest.mark.parametrize("key", ["shard", "blocks", "bytes", "sha256", "content_sha256"])
def test_edited_entry_is_found_with_its_shard(shards: Path, edit_json: EditJson, file: str, key: str) -> None:
    def change(value: dict[str, Any]) -> None:
        entry = value.get("shards", [value])[0]
        name = "name" if key == "shard" and "shards" in value else key
        entry[name] = entry[name] + 1 if isinstance(entry[name], int) else "0" * 64

    edit_json(shards / file, change)
    hurt = shard_paths(shards)[0].name
    found = faults_of(shards)
    assert any(fault.startswith(f"{hurt}: ") for fault in found)
    assert {fault.split(":")[0] for fault in found} <= {hurt, "_manifest.json", "0" * 64}


@pytest.mark.parametrize("key", ["documents", "rejected_documents", "leftover_tokens"])
def test_edited_counts_of_a_receipt_are_found(shards: Path, edit_json: EditJson, key: str) -> None:
    edit_json(shards / "_receipts" / "00001.json", lambda receipt: receipt.update({key: receipt[key] + 1}))
    check_faults(shards, f"^{shard_paths(shards)[1].name}: .*{key}", "^_manifest.json: .*the receipts")


def test_a_receipt_that_contradicts_itself_is_found(shards: Path, edit_json: EditJson) -> None:
    edit_json(shards / "_receipts" / "00001.json", lambda receipt: receipt.update(tokens=5))
    check_faults(shards, f"^{shard_paths(shards)[1].name}: its receipt .* says tokens 5, the rest of it")


def test_a_plan_with_shards_of_other_names_is_found(shards: Path, edit_json: EditJson) -> None:
    edit_json(shards / "_plan.json", lambda plan: plan["splits"].pop(0))
    check_faults(
        shards, r"^_plan.json: splits\[0\] is for 'shard-00001-of-00003.parquet', expected 'shard-00000-of-00002"
    )


def test_another_tokenizer_in_the_folder_is_found(shards: Path, edit_json: EditJson) -> None:
    def swap(value: dict[str, Any]) -> None:
        vocabulary = value["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]

    edit_json(shards / "tokenizer" / "tokenizer.json", swap)
    assert faults_of(shards) == ["tokenizer/: it is another tokenizer than the plan's"]
    shutil.rmtree(shards / "tokenizer")
    assert faults_of(shards) == ["tokenizer/: missing"]


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where a JSON value holds something: the keys that lead to each of its parts."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from leaves(item, (*path, key))


UNTOLD = {"lines", "configuration"}
"""Receipts' lines matter where there are rejects; of the plan's configuration not all can be seen in a folder."""


@pytest.mark.slow  # 7 s
@pytest.mark.parametrize("file", ["_manifest.json", "_plan.json", "_receipts/00001.json"])
@pytest.mark.parametrize("value", [None, "x", -1, 1.5, [], {}, [0]], ids=str)
def test_whatever_stands_in_a_json_file_is_a_fault_and_no_traceback(shards: Path, file: str, value: Any) -> None:
    written = json.loads((shards / file).read_bytes())
    for path in leaves(written):
        changed = json.loads((shards / file).read_bytes())
        inner = changed
        for key in path[:-1]:
            inner = inner[key]
        if inner[path[-1]] == value:
            continue
        inner[path[-1]] = value
        (shards / file).write_text(json.dumps(changed))
        assert faults_of(shards) or UNTOLD & {*path}, path
        (shards / file).write_text(json.dumps(written))
    assert faults_of(shards) == []


# --- The command


def test_a_terminal_gets_a_progress_bar_and_whole_lines(
    shards: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    truncate(shard_paths(shards)[1])
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert verify.main([str(shards)]) == 1
    err = capsys.readouterr().err
    assert "verifying" in err
    lines = [line for line in err.splitlines() if "fault: " in line]
    assert any(line.endswith("is not a parquet file.") for line in lines), err


def test_verify_changes_nothing(shards: Path, state_of: Callable[..., Any]) -> None:
    before = state_of(shards)
    assert verify.main([str(shards)]) == 0
    assert state_of(shards) == before


def test_one_flipped_bit_is_found_wherever_it_is(shards: Path, flip_bit: Callable[..., None]) -> None:
    hurt = shard_paths(shards)[0]
    size = hurt.stat().st_size
    for position in (0, 5, size // 4, size // 2, size - 300, size - 6, size - 1):
        flip_bit(hurt, position)
        check_faults(shards, f"^{hurt.name}: ")
        flip_bit(hurt, position)
    assert faults_of(shards) == []


def test_faults_of_several_shards_are_all_found(shards: Path, flip_bit: Callable[..., None]) -> None:
    for path in shard_paths(shards):
        flip_bit(path, path.stat().st_size // 2)
    assert {fault.split(":")[0] for fault in faults_of(shards)} == {path.name for path in shard_paths(shards)}


@pytest.mark.slow
def test_no_flipped_bit_makes_a_reader_fail_otherwise_than_by_name(block_folder: Path, tmp_path: Path) -> None:
    """Each byte of a footer, and some page headers: a ShardError or a sound read, never a crash."""
    source = min(shard_paths(block_folder), key=lambda path: path.stat().st_size)
    data = source.read_bytes()
    footer = int.from_bytes(data[-8:-4], "little") + 8
    crashes = {}
    for position in [*range(4, 40), *range(len(data) - footer, len(data))]:
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        path = tmp_path / "shard.parquet"
        path.write_bytes(damaged)
        try:
            with ShardReader(str(path)) as reader:
                reader.read()
                reader.content_sha256()
        except ShardError as error:
            assert "shard.parquet" in str(error)  # noqa: PT017
        except Exception as error:
            crashes[position - len(data)] = repr(error)[:200]
    assert crashes == {}


# --- Without the values


def test_a_quick_look_passes_sound_folders_and_says_what_it_left_out(
    block_folder: Path, hardness_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (block_folder, hardness_folder):
        assert verify.main([str(folder), "--quick"]) == 0
        assert "looks sound: 3 shards" in (said := capsys.readouterr().out)
        assert "values were not read" in said


QUICKLY_FOUND: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, "shard-00001-of-00003.parquet: missing"),
    "longer": (lambda path: path.write_bytes(path.read_bytes() + b"x"), r"bytes, the manifest says \d+"),
    "cut": (truncate, r"bytes, the manifest says \d+"),
    "other footer": (rewrite(documents=10**6), "its footer says 1000000 documents, its receipt"),
    "other values": (
        rewrite(lambda rows: rows["forward_perplexity"].__iadd__(1)),
        "its footer vouches for other values than the manifest",
    ),
}


@pytest.mark.parametrize("name", QUICKLY_FOUND)
def test_a_quick_look_finds_what_size_and_footer_tell(shards: Path, name: str, run_command: Run) -> None:
    damage, words = QUICKLY_FOUND[name]
    damage(shard_paths(shards)[1])
    code, said = run_command(verify.main, shards, "--quick")
    assert code == 1
    assert re.search(words, said)


def test_a_quick_look_reads_no_values(shards: Path) -> None:
    flip_in_page(shard_paths(shards)[1], 1)
    assert list(find_faults(str(shards), quick=True)) == []
    assert faults_of(shards)


def test_a_quick_look_names_faults_in_the_order_of_the_plan(shards: Path) -> None:
    for path in shard_paths(shards):
        path.unlink()
    faults = [fault.where for fault in find_faults(str(shards), quick=True) if fault.what == "missing"]
    assert faults == [f"shard-0000{index}-of-00003.parquet" for index in range(3)]
