"""How many bad documents are too many, in one run and over several."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import score_corpus, tokenize_corpus
from pipeline.failures import Tolerance
from scorer.errors import ConfigurationError, CorpusError

IN_THREADS = ("--direct_running_mode", "in_memory")
Run = Callable[..., tuple[int, str]]


# --- What the flag means


@pytest.mark.parametrize(
    ("value", "documents", "most"),
    [
        *(("0", 100, 0), ("3", 100, 3), ("100", 10, 100), ("0100", 10, 100)),
        *(("0%", 1000, 0), ("1%", 1000, 10), ("1%", 99, 0), ("0.5%", 1000, 5), ("50%", 7, 3), ("100%", 8, 8)),
        *(("12.5%", 8, 1), ("1.0%", 100, 1), ("99%", 100, 99)),
        *(("29%", 100, 29), ("58%", 100, 58), ("0.7%", 1000, 7)),  # no binary fractions
    ],
)
def test_a_limit_allows_as_many_as_it_says_and_no_more(value: str, documents: int, most: int) -> None:
    tolerance = Tolerance.parse(value)
    for rejected in range(most + 1):
        tolerance.check(rejected, documents)
    shown = value.lstrip("0") if value not in ("0", "0%", "0.5%", "0.7%") else value
    with pytest.raises(CorpusError, match=f"^{most + 1} documents were .* {shown.replace('1.0%', '1%')} allows"):
        tolerance.check(most + 1, documents)


def test_without_a_limit_all_may_be_bad() -> None:
    for tolerance in (Tolerance.parse(None), Tolerance()):
        tolerance.check(10**12, 10**12)


@pytest.mark.parametrize(
    "value", ["", " ", "-1", "-1%", "1.5", "101%", "100.01%", "1 %", "%", "%1", "1%%", "1e2", "many", "1,000", "inf"]
)
def test_other_limits_are_refused(value: str) -> None:
    with pytest.raises(ConfigurationError, match=r"--max_rejected_documents .*expected a number as 100, or a share"):
        Tolerance.parse(value)


# --- Whole jobs


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Five files of 20 documents, of which one in the second and three in the fourth are bad: 4 of 100."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    bad = {1: {5}, 3: {0, 9, 19}}
    for file in range(5):
        lines = ["{bad" if line in bad.get(file, ()) else json.dumps({"text": "good " * 20}) for line in range(20)]
        (folder / f"{file}.jsonl").write_text("".join(f"{line:<120}\n" for line in lines))
    return folder


@pytest.fixture
def tokenize(run_command: Run, corpus: Path, tokenizer_folder: Path, tmp_path: Path) -> Run:
    """tokenize_corpus, a split a file."""

    def run(*more: object) -> tuple[int, str]:
        flags = ["--input", corpus, "--tokenizer", tokenizer_folder, "--output", tmp_path / "blocks", *IN_THREADS]
        return run_command(tokenize_corpus.main, *flags, "--split_bytes", 20 * 121, *more)

    return run


def shards(folder: Path) -> dict[str, int]:
    """When each was written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}


@pytest.mark.parametrize("limit", [None, "4", "100", "4%", "50%", "100%"])
def test_a_job_with_no_more_bad_documents_than_allowed_succeeds(
    tokenize: Run, tmp_path: Path, limit: str | None
) -> None:
    code, err = tokenize(*(["--max_rejected_documents", limit] if limit else []))
    assert code == 0, err
    manifest = json.loads((tmp_path / "blocks" / "_manifest.json").read_bytes())
    assert (len(manifest["shards"]), manifest["documents"], manifest["rejected_documents"]) == (5, 96, 4)


@pytest.mark.parametrize("limit", ["0", "3", "0%", "1%", "3.9%"])
def test_a_job_with_more_says_so_and_keeps_what_it_made(tokenize: Run, tmp_path: Path, limit: str) -> None:
    """A rerun that allows more completes, and makes nothing again."""
    folder = tmp_path / "blocks"
    code, err = tokenize("--max_rejected_documents", limit)
    message = err.rpartition("error: ")[2]
    assert code == 1
    assert "Traceback" not in err
    assert f"more than --max_rejected_documents {limit} allows" in message
    assert not (folder / "_manifest.json").exists()
    assert not [path for path in folder.rglob("*") if path.name.endswith(".tmp")]
    before = shards(folder)
    for name in before:
        assert (folder / "_receipts" / f"{name[6:11]}.json").exists()
    code, err = tokenize("--max_rejected_documents", "4")
    assert code == 0, err
    after = shards(folder)
    assert len(after) == 5
    assert {name: after[name] for name in before} == before


def test_a_job_stops_as_soon_as_it_is_clear_that_there_are_too_many(
    run_command: Run, tokenizer_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text("{bad\n" * 1000)
    flags = ["--input", tmp_path / "a.jsonl", "--tokenizer", tokenizer_folder, "--output", tmp_path / "blocks"]
    limits = ["--split_bytes", 100, "--max_rejected_documents", 100]
    code, err = run_command(tokenize_corpus.main, *flags, *limits, *IN_THREADS)
    assert code == 1
    assert "allows" in err
    assert 5 <= len(shards(tmp_path / "blocks")) <= 10  # of 50; six splits have more than 100 lines


def test_bad_documents_of_earlier_runs_count(tokenize: Run, tmp_path: Path) -> None:
    """The second run has one bad document to read, the first had four."""
    folder = tmp_path / "blocks"
    assert tokenize()[0] == 0
    (folder / "_manifest.json").unlink()
    second = next(path for path in folder.glob("*.parquet") if path.name.startswith("shard-00001"))
    second.unlink()
    others = shards(folder)
    code, err = tokenize("--max_rejected_documents", "3")
    assert code == 1
    assert "4 documents were rejected, more than --max_rejected_documents 3 allows" in err
    assert not (folder / "_manifest.json").exists()
    found = shards(folder)
    assert second.name in found
    assert {name: found[name] for name in others} == others
    assert tokenize("--max_rejected_documents", "4%")[0] == 0
    assert shards(folder) == found


def test_bad_documents_of_block_shards_count(tokenize: Run, run_command: Run, alm_folder: Path, tmp_path: Path) -> None:
    assert tokenize()[0] == 0
    flags = ["--input", tmp_path / "blocks", "--alm", alm_folder, "--output", tmp_path / "scored", "--device", "cpu"]
    code, err = run_command(score_corpus.main, *flags, *IN_THREADS, "--max_rejected_documents", "3%")
    assert code == 1
    assert "more than --max_rejected_documents 3% allows" in err
    assert run_command(score_corpus.main, *flags, *IN_THREADS, "--max_rejected_documents", "4%")[0] == 0


@pytest.mark.parametrize("limit", ["many", "-1", "101%", "1.5"])
def test_a_limit_that_is_none_is_refused_before_any_shard(tokenize: Run, tmp_path: Path, limit: str) -> None:
    code, err = tokenize("--max_rejected_documents", limit)
    assert code == 2
    assert f"--max_rejected_documents {limit}: expected" in err
    assert shards(tmp_path / "blocks") == {}
