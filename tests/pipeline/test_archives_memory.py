"""A compressed archive is one shard, however large: it is read, tokenized and written without being held."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.conftest import make_sentences

ROOT = Path(__file__).parents[2]
MIB = 1 << 20

TOKENIZE = """
import resource, sys
from pipeline import tokenize_corpus

corpus, tokenizer, *outputs = sys.argv[1:]
peaks = []
for name, output in zip(("small", "large"), outputs, strict=True):
    flags = ["--input", f"{corpus}/{name}.jsonl.gz", "--tokenizer", tokenizer, "--output", output]
    assert tokenize_corpus.main([*flags, "--direct_running_mode", "in_memory"]) == 0
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(*peaks)
"""
"""Peaks of a process that makes a small archive first, and so has loaded and warmed up everything, then a large one."""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_archive(tokenizer_folder: Path, tmp_path: Path) -> None:
    """40 MiB of text in less than 1 MiB: their tokens alone take more than 24 MiB; what is added is less than 16."""
    text = " ".join(make_sentences(300, seed=1))
    line = (json.dumps({"text": text}) + "\n").encode()
    for name, size in (("small", 4 * MIB), ("large", 40 * MIB)):
        (tmp_path / f"{name}.jsonl.gz").write_bytes(gzip.compress(line * (size // len(line)), 6))
    assert (tmp_path / "large.jsonl.gz").stat().st_size < MIB
    outputs = [tmp_path / "of small", tmp_path / "of large"]
    done = subprocess.run(
        [sys.executable, "-c", TOKENIZE, tmp_path, tokenizer_folder, *outputs],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    (shard,) = outputs[1].glob("*.parquet")
    assert pq.read_metadata(shard).num_rows * 1024 > 24 * MIB
    before, after = (int(kibibytes) * 1024 for kibibytes in done.stdout.split())
    assert after - before < 16 * MIB, (before, after)
