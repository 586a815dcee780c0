"""`python -m trainer.replay`: what a run masks, drawn again from outside it by the very code that trains."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

from transformers import HfArgumentParser

from scorer import files
from scorer.console import run_command
from scorer.errors import ConfigurationError
from scorer.manifest import TOKENIZER_FOLDER
from scorer.tokenizer import load_tokenizer
from trainer.batches import Batch
from trainer.masking import AlphaSchedule, HardnessCollator
from trainer.masking.arguments import MaskingArguments
from trainer.reader import ShardCorpus


def main(arguments: Sequence[str]) -> int:
    """Runs the command."""
    try:
        masks, flags = _parser().parse_args_into_dataclasses(list(arguments), look_for_args_file=False)
    except (ValueError, TypeError) as error:
        raise ConfigurationError(str(error)) from error
    corpus = ShardCorpus(flags.shards)
    tokenizer = None
    if masks.needs_tokenizer or not flags.json:
        tokenizer = load_tokenizer(files.join(corpus.folders[0], TOKENIZER_FOLDER))
    schedule = AlphaSchedule(_alpha(masks, flags.step, flags.max_steps))
    collator = HardnessCollator(corpus.vocabulary, schedule, flags.seed, masks.masking(tokenizer), at_positions=True)
    for masked in replay(corpus, collator, flags.shard, flags.rows, flags.epochs):
        if flags.json or tokenizer is None:
            print(json.dumps(masked))
        else:
            print(f"epoch {masked['epoch']}, shard {masked['shard']}, row {masked['row']}:", end=" ")
            print(f"{len(masked['masked_positions'])} positions, {masks.title()}")
            print(tokenizer.decode(masked["input_ids"]), end="\n\n")
    return 0


def replay(
    corpus: ShardCorpus, collator: HardnessCollator, shard: int, rows: range, epochs: range
) -> Iterator[dict[str, Any]]:
    """Yields one JSON object per epoch and row: what the model sees, and where it was masked.

    `alpha` is a number, "inf", or null where the strategy takes none.

    Raises:
        ConfigurationError: there is no such shard or row.
    """
    with corpus.open(shard) as reader:
        content = reader.read()
    if rows.stop > len(content):
        raise ConfigurationError(f"--rows {rows.start}:{rows.stop}: shard {shard} holds rows 0 to {len(content) - 1}")
    alpha = collator.schedule.start
    for epoch in epochs:
        for row in rows:
            feature = {name: values[row] for name, values in content.columns()}
            masked = collator.mask(Batch.of([feature], epoch))
            yield {
                "epoch": epoch,
                "shard": shard,
                "row": row,
                "alpha": None if not collator.masking.needs.alpha else "inf" if math.isinf(alpha) else alpha,
                "masked_positions": masked.positions[masked.is_valid].tolist(),
                "input_ids": masked.input_ids[0].tolist(),
            }


def _alpha(masks: MaskingArguments, step: int | None, steps: int | None) -> float:
    if masks.alpha_schedule == "constant":
        return masks.schedule(steps=1).start
    if step is None or steps is None:
        raise ConfigurationError(
            f"--alpha_schedule {masks.alpha_schedule}: alpha depends on the step; pass --step (from 0) and the run's "
            "--max_steps"
        )
    if not 0 <= step < steps:
        raise ConfigurationError(f"--step {step}: a run of {steps} steps has steps 0 to {steps - 1}")
    return masks.schedule(steps).at(step)


def _parser() -> HfArgumentParser:
    parser = HfArgumentParser(
        MaskingArguments,
        prog="python -m trainer.replay",
        description="Prints the masks that a run draws; ranges are half-open, from 0.",
        allow_abbrev=False,
    )
    parser.add_argument("--shards", nargs="+", required=True, metavar="DIR", help="folders of hardness shards")
    parser.add_argument("--seed", type=int, default=42, help="of the run (default: 42, as Trainer's)")
    parser.add_argument("--epochs", type=_range, default=range(1), metavar="FROM:TO", help="(default: 0:1)")
    parser.add_argument("--shard", type=int, default=0, help="counted over the folders in order (default: 0)")
    parser.add_argument("--rows", type=_range, default=range(1), metavar="FROM:TO", help="of the shard (default: 0:1)")
    parser.add_argument("--step", type=int, help="the step, from 0, of a run whose alpha has a schedule")
    parser.add_argument("--max_steps", type=int, help="steps of that run")
    parser.add_argument("--json", action="store_true", help="one JSON object a line; otherwise text")
    return parser


def _range(text: str) -> range:
    first, colon, last = text.partition(":")
    if not (first.isdigit() and (last.isdigit() or not colon)):
        raise argparse.ArgumentTypeError(f"{text}: expected a half-open range as in 0:3")
    found = range(int(first), int(last) if colon else int(first) + 1)
    if not found:
        raise argparse.ArgumentTypeError(f"{text}: an empty range; the end is not part of it")
    return found


if __name__ == "__main__":
    run_command(main)
