"""What the job costs beside its work: Beam against a bare loop, and the tokenizing path against bare `tokenizers`.

    python -m benchmarks.overhead --tokenizer DIR [--corpus FILES]

Both sides of a comparison run turn by turn on one core of the machine, and the figure is the median over the turns.
CPU seconds are beside wall-clock seconds because other programs may share the machine.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from benchmarks.copied_corpus import copies, read_documents, write_copies
from benchmarks.processes import Finished, cpu_seconds, run
from pipeline.corpus import TextFormat
from pipeline.inputs import find_text
from pipeline.tokenization import SplitTokenizer
from scorer.shards import RUN_LENGTH
from scorer.tokenizer import describe, load_tokenizer

MAX_JOB_RATIO = 1.05
MIN_TOKENIZATION_RATIO = 0.9
ONE_THREAD = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

console = Console()


@dataclass(frozen=True)
class Side:
    """One run of a job or of a bare loop over the same splits."""

    seconds: float
    """Wall-clock from the first published shard to the last, or to the manifest of a job."""
    cpu_seconds: float
    """Of all processes, from the first published shard to the end of the command."""
    whole_seconds: float
    """Wall-clock from the start of the command to its end."""
    whole_cpu_seconds: float


@dataclass(frozen=True)
class Turn:
    """A job and a bare loop, one right after the other."""

    job: Side
    loop: Side

    def ratio(self, figure: str) -> float:
        """The job's figure over the loop's."""
        return float(getattr(self.job, figure) / getattr(self.loop, figure))


@dataclass(frozen=True)
class Encoding:
    """The tokenizing path and a bare call on the same texts, one right after the other; CPU seconds on one core."""

    path_seconds: float
    """Reading, encoding and packing, from the file to the last block."""
    bare_seconds: float
    """One call of `encode_batch_fast` with the texts in memory."""

    @property
    def ratio(self) -> float:
        """The path's speed over the bare call's."""
        return self.bare_seconds / self.path_seconds


def main(arguments: Sequence[str]) -> int:
    """Runs both comparisons; exit code 1 where one misses its bound."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", required=True, metavar="DIR")
    parser.add_argument("--corpus", nargs="*", type=Path, default=[], help="(default: the text that Python ships with)")
    parser.add_argument("--scratch", type=Path, default=Path("runs"), help="a folder for files of the moment")
    parser.add_argument("--shards", type=int, default=24, help="of the job, at least 20 for a fair figure")
    parser.add_argument("--split_bytes", type=int, default=4 << 20)
    parser.add_argument("--turns", type=int, default=5, help="of job and loop")
    parser.add_argument("--encoded_bytes", type=int, default=8_000_000, help="text of the tokenizing comparison")
    parser.add_argument("--encoding_turns", type=int, default=11)
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)), help="which both sides run on")
    parser.add_argument("--only", choices=["job", "tokenization"])
    parser.add_argument("--json", type=Path, help="a file for all figures")
    flags = parser.parse_args(list(arguments))
    flags.scratch.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    passed = True
    with TemporaryDirectory(dir=flags.scratch) as scratch:
        folder = Path(scratch)
        texts = read_documents(flags.corpus, folder)
        if flags.only != "job":
            encodings = compare_tokenization(texts, folder, flags)
            passed &= show_tokenization(encodings)
            results["tokenization"] = {form: [asdict(turn) for turn in turns] for form, turns in encodings.items()}
        if flags.only != "tokenization":
            turns = compare_jobs(texts, folder, flags)
            passed &= show_jobs(turns, flags.shards)
            results["jobs"] = [asdict(turn) for turn in turns]
    if flags.json:
        flags.json.write_text(json.dumps(results, indent=2) + "\n")
    return 0 if passed else 1


# --- The tokenizing path


def compare_tokenization(texts: Sequence[str], folder: Path, flags: argparse.Namespace) -> dict[str, list[Encoding]]:
    """Turns of the product's path and a bare call, for each form of input.

    The same documents in each form; blank lines are taken out, since they would end a document of `.txt`.
    """
    os.environ |= ONE_THREAD
    sample = [re.sub(r"\n\s*\n", "\n", text).strip() for _, text in copies(texts, flags.encoded_bytes)]
    forms = write_forms(sample, folder / "forms")
    bare = load_tokenizer(flags.tokenizer).backend_tokenizer
    ours = load_tokenizer(flags.tokenizer)
    paths = {form: path_tokenizer(path, ours) for form, path in forms.items()}
    turns: dict[str, list[Encoding]] = {form: [] for form in forms}
    for number in range(flags.encoding_turns + 1):
        for form, tokenize in paths.items():
            turn = Encoding(cpu_time(tokenize), encode_bare(bare, sample))
            if number:  # the first one warms both up
                turns[form].append(turn)
    return turns


def write_forms(texts: Sequence[str], folder: Path) -> dict[str, Path]:
    """The same documents as JSON lines, as text between blank lines, compressed, and as Parquet."""
    folder.mkdir()
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()
    contents = {
        ".jsonl": lines,
        ".txt": ("\n\n".join(texts) + "\n").encode(),
        ".jsonl.gz": gzip.compress(lines, compresslevel=6),
    }
    paths = {form: folder / f"documents{form}" for form in [*contents, ".parquet"]}
    for form, content in contents.items():
        paths[form].write_bytes(content)
    pq.write_table(pa.table({"text": list(texts)}), paths[".parquet"], compression="zstd", row_group_size=1000)
    return paths


def path_tokenizer(path: Path, tokenizer: PreTrainedTokenizerBase) -> Callable[[], int]:
    """A function that takes a file from its bytes to its blocks as a worker does, and returns their tokens."""
    corpus = find_text([str(path)], sys.maxsize, TextFormat())
    (split,) = corpus.splits()
    splits = SplitTokenizer(corpus.root, corpus.text_format, tokenizer, describe(tokenizer))

    def tokenize() -> int:
        blocks = splits.tokenize(split)
        return sum(len(ids) for ids in blocks) * RUN_LENGTH + blocks.account.leftover_tokens

    return tokenize


def encode_bare(backend: Any, texts: list[str]) -> float:
    """CPU seconds of one bare batch call; what becomes of its result does not count."""
    began = time.process_time()
    encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
    seconds = time.process_time() - began
    del encodings
    return seconds


def cpu_time(function: Callable[[], object]) -> float:
    """CPU seconds of a call."""
    began = time.process_time()
    function()
    return time.process_time() - began


def show_tokenization(encodings: dict[str, list[Encoding]]) -> bool:
    """Prints the comparison; says whether every form keeps the bound."""
    table = Table(title="The tokenizing path against one bare batch call: CPU seconds on one core, medians")
    for column in ("form", "path, s", "bare call, s", "speed of the path", f"at least {MIN_TOKENIZATION_RATIO}"):
        table.add_column(column, justify="left" if column == "form" else "right")
    passed = True
    for form, turns in encodings.items():
        ratios = [turn.ratio for turn in turns]
        is_fast = statistics.median(ratios) >= MIN_TOKENIZATION_RATIO
        table.add_row(
            form,
            f"{statistics.median(turn.path_seconds for turn in turns):.2f}",
            f"{statistics.median(turn.bare_seconds for turn in turns):.2f}",
            _median_and_range(ratios),
            _verdict(is_fast),
        )
        passed &= is_fast
    console.print(table)
    return passed


# --- The job


def compare_jobs(texts: Sequence[str], folder: Path, flags: argparse.Namespace) -> list[Turn]:
    """Turns of a job and a bare loop over the same splits, whoever is first changing from turn to turn."""
    corpus = write_copies(texts, folder / "corpus", flags.shards * flags.split_bytes)
    command = ["--input", folder / "corpus", "--tokenizer", flags.tokenizer]
    command += ["--split_bytes", -(-corpus.file_bytes // flags.shards)]
    turns = []
    for number in range(flags.turns):
        sides = {}
        for module in ("trivial_job", "bare_loop")[:: 1 if number % 2 else -1]:
            sides[module] = run_side(module, command, folder, flags)
        turns.append(Turn(sides["trivial_job"], sides["bare_loop"]))
        ratios = (turns[-1].ratio("seconds"), turns[-1].ratio("cpu_seconds"))
        console.print(f"turn {number + 1}: wall-clock {ratios[0]:.3f}, CPU {ratios[1]:.3f}")
    return turns


def run_side(module: str, command: Sequence[object], folder: Path, flags: argparse.Namespace) -> Side:
    """Runs one side in a process of its own, on one core with one thread of arithmetic."""
    shards = folder / module
    start = FirstShard(shards)
    more = ["--direct_num_workers", 1] if module == "trivial_job" else []
    finished = run(
        f"benchmarks.{module}",
        *command,
        "--output",
        shards,
        *more,
        log=folder / "log",
        look=start,
        interval=0.01,
        core=flags.core,
        environment=ONE_THREAD,
    ).require(0)
    side = measure_side(shards, finished, start.cpu_seconds, flags.shards)
    shutil.rmtree(shards)
    return side


class FirstShard:
    """Notes when the first shard of a folder is there, for `run`'s `look`."""

    def __init__(self, folder: Path):
        self._folder = folder
        self.cpu_seconds: float | None = None
        """That the command had used by then."""

    def __call__(self, process: psutil.Process) -> None:
        """Looks into the folder."""
        if self.cpu_seconds is None and next(self._folder.glob("shard-*.parquet"), None) is not None:
            self.cpu_seconds = cpu_seconds(process)


def measure_side(shards: Path, finished: Finished, cpu_before: float | None, planned: int) -> Side:
    """Reads the clock off the files: a file's ctime is when it was linked into its place."""
    times = sorted(path.stat().st_ctime for path in shards.glob("shard-*.parquet"))
    if len(times) != planned or cpu_before is None:
        sys.exit(f"{shards} holds {len(times)} shards, expected {planned}:\n{finished.output}")
    manifest = shards / "_manifest.json"
    end = manifest.stat().st_ctime if manifest.exists() else times[-1]
    return Side(end - times[0], finished.cpu_seconds - cpu_before, finished.seconds, finished.cpu_seconds)


def show_jobs(turns: Sequence[Turn], shards: int) -> bool:
    """Prints the comparison; says whether the job keeps the bound."""
    table = Table(title=f"A job over {shards} shards against a bare loop over them, one core, medians")
    for column in ("", "job, s", "bare loop, s", "ratio"):
        table.add_column(column, justify="left" if column == "" else "right")
    names = {
        "seconds": "first shard to the end, wall-clock",
        "cpu_seconds": "first shard to the end, CPU",
        "whole_seconds": "the whole command, wall-clock",
        "whole_cpu_seconds": "the whole command, CPU",
    }
    for figure, name in names.items():
        job, loop = (statistics.median(getattr(side, figure) for side in sides) for sides in _sides(turns))
        table.add_row(name, f"{job:.2f}", f"{loop:.2f}", _median_and_range([turn.ratio(figure) for turn in turns]))
    console.print(table)
    start = statistics.median(turn.job.whole_seconds - turn.job.seconds for turn in turns)
    start -= statistics.median(turn.loop.whole_seconds - turn.loop.seconds for turn in turns)
    console.print(f"A job takes {start:.1f} s longer to start and to end; after an hour that is {start / 36:.2f} %.")
    passed = True
    for figure in ("seconds", "cpu_seconds"):
        ratio = statistics.median(turn.ratio(figure) for turn in turns)
        console.print(f"{names[figure]}: {ratio:.3f}, at most {MAX_JOB_RATIO}: {_verdict(ratio <= MAX_JOB_RATIO)}")
        passed &= ratio <= MAX_JOB_RATIO
    return passed


def _sides(turns: Sequence[Turn]) -> tuple[list[Side], list[Side]]:
    return [turn.job for turn in turns], [turn.loop for turn in turns]


def _median_and_range(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def _verdict(passed: bool) -> str:
    return "[green]pass[/]" if passed else "[red]fail[/]"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
