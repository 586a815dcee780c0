"""What the scorer waits for: the job against the bare scorer, and a device of a given speed inside the job.

    python -m benchmarks.overlap --tokenizer DIR --alm DIR [--corpus FILES] [--blocks DIR]

The job: `score_corpus` with one worker, from its first shard to its manifest, and the bare scorer over the very same
blocks, turn by turn on one core. The figure is the tokens/s of the one over those of the other.

The device: a stand-in that takes its time for each block and does nothing, as a GPU does for the machine beside it.
It stands where `DeviceQueue` does, so that calls queue up. Idle is what lies between the end of one call's blocks and
the beginning of the next one's, once the first has come. Reading, tokenizing, perplexities, hashing and Parquet are the
job's own, on as many cores as there are: what matters is the device's speed for each of them.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow.parquet as pq
import torch

from benchmarks.copied_corpus import read_documents, write_copies
from benchmarks.device import DEVICES, Device, DeviceScorer
from benchmarks.interleaved import Report, Sample, Table, console, interleave, median, ratio, timed, verdict
from benchmarks.overhead import ONE_THREAD, FirstShard, measure_side
from benchmarks.processes import run
from pipeline import score_corpus, tokenize_corpus
from scorer.alm import load_alm
from scorer.scoring import score_nll
from scorer.shards import BLOCK_LENGTH, ID_COLUMN

MODULE = "benchmarks.overlap"
MIN_JOB_SHARE = 0.95
MAX_IDLE_SHARE = 0.03
IN_THREADS = ("--direct_running_mode", "in_memory", "--direct_num_workers", 3)
"""Shards at a time, as a worker of a GPU has."""


def main(arguments: Sequence[str]) -> int:
    """Runs what is asked for; exit code 1 where the job misses its bound."""
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", required=True, metavar="DIR")
    parser.add_argument("--alm", metavar="DIR", help="of the job; without it only the device is measured")
    parser.add_argument("--corpus", nargs="*", type=Path, default=[], help="(default: the text that Python ships with)")
    parser.add_argument("--shards", type=int, default=24, help="of the job and of the device's jobs")
    parser.add_argument("--split_bytes", type=int, default=16_000, help="of the job")
    parser.add_argument("--turns", type=int, default=2, help="of job and bare scorer")
    parser.add_argument("--rates", type=float, nargs="*", default=[2.5e5, 5e5, 1e6, 2e6], help="of devices, tokens/s")
    parser.add_argument("--device_split_bytes", type=int, default=2_000_000)
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)), help="of job and bare scorer")
    parser.add_argument("--scratch", type=Path, default=Path("runs"), help="a folder for files of the moment")
    parser.add_argument("--output", type=Path, help="a Markdown file for the results")
    flags = parser.parse_args(list(arguments))
    flags.scratch.mkdir(parents=True, exist_ok=True)
    report = Report(
        title="What the scorer waits for",
        module=MODULE,
        arguments=arguments,
        method=(
            "The job: from its first shard to its manifest, one worker on one core; the bare scorer over the same "
            "blocks on the same core, turn by turn. A device: a stand-in that sleeps, in a job of threads; idle from "
            "its first blocks to its last."
        ),
        packages=["torch", "transformers", "tokenizers", "pyarrow", "apache-beam"],
    )
    passed = True
    with TemporaryDirectory(dir=flags.scratch) as scratch:
        texts = read_documents(flags.corpus, Path(scratch))
        measure_devices(texts, Path(scratch), flags, report)
        report.write(flags.output)
        if flags.alm:
            passed = measure_job(texts, Path(scratch), flags, report)
    report.write(flags.output)
    return 0 if passed else 1


# --- The job


def measure_job(texts: Sequence[str], folder: Path, flags: argparse.Namespace, report: Report) -> bool:
    """Turns of job and bare scorer; says whether the job keeps its bound."""
    corpus = write_copies(texts, folder / "corpus", flags.shards * flags.split_bytes)
    shards = folder / "shards"
    command = ["--input", folder / "corpus", "--tokenizer", flags.tokenizer, "--alm", flags.alm, "--output", shards]
    command += ["--split_bytes", -(-corpus.file_bytes // flags.shards), "--direct_num_workers", 1]
    run_job(command, folder, flags)  # for its blocks, and to have everything in the page cache
    blocks = read_blocks(shards)
    os.sched_setaffinity(0, {flags.core})
    torch.set_num_threads(1)
    alm = load_alm(flags.alm)
    sides = {
        "the job": partial(run_job, command, folder, flags),
        "bare scorer": partial(timed, lambda: [score_nll(alm, ids) for ids in blocks]),
    }
    samples = interleave(sides, flags.turns, warmups=0)
    tokens = sum(ids.numel() for ids in blocks)
    rows = [
        (name, f"{median(side):.1f}", f"{tokens / median(side):,.0f}", f"{tokens / median(side, 'cpu_seconds'):,.0f}")
        for name, side in samples.items()
    ]
    header = ("", "seconds", "tokens/s", "tokens/s of CPU time")
    report.tables.append(Table(f"{flags.shards} shards, {tokens:,} tokens, all but the first shard", header, rows))
    report.tables[-1].show()
    shares = [ratio(samples["bare scorer"], samples["the job"], figure) for figure in ("seconds", "cpu_seconds")]
    note = (
        f"The job scores {shares[0]} times as many tokens/s as the bare scorer, {shares[1]} times in CPU time; "
        f"{verdict(shares[0].of_medians, MIN_JOB_SHARE)}."
    )
    report.notes.append(note)
    console.print(note, highlight=False)
    return shares[0].of_medians >= MIN_JOB_SHARE


def run_job(command: Sequence[object], folder: Path, flags: argparse.Namespace) -> Sample:
    """One job, in processes of its own, into an empty folder."""
    shards = folder / "shards"
    shutil.rmtree(shards, ignore_errors=True)
    start = FirstShard(shards)
    finished = run(
        "pipeline.score_corpus",
        *command,
        log=folder / "log",
        look=start,
        interval=0.01,
        core=flags.core,
        environment=ONE_THREAD,
    ).require(0)
    side = measure_side(shards, finished, start.cpu_seconds, flags.shards)
    return Sample(side.seconds, side.cpu_seconds)


def read_blocks(shards: Path) -> list[torch.Tensor]:
    """The blocks of all shards but the one that was published first, int64 [B, 512] each."""
    paths = sorted(shards.glob("shard-*.parquet"), key=lambda path: path.stat().st_ctime)
    columns = [pq.read_table(path, columns=[ID_COLUMN])[ID_COLUMN].combine_chunks().flatten() for path in paths[1:]]
    return [torch.from_numpy(ids.to_numpy().astype("int64")).view(-1, BLOCK_LENGTH) for ids in columns]


# --- The device


def measure_devices(texts: Sequence[str], folder: Path, flags: argparse.Namespace, report: Report) -> None:
    """A job for each speed of a device, from text and from block shards."""
    corpus = write_copies(texts, folder / "text", flags.shards * flags.device_split_bytes)
    split_bytes = -(-corpus.file_bytes // flags.shards)
    text = ["--input", folder / "text", "--tokenizer", flags.tokenizer, "--split_bytes", split_bytes]
    tokenize_corpus.main([*map(str, [*text, "--output", folder / "blocks"])])
    sources = {"text": text, "block shards": ["--input", folder / "blocks"]}
    rows = []
    for name, source in sources.items():
        for rate in flags.rates:
            device, cpu = run_device([*source, "--output", folder / "scored"], rate)
            shutil.rmtree(folder / "scored")
            idle = device.idle_share()
            word = "yes" if idle < MAX_IDLE_SHARE else "no"
            rows.append((name, f"{rate:,.0f}", f"{idle:.1%}", word, f"{1e6 * cpu / device.blocks / BLOCK_LENGTH:.2f}"))
    header = ("the job reads", "device, tokens/s", "idle", f"under {MAX_IDLE_SHARE:.0%}", "CPU µs a token, whole job")
    report.tables.append(Table(f"A device in a job of {flags.shards} shards", header, rows))
    report.tables[-1].show()


def run_device(command: Sequence[object], rate: float) -> tuple[Device, float]:
    """A job on a device of so many tokens/s: what became of it, and the CPU seconds of the job."""
    DEVICES["device"] = device = Device(BLOCK_LENGTH / rate)
    began = time.process_time()
    score_corpus.main([*map(str, [*command, *IN_THREADS])], scorer=DeviceScorer("device"))
    return device, time.process_time() - began


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
