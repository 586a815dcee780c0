"""Whole jobs: what shards hold, that the same work gives the same bytes, and what a crash costs."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from pipeline import score_corpus, shard_making, status, tokenize_corpus, verify
from pipeline.corpus import TextFormat
from pipeline.plan import read_plan
from pipeline.publication import Draft, Provenance, publish_split
from pipeline.tokenization import SplitTokenizer
from scorer import files
from scorer.errors import HardnessError, ShardError
from scorer.shard_writing import ShardBuffer
from scorer.shards import ShardContent
from scorer.tokenizer import describe, load_tokenizer

ROOT = Path(__file__).parents[2]
IN_THREADS = ("--direct_running_mode", "in_memory")
State = dict[str, tuple[bytes, int]]
LookAt = Callable[[Path], State]
SPECIAL_IDS = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 499}
FOOTER_KEYS = {
    *("format_version", "block_length", "vocabulary_size", "special_ids", "start_id", "end_id", "mask_id"),
    *("tokenizer", "alm", "split", "documents", "blocks", "tokens", "rejected_documents", "leftover_tokens"),
    *("clamped_values", "device", "dtype", "micro_batch", "versions", "content_sha256"),
}
MANIFEST_KEYS = {
    *("format_version", "block_length", "documents", "blocks", "tokens", "rejected_documents", "leftover_tokens"),
    *("tokenizer", "alm", "shards"),
}


def tokenize(inputs: list[Path] | Path, tokenizer: Path, output: Path, *more: object) -> Path:
    inputs = [inputs] if isinstance(inputs, Path) else inputs
    arguments = ["--input", *inputs, "--tokenizer", tokenizer, "--output", output, *IN_THREADS, *more]
    assert tokenize_corpus.main([*map(str, arguments)]) == 0
    return output


def score(inputs: list[Path] | Path, alm: Path, output: Path, *more: object) -> Path:
    inputs = [inputs] if isinstance(inputs, Path) else inputs
    arguments = ["--input", *inputs, "--alm", alm, "--output", output, "--device", "cpu", *IN_THREADS, *more]
    assert score_corpus.main([*map(str, arguments)]) == 0
    return output


def manifest_of(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / "_manifest.json").read_bytes())
    return value


def shard_paths(folder: Path) -> list[Path]:
    return [folder / shard["name"] for shard in manifest_of(folder)["shards"]]


def bytes_of(state: State) -> dict[str, bytes]:
    return {name: data for name, (data, _) in state.items()}


def documents_of_split(corpus: Path, ranges: list[list[Any]]) -> list[str]:
    """The documents whose first byte lies in the ranges; for the small corpus, which has no oddities."""
    found = []
    for name, start, end in ranges:
        text = (corpus / name).read_text()
        separator = "\n" if name.endswith("jsonl") else "\n\n"
        offset = 0
        for piece in text.split(separator):
            if start <= offset < end and piece.strip():
                found.append(json.loads(piece)["text"] if name.endswith("jsonl") else piece.removesuffix("\n"))
            offset += len(piece) + len(separator)
    return found


# --- What shards hold


def test_blocks_hold_the_documents_of_their_split(
    block_folder: Path, corpus_folder: Path, tokenizer_folder: Path, read_shard: Callable[..., Any]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    plan = json.loads((block_folder / "_plan.json").read_bytes())
    manifest = manifest_of(block_folder)
    assert len(plan["splits"]) > 2
    totals = {"documents": 0, "leftover_tokens": 0, "blocks": 0}
    for split in plan["splits"]:
        texts = documents_of_split(corpus_folder, split["ranges"])
        stream = [id_ for text in texts for id_ in [*tokenizer(text, add_special_tokens=False)["input_ids"], 2]]
        arrays, footer = read_shard(block_folder / split["shard"])
        ids = arrays["input_ids"]
        assert ids[:, 1:511].reshape(-1).tolist() == stream[: len(stream) // 510 * 510]
        assert set(ids[:, 0].tolist()) == {0}
        assert set(ids[:, 511].tolist()) == {2}
        assert footer["documents"] == len(texts)
        assert footer["leftover_tokens"] == len(stream) % 510
        assert footer["blocks"] == len(ids)
        assert footer["split"] == [{"file": f, "start": s, "end": e} for f, s, e in split["ranges"]]
        for key in totals:
            totals[key] += footer[key]
    assert totals["documents"] == 499
    assert {key: manifest[key] for key in totals} == totals
    assert manifest["tokens"] == 510 * totals["blocks"]


def test_footers_have_the_keys_of_the_format(
    block_folder: Path, hardness_folder: Path, read_shard: Callable[..., Any], content_sha256: Callable[..., str]
) -> None:
    for folder in (block_folder, hardness_folder):
        is_hardness = folder == hardness_folder
        for path in shard_paths(folder):
            arrays, footer = read_shard(path)
            assert footer.keys() == FOOTER_KEYS
            assert footer["format_version"] == 1
            assert footer["block_length"] == 512
            assert footer["vocabulary_size"] == 500
            assert footer["special_ids"] == SPECIAL_IDS
            assert (footer["start_id"], footer["end_id"], footer["mask_id"]) == (0, 2, 499)
            assert footer["tokens"] == 510 * footer["blocks"] == 510 * len(arrays["input_ids"])
            assert footer["rejected_documents"] == 0
            assert footer["content_sha256"] == content_sha256(arrays)
            assert set(footer["tokenizer"]) == {"vocabulary_sha256", "tokenizer_sha256"}
            assert footer["versions"].keys() >= {"numpy", "pyarrow", "tokenizers", "torch", "transformers"}
            if is_hardness:
                assert (footer["device"], footer["dtype"], footer["micro_batch"]) == ("cpu", "float32", 8)
                assert set(footer["alm"]) == {"forward_sha256", "backward_sha256"}
            else:
                assert footer["alm"] is footer["device"] is footer["dtype"] is footer["micro_batch"] is None


def test_schemas_are_those_of_the_format(block_folder: Path, hardness_folder: Path) -> None:
    ids, scores = pa.list_(pa.uint16(), 512), pa.list_(pa.float32(), 512)
    for path in shard_paths(block_folder):
        schema = pq.read_schema(path)
        assert dict(zip(schema.names, schema.types, strict=True)) == {"input_ids": ids}
    for path in shard_paths(hardness_folder):
        schema = pq.read_schema(path)
        assert list(zip(schema.names, schema.types, strict=True)) == [
            ("input_ids", ids),
            ("forward_perplexity", scores),
            ("backward_perplexity", scores),
        ]


def test_columns_are_encoded_as_the_format_says(block_folder: Path, hardness_folder: Path) -> None:
    for path in [*shard_paths(block_folder), *shard_paths(hardness_folder)]:
        metadata = pq.read_metadata(path)
        for group in range(metadata.num_row_groups):
            for index in range(metadata.num_columns):
                column = metadata.row_group(group).column(index)
                name = column.path_in_schema.split(".")[0]
                assert column.compression == "ZSTD"
                assert not column.has_dictionary_page
                assert "RLE_DICTIONARY" not in column.encodings
                assert ("PLAIN" if name == "input_ids" else "BYTE_STREAM_SPLIT") in column.encodings
                assert ("BYTE_STREAM_SPLIT" in column.encodings) == (name != "input_ids")


def test_page_checksums_are_written(hardness_folder: Path, tmp_path: Path) -> None:
    """A flip in the middle of the data is found by any Parquet reader that checks pages."""
    path = shard_paths(hardness_folder)[0]
    column = pq.read_metadata(path).row_group(0).column(1)
    data = bytearray(path.read_bytes())
    data[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    (tmp_path / "flipped.parquet").write_bytes(data)
    with pytest.raises(OSError, match="CRC"):
        pq.ParquetFile(tmp_path / "flipped.parquet", page_checksum_verification=True).read()


def test_row_groups_hold_256_blocks(
    random_text: Callable[..., str], tokenizer_folder: Path, alm_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text(random_text(300_000, 1))
    blocks = tokenize(tmp_path / "a.txt", tokenizer_folder, tmp_path / "blocks")
    shards = score(blocks, alm_folder, tmp_path / "shards", "--micro_batch", 32)
    for folder in (blocks, shards):
        (path,) = shard_paths(folder)
        metadata = pq.read_metadata(path)
        assert metadata.num_rows > 512
        rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        assert rows[:-1] == [256] * (len(rows) - 1)
        assert len(rows) == -(-metadata.num_rows // 256)


def test_perplexities_are_zero_exactly_at_special_tokens(hardness_folder: Path, read_shard: Callable[..., Any]) -> None:
    inner_separators = 0
    for path in shard_paths(hardness_folder):
        arrays, _ = read_shard(path)
        ids = arrays["input_ids"]
        is_special = np.isin(ids, list(SPECIAL_IDS.values()))
        inner_separators += int(is_special[:, 1:511].sum())
        for name in ("forward_perplexity", "backward_perplexity"):
            scores = arrays[name]
            assert np.isfinite(scores).all()
            assert ((scores == 0) == is_special).all()
            assert (scores[~is_special] >= 1).all()
            assert scores.max() > 1000  # heavy-tailed, as real ones are
    assert inner_separators > 400


def test_perplexities_have_ten_bits_of_mantissa(hardness_folder: Path, read_shard: Callable[..., Any]) -> None:
    arrays, _ = read_shard(shard_paths(hardness_folder)[0])
    for name in ("forward_perplexity", "backward_perplexity"):
        assert not (arrays[name].view(np.uint32) & np.uint32((1 << 13) - 1)).any()


def test_manifest_has_the_keys_of_the_format_and_describes_the_shards(
    block_folder: Path, hardness_folder: Path, read_shard: Callable[..., Any]
) -> None:
    for folder in (block_folder, hardness_folder):
        manifest = manifest_of(folder)
        assert manifest.keys() == MANIFEST_KEYS
        assert (manifest["alm"] is None) == (folder == block_folder)
        for shard in manifest["shards"]:
            assert shard.keys() == {"name", "blocks", "bytes", "sha256", "content_sha256"}
            data = (folder / shard["name"]).read_bytes()
            assert shard["bytes"] == len(data)
            assert shard["sha256"] == hashlib.sha256(data).hexdigest()
            _, footer = read_shard(folder / shard["name"])
            assert (shard["blocks"], shard["content_sha256"]) == (footer["blocks"], footer["content_sha256"])
        assert sorted(path.name for path in folder.glob("*.parquet")) == [s["name"] for s in manifest["shards"]]
        for index, shard in enumerate(manifest["shards"]):
            receipt = json.loads((folder / "_receipts" / f"{index:05d}.json").read_bytes())
            assert {key: receipt[key] for key in ("sha256", "bytes", "blocks")} == {
                key: shard[key] for key in ("sha256", "bytes", "blocks")
            }
            assert {"lines", "rejects"} <= receipt.keys()


def test_a_finished_folder_holds_nothing_temporary(block_folder: Path, hardness_folder: Path) -> None:
    for folder in (block_folder, hardness_folder):
        assert {path.name for path in folder.iterdir() if path.suffix != ".parquet"} == {
            *("_manifest.json", "_plan.json", "_receipts", "_rejects.jsonl", "tokenizer"),
        }
        assert not [path for path in folder.rglob("*") if path.name.startswith(".") or path.suffix == ".tmp"]


def test_temporary_files_of_killed_runs_are_swept(blocks: Path, corpus_folder: Path, tokenizer_folder: Path) -> None:
    (blocks / "_manifest.json").unlink()
    litter = [blocks / folder / ".left.json.0123.tmp" for folder in ("", "_receipts", "tokenizer")]
    for path in litter:
        path.write_bytes(b"half")
    tokenize(corpus_folder, tokenizer_folder, blocks, "--split_bytes", 100_000)
    assert [path for path in litter if path.exists()] == []


# --- The same work gives the same bytes


def test_text_and_block_shards_give_the_same_hardness_shards(
    hardness_folder: Path, corpus_folder: Path, alm_folder: Path, tmp_path: Path, state_of: LookAt
) -> None:
    shards = score(corpus_folder, alm_folder, tmp_path / "shards", "--split_bytes", 100_000)
    from_text, from_blocks = bytes_of(state_of(shards)), bytes_of(state_of(hardness_folder))
    del from_text["_plan.json"], from_blocks["_plan.json"]  # these say which of the two it was
    assert from_text == from_blocks


def test_the_same_job_twice_gives_the_same_bytes(
    hardness_folder: Path, block_folder: Path, alm_folder: Path, tmp_path: Path, state_of: LookAt
) -> None:
    again = score(block_folder, alm_folder, tmp_path / "again")
    assert bytes_of(state_of(again)) == bytes_of(state_of(hardness_folder))


def test_order_of_inputs_decides_the_order_of_shards(
    corpus_folder: Path, tokenizer_folder: Path, tmp_path: Path, read_shard: Callable[..., Any]
) -> None:
    inputs = [corpus_folder / "b.txt", corpus_folder / "a.jsonl"]
    blocks = tokenize(inputs, tokenizer_folder, tmp_path / "blocks")
    (path,) = shard_paths(blocks)
    _, footer = read_shard(path)
    assert [range_["file"] for range_ in footer["split"]] == ["b.txt", "a.jsonl"]


@pytest.mark.slow
def test_commands_work_from_the_command_line(
    *,
    run_module: Callable[..., Any],
    corpus_folder: Path,
    tokenizer_folder: Path,
    alm_folder: Path,
    hardness_folder: Path,
    tmp_path: Path,
    state_of: LookAt,
) -> None:
    blocks, shards = tmp_path / "blocks", tmp_path / "shards"
    pattern = f"{corpus_folder}/*.*"
    common = ["--tokenizer", tokenizer_folder, "--split_bytes", 100_000]
    done = run_module("pipeline.tokenize_corpus", "--input", pattern, *common, "--output", blocks)
    assert done.returncode == 0, done.stderr
    flags = ["--input", blocks, "--alm", alm_folder, "--device", "cpu"]
    done = run_module("pipeline.score_corpus", *flags, "--output", shards)
    assert done.returncode == 0, done.stderr
    assert "is complete" in done.stderr
    assert bytes_of(state_of(shards)) == bytes_of(state_of(hardness_folder))


# --- Reruns


def run_again(folder: Path, block_folder: Path, alm_folder: Path) -> None:
    score(block_folder, alm_folder, folder)


def test_rerun_of_a_finished_folder_touches_nothing(
    shards: Path, block_folder: Path, alm_folder: Path, state_of: LookAt
) -> None:
    before = state_of(shards)
    run_again(shards, block_folder, alm_folder)
    after = state_of(shards)
    assert bytes_of(after) == bytes_of(before)
    changed = {name for name in before if after[name] != before[name]}
    assert changed <= {"_rejects.jsonl"}


def check_mended(before: State, after: State, remade: set[str]) -> None:
    """Everything has the bytes it had, and only `remade` and the folder's summaries were written again."""
    assert bytes_of({name: after[name] for name in before}) == bytes_of(before)
    changed = {name for name in before if after[name][1] != before[name][1]}
    assert remade <= changed <= remade | {"_manifest.json", "_rejects.jsonl"}


def test_rerun_makes_only_missing_shards(shards: Path, block_folder: Path, alm_folder: Path, state_of: LookAt) -> None:
    before = state_of(shards)
    gone = shard_paths(shards)[1].name
    (shards / gone).unlink()
    run_again(shards, block_folder, alm_folder)
    after = state_of(shards)
    check_mended(before, after, {gone, "_receipts/00001.json"})
    assert after.keys() == before.keys()


def flip_data(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)


def flip_footer(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-200] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [flip_data, flip_footer, truncate, empty])
def test_rerun_sets_a_damaged_shard_aside_and_makes_it_again(
    shards: Path, block_folder: Path, alm_folder: Path, state_of: LookAt, damage: Callable[[Path], None]
) -> None:
    before = state_of(shards)
    hurt = shard_paths(shards)[2]
    damage(hurt)
    damaged = hurt.read_bytes()
    run_again(shards, block_folder, alm_folder)
    after = state_of(shards)
    check_mended(before, after, {hurt.name, "_receipts/00002.json"})
    (aside,) = after.keys() - before.keys()
    assert not aside.endswith(".parquet")
    assert after[aside][0] == damaged


def test_rerun_survives_lost_and_damaged_receipts(
    shards: Path, block_folder: Path, alm_folder: Path, state_of: LookAt
) -> None:
    before = state_of(shards)
    (shards / "_receipts" / "00000.json").unlink()
    (shards / "_receipts" / "00001.json").write_text('{"shard": ')
    run_again(shards, block_folder, alm_folder)
    after = state_of(shards)
    assert bytes_of({name: after[name] for name in before}) == bytes_of(before)
    untouched = {path.name for path in shard_paths(shards)[2:]}
    assert all(after[name] == before[name] for name in untouched)
    assert not [name for name in after.keys() - before.keys() if name.endswith(".parquet")]


def test_rerun_after_all_receipts_are_lost_gives_the_same_folder(
    blocks: Path, corpus_folder: Path, tokenizer_folder: Path, state_of: LookAt
) -> None:
    before = bytes_of(state_of(blocks))
    shutil.rmtree(blocks / "_receipts")
    tokenize(corpus_folder, tokenizer_folder, blocks, "--split_bytes", 100_000)
    after = bytes_of(state_of(blocks))
    assert {name: after[name] for name in before} == before


def test_rerun_replaces_a_manifest_that_does_not_fit(
    shards: Path, block_folder: Path, alm_folder: Path, state_of: LookAt
) -> None:
    before = bytes_of(state_of(shards))
    (shards / "_manifest.json").write_text("{}")
    run_again(shards, block_folder, alm_folder)
    assert bytes_of(state_of(shards)) == before


def test_a_resume_takes_the_dtype_of_the_plan(
    block_folder: Path, alm_folder: Path, tmp_path: Path, read_shard: Callable[..., Any]
) -> None:
    shards = score(block_folder, alm_folder, tmp_path / "shards", "--dtype", "bfloat16")
    path = shard_paths(shards)[0]
    before = path.read_bytes()
    path.unlink()
    score(block_folder, alm_folder, shards)
    assert path.read_bytes() == before
    assert read_shard(path)[1]["dtype"] == "bfloat16"


# --- Object stores


def test_jobs_run_on_an_object_store(
    hardness_folder: Path, corpus_folder: Path, tokenizer_folder: Path, alm_folder: Path, state_of: LookAt
) -> None:
    """The same bytes as on a local disk, a rerun that mends, and no file that is not there locally."""
    store, bucket = fsspec.filesystem("memory"), f"memory://{uuid.uuid4().hex}"
    store.put(str(corpus_folder), f"{bucket}/corpus", recursive=True)
    flags = ["--input", f"{bucket}/corpus", "--output", f"{bucket}/shards", "--alm", str(alm_folder), "--device", "cpu"]
    arguments = [*flags, "--tokenizer", str(tokenizer_folder), "--split_bytes", "100000", *IN_THREADS]
    assert score_corpus.main(arguments) == 0
    expected = {name: data for name, data in bytes_of(state_of(hardness_folder)).items() if name != "_plan.json"}
    assert {name: store.cat(f"{bucket}/shards/{name}") for name in expected} == expected
    hurt = next(name for name in expected if name.endswith(".parquet"))
    store.pipe_file(f"{bucket}/shards/{hurt}", b"torn")
    assert score_corpus.main(arguments) == 0
    assert {name: store.cat(f"{bucket}/shards/{name}") for name in expected} == expected
    assert verify.main([f"{bucket}/shards"]) == 0
    assert status.main([f"{bucket}/shards", "--json"]) == 0
    store.rm(bucket, recursive=True)


# --- Frames that a flag names


def test_block_shards_keep_the_frame_that_they_were_made_with(
    corpus_folder: Path, tokenizer_folder: Path, alm_folder: Path, tmp_path: Path, read_shard: Callable[..., Any]
) -> None:
    flags = ["--start_token", "<unk>", "--end_token", "<pad>"]
    blocks = tokenize(corpus_folder / "b.txt", tokenizer_folder, tmp_path / "blocks", *flags)
    shards = score(blocks, alm_folder, tmp_path / "shards")
    arrays, footer = read_shard(shard_paths(shards)[0])
    assert set(arrays["input_ids"][:, 0].tolist()) == {3}
    assert (footer["start_id"], footer["end_id"]) == (3, 1)


# --- Bad documents


@pytest.fixture
def bad_corpus(tmp_path: Path) -> Path:
    """Two files with bad lines all over, one of them compressed, and the place of every reject."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    good = json.dumps({"text": "good " * 20})
    lines = [good if number % 7 else "{bad" for number in range(1, 301)]
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n")
    paragraphs = [b"fine text " * 10 if number % 5 else b"first\nbad \xff" for number in range(1, 101)]
    (folder / "b.txt").write_bytes(b"\n\n".join(paragraphs) + b"\n")
    return folder


def expected_rejects(folder: Path) -> list[tuple[str, int, int]]:
    lines = (folder / "a.jsonl").read_bytes().splitlines(keepends=True)
    places = [
        ("a.jsonl", index + 1, sum(map(len, lines[:index]))) for index, line in enumerate(lines) if line == b"{bad\n"
    ]
    lines = (folder / "b.txt").read_bytes().splitlines(keepends=True)
    return places + [
        ("b.txt", index + 1, sum(map(len, lines[:index]))) for index, line in enumerate(lines) if line == b"first\n"
    ]


@pytest.mark.parametrize("split_bytes", [1000, 7777, 1_000_000])
def test_rejects_have_absolute_lines_however_files_are_cut(
    bad_corpus: Path, tokenizer_folder: Path, tmp_path: Path, split_bytes: int
) -> None:
    blocks = tokenize(bad_corpus, tokenizer_folder, tmp_path / "blocks", "--split_bytes", split_bytes)
    rejects = [json.loads(line) for line in (blocks / "_rejects.jsonl").read_text().splitlines()]
    assert [(reject["file"], reject["line"], reject["offset"]) for reject in rejects] == expected_rejects(bad_corpus)
    assert all(reject.keys() == {"file", "line", "offset", "reason"} for reject in rejects)
    assert manifest_of(blocks)["rejected_documents"] == len(rejects) == 42 + 20
    assert manifest_of(blocks)["documents"] == 258 + 80


def test_rejects_travel_from_block_shards_to_hardness_shards(
    bad_corpus: Path, tokenizer_folder: Path, alm_folder: Path, tmp_path: Path
) -> None:
    blocks = tokenize(bad_corpus, tokenizer_folder, tmp_path / "blocks", "--split_bytes", 10_000)
    shards = score(blocks, alm_folder, tmp_path / "shards")
    assert (shards / "_rejects.jsonl").read_bytes() == (blocks / "_rejects.jsonl").read_bytes()
    for key in ("documents", "blocks", "tokens", "rejected_documents", "leftover_tokens"):
        assert manifest_of(shards)[key] == manifest_of(blocks)[key], key


def test_rejects_are_not_lost_with_the_receipts_of_block_shards(
    bad_corpus: Path, tokenizer_folder: Path, alm_folder: Path, tmp_path: Path
) -> None:
    """Whoever scores block shards whose receipts are gone is told so, or gets a list that fits the count."""
    blocks = tokenize(bad_corpus, tokenizer_folder, tmp_path / "blocks", "--split_bytes", 10_000)
    shutil.rmtree(blocks / "_receipts")
    try:
        shards = score(blocks, alm_folder, tmp_path / "shards")
    except HardnessError as error:
        assert "receipt" in str(error)  # noqa: PT017
        return
    rejects = (shards / "_rejects.jsonl").read_text().splitlines()
    assert len(rejects) == manifest_of(shards)["rejected_documents"]


def test_a_corpus_without_a_block_gives_a_shard_without_rows(
    tokenizer_folder: Path, alm_folder: Path, tmp_path: Path
) -> None:
    for name, text in (("empty.txt", ""), ("short.txt", "a few words\n"), ("bad.jsonl", "{bad\n")):
        (tmp_path / name).write_text(text)
        blocks = tokenize(tmp_path / name, tokenizer_folder, tmp_path / f"blocks of {name}")
        shards = score(blocks, alm_folder, tmp_path / f"shards of {name}")
        for folder, columns in ((blocks, 1), (shards, 3)):
            (path,) = shard_paths(folder)
            table = pq.read_table(path)
            assert (table.num_rows, table.num_columns) == (0, columns)
            assert manifest_of(folder)["blocks"] == 0


# --- Publication


def test_first_of_many_threads_publishes(tmp_path: Path) -> None:
    path, published = str(tmp_path / "file"), []
    barrier = threading.Barrier(16)

    def race(number: int) -> None:
        barrier.wait()
        if files.publish(path, bytes([number]) * 100_000):
            published.append(number)

    threads = [threading.Thread(target=race, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = published
    assert Path(path).read_bytes() == bytes([winner]) * 100_000
    assert os.listdir(tmp_path) == ["file"]


def publish_number(path: str, number: int) -> bool:
    return files.publish(path, bytes([number]) * 100_000)


@pytest.mark.slow
def test_first_of_many_processes_publishes(tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{index}") for index in range(20)]
    with multiprocessing.get_context("fork").Pool(3) as pool:
        won = pool.starmap(publish_number, [(path, number) for path in paths for number in range(6)], chunksize=1)
    for index, path in enumerate(paths):
        wins = won[index * 6 : index * 6 + 6]
        assert sum(wins) == 1
        assert Path(path).read_bytes() == bytes([wins.index(True)]) * 100_000
    assert sorted(os.listdir(tmp_path)) == sorted(map(str, range(20)))


@pytest.fixture
def first_split(block_folder: Path, corpus_folder: Path, tokenizer_folder: Path) -> Iterator[tuple[Draft, Provenance]]:
    """The first split of the small corpus, ready to be published, and what its footer says."""
    tokenizer = load_tokenizer(str(tokenizer_folder))
    vocabulary = describe(tokenizer)
    plan = read_plan(str(block_folder))
    assert plan is not None
    blocks = SplitTokenizer(f"{corpus_folder}/", TextFormat(), tokenizer, vocabulary).tokenize(plan.splits[0])
    with ShardBuffer("uint16", scored=False) as rows:
        for ids in blocks:
            rows.append(ShardContent(ids))
        draft = Draft(plan.splits[0], rows, blocks.account, 0)
        yield draft, Provenance(vocabulary, None, None, None, None, {"a library": "1"})


def receipt_fits(folder: Path, name: str, read_shard: Callable[..., Any]) -> bool:
    receipt = json.loads((folder / "_receipts" / "00000.json").read_bytes())
    data = (folder / name).read_bytes()
    _, footer = read_shard(folder / name)
    return (receipt["sha256"], receipt["bytes"], receipt["content_sha256"]) == (
        hashlib.sha256(data).hexdigest(),
        len(data),
        footer["content_sha256"],
    )


def test_a_slower_publisher_vouches_for_the_published_shard(
    first_split: tuple[Draft, Provenance], tmp_path: Path, read_shard: Callable[..., Any]
) -> None:
    draft, provenance = first_split
    name = draft.split.shard
    (tmp_path / "_receipts").mkdir()
    publish_split(str(tmp_path), draft, provenance)
    before = (tmp_path / name).read_bytes()
    published = publish_split(str(tmp_path), draft, replace(provenance, versions={"a library": "2"}))
    assert (tmp_path / name).read_bytes() == before
    assert published.entry.sha256 == hashlib.sha256(before).hexdigest()
    assert receipt_fits(tmp_path, name, read_shard)
    assert published.entry.bytes == len(before)


def test_a_publisher_whose_temporary_file_was_swept_tries_again(
    first_split: tuple[Draft, Provenance],
    tmp_path: Path,
    read_shard: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draft, provenance = first_split
    (tmp_path / "_receipts").mkdir()
    link, attempts = os.link, []

    def sweep_first(source: str, target: str) -> None:
        attempts.append(source)
        if len(attempts) == 1:
            os.unlink(source)
        link(source, target)

    monkeypatch.setattr(os, "link", sweep_first)
    publish_split(str(tmp_path), draft, provenance)
    assert len(attempts) == 2
    assert receipt_fits(tmp_path, draft.split.shard, read_shard)


@pytest.mark.parametrize("damage", ["torn", "other blocks"])
def test_a_publisher_never_vouches_for_a_damaged_shard(
    first_split: tuple[Draft, Provenance], tmp_path: Path, read_shard: Callable[..., Any], damage: str
) -> None:
    """What is vouched for is whole, and holds the same blocks."""
    draft, provenance = first_split
    path = tmp_path / draft.split.shard
    ids = np.concatenate([group.input_ids for group in draft.rows.row_groups()])
    (tmp_path / "_receipts").mkdir()
    if damage == "torn":
        path.write_bytes(b"PAR1 torn PAR1")
    else:
        with ShardBuffer("uint16", scored=False) as reversed_:
            reversed_.append(ShardContent(ids[::-1]))
            publish_split(str(tmp_path), replace(draft, rows=reversed_), provenance)
    damaged = path.read_bytes()
    try:
        published = publish_split(str(tmp_path), draft, provenance)
    except ShardError as error:
        assert path.name in str(error)  # noqa: PT017
        return
    assert published.entry.sha256 != hashlib.sha256(damaged).hexdigest()
    assert read_shard(path)[0]["input_ids"].tolist() == ids.tolist()


# --- kill -9


@pytest.mark.slow
def test_kill_costs_only_the_shards_in_flight(
    corpus_folder: Path, alm_folder: Path, tmp_path: Path, state_of: LookAt
) -> None:
    flags = ["--split_bytes", 6000, "--micro_batch", 1]
    undisturbed = score(corpus_folder, alm_folder, tmp_path / "undisturbed", *flags)
    names = [path.name for path in shard_paths(undisturbed)]
    assert len(names) > 40
    output = tmp_path / "killed"
    arguments = ["--input", corpus_folder, "--alm", alm_folder, "--output", output, "--device", "cpu", *flags]
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline.score_corpus", *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        while len(list(output.glob("*.parquet"))) < 2:
            assert process.poll() is None, "the job ended before it could be killed"
            time.sleep(0.005)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not (output / "_manifest.json").exists()
    published = [path.name for path in output.glob("*.parquet")]
    assert 2 <= len(published) < len(names)
    before = state_of(output)

    score(corpus_folder, alm_folder, output, *flags)
    after = state_of(output)
    assert [name for name in published if after[name] != before[name]] == []
    assert bytes_of(after) == bytes_of(state_of(undisturbed))


# --- Damage while a job runs


@pytest.mark.parametrize("damage", ["delete", "cut", "flip"])
def test_a_shard_that_is_damaged_while_the_job_runs_is_in_no_manifest(
    *,
    damage: str,
    corpus_folder: Path,
    tokenizer_folder: Path,
    block_folder: Path,
    tmp_path: Path,
    state_of: LookAt,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first shard is hurt while the last one is published."""
    output = tmp_path / "blocks"
    publish = shard_making.publish_split

    def hurt_first(folder: str, draft: Draft, provenance: Provenance) -> Any:
        published = publish(folder, draft, provenance)
        first = output / "shard-00000-of-00003.parquet"
        if draft.split.index == 2:
            data = first.read_bytes()
            first.unlink()
            if damage != "delete":
                first.write_bytes(data[:-1] if damage == "cut" else bytes([data[0] ^ 1]) + data[1:])
        return published

    with monkeypatch.context() as patch:
        patch.setattr(shard_making, "publish_split", hurt_first)
        with pytest.raises(ShardError, match=r"shard-00000-of-00003.parquet was lost or damaged"):
            tokenize(corpus_folder, tokenizer_folder, output, "--split_bytes", 100_000)
    assert not (output / "_manifest.json").exists()
    tokenize(corpus_folder, tokenizer_folder, output, "--split_bytes", 100_000)
    mended = {name: data for name, data in bytes_of(state_of(output)).items() if "damaged" not in name}
    assert mended == bytes_of(state_of(block_folder))


def test_a_shard_that_is_missing_takes_the_manifest_with_it(
    blocks: Path, corpus_folder: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a rerun makes it anew, nobody takes the folder for complete."""
    shard_paths(blocks)[1].unlink()
    seen = []
    publish = shard_making.publish_split

    def look(*arguments: Any) -> Any:
        seen.append((blocks / "_manifest.json").exists())
        return publish(*arguments)

    monkeypatch.setattr(shard_making, "publish_split", look)
    tokenize(corpus_folder, tokenizer_folder, blocks, "--split_bytes", 100_000)
    assert seen == [False]
    assert (blocks / "_manifest.json").exists()
