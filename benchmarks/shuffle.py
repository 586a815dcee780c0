"""How well the order of training mixes a corpus, against a perfect permutation; nothing of the corpus is read.

    python -m benchmarks.shuffle [--shards DIR] [--blocks 4666 1e6 78e6] [--batches 32 2560] [--output results.md]

    apart       how far from each other two blocks land that are neighbours in the corpus, in positions of the epoch
    together    the share of neighbours that land in one batch
    shards      how many different ones a batch mixes

78 million blocks are 160 GB of text; a split of 16 MiB makes a shard of 7,800. Of large corpora an even sample of the
windows that are shuffled together stands for all.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.interleaved import Report, Table, console
from scorer.shards import BLOCK_LENGTH, ROW_GROUP_BLOCKS
from trainer import noise
from trainer.reader import RowGroup, ShardCorpus
from trainer.stream import POOL_BLOCKS, WINDOW_ROW_GROUPS, TrainingStream

MODULE = "benchmarks.shuffle"
SHARD_BLOCKS = 7_800
"""Of 16 MiB of text."""
SAMPLED_WINDOWS = 1_000
BYTES_A_TOKEN = {"ids": 2, "ids and both perplexities": 10}
CHECKED_POSITIONS = 200

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Window:
    """The blocks that are shuffled together, in the order in which they are trained on."""

    start: int
    """The first one's position in the epoch."""
    groups: list[RowGroup]
    places: Ints
    """Where in the window each block lands; the blocks row group by row group, as the corpus has them."""


@dataclass(frozen=True)
class Quality:
    """What an order does to neighbours and to batches."""

    median_apart: float
    """Positions between two neighbours of the corpus; half of all are further apart."""
    close_apart: float
    """The 5 % quantile."""
    together: dict[int, float]
    """By batch size, the share of neighbours in one batch."""
    mean_shards: dict[int, float]
    """By batch size, the number of shards that a batch mixes."""
    least_shards: dict[int, float]
    """By batch size, that of the batch with the fewest."""


@dataclass(frozen=True)
class Corpus:
    """Row groups without rows."""

    name: str
    groups: list[RowGroup]

    @property
    def blocks(self) -> int:
        """Of all row groups."""
        return sum(map(len, self.groups))

    @property
    def shard_blocks(self) -> Ints:
        """Blocks of each shard."""
        counts = np.zeros(1 + max(group.shard for group in self.groups), dtype=np.int64)
        for group in self.groups:
            counts[group.shard] += len(group)
        return counts


def main(arguments: Sequence[str]) -> int:
    """Measures each corpus; exit code 1 where the order is not the one that a TrainingStream says it has."""
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=Path, metavar="DIR", help="a complete folder")
    parser.add_argument("--blocks", nargs="*", type=float, default=[1e5, 1e6, 78e6], help="of made-up corpora")
    parser.add_argument("--batches", nargs="+", type=int, default=[32, 256, 2560], help="blocks a batch")
    parser.add_argument("--window", type=int, default=WINDOW_ROW_GROUPS, help="row groups, to see what others would do")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, help="a Markdown file for the results")
    flags = parser.parse_args(list(arguments))
    corpora = [real_corpus(flags.shards)] if flags.shards else []
    corpora += [made_up_corpus(int(blocks)) for blocks in flags.blocks]
    report = Report(
        title="How well the order of training mixes a corpus",
        module=MODULE,
        arguments=arguments,
        method=describe_method(flags.seed),
        packages=["numpy"],
    )
    agreed = True
    for corpus in corpora:
        table = to_table(corpus, measure(corpus, flags.batches, flags.seed, flags.window), flags.batches)
        table.show()
        report.tables.append(table)
        agreed &= matches_stream(corpus, flags.batches[0], flags.seed)
    report.notes.append(describe_memory(flags.window))
    for text in report.notes:
        console.print(f"- {text}")
    report.write(flags.output)
    return 0 if agreed else 1


def describe_method(seed: int) -> str:
    """What is counted."""
    return (
        f"The first epoch of seed {seed}. Neighbours are blocks that follow each other in a row group, 255 of 256 of "
        f"those in a shard. Of corpora with more than {SAMPLED_WINDOWS:,} windows an even sample of at most so many "
        "stands for all. A perfect permutation of as many blocks is computed, not drawn; nothing is timed."
    )


def describe_memory(window: int) -> str:
    """What a window holds."""
    blocks = window * ROW_GROUP_BLOCKS
    sizes = [f"{blocks * BLOCK_LENGTH * size / 1e6:.0f} MB with {what}" for what, size in BYTES_A_TOKEN.items()]
    return f"A window is {window} row groups, {blocks:,} blocks: {', '.join(sizes)}, whatever the corpus."


# --- Corpora


def real_corpus(folder: Path) -> Corpus:
    """The row groups of a folder."""
    groups = ShardCorpus([str(folder)], perplexities=False).row_groups()
    return Corpus(folder.name, [group for of_folder in groups for group in of_folder])


def made_up_corpus(blocks: int) -> Corpus:
    """Shards of the usual size, the last one smaller."""
    groups = []
    for shard, first in enumerate(range(0, blocks, SHARD_BLOCKS)):
        rows = min(SHARD_BLOCKS, blocks - first)
        groups += [
            RowGroup(shard, index, 0, min(ROW_GROUP_BLOCKS, rows - start))
            for index, start in enumerate(range(0, rows, ROW_GROUP_BLOCKS))
        ]
    return Corpus("made up", groups)


# --- The order


def pools_of(corpus: Corpus, seed: int) -> dict[int, int]:
    """The first epoch's pool of each shard: shards in random order, the next pool after each POOL_BLOCKS blocks."""
    counts, before, pools = corpus.shard_blocks, 0, {}
    for shard in noise.permutation(len(counts), seed, 0, -1).tolist():
        pools[shard] = before // POOL_BLOCKS
        before += int(counts[shard])
    return pools


def windows(corpus: Corpus, seed: int, size: int = WINDOW_ROW_GROUPS, every: int = 1) -> Iterator[Window]:
    """The first epoch's windows as TrainingStream forms them, of `size` row groups; of `every` so many the first."""
    pools = pools_of(corpus, seed)
    order = [corpus.groups[index] for index in noise.permutation(len(corpus.groups), seed, 0)]
    order = sorted(order, key=lambda group: pools[group.shard])
    start = 0
    for number, first in enumerate(range(0, len(order), size)):
        groups = order[first : first + size]
        blocks = sum(map(len, groups))
        if number % every == 0:
            yield Window(start, groups, noise.permutation(blocks, seed, 0, number))
        start += blocks


def origins(window: Window) -> tuple[Ints, Ints]:
    """Shard, and row there, of each position of a window, in order."""
    shards, rows = np.empty_like(window.places), np.empty_like(window.places)
    shards[window.places] = np.concatenate([np.full(len(group), group.shard) for group in window.groups])
    rows[window.places] = np.concatenate(
        [group.index * ROW_GROUP_BLOCKS + np.arange(group.start, group.stop) for group in window.groups]
    )
    return shards, rows


def matches_stream(corpus: Corpus, batch: int, seed: int) -> bool:
    """Whether a TrainingStream says the same of where its blocks are from; true where it cannot say."""
    stream = TrainingStream(None, corpus.groups, batch, corpus.blocks // batch, seed)  # type: ignore[arg-type]
    if not hasattr(stream, "origin"):
        return True
    first = next(windows(corpus, seed))
    expected = list(zip(*(column.tolist() for column in origins(first)), strict=True))
    positions = np.linspace(0, min(len(stream), len(expected)) - 1, CHECKED_POSITIONS).astype(int).tolist()
    agrees = all(tuple(stream.origin(position)) == expected[position] for position in positions)
    if not agrees:
        console.print(f"[red]{corpus.name}: TrainingStream.origin says otherwise[/]")
    return agrees


# --- What it does


def measure(corpus: Corpus, batches: Sequence[int], seed: int, size: int = WINDOW_ROW_GROUPS) -> Quality:
    """Neighbours within a row group share a window, so that windows are looked at one by one."""
    number = -(-len(corpus.groups) // size)
    distances: list[npt.NDArray[np.int32]] = []
    pairs = 0
    together = dict.fromkeys(batches, 0)
    shards: dict[int, list[int]] = {batch: [] for batch in batches}
    for window in windows(corpus, seed, size, every=-(-number // SAMPLED_WINDOWS)):
        positions = window.start + window.places
        ends = np.cumsum([len(group) for group in window.groups])
        is_inside = np.ones(len(positions) - 1, dtype=bool)
        is_inside[ends[:-1] - 1] = False  # the last of one row group and the first of the next are no neighbours
        one, other = positions[:-1][is_inside], positions[1:][is_inside]
        distances.append(np.abs(one - other).astype(np.int32))
        pairs += len(one)
        for batch in batches:
            together[batch] += int((one // batch == other // batch).sum())
            shards[batch] += shards_of_batches(window, batch)
    apart = np.concatenate(distances)
    return Quality(
        median_apart=float(np.median(apart)),
        close_apart=float(np.quantile(apart, 0.05)),
        together={batch: count / max(pairs, 1) for batch, count in together.items()},
        mean_shards={batch: float(np.mean(counts)) if counts else math.nan for batch, counts in shards.items()},
        least_shards={batch: float(min(counts, default=math.nan)) for batch, counts in shards.items()},
    )


def shards_of_batches(window: Window, batch: int) -> list[int]:
    """How many shards each batch mixes that lies within the window; those across its ends mix more."""
    shards, _ = origins(window)
    first = -window.start % batch
    count = (len(shards) - first) // batch
    whole = shards[first : first + count * batch].reshape(count, batch)
    return [len(np.unique(row)) for row in whole]


def perfect(corpus: Corpus, batches: Sequence[int]) -> Quality:
    """What a uniform permutation of all blocks would do, by its law.

    The distance of two blocks is triangular: further than x of N with probability (1 - x/N)^2. A shard of n blocks is
    missing from a batch with probability (1 - n/N)^B.
    """
    blocks = corpus.blocks
    shares = corpus.shard_blocks / blocks
    expected = {batch: float((1 - (1 - shares) ** batch).sum()) for batch in batches}
    return Quality(
        median_apart=blocks * (1 - math.sqrt(0.5)),
        close_apart=blocks * (1 - math.sqrt(0.95)),
        together={batch: (batch - 1) / (blocks - 1) for batch in batches},
        mean_shards=expected,
        least_shards=dict.fromkeys(batches, math.nan),
    )


def to_table(corpus: Corpus, found: Quality, batches: Sequence[int]) -> Table:
    """Ours beside a perfect permutation."""
    ideal = perfect(corpus, batches)
    rows = [
        ("neighbours apart, median", f"{found.median_apart:,.0f}", f"{ideal.median_apart:,.0f}"),
        ("neighbours apart, 5 % quantile", f"{found.close_apart:,.0f}", f"{ideal.close_apart:,.0f}"),
    ]
    for batch in batches:
        shards = f"{found.mean_shards[batch]:,.1f} ({found.least_shards[batch]:,.0f})"
        rows += [
            (
                f"neighbours in one batch of {batch:,}, %",
                f"{100 * found.together[batch]:.3g}",
                f"{100 * ideal.together[batch]:.2g}",
            ),
            (f"shards in a batch of {batch:,}: mean (least)", shards, f"{ideal.mean_shards[batch]:,.1f}"),
        ]
    title = f"{corpus.name}: {corpus.blocks:,} blocks in {len(corpus.shard_blocks):,} shards"
    return Table(title, ("", "ours", "perfect permutation"), rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
