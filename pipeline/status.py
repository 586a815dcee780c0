"""`python -m pipeline.status DIR`: how far a folder of shards has come, from any machine that sees it."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipeline.plan import PLAN_NAME, read_plan
from pipeline.progress import Progress, State, Watch
from scorer.console import run_command
from scorer.errors import ConfigurationError

EXIT_CODES: dict[State, int] = {"complete": 0, "running": 3, "stalled": 4, "damaged": 5}
_COLOURS: dict[State, str] = {"complete": "green", "running": "cyan", "stalled": "yellow", "damaged": "red"}
_WATCH_SECONDS = 2.0
_SHOWN = 8
"""Lines of each list; the JSON has all."""


def main(arguments: Sequence[str]) -> int:
    """Runs the command; its exit code says the state (0 complete, 3 running, 4 stalled, 5 damaged)."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.status",
        description="Shows the progress of a folder of shards. Exit codes: 0 complete, 3 running, "
        "4 stalled (nothing for 10 minutes), 5 damaged, or ended with splits set aside.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", metavar="DIR", help="what a job was given as --output")
    parser.add_argument("--json", action="store_true", help="one JSON object; with --watch, one a line at each change")
    parser.add_argument("--watch", action="store_true", help="go on showing it until the job is no longer running")
    flags = parser.parse_args(list(arguments))
    plan = read_plan(flags.folder)
    if plan is None:
        raise ConfigurationError(f"{flags.folder} has no {PLAN_NAME}: expected the --output of a job of the pipeline")
    looks = _looks(Watch(flags.folder, plan), is_watching=flags.watch)
    show = _show_json if flags.json else _show
    return EXIT_CODES[show(flags.folder, looks).state]


def _looks(watch: Watch, is_watching: bool) -> Iterator[Progress]:
    """One look, or looks until the job is no longer running."""
    progress = watch.look()
    yield progress
    while is_watching and progress.state == "running":
        time.sleep(_WATCH_SECONDS)
        progress = watch.look()
        yield progress


def _show_json(_: str, looks: Iterator[Progress]) -> Progress:
    shown = None
    for progress in looks:
        if progress != shown:
            print(json.dumps(asdict(progress)), flush=True)
        shown = progress
    assert shown is not None
    return shown


def _show(folder: str, looks: Iterator[Progress]) -> Progress:
    """Draws each look over the one before."""
    progress = next(looks)
    with Live(_draw(folder, progress), console=Console(), auto_refresh=False) as live:
        for progress in looks:
            live.update(_draw(folder, progress), refresh=True)
    return progress


def _draw(folder: str, progress: Progress) -> RenderableType:
    parts: list[RenderableType] = [
        Text.assemble((progress.state, f"bold {_COLOURS[progress.state]}"), "  ", folder, overflow="fold"),
        _counts(progress),
    ]
    if progress.in_flight:
        parts.append(_in_flight(progress))
    parts += _list("set aside", [failure.describe() for failure in progress.set_aside])
    parts += _list("damaged", list(progress.damage))
    return Group(*parts)


def _counts(progress: Progress) -> Table:
    rate, left = progress.tokens_per_second, progress.seconds_left
    rows = {
        "shards": f"{progress.done:,} of {progress.planned:,}",
        "documents": f"{progress.documents:,}, {progress.rejected_documents:,} rejected",
        "blocks": f"{progress.blocks:,}",
        "tokens": f"{progress.tokens:,}",
        "tokens/s": "unknown" if rate is None else f"{rate:,.0f}",
        "time left": "unknown" if left is None else _duration(left),
    }
    if progress.state != "complete":
        rows["driver"] = progress.driver or "none: run the same command again to go on"
    if progress.engine is not None:
        rows["engine"] = ": ".join(filter(None, (progress.engine.runner, progress.engine.state)))
        rows |= {"page": progress.engine.page} if progress.engine.page else {}
    table = Table.grid(padding=(0, 2))
    colour = _COLOURS[progress.state]
    table.add_row("", ProgressBar(max(1, progress.planned), progress.done, width=40, complete_style=colour))
    for name, value in rows.items():
        table.add_row(Text(name, "dim"), Text(value, overflow="fold"))
    return table


def _in_flight(progress: Progress) -> Table:
    table = Table(
        "in flight", "blocks", "tokens/s", "for", "attempt", box=None, header_style="dim", padding=(0, 2, 0, 0)
    )
    for shard in progress.in_flight[:_SHOWN]:
        rate = f"{shard.tokens_per_second:,.0f}" if shard.blocks else ""
        attempt = "" if shard.attempt == 1 else f"{shard.attempt}"
        table.add_row(shard.shard, f"{shard.blocks:,}", rate, _duration(shard.seconds), attempt)
    hidden = len(progress.in_flight) - _SHOWN
    if hidden > 0:
        table.add_row(f"and {hidden} more, begun later", "", "", "", "")
    return table


def _list(name: str, items: list[str]) -> list[RenderableType]:
    hidden = [f"and {len(items) - _SHOWN} more"] if len(items) > _SHOWN else []
    return [Text(f"{name}: {item}", "red") for item in [*items[:_SHOWN], *hidden]]


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60:02d} min" if hours else f"{rest // 60} min {rest % 60:02d} s"


if __name__ == "__main__":
    run_command(main)
