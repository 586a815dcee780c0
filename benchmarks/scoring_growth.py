"""What scoring costs as the work grows: micro-batch, block length, vocabulary and width, one at a time; table and plot.

Beside our rate stand the bound, which is the best matrix product over the FLOPs of a token, and a usual loop where all
its logits fit.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, StrMethodFormatter
from torch import Tensor

from benchmarks.interleaved import Table, interleave, median, timed
from benchmarks.parts import Parts
from benchmarks.scoring_sides import (
    HEAD_WIDTH,
    OURS,
    TINY,
    USUAL,
    Case,
    Direction,
    Shape,
    build_model,
    in_both_directions,
    make_blocks,
)
from scorer.engine import Engine, Settings

FACTORS = {
    "micro_batch": "blocks at once",
    "block_length": "tokens of a block",
    "vocabulary": "vocabulary",
    "width": "width of the model",
}
_VALUES = {
    "cpu": {"micro_batch": (1, 2, 4, 8, 16, 32)},
    "cuda": {"micro_batch": (8, 16, 32, 64, 128, 256, 512)},
}
_SHAPE_VALUES = {
    "block_length": (128, 256, 512, 1024),
    "vocabulary": (8192, 16384, 32768, 50265, 65536, 131072),
    "width": (256, 512, 768, 1024),
}
_TINY_VALUES = {
    "micro_batch": (1, 2),
    "block_length": (32, 64),
    "vocabulary": (1000, 2000),
    "width": (64, 128),
}
_DEFAULT_BLOCKS = {"cpu": 4, "cuda": 64}
_BYTES_PER_LOGIT = 12
"""A usual loop's: bf16 or float32 logits, float32 ones, and their log-softmax."""
_MOST_BYTES = {"cpu": 4e9, "cuda": 80e9}
_POINT_SECONDS = {"cpu": 2.0, "cuda": 0.5}
"""Of measuring one side at one place, after warming it up."""
_MOST_TURNS = 8
_BOUND = "bound: the best matrix product"
_DOTS_PER_INCH = 150


@dataclass(frozen=True)
class Place:
    """Where one factor has another value."""

    factor: str
    value: int
    shape: Shape
    blocks: int

    def __str__(self) -> str:
        return f"growth, {self.factor} {self.value}"


@dataclass(frozen=True)
class Point:
    """One side there."""

    factor: str
    value: int
    side: str
    tokens_per_second: float
    mfu: float
    bound_tokens_per_second: float
    """Of both directions at the rate of the best matrix product."""


def places(shape: Shape, device_type: str) -> Iterator[Place]:
    """One factor after the other."""
    is_tiny = shape == TINY
    values = _TINY_VALUES if is_tiny else _VALUES[device_type] | _SHAPE_VALUES
    blocks = 2 if is_tiny else _DEFAULT_BLOCKS[device_type]
    for factor in FACTORS:
        for value in values[factor]:
            if factor == "micro_batch":
                yield Place(factor, value, shape, value)
            elif factor == "width":
                wider = replace(shape, width=value, heads=max(1, value // HEAD_WIDTH))
                yield Place(factor, value, wider, blocks)
            else:
                yield Place(factor, value, replace(shape, **{factor: value}), blocks)


def measure_growth(parts: Parts, case: Case, peak: float, usual: str) -> Iterator[Point]:
    """Points as they are measured.

    Args:
        parts: names what fails.
        case: the default, around which one factor changes.
        peak: FLOP/s of the best matrix product.
        usual: the usual loop to compare with; not a compiled one, which would be compiled at every place.
    """
    for place in places(case.shape, case.device.type):
        here = replace(case, shape=place.shape)
        for side, seconds in (parts.attempt(str(place), partial(_measure, parts, place, here, usual)) or {}).items():
            rate, flops = place.blocks * place.shape.block_length / seconds, 2 * place.shape.flops()
            yield Point(place.factor, place.value, side, rate, rate * flops / peak, peak / flops)


def _measure(parts: Parts, place: Place, case: Case, usual: str) -> dict[str, float]:
    """Seconds of both directions, by side."""
    torch._dynamo.reset()  # what was compiled for other shapes is of no use here
    model = build_model(case.shape, seed=1).to(case.device, case.dtype)  # one for both directions: they cost the same
    ids = make_blocks(case, place.blocks)
    settings = Settings.default(case.device, case.dtype)
    makers: dict[str, Callable[[], Direction]] = {
        OURS: lambda: Engine(model, replace(settings, micro_batch=place.blocks) if case.is_gpu else settings)
    }
    if ids.numel() * case.shape.vocabulary * _BYTES_PER_LOGIT <= _MOST_BYTES[case.device.type]:
        makers[usual] = lambda: USUAL[usual].direction(model, "default")
    found = {side: parts.attempt(f"{place}, {side}", partial(_seconds, make, ids)) for side, make in makers.items()}
    return {side: seconds for side, seconds in found.items() if seconds is not None}


def _seconds(make: Callable[[], Direction], ids: Tensor) -> float:
    """The median of as many turns as find time, after two to warm up."""
    direction = make()
    run = partial(timed, partial(in_both_directions, direction, direction, ids), ids.device)
    run()
    turns = min(_MOST_TURNS, max(1, round(_POINT_SECONDS[ids.device.type] / run().seconds)))
    return median(interleave({"run": run}, turns, warmups=0)["run"])


def to_table(points: Sequence[Point], title: str) -> Table:
    """One row a place: ours, the bound, and the usual loop where it was run."""
    by_place: dict[tuple[str, int], dict[str, Point]] = {}
    for point in points:
        by_place.setdefault((point.factor, point.value), {})[OURS if point.side == OURS else "usual"] = point
    rows = []
    for (factor, value), sides in by_place.items():
        shown = [sides.get(OURS), sides.get("usual")]
        bound = next(iter(sides.values())).bound_tokens_per_second
        figures = [f"{point.tokens_per_second:,.0f}" if point else "" for point in shown]
        shares = [f"{100 * point.mfu:.1f}" if point else "" for point in shown]
        rows.append((f"{FACTORS[factor]}: {value:,}", figures[0], shares[0], f"{bound:,.0f}", figures[1], shares[1]))
    header = ("", "ours, tokens/s", "MFU, %", "bound, tokens/s", "usual, tokens/s", "its MFU, %")
    return Table(title, header, rows)


def draw_png(points: Sequence[Point], title: str) -> bytes:
    """Four panels, one for each factor: tokens/s of each side and of the bound. The PNG's bytes."""
    figure = Figure(figsize=(11, 7.5), layout="constrained", dpi=_DOTS_PER_INCH)
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for axes, factor in zip(figure.subplots(2, 2).flat, FACTORS, strict=True):
        _draw(axes, [point for point in points if point.factor == factor], FACTORS[factor])
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw(axes: Axes, points: Sequence[Point], label: str) -> None:
    for side in dict.fromkeys(point.side for point in points):
        of_side = [point for point in points if point.side == side]
        axes.plot([point.value for point in of_side], [point.tokens_per_second for point in of_side], "o-", label=side)
    bounds = {point.value: point.bound_tokens_per_second for point in points}
    axes.plot(list(bounds), list(bounds.values()), "--", color="grey", label=_BOUND)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(list(bounds), [f"{value:,}" for value in bounds], rotation=30)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.minorticks_off()
    axes.set_xlabel(label)
    axes.set_ylabel("tokens/s, both directions")
    axes.grid(alpha=0.3)
    if points:
        axes.legend(fontsize="small")
