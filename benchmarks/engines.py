"""One job on this machine alone, on a Flink cluster of two TaskManagers, and on Spark's local master.

    python -m benchmarks.engines --corpus FILES --alm DIR

Each side is a command of its own, with two worker processes of one thread each, turn by turn. The cluster is up before
its first job, as on a farm; what its start takes is told apart. Bytes have to be the same, or the benchmark ends.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from benchmarks.interleaved import Report, Sample, Table, console, interleave, median, ratio
from benchmarks.processes import run
from benchmarks.small_job import files_in, shards_in, workers_among
from pipeline.engines import local_flink
from pipeline.engines.services import marked

MODULE = "benchmarks.engines"
WORKERS = 2
SIDES: Mapping[str, Sequence[str]] = {
    "FnApiRunner": ("--direct_num_workers", str(WORKERS)),
    "FlinkRunner": ("--runner", "FlinkRunner"),
    "SparkRunner": ("--runner", "SparkRunner", "--spark_master_url", f"local[{WORKERS},4]"),
}


@dataclass
class Phases:
    """Of every run of one side, in seconds."""

    until_first_shard: list[float] = field(default_factory=list)
    between_shards: list[float] = field(default_factory=list)
    """From the first shard to the last."""
    after_last_shard: list[float] = field(default_factory=list)
    most_workers: int = 0
    """At one time."""


def main(arguments: Sequence[str]) -> int:
    """Runs all sides."""
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", nargs="+", required=True, metavar="FILES")
    parser.add_argument("--alm", required=True, metavar="DIR", help="with its tokenizer")
    parser.add_argument("--split_bytes", type=int, default=60_000)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--output", type=Path, help="a Markdown file for the results")
    flags = parser.parse_args(list(arguments))
    report = Report(
        title="One job on three runners",
        module=MODULE,
        arguments=arguments,
        method=(
            "Whole commands from their start to their end, turn by turn. Two worker processes each; the Flink cluster "
            "runs throughout, Spark starts with each job."
        ),
        packages=["torch", "transformers", "apache-beam", "pyarrow"],
    )
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        began = time.monotonic()
        cluster = local_flink.up(folder / "flink", taskmanagers=WORKERS)
        up_seconds = time.monotonic() - began
        try:
            phases, samples, shards = compare(flags, folder, cluster)
        finally:
            local_flink.down(folder / "flink")
    report.tables.append(to_table(phases, samples, shards))
    report.tables[-1].show()
    report.notes.extend(
        f"{engine} takes {ratio(samples[engine], samples['FnApiRunner'])} times as long as FnApiRunner."
        for engine in ("FlinkRunner", "SparkRunner")
    )
    report.notes.extend([f"flink-up took {up_seconds:.0f} s.", "All files of all runs had the same bytes."])
    for note in report.notes:
        console.print(note, highlight=False)
    report.write(flags.output)
    return 0


def compare(
    flags: argparse.Namespace, folder: Path, cluster: local_flink.LocalFlink
) -> tuple[dict[str, Phases], dict[str, list[Sample]], int]:
    """What became of each side, and of how many shards."""
    command = ["--input", *flags.corpus, "--alm", flags.alm, "--split_bytes", flags.split_bytes]
    there = ["--flink_master", cluster.rest, "--job_endpoint", cluster.job_endpoint]
    phases = {side: Phases() for side in SIDES}
    expected: dict[str, bytes] = {}

    def measure(side: str) -> Sample:
        shards = folder / "shards"
        shutil.rmtree(shards, ignore_errors=True)
        extra = [*SIDES[side], *(there if side == "FlinkRunner" else [])]
        watch = partial(count_workers, phases[side], folder / "flink")
        done = run(
            "pipeline.score_corpus", *command, "--output", shards, *extra,
            log=folder / "log", look=watch, environment={"OMP_NUM_THREADS": "1"},
        ).require(0)  # fmt: skip
        found = files_in(shards)
        if found != (expected or found):
            sys.exit(f"{side} gave other bytes")
        expected.update(found)
        times = sorted(path.stat().st_mtime - done.began for path in shards_in(shards))
        phases[side].until_first_shard.append(times[0])
        phases[side].between_shards.append(times[-1] - times[0])
        phases[side].after_last_shard.append(done.seconds - times[-1])
        return Sample(done.seconds, done.cpu_seconds)

    samples = interleave({side: partial(measure, side) for side in SIDES}, flags.turns, warmups=0)
    return phases, samples, sum(name.endswith(".parquet") for name in expected)


def count_workers(phases: Phases, cluster: Path, driver: psutil.Process) -> None:
    """Looks how many scoring processes there are, below the driver and on the cluster."""
    there = {process.pid for process in workers_among([*driver.children(recursive=True), *marked(cluster)])}
    phases.most_workers = max(phases.most_workers, len(there))


def to_table(phases: Mapping[str, Phases], samples: Mapping[str, Sequence[Sample]], shards: int) -> Table:
    """One row a side; medians."""
    rows = []
    for side, phase in phases.items():
        seconds = median(samples[side])
        parts = [
            sorted(values)[len(values) // 2]
            for values in (phase.until_first_shard, phase.between_shards, phase.after_last_shard)
        ]
        overhead = (parts[0] + parts[2] - parts[1] * WORKERS / (shards - WORKERS)) / seconds
        rows.append(
            (side, f"{seconds:.0f}", *(f"{part:.0f}" for part in parts), f"{overhead:.0%}", f"{phase.most_workers}")
        )
    header = (
        *("", "seconds", "until the first shard", "first to last shard", "after the last"),
        *("start-up and end", "workers at once"),
    )
    return Table(f"{shards} shards of text", header, rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
