"""A sweep's results for people: a table on the console, the same in Markdown, and a figure."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from scorer import files
from trainer.sweep_results import (
    HARDNESS_LOSS,
    OWN_LOSS,
    UNIFORM_LOSS,
    AlphaSummary,
    Estimate,
    SweepResults,
    alpha_text,
    read_results,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RESULTS_NAME = "sweep_results.json"
MARKDOWN_NAME = "sweep.md"
FIGURE_NAME = "sweep.png"
TITLE = "Held-out loss, nats a masked token: mean over seeds ± 95 % t interval"
_DASH = "–"
_SEED_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
"""Okabe and Ito's, which people with any colour vision can tell apart."""


def report(folder: Path, console: Console) -> None:
    """Prints what is finished of a sweep, and writes it beside the runs as JSON, Markdown and PNG.

    Raises:
        ConfigurationError: the folder is none of a sweep, or nothing is finished.
    """
    results = read_results(folder)
    headers, rows = table(results)
    printed = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for header in headers:
        printed.add_column(header, justify="right")
    for row in rows:
        printed.add_row(*row)
    console.print(f"\n{TITLE}", style="bold", highlight=False)
    console.print(printed)
    console.print(f"{notes(results)}\n", style="dim", highlight=False, markup=False)
    files.replace(str(folder / RESULTS_NAME), files.to_json(results.to_json()))
    files.replace(str(folder / MARKDOWN_NAME), markdown(results).encode())
    files.replace(str(folder / FIGURE_NAME), png(results))
    console.print(f"In {folder}: {RESULTS_NAME}, {MARKDOWN_NAME}, {FIGURE_NAME}", highlight=False, markup=False)


def table(results: SweepResults) -> tuple[list[str], list[list[str]]]:
    """Headers, some of two lines, and one row an alpha."""
    summaries = results.summaries
    columns: list[tuple[str, list[str]]] = [
        ("alpha", [alpha_text(summary.alpha) for summary in summaries]),
        ("seeds", [str(len(summary.seeds)) for summary in summaries]),
        ("uniform\nmasks", _shown([summary.metrics.get(UNIFORM_LOSS) for summary in summaries])),
        ("own\nmasks", _shown([summary.metrics.get(OWN_LOSS) for summary in summaries])),
    ]
    if any(HARDNESS_LOSS in summary.metrics for summary in summaries):
        cells = _shown([summary.metrics.get(HARDNESS_LOSS) for summary in summaries])
        columns.append(("hardness\nmasks", cells))
    if len(summaries) > 1:
        header = f"uniform masks,\nminus alpha = {alpha_text(results.reference)}"
        columns.append((header, _differences(summaries)))
    return [header for header, _ in columns], [list(row) for row in zip(*(cells for _, cells in columns), strict=True)]


def notes(results: SweepResults) -> str:
    """What a reader of the table has to know."""
    said = [
        "Uniform and hardness masks (alpha = 0) are the same for all runs. Own masks differ by alpha: that column "
        "compares masks as much as models. Intervals are over seeds, not over other held-out blocks."
    ]
    if len(results.summaries) > 1:
        said.append(
            "The last column is over pairs of runs of one seed, which share initial weights, order and noise: it "
            "says whether alphas differ."
        )
    shown = [found for summary in results.summaries for found in (*summary.metrics.values(), summary.difference)]
    if any(found and found.half_width is None for found in shown):
        said.append("± ?: one value gives no interval.")
    if results.missing:
        said.append(f"Not finished: {'; '.join(map(str, results.missing))}.")
    return " ".join(said)


def markdown(results: SweepResults) -> str:
    """The table and its notes, to be taken over into a page of results."""
    headers, rows = table(results)
    lines = [[header.replace("\n", " ") for header in headers], ["---:"] * len(headers), *rows]
    drawn = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{TITLE}.\n\n{drawn}\n\n{notes(results)}\n\n![losses against alpha]({FIGURE_NAME})\n"


def _shown(estimates: Sequence[Estimate | None], sign: str = "") -> list[str]:
    """A column of estimates, all with as many decimals as its narrowest interval is worth."""
    widths = [estimate.half_width for estimate in estimates if estimate and estimate.half_width]
    finite = [width for width in widths if math.isfinite(width)]
    decimals = min(6, max(3, 1 - math.floor(math.log10(min(finite))))) if finite else 6 if sign else 4

    def text(estimate: Estimate | None) -> str:
        if estimate is None:
            return _DASH
        mean = f"{estimate.mean:{sign}.{decimals}f}"
        return f"{mean} ± {'?' if estimate.half_width is None else f'{estimate.half_width:.{decimals}f}'}"

    return [text(estimate) for estimate in estimates]


def _differences(summaries: Sequence[AlphaSummary]) -> list[str]:
    """The column of differences, with the number of pairs where some seed has no partner."""
    differences = [summary.difference for summary in summaries]

    def pairs(summary: AlphaSummary) -> str:
        count = summary.difference.count if summary.difference else len(summary.seeds)
        return "" if count == len(summary.seeds) else f", {count} {'pair' if count == 1 else 'pairs'}"

    return [cell + pairs(summary) for cell, summary in zip(_shown(differences, sign="+"), summaries, strict=True)]


# Figure ---------------------------------------------------------------------------------------------------------------


def png(results: SweepResults) -> bytes:
    """The figure as a PNG file's bytes."""
    stream = io.BytesIO()
    figure(results).savefig(stream, format="png", dpi=150)
    return stream.getvalue()


def figure(results: SweepResults) -> Figure:
    """Both losses against alpha, and the paired differences: means with intervals, and every seed by itself.

    Alphas have evenly spaced places on the axis, since 0 and inf are two of them and no scale holds both.
    """
    # Takes seconds to import, and only this needs it.
    from matplotlib.figure import Figure  # noqa: PLC0415
    from matplotlib.layout_engine import ConstrainedLayoutEngine  # noqa: PLC0415

    summaries = sorted(results.summaries, key=lambda summary: summary.alpha)
    metrics = {(run.cell.alpha, run.cell.seed): run.metrics for run in results.runs}

    def loss(name: str) -> Callable[[float, int], float]:
        return lambda alpha, seed: metrics.get((alpha, seed), {}).get(name, math.nan)

    def difference(alpha: float, seed: int) -> float:
        return loss(UNIFORM_LOSS)(alpha, seed) - loss(UNIFORM_LOSS)(results.reference, seed)

    panels = [
        ("One fixed uniform mask", "loss", UNIFORM_LOSS, loss(UNIFORM_LOSS)),
        (f"The same, minus alpha = {alpha_text(results.reference)} (by seed)", "difference", None, difference),
        ("Each alpha's own masks", "loss", OWN_LOSS, loss(OWN_LOSS)),
    ]
    if len(summaries) == 1:
        del panels[1]
    drawn = Figure(figsize=(4 * len(panels), 4.2), layout=ConstrainedLayoutEngine(w_pad=0.12))
    for axes, (title, quantity, name, value) in zip(drawn.subplots(1, len(panels)), panels, strict=True):
        found = [summary.metrics.get(name) if name else summary.difference for summary in summaries]
        _draw(axes, summaries, found, value)
        axes.set(title=title, ylabel=f"{quantity} [nats a masked token]")
        if name is None:
            axes.axhline(0, color="0.6", linewidth=1, zorder=0)
    handles, labels = axes.get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 8), frameon=False)
    return drawn


def _draw(
    axes: Axes,
    summaries: Sequence[AlphaSummary],
    estimates: Sequence[Estimate | None],
    value: Callable[[float, int], float],
) -> None:
    """Single seeds as points, joined because they are pairs, and beside them their means where there is an interval."""
    places = range(len(summaries))
    seeds = sorted({seed for summary in summaries for seed in summary.seeds})
    for index, seed in enumerate(seeds):
        heights = [value(summary.alpha, seed) for summary in summaries]
        colour = _SEED_COLOURS[index % len(_SEED_COLOURS)]
        axes.plot(places, heights, "o-", color=colour, markersize=4, linewidth=0.8, alpha=0.7, label=f"seed {seed}")
    shown = [(place, found) for place, found in zip(places, estimates, strict=True) if found and found.count > 1]
    if shown:
        axes.errorbar(
            [place + 0.12 for place, _ in shown],  # beside the points, which it would hide
            [found.mean for _, found in shown],
            yerr=[found.half_width or 0.0 for _, found in shown],
            fmt="s",
            color="black",
            markersize=5,
            capsize=4,
            label="mean, 95 % t interval",
        )
    axes.set_xticks(list(places), [_tick(summary.alpha) for summary in summaries])
    axes.set_xlim(-0.4, len(summaries) - 0.6)
    axes.set_xlabel("alpha")
    axes.ticklabel_format(axis="y", style="plain", useOffset=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.92")
    axes.set_axisbelow(True)


def _tick(alpha: float) -> str:
    """Two lines for all, so that they stand at one height."""
    return f"{alpha_text(alpha)}\n{'(uniform)' if math.isinf(alpha) else '(hardness)' if alpha == 0 else ' '}"
