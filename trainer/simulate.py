"""`python -m trainer.simulate`: what each alpha would mask, in seconds and before any training, to choose one."""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console, Group
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from scorer import files
from scorer.console import run_command
from scorer.errors import ConfigurationError
from scorer.manifest import TOKENIZER_FOLDER
from scorer.tokenizer import load_tokenizer
from trainer.block_sample import MAX_SHARDS
from trainer.reader import ShardCorpus
from trainer.simulation import DECILES, EPOCHS, TOP_TYPES, Outcome, Simulation, simulate

ALPHAS = (math.inf, 0.005, 0.001, 0.0005, 0.0001, 0.0)
"""The paper's four, and two between 0.001 and 0."""
BLOCKS = 1024
_COLUMNS = 100
"""Of the terminal, at least: in fewer, rich would cut numbers."""

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str]) -> int:
    """Runs the command."""
    flags = _parser().parse_args(list(arguments))
    if flags.plot is not None:
        if not flags.plot.lower().endswith(".png"):
            raise ConfigurationError(f"--plot {flags.plot}: expected the name of a PNG file, as in alphas.png")
        files.make_folder(os.path.dirname(flags.plot) or ".")
    corpus = ShardCorpus(flags.shards)
    tokenizer = _load_tokenizer(corpus.folders[0])
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("drawing masks", total=None)
        simulation = simulate(
            corpus,
            list(dict.fromkeys(flags.alphas)),
            flags.blocks,
            flags.seed,
            lambda done, total: progress.update(task, completed=done, total=total),
        )
    if flags.json:
        print(json.dumps(to_json(simulation, corpus, tokenizer, flags.seed)))
    else:
        console = Console(width=max(_COLUMNS, Console().width), highlight=False)
        console.print(report(simulation, corpus, tokenizer, flags.seed))
    if flags.plot is not None:
        from trainer.simulation_plot import draw_png  # noqa: PLC0415 - matplotlib is slow to import

        files.replace(flags.plot, draw_png(simulation))
        logger.info("drawn: %s", flags.plot)
    return 0


def to_json(
    simulation: Simulation, corpus: ShardCorpus, tokenizer: PreTrainedTokenizerBase, seed: int
) -> dict[str, Any]:
    """The simulation as a JSON object; alpha is a number or the string "inf", shares are of 1."""
    return {
        "shards": corpus.folders,
        "corpus_shards": len(corpus),
        "corpus_blocks": sum(manifest.blocks for manifest in corpus.manifests),
        "sampled_shards": simulation.shards,
        "sampled_blocks": simulation.blocks,
        "seed": seed,
        "epochs": EPOCHS,
        "eligible_tokens": simulation.eligible_tokens,
        "masked_tokens": simulation.masked_tokens,
        "chance_overlap": simulation.chance_overlap,
        "uniform_top_types_share": simulation.uniform_top_types_share,
        "alphas": [
            {
                "alpha": "inf" if math.isinf(outcome.alpha) else outcome.alpha,
                **asdict(outcome.mean),
                "standard_error": outcome.standard_error and asdict(outcome.standard_error),
                "top_types_share": outcome.top_types_share,
                "top_types": [{**asdict(kind), "token": _spell(tokenizer, kind.id)} for kind in outcome.top_types],
            }
            for outcome in simulation.outcomes
        ],
    }


def report(simulation: Simulation, corpus: ShardCorpus, tokenizer: PreTrainedTokenizerBase, seed: int) -> Group:
    """The simulation for a person: what was sampled, what is masked, what the columns mean, how to read them."""
    blocks = sum(manifest.blocks for manifest in corpus.manifests)
    where = f"{simulation.blocks:,} of {blocks:,} blocks, from {simulation.shards:,} of {len(corpus):,} shards"
    tokens = f"{simulation.masked_tokens:.1f} of {simulation.eligible_tokens:.1f} eligible tokens a block"
    return Group(
        Text(f"{', '.join(corpus.folders)}: {where}"),
        Text(f"{tokens} are masked, as in epochs 0 to {EPOCHS - 1} of a run with seed {seed}"),
        "",
        _measures_table(simulation.outcomes),
        "",
        _legend(simulation),
        "",
        _types_table(simulation, tokenizer),
        "",
        Text(_HINT),
    )


_HINT = (
    "Too low: candidates down at the number masked, most tokens masked again, or types that are noise.\n"
    "Too high: overlap near 100 %, so that training will differ little from uniform masks."
)


def _measures_table(outcomes: Sequence[Outcome]) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    deciles = ["easy\n1", *(f"\n{decile}" for decile in range(2, DECILES)), f"hard\n{DECILES}"]
    measures = ("uniform\nshare", "\noverlap", "masked\nagain", "effective\ncandidates")
    for header in ("\nalpha", *deciles, *measures):
        table.add_column(header, justify="right", no_wrap=True)
    for outcome in outcomes:
        mean = outcome.mean
        table.add_row(
            f"{outcome.alpha:g}",
            *(f"{count:.1f}" for count in mean.masked_tokens_per_decile),
            _percent(mean.uniform_share),
            _percent(mean.overlap_with_uniform),
            _percent(mean.masked_again),
            f"{mean.effective_candidates:.0f}",
        )
    return table


def _legend(simulation: Simulation) -> Table:
    """What the columns mean, and how exact they are."""
    chance = f"chance {_percent(simulation.chance_overlap)}"
    errors = [outcome.standard_error for outcome in simulation.outcomes if outcome.standard_error is not None]
    tokens = max((max(error.masked_tokens_per_decile) for error in errors), default=math.nan)
    share = max((max(error.overlap_with_uniform, error.masked_again) for error in errors), default=math.nan)
    candidates = max((error.effective_candidates for error in errors), default=math.nan)
    table = Table.grid(padding=(0, 2))
    for name, meaning in {
        f"1 to {DECILES}": "masked tokens a block in each decile of hardness, Eq. (3)",
        "uniform share": "n alpha / (1 + n alpha) of n eligible tokens: what alpha contributes to Eq. (4)",
        "overlap": f"of the masked tokens, those that uniform masks hit too (same noise); {chance}",
        "masked again": f"of the masked tokens, those that were masked in the epoch before; {chance}",
        "candidates": "exp(entropy of Eq. (4)): over how many tokens a block the draws are spread",
        "standard errors": f"at most {tokens:.2f} tokens, {100 * share:.2f} %, {candidates:.1f} candidates"
        if errors
        else "unknown, of one block",
    }.items():
        table.add_row(Text(name, "dim"), Text(meaning, "dim"))
    return table


def _types_table(simulation: Simulation, tokenizer: PreTrainedTokenizerBase) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    own = _percent(simulation.uniform_top_types_share)
    for header in ("\nalpha", "of all\nmasked", "of uniform\nmasks"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column(f"the {TOP_TYPES} most masked token types\n(those of uniform masks: {own} of them)")
    for outcome in simulation.outcomes:
        texts = [json.dumps(_spell(tokenizer, kind.id), ensure_ascii=False) for kind in outcome.top_types]
        uniform = math.fsum(kind.uniform_share for kind in outcome.top_types)
        table.add_row(f"{outcome.alpha:g}", _percent(outcome.top_types_share), _percent(uniform), Text(" ".join(texts)))
    return table


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _spell(tokenizer: PreTrainedTokenizerBase, id_: int) -> str:
    """A token as text; where it is part of a character, as the vocabulary spells it."""
    text = str(tokenizer.decode([id_], clean_up_tokenization_spaces=False))
    return str(tokenizer.convert_ids_to_tokens(id_)) if "\ufffd" in text else text


def _load_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    """Loads the tokenizer that the shards were made with.

    Raises:
        ConfigurationError: it is not beside them.
    """
    path = files.join(folder, TOKENIZER_FOLDER)
    if not files.is_folder(path):  # or a relative path would be taken for the name of a model on the hub
        raise ConfigurationError(
            f"{folder} has no folder {TOKENIZER_FOLDER}, which names the token types: copy it from where the shards "
            "were made, or run the command that wrote them again"
        )
    return load_tokenizer(path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.simulate",
        description="Shows what each alpha would mask, from a sample of scored shards, before anything is trained.",
        allow_abbrev=False,
    )
    parser.add_argument("--shards", nargs="+", required=True, metavar="DIR", help="folders of hardness shards")
    parser.add_argument(
        "--alphas",
        nargs="+",
        type=float,
        default=ALPHAS,
        metavar="ALPHA",
        help=f"each from 0 (all hardness) to inf (uniform) (default: {' '.join(f'{alpha:g}' for alpha in ALPHAS)})",
    )
    parser.add_argument(
        "--blocks",
        type=int,
        default=BLOCKS,
        help=f"sampled evenly over the folders, from {MAX_SHARDS} shards at most (default: {BLOCKS})",
    )
    parser.add_argument("--seed", type=int, default=42, help="of the masks (default: 42, as Trainer's)")
    parser.add_argument("--json", action="store_true", help="one JSON object; otherwise a table")
    parser.add_argument("--plot", metavar="FILE.png", help="also draw it")
    return parser


if __name__ == "__main__":
    run_command(main)
