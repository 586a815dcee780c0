"""`--dry_run`: what a job would do, and how long it would take here, before anything is written."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from itertools import cycle

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn
from rich.table import Table

from pipeline.estimate import Estimate, estimate
from pipeline.inputs import BlockInput
from pipeline.job import Job
from pipeline.plan import read_plan, require_same
from pipeline.tokenization import Ids
from scorer import files
from scorer.shards import BLOCK_LENGTH, RUN_LENGTH

_TIMED_SECONDS = 5.0
_TIMED_BLOCKS = 16
"""A call of the step; a row group would take a slow scorer minutes."""


def preview(job: Job) -> None:
    """Prints a job's splits, tokens, shards, bytes and hours.

    Raises:
        ConfigurationError: the job would be refused.
    """
    existing = read_plan(job.folder)
    if existing is not None:
        require_same(job.folder, existing, job.plan)
    if job.crew.cores == 1:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as in the workers
    console = Console(stderr=True)
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), console=console, transient=True) as progress:
        task = progress.add_task("reading a sample of the corpus")
        estimated = estimate(job.corpus, job.plan, job.tokenizer, job.vocabulary)
        progress.update(task, description="timing some blocks")
        seconds = _seconds_per_token(job, estimated)
    Console().print(_table(job, estimated, seconds))


def _table(job: Job, estimated: Estimate, seconds: dict[str, float]) -> Table:
    table = Table(title=f"{job.folder}: dry run, nothing was written", show_header=False)
    free = files.free_bytes(job.folder)
    done = len({split.shard for split in job.plan.splits} & set(files.names(job.folder)))
    crew = max(1, job.crew.processes)
    table.add_row("input", job.corpus.describe())
    table.add_row("splits, one shard each", f"{len(job.plan.splits):,}" + (f", {done:,} of them done" if done else ""))
    about = "" if estimated.sample is None else "about "
    table.add_row("tokens", f"{about}{estimated.tokens:,}")
    table.add_row(f"blocks of {BLOCK_LENGTH}", f"{about}{estimated.tokens // RUN_LENGTH:,}")
    table.add_row("shards on disk", f"about {estimated.shard_bytes / 1e9:,.3f} GB")
    table.add_row("free there", "unknown" if free is None else f"{free / 1e9:,.3f} GB")
    table.add_row("workers", f"{crew} x {job.crew.cores or 'all'} thread(s)")
    for name, cost in seconds.items():
        table.add_row(f"{name}, one worker", f"{1 / cost:,.0f} tokens/s")
    if seconds:
        hours = estimated.tokens * sum(seconds.values()) / crew / 3600
        table.add_row("time on this machine", f"about {hours:,.2f} hours ({hours * 60:,.1f} minutes)")
    else:
        table.add_row("time on this machine", "unknown: the sample holds no whole block")
    return table


def _seconds_per_token(job: Job, estimated: Estimate) -> dict[str, float]:
    """What each step costs one worker, measured here; empty where there is nothing to measure."""
    costs = {}
    blocks: Iterable[Ids] = job.corpus.sample_blocks() if isinstance(job.corpus, BlockInput) else ()
    if estimated.sample is not None and estimated.sample.tokens:
        costs["tokenization"] = estimated.sample.seconds / estimated.sample.tokens
        blocks = estimated.sample.blocks
    if job.provenance.alm is not None:
        some = next(iter(blocks), None)
        if some is None:
            return {}
        costs["scoring"] = _time_scoring(job, some)
    return costs


def _time_scoring(job: Job, blocks: Ids) -> float:
    """Seconds a token, from some seconds of scoring after a warm-up."""
    if job.crew.cores is not None:
        torch.set_num_threads(job.crew.cores)
    fill = job.step.open()
    calls = [blocks[start : start + _TIMED_BLOCKS] for start in range(0, len(blocks), _TIMED_BLOCKS)]
    fill(calls[0])
    began, done = time.perf_counter(), 0
    for call in cycle(calls):
        fill(call)
        done += len(call)
        seconds = time.perf_counter() - began
        if seconds > _TIMED_SECONDS:
            return seconds / (done * RUN_LENGTH)
    raise AssertionError("cycle ended")
