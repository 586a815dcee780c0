"""Large jobs end to end with a scorer that costs nothing: time and memory, and what they will be at 160 GB.

    python -m benchmarks.scale --tokenizer DIR --text_bytes 2e8 2e9 --shards 1000 10000 --json OUT [--corpus FILES]

Each case is a job over copies of a corpus: much text in splits of the usual size, or many tiny splits. A job, a look
by `status`, `verify`, and a rerun that finds everything done are run as the commands that they are, and watched from
outside. The first kind of case shows what grows with the text, the second what grows with the shards.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.table import Table

from benchmarks.copied_corpus import CopiedCorpus, read_documents, write_copies
from benchmarks.processes import Finished, MemoryWatch, run
from benchmarks.trivial_scorer import read_times
from pipeline.plan import DEFAULT_SPLIT_BYTES, PLAN_NAME
from scorer.manifest import MANIFEST_NAME, RECEIPTS_FOLDER, read_manifest

TARGET_GB = 160.0
TARGET_SHARDS = 10_000
"""160 GB in splits of 16 MiB."""
_TINY_DOCUMENT_CHARACTERS = 1500
_TINY_SPLIT_BYTES = 3500

console = Console(width=None if sys.stdout.isatty() else 160)


@dataclass(frozen=True)
class Case:
    """What was measured of one job; times are wall-clock seconds, memory is in bytes."""

    kind: str
    """'text' (splits of the usual size) or 'shards' (tiny ones)."""
    gb: float
    """Of text, 1e9 bytes of UTF-8."""
    shards: int
    tokens: int
    workers: int
    plan_seconds: float
    """From the start of the command until the plan is there."""
    first_worker_seconds: float
    """From the start of the command until the first worker process starts."""
    job_seconds: float
    """The whole command."""
    work_seconds: float
    """From the first worker's start until the manifest is there."""
    cpu_seconds: float
    """Of all processes."""
    status_seconds: float
    verify_seconds: float
    rerun_seconds: float
    """The same command again: nothing is left to do, all shards are hashed."""
    driver_rss: int
    driver_pss: int
    worker_rss: int
    """Of the largest worker."""
    worker_pss: int
    together_pss: int
    """Driver and workers at one time."""
    rerun_rss: int
    status_rss: int
    verify_rss: int
    worker_start_cpu: float
    """CPU seconds of all workers before their first split."""
    tokenizer_cpu: float
    """CPU seconds of all workers inside `encode_batch_fast`."""
    scorer_cpu: float
    """CPU seconds of all workers inside the scorer."""
    outside_cpu: float
    """CPU seconds of all workers, less the three above."""
    plan_bytes: int
    manifest_bytes: int
    receipts_bytes: int
    shards_bytes: int

    @property
    def outside_share(self) -> float:
        """The share of the workers' CPU time that is spent outside tokenizer and scorer, the start left out."""
        return self.outside_cpu / (self.outside_cpu + self.tokenizer_cpu + self.scorer_cpu)


def main(arguments: Sequence[str]) -> int:
    """Runs the cases, adds them to those that `--json` holds, and shows them all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", required=True, metavar="DIR")
    parser.add_argument("--corpus", nargs="*", type=Path, default=[], help="(default: the text that Python ships with)")
    parser.add_argument("--text_bytes", nargs="*", type=float, default=[], help="of text, one job each")
    parser.add_argument("--shards", nargs="*", type=int, default=[], help="tiny ones, one job each")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--scratch", type=Path, default=Path("runs"), help="a folder for files of the moment")
    parser.add_argument("--json", type=Path, help="cases are added to this file")
    parser.add_argument("--markdown", type=Path, help="a file for the tables")
    flags = parser.parse_args(list(arguments))
    cases = [Case(**case) for case in json.loads(flags.json.read_text())] if flags.json and flags.json.exists() else []
    flags.scratch.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=flags.scratch) as scratch:
        for make in _makers(read_documents(flags.corpus, Path(scratch)), Path(scratch), flags):
            cases.append(make())
            if flags.json:
                flags.json.write_text(json.dumps([asdict(case) for case in cases], indent=2) + "\n")
            show(cases)
    if flags.markdown:
        flags.markdown.write_text(to_markdown(cases))
    return 0


def _makers(texts: Sequence[str], scratch: Path, flags: argparse.Namespace) -> list[Callable[[], Case]]:
    """A function for each case that was asked for."""

    def text_case(number: int, text_bytes: float) -> Case:
        folder = scratch / f"text-{number}"
        return measure("text", write_copies(texts, folder / "corpus", int(text_bytes)), DEFAULT_SPLIT_BYTES, flags)

    def shards_case(number: int, shards: int) -> Case:
        size = _TINY_DOCUMENT_CHARACTERS
        pieces = [text[start : start + size] for text in texts for start in range(0, len(text), size)]
        corpus = write_copies(pieces, scratch / f"shards-{number}" / "corpus", shards * _TINY_SPLIT_BYTES)
        return measure("shards", corpus, corpus.file_bytes // shards, flags)

    cases = [partial(text_case, *item) for item in enumerate(flags.text_bytes)]
    return cases + [partial(shards_case, *item) for item in enumerate(flags.shards)]


# --- One job


def measure(kind: str, corpus: CopiedCorpus, split_bytes: int, flags: argparse.Namespace) -> Case:
    """Runs a job over a corpus and everything else that is done with its folder, and removes both."""
    inputs = corpus.files[0].parent
    shards, account, log = (inputs.parent / name for name in ("shards", "account", "log"))
    command = ["--input", inputs, "--tokenizer", flags.tokenizer, "--output", shards]
    command += ["--split_bytes", split_bytes, "--direct_num_workers", flags.workers]
    watches = {name: MemoryWatch() for name in ("job", "status", "verify", "rerun")}

    def command_of(name: str, module: str, *arguments: object) -> Finished:
        console.print(f"{name}: python -m {module} {' '.join(map(str, arguments))}", style="dim", highlight=False)
        return run(module, *arguments, log=log, look=watches[name]).require(0)

    job = command_of("job", "benchmarks.trivial_job", *command, "--account", account)
    status = command_of("status", "pipeline.status", shards, "--json")
    verify = command_of("verify", "pipeline.verify", shards)
    planned, finished = (shards / PLAN_NAME).stat().st_ctime, (shards / MANIFEST_NAME).stat().st_ctime
    rerun = command_of("rerun", "benchmarks.trivial_job", *command)
    manifest, times = read_manifest(str(shards)), read_times(account)
    workers = watches["job"].workers.values()
    first_worker = min(worker.began for worker in workers)
    case = Case(
        kind=kind,
        gb=corpus.text_bytes / 1e9,
        shards=len(manifest.shards),
        tokens=manifest.tokens + manifest.leftover_tokens,
        workers=flags.workers,
        plan_seconds=planned - job.began,
        first_worker_seconds=first_worker - job.began,
        job_seconds=job.seconds,
        work_seconds=finished - first_worker,
        cpu_seconds=job.cpu_seconds,
        status_seconds=status.seconds,
        verify_seconds=verify.seconds,
        rerun_seconds=rerun.seconds,
        driver_rss=watches["job"].driver.resident,
        driver_pss=watches["job"].driver.proportional,
        worker_rss=max(worker.resident for worker in workers),
        worker_pss=max(worker.proportional for worker in workers),
        together_pss=watches["job"].together,
        rerun_rss=watches["rerun"].driver.resident,
        status_rss=watches["status"].driver.resident,
        verify_rss=watches["verify"].driver.resident,
        worker_start_cpu=sum(worker.start for worker in times),
        tokenizer_cpu=sum(worker.tokenizer for worker in times),
        scorer_cpu=sum(worker.scorer for worker in times),
        outside_cpu=sum(worker.outside for worker in times),
        plan_bytes=(shards / PLAN_NAME).stat().st_size,
        manifest_bytes=(shards / MANIFEST_NAME).stat().st_size,
        receipts_bytes=sum(path.stat().st_size for path in (shards / RECEIPTS_FOLDER).iterdir()),
        shards_bytes=sum(shard.bytes for shard in manifest.shards),
    )
    shutil.rmtree(inputs.parent)
    return case


# --- All jobs


@dataclass(frozen=True)
class Growth:
    """How a figure grows: `fixed + per_gb * GB + per_shard * shards`."""

    fixed: float
    per_gb: float
    per_shard: float

    @classmethod
    def of(cls, cases: Sequence[Case], figure: str) -> Growth | None:
        """What a shard adds from the cases of tiny ones, then what a GB adds from those of text.

        Each from its smallest and its largest case; None where there are fewer than two.
        """
        tiny = sorted((case for case in cases if case.kind == "shards"), key=lambda case: case.shards)
        text = sorted((case for case in cases if case.kind == "text"), key=lambda case: case.gb)
        if len(tiny) < 2 or len(text) < 2:
            return None

        def between(low: Case, high: Case) -> float:
            return float(getattr(high, figure) - getattr(low, figure))

        per_shard = max(0.0, between(tiny[0], tiny[-1]) / (tiny[-1].shards - tiny[0].shards))
        of_shards = per_shard * (text[-1].shards - text[0].shards)
        per_gb = max(0.0, (between(text[0], text[-1]) - of_shards) / (text[-1].gb - text[0].gb))
        largest = getattr(text[-1], figure)
        return cls(largest - per_gb * text[-1].gb - per_shard * text[-1].shards, per_gb, per_shard)

    @classmethod
    def of_memory(cls, cases: Sequence[Case], figure: str) -> Growth | None:
        """The same for memory, which text does not add to: the largest case of text, and what a shard adds.

        Whether text adds nothing is for the table to show, in which sizes lie side by side.
        """
        growth = cls.of(cases, figure)
        if growth is None:
            return None
        most = max((case for case in cases if case.kind == "text"), key=lambda case: float(getattr(case, figure)))
        return cls(getattr(most, figure) - growth.per_shard * most.shards, 0.0, growth.per_shard)

    def at(self, gb: float, shards: int) -> float:
        """The figure of a job of that size."""
        return self.fixed + self.per_gb * gb + self.per_shard * shards


_SECONDS = {
    "plan_seconds": "until the plan is there, s",
    "first_worker_seconds": "until the first worker starts, s",
    "job_seconds": "job, s",
    "status_seconds": "status, s",
    "verify_seconds": "verify, s",
    "rerun_seconds": "rerun, nothing to do, s",
}
_MEMORY = {
    "driver_rss": "driver, RSS, MB",
    "driver_pss": "driver, PSS, MB",
    "worker_rss": "largest worker, RSS, MB",
    "worker_pss": "largest worker, PSS, MB",
    "together_pss": "driver and workers, PSS, MB",
    "rerun_rss": "rerun, RSS, MB",
    "status_rss": "status, RSS, MB",
    "verify_rss": "verify, RSS, MB",
}
_FILES = {
    "plan_bytes": "plan, MB",
    "manifest_bytes": "manifest, MB",
    "receipts_bytes": "receipts, MB",
    "shards_bytes": "shards, MB",
}


def rows(cases: Sequence[Case]) -> list[list[str]]:
    """The table: a heading, then a row a figure and a column a case; the extrapolation last."""
    heading = ["", *(f"{case.gb:,.3g} GB, {case.shards:,} shards" for case in cases)]
    table = [[*heading, f"{TARGET_GB:,.0f} GB, {TARGET_SHARDS:,} shards"]]
    for names, unit, grow in ((_SECONDS, 1.0, Growth.of), (_MEMORY, 1e6, Growth.of_memory), (_FILES, 1e6, Growth.of)):
        for figure, name in names.items():
            growth = grow(cases, figure)
            end = "" if growth is None else f"{growth.at(TARGET_GB, TARGET_SHARDS) / unit:,.1f}"
            table.append([name, *(f"{getattr(case, figure) / unit:,.1f}" for case in cases), end])
    derived: Mapping[str, Callable[[Case], str]] = {
        "tokens": lambda case: f"{case.tokens:,}",
        "tokens/s, from the first worker on": lambda case: f"{case.tokens / case.work_seconds:,.0f}",
        "s a GB, from the first worker on": lambda case: f"{case.work_seconds / case.gb:,.1f}",
        "ms a shard, from the first worker on": lambda case: f"{1e3 * case.work_seconds / case.shards:,.1f}",
        "workers' CPU: tokenizer, s": lambda case: f"{case.tokenizer_cpu:,.1f}",
        "workers' CPU: scorer, s": lambda case: f"{case.scorer_cpu:,.1f}",
        "workers' CPU: outside both, s": lambda case: f"{case.outside_cpu:,.1f}",
        "workers' CPU: share outside both": lambda case: f"{case.outside_share:.1%}",
        "workers' CPU: their start, s": lambda case: f"{case.worker_start_cpu:,.1f}",
        "CPU of all processes, s": lambda case: f"{case.cpu_seconds:,.1f}",
    }
    return table + [[name, *(show_(case) for case in cases), ""] for name, show_ in derived.items()]


def show(cases: Sequence[Case]) -> None:
    """Prints the table."""
    heading, *body = rows(cases)
    table = Table(title="Jobs with a scorer that costs nothing")
    for number, column in enumerate(heading):
        table.add_column(column, justify="right" if number else "left")
    for row in body:
        table.add_row(*row)
    console.print(table)


def to_markdown(cases: Sequence[Case]) -> str:
    """The table in Markdown."""
    heading, *body = rows(cases)
    lines = [heading, ["---", *["---:"] * len(cases), "---:"], *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
