"""`python -m pipeline.engines`: fetches engines, and runs a Flink cluster of this machine's own."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from pipeline.engines import local_flink
from pipeline.engines.installation import console, fetch
from scorer.console import run_command

ENGINES = ("flink", "spark")


def main(arguments: Sequence[str]) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.engines", description=__doc__.partition(": ")[2])
    commands = parser.add_subparsers(required=True, dest="command", metavar="fetch|flink-up|flink-down")
    fetching = commands.add_parser("fetch", help="fetches Flink, and Beam's job servers for Flink and Spark")
    fetching.add_argument("engines", nargs="*", metavar="ENGINE", help="flink, spark (default: both)")
    up = commands.add_parser("flink-up", help="starts a JobManager, TaskManagers and a job server on this machine")
    up.add_argument("--taskmanagers", type=int, default=2, help="processes that have slots (default: 2)")
    up.add_argument("--slots", type=int, default=1, help="of each (default: 1)")
    down = commands.add_parser("flink-down", help="ends all of them, and whatever they started")
    for command in (up, down):
        command.add_argument("--folder", type=Path, help="process ids and logs (default: ENGINES/flink-cluster)")
    flags = parser.parse_args(list(arguments))
    if flags.command == "fetch":
        if unknown := set(flags.engines) - set(ENGINES):
            parser.error(f"unknown engine {', '.join(sorted(unknown))}: expected flink or spark")
        for engine in flags.engines or ENGINES:
            fetch(engine)
        return 0
    folder = (flags.folder or local_flink.cluster_folder()).absolute()
    if flags.command == "flink-up":
        cluster = local_flink.up(folder, flags.taskmanagers, flags.slots)
        console.print(
            f"Flink is up: {flags.taskmanagers} TaskManagers of {flags.slots} slot(s), http://{cluster.rest}, logs in "
            f"{folder / 'log'}\nnow: make score-corpus RUNNER=FlinkRunner …; at the end: make flink-down",
            soft_wrap=True,
        )
    else:
        console.print(f"Flink is down: {local_flink.down(folder)} processes ended")
    return 0


if __name__ == "__main__":
    run_command(main)
