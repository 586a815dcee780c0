"""`--dry_run` and the estimates behind it: near the truth, and without a trace."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from pipeline import score_corpus, tokenize_corpus
from pipeline.corpus import TextFormat
from pipeline.estimate import estimate
from pipeline.inputs import find_text
from pipeline.plan import Configuration, Plan
from scorer.errors import ConfigurationError
from scorer.tokenizer import describe, load_tokenizer

IN_THREADS = ("--direct_running_mode", "in_memory")


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Some 6 MB of documents of very unequal lengths, a few of them long."""
    generator = np.random.default_rng(0)
    words = ["".join(generator.choice(list("etaoinshrdlu"), generator.integers(2, 9))) for _ in range(300)]
    lengths = generator.lognormal(5, 1, 4000).astype(int) + 1
    return [" ".join(generator.choice(words, length)) for length in lengths]


def write_jsonl(path: Path, texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": "x" * 20, "text": text}) + "\n" for text in texts).encode()


def write(folder: Path, form: str, texts: list[str]) -> None:
    lines = write_jsonl(folder, texts)
    if form == "jsonl":
        (folder / "a.jsonl").write_bytes(lines)
    elif form == "jsonl.gz":
        (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    elif form == "jsonl.zst":
        (folder / "a.jsonl.zst").write_bytes(zstandard.compress(lines))
    elif form == "txt":
        (folder / "a.txt").write_text("\n\n".join(texts))
    elif form == "parquet":
        pq.write_table(pa.table({"text": texts}), folder / "a.parquet", row_group_size=500)
    elif form == "tiny files":
        for index, text in enumerate(texts[:500]):
            (folder / f"{index}.txt").write_text(text)


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "jsonl.zst", "txt", "parquet", "tiny files"])
def test_estimates_are_within_a_quarter_of_the_truth(
    form: str, texts: list[str], tokenizer_folder: Path, tmp_path: Path
) -> None:
    """Samples of a quarter of a megabyte, of which the long documents make a good part."""
    write(tmp_path, form, texts)
    tokenizer = load_tokenizer(str(tokenizer_folder))
    vocabulary = describe(tokenizer)
    kept = texts[:500] if form == "tiny files" else texts
    truth = sum(len(ids) + 1 for ids in tokenizer(kept, add_special_tokens=False)["input_ids"])
    corpus = find_text([str(tmp_path)], 500_000, TextFormat())
    settings = {"kind": "hardness", "alm": None, "dtype": None, "mantissa_bits": 10}
    plan = Plan(
        Configuration(tokenizer=vocabulary.to_json(), **settings, **corpus.configuration()),  # type: ignore[arg-type]
        corpus.splits(),
    )
    found = estimate(corpus, plan, tokenizer, vocabulary)
    assert found.tokens == pytest.approx(truth, rel=0.25)
    assert found.shard_bytes == pytest.approx(5.3 * found.tokens, rel=0.01)


def test_a_dry_run_says_what_it_would_do_and_writes_nothing(
    corpus_folder: Path, alm_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "output"
    flags = ["--input", str(corpus_folder), "--alm", str(alm_folder), "--output", str(output), "--device", "cpu"]
    assert score_corpus.main([*flags, "--split_bytes", "100000", "--dry_run", *IN_THREADS]) == 0
    out = capsys.readouterr().out
    for word in ("2 file(s)", "splits", "tokens", "GB", "hours", "tokens/s"):
        assert word in out
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_of_block_shards_is_exact(
    block_folder: Path, alm_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--input", str(block_folder), "--alm", str(alm_folder), "--output", str(tmp_path / "output")]
    assert score_corpus.main([*flags, "--device", "cpu", "--dry_run", *IN_THREADS]) == 0
    manifest = json.loads((block_folder / "_manifest.json").read_bytes())
    assert re.search(rf"tokens\W+{manifest['tokens']:,}\W", capsys.readouterr().out)


def test_a_dry_run_in_a_begun_folder_counts_what_is_done_and_changes_nothing(
    blocks: Path,
    corpus_folder: Path,
    tokenizer_folder: Path,
    state_of: Callable[..., object],
    capsys: pytest.CaptureFixture[str],
) -> None:
    (blocks / "_manifest.json").unlink()
    next(blocks.glob("*.parquet")).unlink()
    before = state_of(blocks)
    flags = ["--input", str(corpus_folder), "--tokenizer", str(tokenizer_folder), "--output", str(blocks)]
    assert tokenize_corpus.main([*flags, "--split_bytes", "100000", "--dry_run", *IN_THREADS]) == 0
    assert "2 of them done" in capsys.readouterr().out
    assert state_of(blocks) == before
    with pytest.raises(ConfigurationError, match="split_bytes"):
        tokenize_corpus.main([*flags, "--split_bytes", "50000", "--dry_run", *IN_THREADS])


def test_a_job_whose_shards_will_not_fit_is_refused_before_any_shard(
    corpus_folder: Path, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "output"
    flags = ["--input", str(corpus_folder), "--tokenizer", str(tokenizer_folder), "--output", str(output)]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=50_000))
    with pytest.raises(ConfigurationError, match=r"0\.00 GB free"):
        tokenize_corpus.main([*flags, *IN_THREADS])
    assert list(output.glob("*.parquet")) == []
    monkeypatch.undo()
    assert tokenize_corpus.main([*flags, *IN_THREADS]) == 0


def test_only_what_is_missing_needs_room(
    block_folder: Path, corpus_folder: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished folder on a full disk is no error."""
    flags = ["--input", str(corpus_folder), "--tokenizer", str(tokenizer_folder), "--output", str(block_folder)]
    usage = shutil.disk_usage(block_folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0))
    assert tokenize_corpus.main([*flags, "--split_bytes", "100000", *IN_THREADS]) == 0
