"""`status` says how far a folder has come and `verify` finds every fault, each by its own name."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline import status, tokenize_corpus, verify
from pipeline.verify import find_faults
from scorer import files
from scorer.errors import ShardError
from scorer.shards import ShardReader

Run = Callable[..., tuple[int, str]]
EditJson = Callable[..., None]
KEYS = {
    *("state", "planned", "done", "documents", "blocks", "tokens", "tokens_per_second", "seconds_left"),
    "rejected_documents",
}


# --- status


@pytest.fixture
def status_of(capsys: pytest.CaptureFixture[str]) -> Callable[[Path], tuple[int, dict[str, Any]]]:
    """Exit code and JSON."""

    def look(folder: Path) -> tuple[int, dict[str, Any]]:
        capsys.readouterr()
        code = status.main([str(folder), "--json"])
        return code, json.loads(capsys.readouterr().out)

    return look


Look = Callable[[Path], tuple[int, dict[str, Any]]]


def shard_paths(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.parquet"))


def grow_old(folder: Path, seconds: float) -> None:
    then = time.time() - seconds
    for path in [folder, *folder.rglob("*")]:
        os.utime(path, (then, then))


def test_complete_folders_report_everything_done(block_folder: Path, hardness_folder: Path, status_of: Look) -> None:
    for folder in (block_folder, hardness_folder):
        manifest = json.loads((folder / "_manifest.json").read_bytes())
        code, found = status_of(folder)
        assert code == 0
        assert found.keys() >= KEYS
        assert found["state"] == "complete"
        assert found["planned"] == found["done"] == len(manifest["shards"])
        for key in ("documents", "blocks", "tokens", "rejected_documents"):
            assert found[key] == manifest[key]
        assert found["seconds_left"] in (0, None)


def test_a_complete_folder_stays_complete_however_old(shards: Path, status_of: Look) -> None:
    grow_old(shards, 1e6)
    assert status_of(shards)[0] == 0


def test_counts_are_right_in_the_middle_of_a_job(shards: Path, status_of: Look, read_shard: Callable[..., Any]) -> None:
    (shards / "_manifest.json").unlink()
    shard_paths(shards)[1].unlink()
    kept = [read_shard(path)[1] for path in shard_paths(shards)]
    code, found = status_of(shards)
    assert (code, found["state"]) == (3, "running")
    assert found["done"] == len(kept) == found["planned"] - 1
    for key in ("documents", "blocks", "tokens", "rejected_documents"):
        assert found[key] == sum(footer[key] for footer in kept)


def test_rate_and_time_left_follow_from_the_times_of_the_shards(
    shards: Path, status_of: Look, read_shard: Callable[..., Any]
) -> None:
    (shards / "_manifest.json").unlink()
    first, second, third = shard_paths(shards)
    third.unlink()
    now = time.time()
    os.utime(first, (now - 100, now - 100))
    os.utime(second, (now, now))
    _, found = status_of(shards)
    tokens = [read_shard(path)[1]["tokens"] for path in (first, second)]
    assert found["tokens_per_second"] == pytest.approx(tokens[1] / 100, rel=0.01)
    assert found["seconds_left"] == pytest.approx(sum(tokens) / 2 / found["tokens_per_second"], rel=0.01)


def test_unknown_rates_are_null(shards: Path, status_of: Look) -> None:
    (shards / "_manifest.json").unlink()
    for path in shard_paths(shards)[1:]:
        path.unlink()
    code, found = status_of(shards)
    assert code == 3
    assert found["tokens_per_second"] is None
    assert found["seconds_left"] is None
    shard_paths(shards)[0].unlink()
    code, found = status_of(shards)
    assert (code, found["done"], found["tokens"]) == (3, 0, 0)
    assert found["tokens_per_second"] is None
    assert found["seconds_left"] is None


def test_a_folder_where_nothing_happened_for_ten_minutes_is_stalled(shards: Path, status_of: Look) -> None:
    (shards / "_manifest.json").unlink()
    shard_paths(shards)[0].unlink()
    grow_old(shards, 590)
    assert status_of(shards)[0] == 3
    grow_old(shards, 620)
    code, found = status_of(shards)
    assert (code, found["state"]) == (4, "stalled")
    assert found["seconds_left"] is None


@pytest.mark.parametrize("sign", [".shard-00000-of-00003.parquet.0123.tmp", "_receipts"])
def test_a_stalled_folder_runs_again_at_the_first_sign_of_life(shards: Path, status_of: Look, sign: str) -> None:
    (shards / "_manifest.json").unlink()
    shard_paths(shards)[0].unlink()
    (shards / ".shard-00000-of-00003.parquet.0123.tmp").touch()
    grow_old(shards, 1000)
    assert status_of(shards)[0] == 4
    os.utime(shards / sign)
    assert status_of(shards)[0] == 3


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("is_finished", [True, False])
@pytest.mark.parametrize("fault", ["truncated", "lost receipt", "torn receipt"])
def test_damaged_shards_are_named(shards: Path, status_of: Look, fault: str, is_finished: bool) -> None:
    if not is_finished:
        (shards / "_manifest.json").unlink()
    hurt = shard_paths(shards)[1]
    receipt = shards / "_receipts" / "00001.json"
    if fault == "truncated":
        truncate(hurt)
    elif fault == "lost receipt":
        receipt.unlink()
    else:
        receipt.write_text("{")
    code, found = status_of(shards)
    assert (code, found["state"]) == (5, "damaged")
    assert any(hurt.name in damage for damage in found["damage"])
    assert found["done"] == found["planned"] - 1


def test_a_shard_that_is_gone_from_a_finished_folder_is_damage(shards: Path, status_of: Look) -> None:
    gone = shard_paths(shards)[2]
    gone.unlink()
    code, found = status_of(shards)
    assert (code, found["state"]) == (5, "damaged")
    assert any(gone.name in damage for damage in found["damage"])


def test_a_manifest_that_cannot_be_read_is_damage(shards: Path, status_of: Look) -> None:
    (shards / "_manifest.json").write_text("{")
    code, found = status_of(shards)
    assert (code, found["state"]) == (5, "damaged")
    assert any("_manifest.json" in damage for damage in found["damage"])


@pytest.mark.parametrize("gone", [".a.tmp", "shard-00001-of-00003.parquet"])
def test_status_survives_files_that_vanish_while_it_looks(
    shards: Path, status_of: Look, gone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A running job removes its temporary files, and sets damaged shards aside, at any moment."""
    (shards / "_manifest.json").unlink()
    (shards / gone).touch()
    stat_size, stat_modified = files.size, files.modified

    def vanish(path: str) -> None:
        if path.endswith(gone):
            Path(path).unlink(missing_ok=True)

    monkeypatch.setattr(files, "size", lambda path: (vanish(path), stat_size(path))[1])
    monkeypatch.setattr(files, "modified", lambda path: (vanish(path), stat_modified(path))[1])
    code, _ = status_of(shards)
    assert code == 3


def test_status_for_people_says_the_same(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status.main([str(shards)]) == 0
    out = capsys.readouterr().out
    manifest = json.loads((shards / "_manifest.json").read_bytes())
    assert "complete" in out
    assert "3 of 3" in out
    assert f"{manifest['tokens']:,}" in out


def test_watch_ends_with_the_job(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status.main([str(shards), "--watch", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["state"] == "complete"


# --- verify


def faults_of(folder: Path) -> list[str]:
    return list(find_faults(str(folder)))


def check_only_fault(folder: Path, pattern: str) -> None:
    """All faults that are found are of one kind: nothing else is wrong with the folder."""
    found = faults_of(folder)
    assert found
    for fault in found:
        assert re.search(pattern, fault), found


def test_sound_folders_pass(block_folder: Path, hardness_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (block_folder, hardness_folder):
        assert faults_of(folder) == []
        assert verify.main([str(folder)]) == 0
        assert "sound" in capsys.readouterr().out


def test_shards_that_other_tools_rewrote_alike_pass(shards: Path, rewrite_shard: Callable[..., None]) -> None:
    rewrite_shard(shards, 0)
    assert faults_of(shards) == []


def test_faults_are_printed_and_counted_with_exit_code_1(shards: Path, run_command: Run) -> None:
    truncate(shard_paths(shards)[0])
    code, err = run_command(verify.main, shards)
    assert code == 1
    assert shard_paths(shards)[0].name in err
    assert "run the job" in err


def test_unfinished_folders_exit_1(shards: Path, run_command: Run) -> None:
    (shards / "_manifest.json").unlink()
    code, err = run_command(verify.main, shards)
    assert code == 1
    assert "_manifest.json" in err
    assert "not complete" in err


def test_missing_shard_is_found(shards: Path) -> None:
    gone = shard_paths(shards)[1]
    gone.unlink()
    check_only_fault(shards, rf"{gone.name}.*missing")


def test_extra_shard_is_found(shards: Path) -> None:
    shutil.copy(shard_paths(shards)[0], shards / "shard-00003-of-00003.parquet")
    check_only_fault(shards, "shard-00003-of-00003.parquet.*not in the manifest")


def test_truncated_shard_is_found(shards: Path) -> None:
    hurt = shard_paths(shards)[0]
    truncate(hurt)
    check_only_fault(shards, hurt.name)


def test_one_flipped_bit_is_found_wherever_it_is(shards: Path, flip_bit: Callable[..., None]) -> None:
    hurt = shard_paths(shards)[0]
    size = hurt.stat().st_size
    for position in (0, 5, size // 4, size // 2, size - 300, size - 6, size - 1):
        flip_bit(hurt, position)
        check_only_fault(shards, rf"{hurt.name}")
        flip_bit(hurt, position)
    assert faults_of(shards) == []


def test_damaged_pages_are_found_although_receipts_fit(
    shards: Path, flip_bit: Callable[..., None], vouch: Callable[..., None]
) -> None:
    hurt = shard_paths(shards)[0]
    column = pq.read_metadata(hurt).row_group(0).column(2)
    flip_bit(hurt, column.data_page_offset + column.total_compressed_size // 2)
    vouch(shards, 0)
    check_only_fault(shards, hurt.name)


@pytest.mark.slow
def test_no_flipped_bit_makes_a_reader_fail_otherwise_than_by_name(block_folder: Path, tmp_path: Path) -> None:
    """Each bit of a footer's 300 bytes, and of some page headers: a ShardError or a sound read, never a crash."""
    source = min(shard_paths(block_folder), key=lambda path: path.stat().st_size)
    data = source.read_bytes()
    positions = [*range(4, 40), *range(len(data) - 300, len(data))]
    crashes = {}
    for position in positions:
        for bit in (0, 3, 7):
            damaged = bytearray(data)
            damaged[position] ^= 1 << bit
            path = tmp_path / "shard.parquet"
            path.write_bytes(damaged)
            try:
                with ShardReader(str(path)) as reader:
                    reader.read()
            except ShardError as error:
                assert "shard.parquet" in str(error)  # noqa: PT017
            except Exception as error:
                crashes[position - len(data), bit] = repr(error)[:200]
    assert crashes == {}


def test_exchanged_shards_are_found(shards: Path) -> None:
    first, second = shard_paths(shards)[:2]
    first.rename(shards / "x")
    second.rename(first)
    (shards / "x").rename(second)
    assert {fault.split(":")[0] for fault in faults_of(shards)} == {first.name, second.name}


def test_exchanged_shards_are_found_although_receipts_and_manifest_fit(blocks: Path, edit_json: EditJson) -> None:
    """The footer says which bytes of the corpus a shard is made from, and the plan which it should be."""
    first, second = shard_paths(blocks)[:2]
    receipts = [blocks / "_receipts" / f"{index:05d}.json" for index in range(2)]
    for one, other in ((first, second), (receipts[0], receipts[1])):
        one.rename(blocks / "x")
        other.rename(one)
        (blocks / "x").rename(other)

    def swap(manifest: dict[str, Any]) -> None:
        one, other = manifest["shards"][:2]
        one["name"], other["name"] = other["name"], one["name"]
        manifest["shards"][:2] = [other, one]

    edit_json(blocks / "_manifest.json", swap)
    for path, name in zip(receipts, (first.name, second.name), strict=True):
        edit_json(path, lambda receipt, name=name: receipt.update(shard=name))
    found = faults_of(blocks)
    assert {fault.split(":")[0] for fault in found} == {first.name, second.name}


def ordinary(arrays: dict[str, Any], row: int) -> int:
    """The position of some ordinary token of a row."""
    return int(np.flatnonzero(arrays["forward_perplexity"][row])[100])


@pytest.mark.parametrize("column", ["forward_perplexity", "backward_perplexity"])
@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0.0, "ordinary token is below 1"),
        (0.5, "ordinary token is below 1"),
        (-3.0, "ordinary token is below 1"),
        (np.nan, "not finite"),
        (np.inf, "not finite"),
    ],
)
def test_wrong_perplexity_is_found_with_its_row(
    shards: Path, rewrite_shard: Callable[..., None], column: str, value: float, words: str
) -> None:
    positions = []

    def change(arrays: dict[str, Any]) -> None:
        positions.append(ordinary(arrays, 3))
        arrays[column][3, positions[0]] = value

    rewrite_shard(shards, 1, change)
    check_only_fault(shards, rf"{shard_paths(shards)[1].name}.*row 3, position {positions[0]}: {column}.*{words}")


@pytest.mark.parametrize("position", [0, 511, "separator"])
def test_perplexity_at_a_special_token_is_found(
    shards: Path, rewrite_shard: Callable[..., None], position: int | str
) -> None:
    def change(arrays: dict[str, Any]) -> None:
        where = np.flatnonzero(arrays["input_ids"][2, 1:511] == 2)[0] + 1 if position == "separator" else position
        arrays["backward_perplexity"][2, where] = 7.0

    rewrite_shard(shards, 0, change)
    check_only_fault(shards, "row 2.*backward_perplexity of a special token is not 0")


@pytest.mark.parametrize(("position", "token"), [(0, 2), (0, 3), (511, 0), (511, 1)])
def test_wrong_frame_token_is_found(
    shards: Path, rewrite_shard: Callable[..., None], position: int, token: int
) -> None:
    rewrite_shard(shards, 2, lambda arrays: arrays["input_ids"].__setitem__((1, position), token))
    check_only_fault(shards, f"row 1, position {position}: not the frame token")


def test_id_beyond_the_vocabulary_is_found(blocks: Path, rewrite_shard: Callable[..., None]) -> None:
    rewrite_shard(blocks, 0, lambda arrays: arrays["input_ids"].__setitem__((4, 9), 500))
    check_only_fault(blocks, "row 4, position 9: an id that the tokenizer does not have")


def test_dropped_row_is_found(blocks: Path, rewrite_shard: Callable[..., None]) -> None:
    def drop(arrays: dict[str, Any]) -> None:
        arrays["input_ids"] = arrays["input_ids"][:-1]

    rewrite_shard(blocks, 1, drop)
    check_only_fault(blocks, rf"{shard_paths(blocks)[1].name}: \d+ rows")


def test_changed_value_is_found_by_the_fingerprint_of_the_content(
    shards: Path, rewrite_shard: Callable[..., None], edit_json: EditJson, read_shard: Callable[..., Any]
) -> None:
    _, footer = read_shard(shard_paths(shards)[0])
    written = footer["content_sha256"]

    def double(arrays: dict[str, Any]) -> None:
        arrays["forward_perplexity"] *= 2

    rewrite_shard(shards, 0, double, lambda footer: footer.update(content_sha256=written))
    for path in (shards / "_receipts" / "00000.json", shards / "_manifest.json"):
        edit_json(path, lambda value: value.get("shards", [value])[0].update(content_sha256=written))
    check_only_fault(shards, "content SHA-256")


@pytest.mark.parametrize(
    "change",
    [
        {"blocks": 1},
        {"documents": 1},
        {"rejected_documents": 77},
        {"leftover_tokens": 509},
        {"vocabulary_size": 501},
        {"mask_id": None},
        {"alm": {"forward_sha256": "0", "backward_sha256": "0"}},
        {"dtype": "bfloat16"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_wrong_footer_is_found(shards: Path, rewrite_shard: Callable[..., None], change: dict[str, Any]) -> None:
    rewrite_shard(shards, 0, change_footer=lambda footer: footer.update(change))
    check_only_fault(shards, shard_paths(shards)[0].name)


@pytest.mark.parametrize(
    "key", ["documents", "blocks", "tokens", "rejected_documents", "leftover_tokens", "tokenizer", "alm"]
)
def test_edited_manifest_is_found(shards: Path, edit_json: EditJson, key: str) -> None:
    def change(manifest: dict[str, Any]) -> None:
        value = manifest[key]
        manifest[key] = value + 1 if isinstance(value, int) else dict.fromkeys(value, "0" * 64)

    edit_json(shards / "_manifest.json", change)
    check_only_fault(shards, "_manifest.json")


@pytest.mark.parametrize("key", ["name", "blocks", "bytes", "sha256", "content_sha256"])
def test_edited_manifest_entry_is_found(shards: Path, edit_json: EditJson, key: str) -> None:
    def change(manifest: dict[str, Any]) -> None:
        entry = manifest["shards"][0]
        entry[key] = entry[key] + 1 if isinstance(entry[key], int) else "0" + entry[key][1:-1] + "x"

    edit_json(shards / "_manifest.json", change)
    assert faults_of(shards)


def test_shard_that_is_gone_from_the_manifest_is_found(shards: Path, edit_json: EditJson) -> None:
    edit_json(shards / "_manifest.json", lambda manifest: manifest["shards"].pop())
    assert any("_manifest.json" in fault for fault in faults_of(shards))


@pytest.mark.parametrize("key", ["sha256", "bytes", "content_sha256", "blocks", "documents", "leftover_tokens"])
def test_edited_receipt_is_found(shards: Path, edit_json: EditJson, key: str) -> None:
    def change(receipt: dict[str, Any]) -> None:
        receipt[key] = receipt[key] + 1 if isinstance(receipt[key], int) else "0" * 64

    edit_json(shards / "_receipts" / "00001.json", change)
    assert faults_of(shards)


def test_lost_receipt_is_found(shards: Path) -> None:
    (shards / "_receipts" / "00002.json").unlink()
    check_only_fault(shards, "receipt")


def test_lost_rejects_are_found(corpus_folder: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n{bad\n')
    output = tmp_path / "blocks"
    flags = ["--input", tmp_path / "bad.jsonl", "--tokenizer", tokenizer_folder, "--output", output]
    assert tokenize_corpus.main([*map(str, flags)]) == 0
    assert faults_of(output) == []
    (output / "_rejects.jsonl").write_text("")
    check_only_fault(output, "_rejects.jsonl")


def test_another_tokenizer_in_the_folder_is_found(shards: Path, edit_json: EditJson) -> None:
    def swap(value: dict[str, Any]) -> None:
        vocabulary = value["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]

    edit_json(shards / "tokenizer" / "tokenizer.json", swap)
    check_only_fault(shards, "tokenizer/")
    shutil.rmtree(shards / "tokenizer")
    check_only_fault(shards, "tokenizer")


def test_faults_of_several_shards_are_all_found(shards: Path, flip_bit: Callable[..., None]) -> None:
    for path in shard_paths(shards):
        flip_bit(path, path.stat().st_size // 2)
    found = faults_of(shards)
    assert {fault.split(":")[0] for fault in found} == {path.name for path in shard_paths(shards)}


def test_verify_changes_nothing(shards: Path, state_of: Callable[..., Any]) -> None:
    before = state_of(shards)
    digest = hashlib.sha256((shards / "_plan.json").read_bytes()).hexdigest()
    assert verify.main([str(shards)]) == 0
    assert state_of(shards) == before
    assert hashlib.sha256((shards / "_plan.json").read_bytes()).hexdigest() == digest
