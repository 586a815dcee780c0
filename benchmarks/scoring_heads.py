"""Heads alone: from hidden states [N, D] and weights [V, D] to NLLs [N]; the scorer's own, and those of peers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.gemm import Gemm
from benchmarks.interleaved import Sample, Table, interleave, median, timed
from benchmarks.parts import Parts
from benchmarks.scoring_sides import FIRST_ORDINARY_ID, Case, build_model
from scorer.engine.heads import HEADS, Head, MakeHead
from scorer.errors import HardnessError

CHECKED_ROWS = 512
_MAX_ERROR = 1.0
"""In nats: what is further off computes something else."""
ALL_LOGITS = "all logits, cross_entropy"


@dataclass(frozen=True)
class HeadOutcome:
    """One head."""

    head: str
    is_ours: bool
    rows: int
    seconds: float
    """The median of turns."""
    tokens_per_second: float
    """Of one direction."""
    mfu: float
    """FLOPs of the logits over the peak."""
    nll_mean_error: float
    """In nats, against float64 of the same weights and hidden states."""
    nll_max_error: float
    peak_extra_bytes: int | None
    """On a GPU: at the peak, beyond what lay there before."""


# --- Peers


def _all_logits(weight: Tensor) -> Head:
    return lambda hidden, targets: functional.cross_entropy(
        functional.linear(hidden, weight).float(), targets, reduction="none"
    )


def _torch_chunked(weight: Tensor) -> Head:
    """Torch's own, which came with 2.13 or so."""
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda hidden, targets: functional.linear_cross_entropy(
        hidden, weight, targets, reduction="none", options=options
    )


def _cut_cross_entropy(weight: Tensor) -> Head:
    from cut_cross_entropy import linear_cross_entropy  # noqa: PLC0415

    return lambda hidden, targets: linear_cross_entropy(hidden, weight, targets, reduction="none")


def _liger(weight: Tensor) -> Head:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy  # noqa: PLC0415

    return lambda hidden, targets: liger_fused_linear_cross_entropy(hidden, weight, targets, reduction="none")


def _liger_per_token(weight: Tensor) -> Head:
    """Its kernel for Hopper; on other devices its loop over chunks."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction  # noqa: PLC0415

    return lambda hidden, targets: LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, targets)


def _quack(weight: Tensor) -> Head:
    from quack.linear_cross_entropy import linear_cross_entropy_func  # noqa: PLC0415

    return lambda hidden, targets: linear_cross_entropy_func(hidden, weight, None, targets, reduction="none")


CUT_CROSS_ENTROPY = "cut_cross_entropy"
LIGER = "Liger, fused linear cross entropy"
LIGER_PER_TOKEN = "Liger, fused scaled cross entropy"
BOUNDING_PEERS = (CUT_CROSS_ENTROPY, LIGER, LIGER_PER_TOKEN)
"""No slower than these our fastest head is to be on a GPU."""
PEERS: dict[str, Callable[[Tensor], Head]] = {
    ALL_LOGITS: _all_logits,
    "torch linear_cross_entropy, chunked": _torch_chunked,
    CUT_CROSS_ENTROPY: _cut_cross_entropy,
    LIGER: _liger,
    LIGER_PER_TOKEN: _liger_per_token,
    "quack": _quack,
}


# --- Measuring them


@dataclass(frozen=True)
class Task:
    """What every head computes."""

    hidden: Tensor
    """[N, D], as a last layer norm leaves it."""
    targets: Tensor
    weight: Tensor
    expected: Tensor
    """float64 [CHECKED_ROWS] or fewer."""

    @property
    def gemm(self) -> Gemm:
        """The product that all have in common."""
        return Gemm("head", len(self.hidden), *self.weight.shape)


@torch.inference_mode()
def make_task(case: Case, blocks: int) -> Task:
    """Random hidden states and targets of so many blocks, and a model's head."""
    shape, place = case.shape, (case.device, case.dtype)
    count = blocks * shape.block_length
    weight = build_model(shape, seed=1).lm_head.weight.to(*place)
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(count, shape.width, generator=generator).to(*place)
    targets = torch.randint(FIRST_ORDINARY_ID, shape.vocabulary, (count,), generator=generator).to(case.device)
    logits = hidden[:CHECKED_ROWS].double() @ weight.double().t()
    return Task(hidden, targets, weight, functional.cross_entropy(logits, targets[:CHECKED_ROWS], reduction="none"))


@dataclass(frozen=True)
class Started:
    """A head that works."""

    head: Head
    errors: Tensor
    """Float64 [CHECKED_ROWS] or fewer, absolute."""
    peak_extra_bytes: int | None


def measure_heads(parts: Parts, task: Task, peak: float, turns: int) -> list[HeadOutcome]:
    """All heads that are there and work, turn by turn; those that do not are named."""
    makers = {name: partial(_own, make) for name, make in HEADS.items()} | PEERS
    started: dict[str, Started] = {}
    absent = []
    for name, maker in makers.items():
        try:
            found = parts.attempt(f"head {name}", partial(_start, maker(task.weight), task))
        except ModuleNotFoundError:
            absent.append(name)
        except (AttributeError, ImportError, HardnessError) as error:
            parts.note(f"head {name} left out: {error}")
        else:
            started |= {name: found} if found else {}
    if absent:
        parts.note(f"Absent here: {'; '.join(absent)}.")
    runs = {name: partial(_run, one.head, task) for name, one in started.items()}
    return [
        HeadOutcome(
            head=name,
            is_ours=name in HEADS,
            rows=len(task.hidden),
            seconds=median(samples),
            tokens_per_second=len(task.hidden) / median(samples),
            mfu=task.gemm.flops / median(samples) / peak,
            nll_mean_error=float(started[name].errors.mean()),
            nll_max_error=float(started[name].errors.max()),
            peak_extra_bytes=started[name].peak_extra_bytes,
        )
        for name, samples in interleave(runs, turns).items()
    ]


def _own(make: MakeHead, weight: Tensor) -> Head:
    return make(weight, None)


@torch.inference_mode()
def _start(head: Head, task: Task) -> Started:
    """Calls a head twice: for its errors, and for its peak of memory.

    Raises:
        ArithmeticError: it is not the same function.
    """
    errors = (head(task.hidden, task.targets)[: len(task.expected)].double() - task.expected).abs()
    if not bool(errors.max() < _MAX_ERROR):
        raise ArithmeticError(f"off by up to {float(errors.max()):.3g} nats")
    if task.hidden.device.type != "cuda":
        return Started(head, errors, None)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    resident = torch.cuda.memory_allocated()
    head(task.hidden, task.targets)
    torch.cuda.synchronize()
    return Started(head, errors, torch.cuda.max_memory_allocated() - resident)


@torch.inference_mode()
def _run(head: Head, task: Task) -> Sample:
    return timed(lambda: head(task.hidden, task.targets), task.hidden.device)


def to_table(outcomes: list[HeadOutcome], title: str) -> Table:
    """All heads, the fastest first."""
    rows = [
        (
            f"**{outcome.head}**" if outcome.is_ours else outcome.head,
            f"{1e3 * outcome.seconds:,.2f}",
            f"{outcome.tokens_per_second:,.0f}",
            f"{100 * outcome.mfu:.1f}",
            f"{outcome.nll_mean_error:.1e}",
            f"{outcome.nll_max_error:.1e}",
            "" if outcome.peak_extra_bytes is None else f"{outcome.peak_extra_bytes / 1e6:,.0f}",
        )
        for outcome in sorted(outcomes, key=lambda outcome: outcome.seconds)
    ]
    return Table(title, ("", "ms", "tokens/s", "MFU, %", "mean error, nats", "max error", "MB beyond weights"), rows)
