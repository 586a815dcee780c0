"""Training from an object store against training from local disk: rows a second, and what a run waits for data.

    python -m benchmarks.stores --shards DIR --url s3://bucket/folder [--output results.md]

    local disk          the folder itself
    store, empty cache  each shard is fetched, hashed, kept, and read from there: the first pass over a corpus
    store, full cache   each shard is hashed at its first use: later passes, and other runs on the machine

The store is the one that the environment leads to (AWS_ENDPOINT_URL, …). The folder is copied there first, where it is
not there yet.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks.interleaved import Report, Sample, Table, command, console, interleave, median, ratio
from benchmarks.loader import BATCH, consume, keep_to_one_core, our_loader
from scorer import files
from scorer.manifest import MANIFEST_NAME, read_manifest
from trainer.shard_cache import FOLDER_VARIABLE
from trainer.stream import steps_per_epoch

MODULE = "benchmarks.stores"
LOCAL, EMPTY, FULL = "local disk", "store, empty cache", "store, full cache"
MODEL = "hidden_size=128,num_hidden_layers=2,num_attention_heads=2,intermediate_size=512"


def main(arguments: Sequence[str]) -> int:
    """Runs both comparisons."""
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__.splitlines()[0])
    parser.add_argument("--shards", required=True, type=Path, metavar="DIR", help="a complete folder, with tokenizer")
    parser.add_argument("--url", required=True, help="where to in the store: s3://bucket/folder")
    parser.add_argument("--turns", type=int, default=5, help="of reading")
    parser.add_argument("--runs", type=int, default=3, help="of training, a side")
    parser.add_argument("--steps", type=int, default=20, help="of a training run")
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)), help="the only one that is used")
    parser.add_argument("--output", type=Path, help="a Markdown file for the results")
    flags = parser.parse_args(list(arguments))
    keep_to_one_core(flags.core)
    console.print(command(MODULE, arguments))
    if not files.exists(files.join(flags.url, MANIFEST_NAME)):
        files.upload_folder(str(flags.shards), flags.url)
    report = Report(
        title="Reading shards from an object store against local disk, one core",
        module=MODULE,
        arguments=arguments,
        method=(
            f"Sides take turns (A B C A B C …) on one core; one warm-up turn, {flags.turns} that count; ratios are of "
            "medians, with the range of the turns' own. Local files are in the page cache. A turn of reading is one "
            "pass of the loader that pretraining has, in one process: opening the folder, fetching, hashing, shuffling "
            f"and masking. A training run is `trainer.pretrain` with {flags.steps} steps of {BATCH} blocks and a model "
            f"of two layers ({MODEL}); the share of step time that it waits for data is the one that it logs."
        ),
        packages=["torch", "numpy", "pyarrow", "s3fs"],
    )
    with tempfile.TemporaryDirectory() as scratch:
        for table in (compare_reading(flags, Path(scratch)), compare_training(flags, Path(scratch))):
            table.show()
            report.tables.append(table)
            report.write(flags.output)
    return 0


def compare_reading(flags: argparse.Namespace, scratch: Path) -> Table:
    """One pass of the loader, from each place."""
    manifest = read_manifest(str(flags.shards))
    blocks = steps_per_epoch(manifest.blocks, BATCH) * BATCH
    os.environ[FOLDER_VARIABLE] = str(scratch / "cache")

    def read(folder: str, empty: bool) -> Sample:
        if empty:
            shutil.rmtree(scratch / "cache", ignore_errors=True)
        return consume((batch for loader in [our_loader(folder, 1)] for batch in loader), blocks)

    samples = interleave(
        {
            LOCAL: partial(read, str(flags.shards), False),
            EMPTY: partial(read, flags.url, True),
            FULL: partial(read, flags.url, False),
        },
        flags.turns,
    )
    size = sum(shard.bytes for shard in manifest.shards)
    return Table(
        f"Reading: {blocks:,} blocks, {len(manifest.shards)} shards, {size / 1e6:.1f} MB",
        ("", "blocks/s", "wall, of local", "CPU, of local"),
        [
            (
                name,
                f"{blocks / median(runs):,.0f}",
                *(str(ratio(runs, samples[LOCAL], figure)) for figure in ("seconds", "cpu_seconds")),
            )
            for name, runs in samples.items()
        ],
    )


def compare_training(flags: argparse.Namespace, scratch: Path) -> Table:
    """The share of step time that a run waits for data, from each place."""
    sides = {LOCAL: (str(flags.shards), False), EMPTY: (flags.url, True), FULL: (flags.url, False)}
    waits: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(flags.runs):
        for name, (folder, empty) in sides.items():
            if empty:
                shutil.rmtree(scratch / "cache", ignore_errors=True)
            waits[name].append(wait_of(folder, flags.steps, scratch))
    return Table(
        f"Training: share of step time that a run waits for data, {flags.runs} runs a side",
        ("", "median, %", "lowest, %", "highest, %"),
        [
            (name, *(f"{100 * value:.2f}" for value in (statistics.median(shares), min(shares), max(shares))))
            for name, shares in waits.items()
        ],
    )


def wait_of(folder: str, steps: int, scratch: Path) -> float:
    """`data_wait` of one training run, the mean over its log entries."""
    output = scratch / "run"
    shutil.rmtree(output, ignore_errors=True)
    arguments = [
        *("--shards", folder, "--output_dir", str(output), "--alpha", "0.001", "--max_steps", str(steps)),
        *("--model_type", "roberta", "--config_overrides", MODEL, "--global_batch_size", str(BATCH)),
        *("--per_device_train_batch_size", str(BATCH), "--use_cpu", "--report_to", "none", "--logging_steps", "5"),
        *("--save_strategy", "no", "--disable_tqdm", "true"),
    ]
    subprocess.run([sys.executable, "-m", "trainer.pretrain", *arguments], check=True, capture_output=True)
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return statistics.mean(entry["data_wait"] for entry in history if "data_wait" in entry)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
