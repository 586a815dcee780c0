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

from benchmarks.interleaved import Sample, Table, interleave, median, timed
from benchmarks.parts import Parts
from benchmarks.scoring_sides import HEAD_WIDTH, OURS, TINY, USUAL, Shape, build_model, in_both_directions, make_blocks
from scorer.alm import BidirectionalALM
from scorer.engine import Settings
from scorer.scoring import score_nll

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


def measure_growth(
    parts: Parts, shape: Shape, device: torch.device, dtype: torch.dtype, peak: float, usual: str
) -> Iterator[Point]:
    """Points as they are measured.

    Args:
        parts: names what fails.
        shape: the default, around which one factor changes.
        device: of the models.
        dtype: of the models.
        peak: FLOP/s of the best matrix product.
        usual: the usual loop to compare with; not a compiled one, which would be compiled at every place.
    """
    for place in places(shape, device.type):
        yield from parts.attempt(str(place), partial(_measure, parts, place, device, dtype, peak, usual)) or []


def _measure(
    parts: Parts, place: Place, device: torch.device, dtype: torch.dtype, peak: float, usual: str
) -> list[Point]:
    torch._dynamo.reset()  # what was compiled for other shapes is of no use here
    model = build_model(place.shape, seed=1).to(device, dtype)  # one for both directions: they cost the same
    ids = make_blocks(place.shape, place.blocks, device)
    settings = Settings.default(device, dtype)
    if device.type == "cuda":
        settings = replace(settings, micro_batch=place.blocks)
    runs: dict[str, Callable[[], object]] = {
        OURS: partial(score_nll, BidirectionalALM(model, model), ids, settings),
    }
    if ids.numel() * place.shape.vocabulary * _BYTES_PER_LOGIT <= _MOST_BYTES[device.type]:
        direction = USUAL[usual].direction(model, "default")
        runs[usual] = partial(in_both_directions, direction, direction, ids)
    points = []
    for side, run in runs.items():
        seconds = parts.attempt(f"{place}, {side}", partial(_seconds, run, device))
        if seconds is not None:
            rate = ids.numel() / seconds
            flops = 2 * place.shape.flops()
            points.append(Point(place.factor, place.value, side, rate, rate * flops / peak, peak / flops))
    return points


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """The median of as many turns as find time, after two to warm up."""
    run()
    first: Sample = timed(run, device)
    turns = min(_MOST_TURNS, max(1, round(_POINT_SECONDS[device.type] / first.seconds)))
    return median(interleave({"run": partial(timed, run, device)}, turns, warmups=0)["run"])


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
    axes.set_xticks(list(bounds), [f"{value:,}" for value in bounds])
    axes.minorticks_off()
    axes.set_xlabel(label)
    axes.set_ylabel("tokens/s, both directions")
    axes.grid(alpha=0.3)
    if points:
        axes.legend(fontsize="small")
