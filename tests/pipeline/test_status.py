"""`status` says how far a folder has come."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from pipeline import progress, status
from pipeline.failures import SetAside, record
from pipeline.lease import holding
from pipeline.plan import read_plan
from pipeline.progress import Watch
from scorer import files
from scorer.manifest import Receipt, read_receipts

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


# --- What a job says of itself while it runs


def make_unfinished(folder: Path) -> str:
    """Takes the manifest and the last shard away; returns the shard's name."""
    (folder / "_manifest.json").unlink()
    last = shard_paths(folder)[-1]
    last.unlink()
    return last.name


def say_in_flight(folder: Path, *shards: dict[str, Any]) -> Path:
    """The word that a supervisor leaves in the folder."""
    path = folder / f".in-flight.{'0' * 32}.tmp"
    path.write_text(json.dumps({"host": "here", "pid": 1, "in_flight": shards}))
    return path


def test_shards_in_flight_are_shown_longest_first(
    shards: Path, status_of: Look, capsys: pytest.CaptureFixture[str]
) -> None:
    last, done = make_unfinished(shards), shard_paths(shards)[0].name
    say_in_flight(
        shards,
        {"shard": "shard-x", "seconds": 2.0, "blocks": 10, "attempt": 1},
        {"shard": last, "seconds": 7.0, "blocks": 100, "attempt": 2},
        {"shard": done, "seconds": 9.0, "blocks": 1, "attempt": 1},  # published since
    )
    code, found = status_of(shards)
    assert code == 3
    assert [shard["shard"] for shard in found["in_flight"]] == [last, "shard-x"]
    assert status.main([str(shards)]) == 3
    out = capsys.readouterr().out
    assert out.index(last) < out.index("shard-x")


def test_the_word_of_a_job_that_was_killed_is_not_believed_for_long(shards: Path, status_of: Look) -> None:
    last = make_unfinished(shards)
    path = say_in_flight(shards, {"shard": last, "seconds": 7.0, "blocks": 100, "attempt": 1})
    then = time.time() - 61
    os.utime(path, (then, then))
    assert status_of(shards)[1]["in_flight"] == []


def test_before_the_first_shard_the_rate_is_that_of_the_shards_in_flight(shards: Path, status_of: Look) -> None:
    make_unfinished(shards)
    for path in shard_paths(shards):
        path.unlink()
    say_in_flight(
        shards,
        {"shard": "a", "seconds": 2.0, "blocks": 10, "attempt": 1},
        {"shard": "b", "seconds": 5.0, "blocks": 100, "attempt": 1},
    )
    assert status_of(shards)[1]["tokens_per_second"] == pytest.approx(10 * 510 / 2 + 100 * 510 / 5)


def test_shards_that_workers_publish_side_by_side_make_no_absurd_rate(shards: Path, status_of: Look) -> None:
    """Three workers, three shards within a millisecond: the time between them says nothing."""
    (shards / "_manifest.json").unlink()
    for index, path in enumerate(shard_paths(shards)):
        os.utime(path, (time.time() - 5 + index / 1000,) * 2)
    say_in_flight(shards, *({"shard": f"x{n}", "seconds": 2.0, "blocks": 10, "attempt": 1} for n in range(3)))
    assert status_of(shards)[1]["tokens_per_second"] == pytest.approx(3 * 10 * 510 / 2)


def test_splits_set_aside_are_named_and_end_in_damage_once_no_driver_lives(
    shards: Path, status_of: Look, capsys: pytest.CaptureFixture[str]
) -> None:
    last = make_unfinished(shards)
    failure = SetAside(2, last, "a.jsonl, byte 17", "PanicException: index out of bounds")
    record(str(shards), failure)
    with holding(str(shards)):
        code, found = status_of(shards)
        assert code == 3
        assert str(os.getpid()) in found["driver"]
    code, found = status_of(shards)
    assert code == 5
    assert found["driver"] is None
    assert found["set_aside"] == [asdict(failure)]
    assert status.main([str(shards)]) == 5
    out = " ".join(capsys.readouterr().out.split())
    for word in (last, "a.jsonl, byte 17", "index out of bounds"):
        assert word in out


def test_a_split_that_was_made_after_all_is_no_longer_set_aside(shards: Path, status_of: Look) -> None:
    record(str(shards), SetAside(0, shard_paths(shards)[0].name, "", "died"))
    code, found = status_of(shards)
    assert (code, found["set_aside"]) == (0, [])


def test_a_watch_reads_each_receipt_once(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = read_plan(str(shards))
    assert plan is not None
    watch, reads = Watch(str(shards), plan), []

    def read(folder: str, indices: Iterable[int]) -> Iterator[Receipt | None]:
        wanted = list(indices)
        reads.extend(wanted)
        return read_receipts(folder, wanted)

    monkeypatch.setattr(progress, "read_receipts", read)
    first = watch.look()
    assert len(reads) == 3
    assert watch.look() == first
    assert len(reads) == 3
    shard_paths(shards)[0].write_bytes(b"torn")
    assert watch.look().state == "damaged"
    assert len(reads) == 4
