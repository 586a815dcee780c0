"""`status` says how far a folder has come."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline import status
from scorer import files

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
