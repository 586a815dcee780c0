"""What a dtype does to the scores of an ALM of yours, and to the masks that they lead to.

    python -m benchmarks.precision --alm DIR --shards DIR [--device cuda] [--output results.md]

NLLs of some blocks, spread over the first shard of a folder of block or hardness shards, in float32, in bfloat16 and
with layers in 8 bits, against float64 of the same weights from first to last; and the total variation between
the laws of Eq. (4) that follow from them. Special tokens count in neither.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks import scoring_precision
from benchmarks.interleaved import Report
from benchmarks.scoring_sides import PLAIN_USUAL, Nll, Score, make_side
from scorer.alm import load_alm
from scorer.engine import Settings
from scorer.scoring import score_nll
from scorer.shards import ShardReader

MODULE = "benchmarks.precision"


def main(arguments: Sequence[str]) -> int:
    """Prints a table, and writes it where that is asked for."""
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__.splitlines()[0])
    parser.add_argument("--alm", required=True, metavar="DIR")
    parser.add_argument("--shards", required=True, metavar="DIR", help="block or hardness shards of its vocabulary")
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="a Markdown file for the results")
    flags = parser.parse_args(list(arguments))
    ids, is_special = read_blocks(flags.shards, flags.blocks)
    ids, is_special = ids.to(flags.device), is_special.to(flags.device)
    exact = without(is_special, scoring_precision.exact_nll(load_alm(flags.alm, flags.device, torch.float64), ids))
    outcomes = []
    for name, dtype, score in sides(flags.alm, flags.device):
        outcomes.append(scoring_precision.compare(name, dtype, without(is_special, score(ids)), exact))
    report = Report(
        title="Precision: scores in less than float64, and the masks that follow",
        module=MODULE,
        arguments=arguments,
        method=f"{len(ids)} blocks, spread over the first shard.",
        packages=["torch", "transformers"],
        tables=[scoring_precision.to_table(outcomes, "Against float64")],
    )
    report.tables[0].show()
    report.write(flags.output)
    return 0


def read_blocks(folder: str, blocks: int) -> tuple[Tensor, Tensor]:
    """Ids int64 [B, T], and which of them are special."""
    with ShardReader(str(min(Path(folder).glob("shard-*.parquet")))) as shard:
        ids = shard.read().input_ids
        special = list(shard.metadata.vocabulary.special_ids.values())
    chosen = ids[np.unique(np.linspace(0, len(ids) - 1, blocks).astype(int))].astype(np.int64)
    return torch.from_numpy(chosen), torch.from_numpy(np.isin(chosen, special))


def without(is_special: Tensor, nlls: Nll) -> Nll:
    """NLLs of ordinary tokens alone; NaN elsewhere."""
    forward, backward = (nll.masked_fill(is_special, torch.nan) for nll in nlls)
    return forward, backward


def sides(folder: str, device: str) -> list[tuple[str, torch.dtype, Score]]:
    """Ours and a usual loop in each dtype."""
    made: list[tuple[str, torch.dtype, Score]] = []
    for dtype in (torch.float32, torch.bfloat16):
        alm = load_alm(folder, device, dtype)
        default = Settings.default(alm.device, dtype)
        made.append(("ours", dtype, partial(score_nll, alm)))
        made.append((PLAIN_USUAL, dtype, make_side(PLAIN_USUAL, alm)))
        if dtype == torch.bfloat16:
            in_8_bits = Settings(default.head, False, default.micro_batch, float8=True)
            made.append(("ours, layers in 8 bits", dtype, partial(score_nll, alm, settings=in_8_bits)))
    return made


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
