"""What the runs of a sweep over alpha found: their results, means over seeds, and differences between paired runs.

Two runs of one seed share initial weights, order and noise, whatever their alphas. Much of what varies from seed to
seed is common to both and cancels in their difference, so the interval of the difference is the one to read, and not
whether the intervals of two means overlap.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.special import stdtrit

from scorer import files
from scorer.errors import ConfigurationError
from trainer.sweep_record import RECORD_NAME, read_record

CONFIDENCE = 0.95
UNIFORM_LOSS = "eval_uniform_loss"
OWN_LOSS = "eval_own_loss"
HARDNESS_LOSS = "eval_hardness_loss"
SUMMARIZED = (UNIFORM_LOSS, OWN_LOSS, HARDNESS_LOSS, "eval_own_accuracy", "eval_mask_rate")


@dataclass(frozen=True)
class Cell:
    """A run's place in the grid."""

    alpha: float
    seed: int

    def __str__(self) -> str:
        return f"alpha = {alpha_text(self.alpha)}, seed = {self.seed}"

    @property
    def name(self) -> str:
        """Of the run's folder within the sweep's."""
        return f"alpha-{alpha_text(self.alpha)}-seed-{self.seed}"


@dataclass(frozen=True)
class Run:
    """A finished run."""

    cell: Cell
    metrics: Mapping[str, float]
    """The numbers of its `all_results.json`; losses are nats a masked token."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds."""

    mean: float
    half_width: float | None
    """Of the 95 % Student-t interval around the mean; None where there is one value, and so no interval."""
    count: int
    """Values in the mean."""


@dataclass(frozen=True)
class AlphaSummary:
    """The runs of one alpha."""

    alpha: float
    seeds: tuple[int, ...]
    metrics: Mapping[str, Estimate]
    """For those of SUMMARIZED that all of these runs have."""
    difference: Estimate | None
    """Uniform loss minus that of the reference, over the seeds that both have; None for the reference itself."""


@dataclass(frozen=True)
class SweepResults:
    """What a sweep's folder holds."""

    runs: tuple[Run, ...]
    missing: tuple[Cell, ...]
    """Cells of the grid whose runs are not finished."""
    reference: float
    """The alpha that the others are compared with: inf where it was run, else the first."""
    summaries: tuple[AlphaSummary, ...]
    """One for each alpha that has a finished run, in the grid's order."""

    def to_json(self) -> dict[str, Any]:
        """Everything, with an alpha as a number or 'inf'; numbers that JSON lacks become strings."""
        return {
            "confidence": CONFIDENCE,
            "reference_alpha": _plain(self.reference),
            "runs": [
                {"alpha": _plain(run.cell.alpha), "seed": run.cell.seed, "folder": run.cell.name}
                | {name: _plain(value) for name, value in run.metrics.items()}
                for run in self.runs
            ],
            "missing": [{"alpha": _plain(cell.alpha), "seed": cell.seed} for cell in self.missing],
            "summary": [
                {
                    "alpha": _plain(summary.alpha),
                    "seeds": list(summary.seeds),
                    "difference_of_uniform_loss": _estimate_json(summary.difference),
                }
                | {name: _estimate_json(estimate) for name, estimate in summary.metrics.items()}
                for summary in self.summaries
            ],
        }


def alpha_text(alpha: float) -> str:
    """The one spelling of an alpha in names and on command lines: `inf`, `0`, `0.001`; exact, so no two share it."""
    return repr(float(alpha) + 0.0).removesuffix(".0")  # + 0.0: there is no second, negative zero


def read_metrics(folder: Path) -> dict[str, float] | None:
    """The numbers that a finished run left in its folder; None where it is not finished.

    Trainer writes the file first with the metrics of training alone, and not in one piece.
    """
    try:
        found = files.read_json(str(folder / "all_results.json"))
    except (FileNotFoundError, ValueError):
        return None
    metrics = {name: value for name, value in found.items() if isinstance(value, int | float)}
    return metrics if {UNIFORM_LOSS, OWN_LOSS} <= metrics.keys() else None


def read_results(folder: Path) -> SweepResults:
    """Reads what is finished of a sweep.

    Raises:
        ConfigurationError: the folder is none of a sweep, or nothing is finished.
    """
    record = read_record(folder)
    if record is None:
        raise ConfigurationError(f"{folder} has no {RECORD_NAME}: expected the --output_dir of a sweep")
    grid = [Cell(float(alpha), seed) for alpha in record["alphas"] for seed in record["seeds"]]
    found = [(cell, read_metrics(folder / cell.name)) for cell in grid]
    runs = [Run(cell, metrics) for cell, metrics in found if metrics is not None]
    if not runs:
        raise ConfigurationError(f"no run in {folder} is finished yet")
    return summarize(runs, [cell for cell, metrics in found if metrics is None])


def summarize(runs: Sequence[Run], missing: Sequence[Cell] = ()) -> SweepResults:
    """Means over seeds, and differences to the reference; alphas in the order of the runs, of which there is one."""
    by_alpha: dict[float, list[Run]] = {}
    for run in runs:
        by_alpha.setdefault(run.cell.alpha, []).append(run)
    reference = math.inf if math.inf in by_alpha else next(iter(by_alpha))
    summaries = [
        AlphaSummary(
            alpha=alpha,
            seeds=tuple(run.cell.seed for run in group),
            metrics={
                name: estimate([run.metrics[name] for run in group])
                for name in SUMMARIZED
                if all(name in run.metrics for run in group)
            },
            difference=None if alpha == reference else paired_difference(group, by_alpha[reference]),
        )
        for alpha, group in by_alpha.items()
    ]
    return SweepResults(tuple(runs), tuple(missing), reference, tuple(summaries))


def paired_difference(runs: Sequence[Run], reference: Sequence[Run]) -> Estimate | None:
    """The mean over common seeds of the uniform loss minus the reference's; None where no seed is common."""
    of_reference = {run.cell.seed: run.metrics[UNIFORM_LOSS] for run in reference}
    differences = [
        run.metrics[UNIFORM_LOSS] - of_reference[run.cell.seed] for run in runs if run.cell.seed in of_reference
    ]
    return estimate(differences) if differences else None


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of n values with `t(0.975, n - 1) · s / √n`, s with n - 1 degrees of freedom."""
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(mean, None, count)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    quantile = float(stdtrit(count - 1, (1 + CONFIDENCE) / 2))  # what scipy.stats.t.ppf calls, without its imports
    return Estimate(mean, quantile * deviation / math.sqrt(count), count)


def _estimate_json(estimate: Estimate | None) -> dict[str, Any] | None:
    if estimate is None:
        return None
    half_width = None if estimate.half_width is None else _plain(estimate.half_width)
    return {"mean": _plain(estimate.mean), "half_width": half_width, "count": estimate.count}


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
