"""`python -m benchmarks.trivial_job`: score_corpus with the trivial scorer, its flags but for the ALM's."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from benchmarks.trivial_scorer import TrivialScorer
from pipeline import score_corpus
from scorer.console import run_command


def main(arguments: Sequence[str]) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trivial_job", add_help=False, allow_abbrev=False)
    parser.add_argument("--account", help="a folder for each worker's account of its time")
    flags, rest = parser.parse_known_args(list(arguments))
    return score_corpus.main(rest, scorer=TrivialScorer(flags.account))


if __name__ == "__main__":
    run_command(main)
