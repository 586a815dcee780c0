"""Batches out of shards, and masking alone, against Hugging Face's own code for both, on one core.

    python -m benchmarks.loader --shards DIR [--output results.md]

    ours    ShardCorpus ── TrainingStream ── DataLoader(collate_fn=HardnessCollator)
    peer    datasets.load_dataset(streaming=True) ── DataLoader(collate_fn=DataCollatorForLanguageModeling)

Ours reads the ids and both perplexities, holds each shard to its hash when it first touches it, shuffles 8,192 blocks
at a time and draws keyed masks. The peer reads only the ids, and masks uniformly; it is run with each setting of its
own that might make it faster, and held to the fastest.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from benchmarks.interleaved import Report, Sample, Table, command, console, interleave, median, ratio, timed, verdict
from scorer.manifest import TOKENIZER_FOLDER
from scorer.tokenizer import load_tokenizer
from trainer.masking import HardnessCollator
from trainer.reader import RowGroup, ShardCorpus
from trainer.stream import WINDOW_ROW_GROUPS, TrainingStream, steps_per_epoch

MODULE = "benchmarks.loader"
BATCH = 32
ALPHA = 0.001
SEED = 1
MIN_LOADER_RATIO, AIMED_LOADER_RATIO = 12, 30
MIN_MASKING_RATIO, AIMED_MASKING_RATIO = 15, 40
OURS = "ours"
BY_HAND = "peer, torch rows taken out of their dicts by hand"
"""Not its documented use, so shown and not held against."""
WHOLE_COLLATOR = ("peer's collator, rows of lists", "peer's collator, rows of tensors")
"""What its readers and Trainer call it with."""
READY_BATCHES = 32
"""Of masking alone: so many different ones, all in memory."""


def main(arguments: Sequence[str]) -> int:
    """Runs both comparisons; exit code 1 where one misses its bound."""
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__.splitlines()[0])
    parser.add_argument("--shards", required=True, type=Path, metavar="DIR", help="a complete folder, with tokenizer")
    parser.add_argument("--passes", type=int, default=2, help="over the folder, in each turn of each side")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--shuffle_buffer", type=int, default=1000, help="rows, of the peer's shuffle")
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)), help="the only one that is used")
    parser.add_argument("--output", type=Path, help="a Markdown file for the results")
    flags = parser.parse_args(list(arguments))
    keep_to_one_core(flags.core)
    tokenizer = load_tokenizer(str(flags.shards / TOKENIZER_FOLDER))
    report = Report(
        title="The loader and masking against Hugging Face's, one core",
        module=MODULE,
        arguments=arguments,
        method=describe_method(flags),
        packages=["torch", "numpy", "pyarrow", "datasets", "transformers"],
    )
    console.print(command(MODULE, arguments))
    passed = compare_loaders(flags, tokenizer, report)
    passed &= compare_masking(flags, tokenizer, report)
    report.write(flags.output)
    return 0 if passed else 1


def keep_to_one_core(core: int) -> None:
    """One core, one thread of arithmetic, none of pyarrow's, and neither progress bars nor advice."""
    os.sched_setaffinity(0, {core})
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    datasets.disable_progress_bars()
    transformers_logging.set_verbosity_error()


def describe_method(flags: argparse.Namespace) -> str:
    """What the clock covers."""
    return (
        f"Sides take turns (A B C A B C …) in one process on one core; one warm-up turn, {flags.turns} that count (for "
        f"masking {2 * flags.turns}); ratios are of medians, with the range of the turns' own. Files are in the page "
        "cache. The ratio that counts is of CPU time of the process with all its threads, which other programs on the "
        "machine do not add to; wall-clock stands beside it. Opening the folder, resolving data files and loading the "
        "tokenizer come before the clock starts; the first-touch hash of each shard is inside it, in each turn of ours."
    )


# --- Loaders


def compare_loaders(flags: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, report: Report) -> bool:
    """Whole passes over the folder, by ours and by each setting of the peer."""
    corpus = ShardCorpus([str(flags.shards)])
    groups = [group for folder in corpus.row_groups() for group in folder]
    steps = steps_per_epoch(sum(map(len, groups)), BATCH)
    blocks = steps * BATCH * flags.passes
    peers = peer_loaders(sorted(map(str, flags.shards.glob("*.parquet"))), tokenizer, flags.shuffle_buffer)
    sides = {OURS: lambda: consume(our_loader(flags.shards, flags.passes), blocks)}
    sides |= {name: partial(run_peer, make, flags.passes, blocks) for name, make in peers.items()}
    samples = interleave(sides, flags.turns)
    documented = [name for name in peers if name != BY_HAND]
    fastest = fastest_of(documented, samples)
    table = Table(
        f"Loader: {blocks:,} blocks a turn ({flags.passes} passes), B = {BATCH}",
        ("", "blocks/s of CPU", "µs a block, CPU", "µs a block, wall", "CPU, of ours", "wall, of ours"),
        [_row(name, runs, samples[OURS], blocks) for name, runs in samples.items()],
    )
    value = ratio(samples[fastest], samples[OURS], "cpu_seconds").of_medians
    windows = flags.passes * -(-len(groups) // WINDOW_ROW_GROUPS)
    notes = [
        f"Loader against the peer's fastest documented setting ({fastest}): {value:.1f} times; "
        f"{verdict(value, MIN_LOADER_RATIO, AIMED_LOADER_RATIO)}.",
        f"A turn of ours passes over {len(corpus)} shards, {len(groups)} row groups and {windows} windows, and hashes "
        f"all shards once; over a longer run that is once in all.",
    ]
    _add(report, table, notes)
    return value >= MIN_LOADER_RATIO


def our_loader(folder: str | Path, passes: int) -> DataLoader[Any]:
    """As pretraining has it, over all blocks; a corpus opened anew, so that its shards are hashed again."""
    corpus = ShardCorpus([str(folder)])
    groups: list[RowGroup] = [group for groups in corpus.row_groups() for group in groups]
    steps = steps_per_epoch(sum(map(len, groups)), BATCH) * passes
    stream = TrainingStream(corpus, groups, BATCH, steps, SEED)
    collator = HardnessCollator(corpus.vocabulary, ALPHA, SEED, at_positions=True)
    return DataLoader(stream, batch_size=BATCH, shuffle=False, num_workers=0, collate_fn=collator)


def peer_loaders(
    paths: Sequence[str], tokenizer: PreTrainedTokenizerBase, buffer: int
) -> dict[str, Callable[[], DataLoader[Any]]]:
    """The peer's own code, in each of its settings; it is told to read `input_ids` only."""
    collator = DataCollatorForLanguageModeling(tokenizer)

    def make(arrange: Callable[[Any], Any], collate: Callable[[Any], Any] = collator) -> DataLoader[Any]:
        rows = load_dataset("parquet", data_files=paths, split="train", streaming=True, columns=["input_ids"])
        return DataLoader(arrange(rows), batch_size=BATCH, collate_fn=collate, drop_last=True)

    return {
        "peer": partial(make, lambda rows: rows),
        f"peer, shuffle(buffer_size={buffer})": partial(make, lambda rows: rows.shuffle(seed=SEED, buffer_size=buffer)),
        'peer, with_format("numpy")': partial(make, lambda rows: rows.with_format("numpy")),
        'peer, with_format("torch")': partial(make, lambda rows: rows.with_format("torch")),
        BY_HAND: partial(
            make,
            lambda rows: rows.with_format("torch"),
            lambda rows: collator([row["input_ids"].long() for row in rows]),
        ),
    }


def run_peer(make: Callable[[], DataLoader[Any]], passes: int, blocks: int) -> Sample:
    """Several passes of one loader."""
    loader = make()
    return consume((batch for _ in range(passes) for batch in loader), blocks)


def consume(batches: Iterable[Mapping[str, torch.Tensor]], blocks: int) -> Sample:
    """Takes all batches.

    Raises:
        RuntimeError: they are not so many blocks as both sides should give.
    """
    count = 0

    def take() -> None:
        nonlocal count
        for batch in batches:
            count += len(batch["input_ids"])

    sample = timed(take)
    if count != blocks:
        raise RuntimeError(f"a side gave {count} blocks, expected {blocks}")
    return sample


# --- Masking alone


def compare_masking(flags: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, report: Report) -> bool:
    """The same blocks, ready in memory as each side wants them: ours as the stream hands them to the collator."""
    corpus = ShardCorpus([str(flags.shards)])
    groups = [group for folder in corpus.row_groups() for group in folder]
    blocks = READY_BATCHES * BATCH
    stream = TrainingStream(corpus, groups, BATCH, READY_BATCHES, SEED)
    rows = [stream.__getitems__(list(range(start, start + BATCH))) for start in range(0, blocks, BATCH)]
    ids = [as_tensor(batch) for batch in rows]
    ours = HardnessCollator(corpus.vocabulary, ALPHA, SEED)
    sides = {OURS: partial(on_all, ours, rows)} | {
        name: partial(on_all, *side) for name, side in peer_masking(tokenizer, ids).items()
    }
    samples = interleave(sides, 2 * flags.turns)
    table = Table(
        f"Masking alone: {blocks:,} blocks a turn, ready in memory, B = {BATCH}",
        ("", "blocks/s of CPU", "µs a block, CPU", "µs a block, wall", "CPU, of ours", "wall, of ours"),
        [_row(name, turns, samples[OURS], blocks) for name, turns in samples.items()],
    )
    fastest = fastest_of(WHOLE_COLLATOR, samples)
    value = ratio(samples[fastest], samples[OURS], "cpu_seconds").of_medians
    notes = [
        f"Masking against {fastest}: {value:.1f} times; {verdict(value, MIN_MASKING_RATIO, AIMED_MASKING_RATIO)}.",
        "Most of the peer's collator is padding by way of Python lists; most of its `torch_mask_tokens` looks for "
        "special tokens in a Python loop. The last row is what is left with neither: uniform masks, unkeyed, in torch.",
    ]
    _add(report, table, notes)
    return value >= MIN_MASKING_RATIO


def as_tensor(features: Iterable[Mapping[str, Any]]) -> torch.Tensor:
    """The ids of a list of rows: int64 [B, T]."""
    return torch.from_numpy(np.stack([np.asarray(row["input_ids"]) for row in features]).astype(np.int64))


def peer_masking(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[torch.Tensor]
) -> dict[str, tuple[Callable[[Any], object], Sequence[Any]]]:
    """The peer's ways to mask a batch, from what it is given by its readers to its bare arithmetic."""
    collator = DataCollatorForLanguageModeling(tokenizer)
    special = torch.tensor(tokenizer.all_special_ids)
    return {
        WHOLE_COLLATOR[0]: (collator, [[{"input_ids": row} for row in batch.tolist()] for batch in ids]),
        WHOLE_COLLATOR[1]: (collator, [[{"input_ids": row} for row in batch] for batch in ids]),
        "peer's collator, tensors without dicts": (collator, [list(batch) for batch in ids]),
        "peer's torch_mask_tokens": (lambda batch: collator.torch_mask_tokens(batch.clone()), ids),
        "peer's torch_mask_tokens, special tokens known": (
            lambda pair: collator.torch_mask_tokens(pair[0].clone(), pair[1]),
            [(batch, torch.isin(batch, special)) for batch in ids],
        ),
    }


def on_all(function: Callable[[Any], object], batches: Sequence[Any]) -> Sample:
    """Calls a function on each batch."""

    def call() -> None:
        for batch in batches:
            function(batch)

    return timed(call)


# --- Results


def fastest_of(names: Iterable[str], samples: Mapping[str, Sequence[Sample]]) -> str:
    """The side that takes the least CPU time."""
    return min(names, key=lambda name: median(samples[name], "cpu_seconds"))


def _row(name: str, runs: Sequence[Sample], ours: Sequence[Sample], blocks: int) -> tuple[str, ...]:
    cpu, wall = median(runs, "cpu_seconds"), median(runs)
    ratios = ["1", "1"] if runs is ours else [str(ratio(runs, ours, figure)) for figure in ("cpu_seconds", "seconds")]
    return (name, f"{blocks / cpu:,.0f}", f"{1e6 * cpu / blocks:.1f}", f"{1e6 * wall / blocks:.1f}", *ratios)


def _add(report: Report, table: Table, notes: Sequence[str]) -> None:
    table.show()
    for note in notes:
        console.print(f"- {note}")
    report.tables.append(table)
    report.notes.extend(notes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
