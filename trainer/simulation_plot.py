"""The simulation as a figure: what each alpha masks, and what that costs in variety."""

from __future__ import annotations

import io
from collections.abc import Sequence

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from trainer.simulation import DECILES, Outcome, Simulation

_CANDIDATES, _OVERLAP, _AGAIN = "#4c78a8", "#e45756", "#f2a03d"
_DOTS_PER_INCH = 150
_HEADROOM = 1.06


def draw_png(simulation: Simulation) -> bytes:
    """Draws two panels and returns the PNG's bytes.

    Left: masked tokens a block in each decile of hardness, one line for each alpha. Right: for each alpha the
    effective candidates (tokens a block), and the shares of the masked positions that uniform masks hit too and that
    the epoch before masked.
    """
    figure = Figure(figsize=(12, 4.8), layout="constrained", dpi=_DOTS_PER_INCH)
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    outcomes = sorted(simulation.outcomes, key=lambda outcome: -outcome.alpha)
    _draw_deciles(left, outcomes, simulation.masked_tokens)
    _draw_variety(right, outcomes, simulation)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw_deciles(axes: Axes, outcomes: Sequence[Outcome], masked: float) -> None:
    colours = colormaps["viridis_r"]
    deciles = range(1, DECILES + 1)
    for number, outcome in enumerate(outcomes):
        colour = colours(0.1 + 0.9 * number / max(1, len(outcomes) - 1))
        counts = outcome.mean.masked_tokens_per_decile
        axes.plot(deciles, counts, marker="o", markersize=4, color=colour, label=f"{outcome.alpha:g}")
    axes.axhline(masked / DECILES, color="grey", linestyle=":", linewidth=1.5, label=f"a tenth of {masked:.0f}")
    axes.set_title("Which tokens are masked")
    axes.set_xlabel("decile of hardness, Eq. (3), within the block (1: easiest, 10: hardest)")
    axes.set_ylabel(f"masked tokens a block (of {masked:.0f})")
    axes.set_xticks(deciles)
    axes.set_ylim(bottom=0)
    axes.legend(title="alpha")
    axes.grid(axis="y", alpha=0.3)


def _draw_variety(axes: Axes, outcomes: Sequence[Outcome], simulation: Simulation) -> None:
    """All eligible tokens are level with 100 %, and so the tokens masked with what chance gives."""
    places = range(len(outcomes))
    candidates = [outcome.mean.effective_candidates for outcome in outcomes]
    bars = axes.bar(places, candidates, width=0.6, color=_CANDIDATES, alpha=0.4, label="effective candidates (left)")
    foot = 0.01 * simulation.eligible_tokens  # where no line runs
    for place, count in zip(places, candidates, strict=True):
        axes.text(place, foot, f"{count:.0f}", ha="center", weight="bold", color=_CANDIDATES)
    axes.set_title("How varied the masks are")
    axes.set_xlabel("alpha (inf: uniform masks, 0: all hardness)")
    axes.set_xticks(places, [f"{outcome.alpha:g}" for outcome in outcomes])
    axes.set_ylabel("effective candidates, tokens a block", color=_CANDIDATES)
    axes.set_ylim(0, simulation.eligible_tokens * _HEADROOM)
    shares = axes.twinx()
    for values, label, colour in (
        ([outcome.mean.overlap_with_uniform for outcome in outcomes], "overlap with uniform masks (right)", _OVERLAP),
        ([outcome.mean.masked_again for outcome in outcomes], "masked again in the next epoch (right)", _AGAIN),
    ):
        shares.plot(places, values, marker="o", color=colour, label=label)
    chance = f"chance (right), {simulation.masked_tokens:.0f} masked tokens (left)"
    shares.axhline(simulation.chance_overlap, color="grey", linestyle=":", linewidth=1.5, label=chance)
    shares.set_ylabel("share of the masked tokens")
    shares.set_ylim(0, _HEADROOM)
    shares.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes.legend(handles=[bars, *shares.lines], loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
