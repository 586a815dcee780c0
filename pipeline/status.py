"""`python -m pipeline.status DIR`: how far a folder of shards has come, from any machine that sees it."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.live import Live
from rich.table import Table

from pipeline.plan import PLAN_NAME, Plan, read_plan
from pipeline.progress import Progress, State, measure
from scorer.console import run_command
from scorer.errors import ConfigurationError

EXIT_CODES: dict[State, int] = {"complete": 0, "running": 3, "stalled": 4, "damaged": 5}
_WATCH_SECONDS = 2.0


def main(arguments: Sequence[str]) -> int:
    """Runs the command; its exit code says the state (0 complete, 3 running, 4 stalled, 5 damaged)."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.status",
        description="Shows the progress of a folder of shards. Exit codes: 0 complete, 3 running, "
        "4 stalled (nothing for 10 minutes), 5 damaged.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", metavar="DIR", help="what a job was given as --output")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--watch", action="store_true", help="go on showing it until the job is no longer running")
    flags = parser.parse_args(list(arguments))
    plan = read_plan(flags.folder)
    if plan is None:
        raise ConfigurationError(f"{flags.folder} has no {PLAN_NAME}: expected the --output of a job of the pipeline")
    progress = _watch(flags.folder, plan) if flags.watch else measure(flags.folder, plan)
    if flags.json:
        print(json.dumps(asdict(progress)))
    elif not flags.watch:
        Console().print(_table(flags.folder, progress))
    return EXIT_CODES[progress.state]


def _watch(folder: str, plan: Plan) -> Progress:
    progress = measure(folder, plan)
    with Live(_table(folder, progress), console=Console(stderr=True)) as live:
        while progress.state == "running":
            time.sleep(_WATCH_SECONDS)
            progress = measure(folder, plan)
            live.update(_table(folder, progress))
    return progress


def _table(folder: str, progress: Progress) -> Table:
    table = Table(title=f"{folder}: {progress.state}", show_header=False)
    rate, left = progress.tokens_per_second, progress.seconds_left
    for name, value in {
        "shards": f"{progress.done:,} of {progress.planned:,}",
        "documents": f"{progress.documents:,} ({progress.rejected_documents:,} rejected)",
        "blocks": f"{progress.blocks:,}",
        "tokens": f"{progress.tokens:,}",
        "tokens/s": "unknown" if rate is None else f"{rate:,.0f}",
        "time left": "unknown" if left is None else f"{left / 60:,.1f} min",
    }.items():
        table.add_row(name, value)
    for damage in progress.damage:
        table.add_row("[red]damage", damage)
    return table


if __name__ == "__main__":
    run_command(main)
