"""One training step of a masked LM: the head at masked positions only, against plain Hugging Face, turn by turn.

    python -m benchmarks.train_step [--size base] [--device cpu|cuda] [--output results.md]

    plain   RobertaForMaskedLM(labels [B, T]), -100 where nothing is masked: what DataCollatorForLanguageModeling gives
    ours    the same weights with trainer.head.on_masked_positions: masked_positions [B, M], labels [B, M]

Model FLOPs are what the task needs, whatever a variant spends: 6 for each weight of a matrix product and token (2
forward, 4 backward), the head's only at the M of T tokens that are asked about, and 12 L T d a token for attention.
MFU is their rate over the best rate of a large matrix product in the same run. What a variant really does is counted
too, as FLOPs are dispatched, and its rate shown beside MFU: plain does more than the task needs, and who leaves out
positions of the last layer does less.

On a CPU: forward and backward in float32, with neither peak nor MFU, since cores may be shared. Set
OMP_WAIT_POLICY=PASSIVE there, else threads that wait for a core count as work, and THP_MEM_ALLOC_ENABLE=1 as make does.

On a GPU: bf16 autocast over fp32 master weights, compiled and not, several micro-batches, and the recipe's whole step
of 2,560 blocks. What fails or finds no time is named. What is done is written after each model and micro-batch: to
`--output`, and to `$OUT/train_step.md` where there is that variable.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from benchmarks.interleaved import Ratio, Report, Sample, Table, console, interleave, median, ratio, verdict
from benchmarks.steps import (
    BLOCK_LENGTH,
    MASKED,
    SIZES,
    VARIANTS,
    Setting,
    Steps,
    Variant,
    as_taken,
    build,
    count_flops,
    make_batch,
    step_optimizer,
)

MODULE = "benchmarks.train_step"
MAX_GRADIENT_DIFFERENCE = 1e-6
"""Of any entry of any gradient, as a share of the largest entry of all."""
CHECKED_BLOCKS = 2
BATCHES = 4
"""Different ones, taken in turn."""
ON_CPU = ("plain", "ours")
FURTHER = ("ours", "ours, compiled")
"""At all micro-batches but the first."""
OPTIMIZER = "AdamW, fused, with clipping"
WHOLE = "whole step"
ATTENTION_KERNELS = ("flash", "fmha", "attention", "cudnn", "softmax")


@dataclass(frozen=True)
class Outcome:
    """One variant of one model at one micro-batch."""

    size: str
    micro_batch: int
    variant: str
    seconds: float
    """Of one forward and backward; the median over turns."""
    cpu_seconds: float
    speedup: Ratio | None
    """Plain's seconds over its own; None where plain did not run."""
    cpu_speedup: Ratio | None
    """The same of CPU time."""
    tokens_per_second: float
    """Of the whole step where the optimizer was measured, else of forward and backward."""
    mfu: float
    """Model FLOPs over the peak."""
    executed: float
    """The FLOPs that it does over the peak."""
    extra_bytes: int
    """Device memory at its peak beyond weights, gradients and optimizer; 0 on a CPU."""
    first_seconds: float
    """Of the first step, in which it is compiled."""

    def is_fast_enough(self) -> bool:
        """Whether plain takes so much longer than ours as it must; by CPU time, since others may share the cores."""
        if self.variant != "ours" or self.cpu_speedup is None:
            return True
        return self.cpu_speedup.of_medians >= SIZES[self.size].least_ratio


@dataclass(frozen=True)
class Cell:
    """Variants of one model at one micro-batch."""

    size: str
    micro_batch: int
    names: Sequence[str]

    def __str__(self) -> str:
        return f"{self.size}, micro-batch {self.micro_batch}"


@dataclass(frozen=True)
class Start:
    """A variant's first two steps."""

    seconds: float
    """Of the first."""
    extra_bytes: int
    """At the peak of the second, beyond what lay there."""


class Benchmark:
    """The flags, the results so far, and what is measured once for all."""

    def __init__(self, flags: argparse.Namespace, arguments: Sequence[str]):
        """Takes the parsed flags, and the words of the command for the results file."""
        self._deadline = time.monotonic() + 60 * flags.minutes
        self._flags = flags
        self._setting = Setting(torch.device(flags.device), flags.bf16, flags.compile_mode, flags.steps)
        self._peak = math.nan
        self._flops: dict[tuple[str, bool], float] = {}
        """By model, and whether its head is at masked positions only: FLOPs that a token costs."""
        self._report = Report(
            title="A training step: the head at masked positions only, against plain Hugging Face",
            module=MODULE,
            arguments=arguments,
            method=describe_method(flags),
            packages=["torch", "transformers", "triton"],
        )
        self._outcomes: list[Outcome] = []

    def run(self) -> bool:
        """Checks, then measures; whether all checks passed, and on a CPU the bound on the ratio was kept."""
        flags = self._flags
        if flags.peak:
            self._attempt("peak", self._measure_peak)
        checks = [self._attempt(f"{size}: check", partial(self._check, size)) for size in flags.size]
        for size in flags.size:
            self._attempt(f"{size}: counting", partial(self._count, size))
        for number, micro_batch in enumerate(flags.micro_batches):
            names = flags.variants if number == 0 else [name for name in flags.variants if name in FURTHER]
            for size in flags.size:
                cell = Cell(size, micro_batch, names)
                self._attempt(str(cell), partial(self._measure, cell))
                self._save()
        self._conclude()
        self._save()
        is_fast = self._setting.is_gpu or all(outcome.is_fast_enough() for outcome in self._outcomes)
        return is_fast and all(checks) and bool(self._outcomes)

    def _attempt(self, what: str, function: Callable[[], Any]) -> Any:
        """Runs a part; if it fails, says so, and the others go on."""
        try:
            return function()
        except Exception as error:  # whatever a driver or a compiler may raise
            reason = (str(error).strip().splitlines() or [""])[0]
            self._note(f"{what} left out: {type(error).__name__}: {reason}")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # not in the handler, where the traceback still holds tensors
        return None

    def _note(self, text: str) -> None:
        """Says something, now and in the results."""
        console.print(f"- {text}", highlight=False, markup=False)
        self._report.notes.append(text)

    def _save(self) -> None:
        """Writes what there is so far; figures as JSON beside it."""
        paths = [self._flags.output] if self._flags.output else []
        if "OUT" in os.environ:
            paths.append(Path(os.environ["OUT"]) / "train_step.md")
        for path in paths:
            self._report.write(path)
            figures = [asdict(outcome) for outcome in self._outcomes]
            path.with_suffix(".json").write_text(json.dumps(figures, indent=2) + "\n")

    # --- Checks

    def _check(self, size: str) -> bool:
        """Loss and gradients of both without dropout; and which attention runs, with which mask."""
        device = self._setting.device
        # A GPU's float32 attention adds up in an order that changes; its float64 is fast enough for this.
        dtype = torch.float64 if self._setting.is_gpu else torch.float32
        models = build(SIZES[size], device, dtype)
        batch = make_batch(SIZES[size], CHECKED_BLOCKS, device, seed=1)
        losses: list[float] = []
        masks: list[str] = []
        for at_positions, model in models.items():
            with record_attention(masks):
                loss = model.eval()(**as_taken(batch, Variant(at_positions))).loss
            loss.backward()
            losses.append(loss.item())
        difference, largest = compare_gradients(models[False], models[True])
        passed = difference <= MAX_GRADIENT_DIFFERENCE * largest and math.isclose(*losses, rel_tol=1e-6)
        self._note(
            f"{size}, {CHECKED_BLOCKS} blocks, {str(dtype).removeprefix('torch.')}, no dropout: losses {losses[0]:.7g} "
            f"and {losses[1]:.7g}; of all gradients the largest entry is {largest:.2g}, the largest difference "
            f"{difference:.1e}, {difference / largest:.1e} of it; at most {MAX_GRADIENT_DIFFERENCE:g}: "
            f"{'pass' if passed else 'FAIL'}."
        )
        self._note(
            f"{size}: attention is {models[True].config._attn_implementation}; torch's fused function was called "
            f"{len(masks)} times in {2 * SIZES[size].layers} layers, with masks: {', '.join(sorted(set(masks)))}."
        )
        if self._setting.is_gpu:
            self._attempt(f"{size}: kernels", partial(self._note_kernels, models[True].float().train(), batch))
        return passed

    def _count(self, size: str) -> None:
        """What plain and ours do."""
        batch = make_batch(SIZES[size], 1, self._setting.device, seed=1)
        for at_positions, model in build(SIZES[size], self._setting.device).items():
            self._flops[size, at_positions] = count_flops(model, as_taken(batch, Variant(at_positions)))
        plain, ours = self._flops[size, False], self._flops[size, True]
        self._note(
            f"{size}: for a token plain does {plain / 1e6:.1f} MFLOP, {plain / ours:.2f} times the {ours / 1e6:.1f} of "
            f"ours; the model's are {SIZES[size].flops() / 1e6:.1f}."
        )

    def _note_kernels(self, model: PreTrainedModel, batch: dict[str, Tensor]) -> None:
        """Which kernels attention becomes on the device."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            with self._setting.autocast():
                loss = model(**batch).loss
            loss.backward()
            torch.cuda.synchronize()
        found = {event.key for event in profile.key_averages()}
        names = sorted(name[:70] for name in found if any(word in name.lower() for word in ATTENTION_KERNELS))
        self._note(f"attention's kernels: {', '.join(names)}.")

    # --- Measurements

    def _measure_peak(self) -> None:
        """FLOP/s of a matrix product: of several large shapes, the best one's median."""
        sides = (8192, 16384) if self._setting.is_gpu else (1024, 2048)
        shapes = [(sides[0],) * 3, (sides[1], sides[0], sides[0]), (sides[1],) * 3]
        dtype = torch.bfloat16 if self._setting.is_bf16 else torch.float32
        rates = {}
        for m, n, k in shapes:
            one, other = (torch.randn(shape, device=self._setting.device, dtype=dtype) for shape in ((m, k), (k, n)))
            out = torch.empty(m, n, device=self._setting.device, dtype=dtype)
            product = partial(self._setting.timed, partial(torch.mm, one, other, out=out))
            turns, warmups = (20, 5) if self._setting.is_gpu else (5, 1)
            seconds = median(interleave({"product": product}, turns, warmups)["product"])
            rates[f"{m} x {n} x {k}"] = 2.0 * m * n * k / seconds
        self._peak = max(rates.values())
        shown = "; ".join(f"{shape}: {rate / 1e12:.3g}" for shape, rate in rates.items())
        self._note(f"Matrix products in {str(dtype).removeprefix('torch.')}, TFLOP/s: {shown}.")

    def _measure(self, cell: Cell) -> None:
        """All variants of a cell, turn by turn."""
        torch._dynamo.reset()  # what was compiled for other shapes is of no use here
        models = build(SIZES[cell.size], self._setting.device)
        batches = [
            make_batch(SIZES[cell.size], cell.micro_batch, self._setting.device, seed) for seed in range(BATCHES)
        ]
        steps: dict[str, Steps] = {}
        starts: dict[str, Start] = {}
        for name in cell.names:
            variant = VARIANTS[name]
            candidate = Steps(variant, models[variant.at_positions], batches, self._setting)
            start = self._attempt(f"{cell}, {name}", partial(self._warm_up, candidate))
            if start is not None:
                steps[name], starts[name] = candidate, start
        sides = {name: candidate.turn for name, candidate in steps.items()}
        optimizer = None
        if self._flags.optimizer and (stepped := [name for name in steps if VARIANTS[name].at_positions]):
            optimizer = torch.optim.AdamW(models[True].parameters(), lr=1e-6, weight_decay=0.0, fused=True)
            sides[OPTIMIZER] = partial(self._setting.timed, partial(step_optimizer, models[True], optimizer))
        if not steps:
            return
        samples = interleave(sides, self._flags.turns)
        if optimizer is not None:
            count = self._flags.global_batch // cell.micro_batch
            whole = self._attempt(f"{cell}, {WHOLE}", partial(self._whole, steps[stepped[-1]], optimizer, count))
            samples |= {WHOLE: [whole]} if whole else {}
        self._add(cell, samples, starts)

    def _whole(self, steps: Steps, optimizer: torch.optim.Optimizer, count: int) -> Sample:
        self._require_time()
        return steps.whole(optimizer, count)

    def _require_time(self) -> None:
        if time.monotonic() > self._deadline:
            raise TimeoutError(f"begun too late for --minutes {self._flags.minutes:g}")

    def _warm_up(self, steps: Steps) -> Start:
        """Two steps.

        Raises:
            TimeoutError: there is no time left to begin.
            ArithmeticError: the loss is not finite.
        """
        self._require_time()
        began = time.perf_counter()
        loss = float(steps.step().detach())
        seconds = time.perf_counter() - began
        if not math.isfinite(loss):
            raise ArithmeticError(f"the loss is {loss}")
        if not self._setting.is_gpu:
            steps.step()
            return Start(seconds, 0)
        torch.cuda.reset_peak_memory_stats()
        resident = torch.cuda.memory_allocated()
        steps.step()
        torch.cuda.synchronize()
        return Start(seconds, torch.cuda.max_memory_allocated() - resident)

    # --- Results

    def _add(self, cell: Cell, samples: Mapping[str, Sequence[Sample]], starts: Mapping[str, Start]) -> None:
        """Turns samples into outcomes and a table."""
        outcomes = [self._outcome(cell, name, samples, starts[name]) for name in starts]
        rows = [to_row(outcome) for outcome in outcomes]
        rows += [
            (
                name,
                f"{1e3 * median(samples[name]):,.1f}",
                f"{1e3 * median(samples[name], 'cpu_seconds'):,.1f}",
                *[""] * 7,
            )
            for name in (OPTIMIZER, WHOLE)
            if name in samples
        ]
        header = ("", "ms", "CPU ms", "plain over it", "in CPU time", "tokens/s", "MFU, %", "done, %")
        table = Table(f"{cell}: forward and backward", (*header, "GB beyond weights", "first step, s"), rows)
        table.show()
        self._report.tables.append(table)
        self._outcomes += outcomes
        if any(VARIANTS[name].is_compiled for name in starts):
            breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
            self._note(f"{cell}: what is compiled has {breaks} graph breaks so far.")

    def _outcome(self, cell: Cell, name: str, samples: Mapping[str, Sequence[Sample]], start: Start) -> Outcome:
        steps = self._setting.steps
        seconds = whole = median(samples[name]) / steps
        blocks = cell.micro_batch
        if OPTIMIZER in samples:
            blocks = self._flags.global_batch
            whole = seconds * blocks / cell.micro_batch + median(samples[OPTIMIZER])
        plain = samples.get("plain") if name != "plain" else None
        rate = blocks * BLOCK_LENGTH / whole
        return Outcome(
            size=cell.size,
            micro_batch=cell.micro_batch,
            variant=name,
            seconds=seconds,
            cpu_seconds=median(samples[name], "cpu_seconds") / steps,
            speedup=ratio(plain, samples[name]) if plain else None,
            cpu_speedup=ratio(plain, samples[name], "cpu_seconds") if plain else None,
            tokens_per_second=rate,
            mfu=SIZES[cell.size].flops() * rate / self._peak,
            executed=self._flops.get((cell.size, VARIANTS[name].at_positions), math.nan) * rate / self._peak,
            extra_bytes=start.extra_bytes,
            first_seconds=start.seconds,
        )

    def _conclude(self) -> None:
        """The best of each size against what is aimed at, and ours against plain."""
        for size in dict.fromkeys(outcome.size for outcome in self._outcomes):
            of_size = [outcome for outcome in self._outcomes if outcome.size == size]
            best = max(of_size, key=lambda outcome: outcome.tokens_per_second)
            share = f", {100 * best.mfu:.1f} % of the best matrix product ({self._peak / 1e12:.3g} TFLOP/s)"
            aim = f"; aim {100 * SIZES[size].aimed_mfu:.0f} %" if self._setting.is_gpu else ""
            self._note(
                f"{size}: the fastest is {best.variant} at micro-batch {best.micro_batch}: "
                f"{best.tokens_per_second:,.0f} tokens/s of {SIZES[size].flops() / 1e6:.1f} MFLOP"
                f"{'' if math.isnan(best.mfu) else share}{aim}."
            )
        for outcome in self._outcomes:
            if outcome.variant == "ours" and outcome.cpu_speedup and not self._setting.is_gpu:
                words = verdict(outcome.cpu_speedup.of_medians, SIZES[outcome.size].least_ratio)
                self._note(
                    f"{outcome.size}, micro-batch {outcome.micro_batch}: plain takes {outcome.cpu_speedup} times ours "
                    f"in CPU time; {words}."
                )


def main(arguments: Sequence[str]) -> int:
    """Runs the benchmark; exit code 1 where a check or a bound is missed."""
    return 0 if Benchmark(parse(arguments), arguments).run() else 1


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The flags, with what suits the device where nothing is said."""
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", nargs="+", choices=SIZES, help="default: base, and on a GPU large too")
    parser.add_argument("--micro_batches", nargs="+", type=int, help="blocks; all variants at the first")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, metavar="NAME", help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--turns", type=int, help="of all variants, one after the other")
    parser.add_argument("--steps", type=int, help="forward and backward passes in a turn of a variant")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, help="autocast; default: on a GPU")
    parser.add_argument("--optimizer", action=argparse.BooleanOptionalAction, help="measure it; default: on a GPU")
    parser.add_argument("--peak", action=argparse.BooleanOptionalAction, help="measure it; default: on a GPU")
    parser.add_argument("--global_batch", type=int, default=2560, help="blocks a step of the optimizer")
    parser.add_argument("--compile_mode", default="default", help="of torch.compile")
    parser.add_argument("--minutes", type=float, help="after which nothing new is begun; default on a GPU: 7.5")
    parser.add_argument("--output", type=Path, help="a Markdown file for the results; figures go into .json beside it")
    flags = parser.parse_args(list(arguments))
    is_gpu = flags.device == "cuda"
    defaults = {
        "size": ["base", "large"] if is_gpu else ["base"],
        "micro_batches": [64, 32, 128] if is_gpu else [4],
        "variants": list(VARIANTS if is_gpu else ON_CPU),
        "turns": 8 if is_gpu else 5,
        "steps": 2 if is_gpu else 1,
        "bf16": is_gpu,
        "optimizer": is_gpu,
        "peak": is_gpu,
        "minutes": 7.5 if is_gpu else math.inf,
    }
    for name, value in defaults.items():
        if getattr(flags, name) is None:
            setattr(flags, name, value)
    return flags


def describe_method(flags: argparse.Namespace) -> str:
    """Warm-up, repeats, arithmetic."""
    clock = "device events" if flags.device == "cuda" else "wall-clock, with CPU time of all threads beside it"
    arithmetic = "bf16 autocast over float32 weights" if flags.bf16 else "float32"
    text = (
        f"Variants take turns (A B A B …) in one process: {flags.turns} turns of {flags.steps} forward and backward, "
        f"after two steps and one turn of each to warm up, by {clock}. Medians, and ratios of medians with the range "
        f"of the turns' own. {arithmetic}, dropout 0.1, random ids, T = {BLOCK_LENGTH}, M = {MASKED}."
    )
    if flags.optimizer:
        text += (
            f" A step of the optimizer is {flags.global_batch:,} blocks: tokens/s are those of so many forward and "
            "backward passes and one step of the optimizer, put together from medians; the last variant's whole step "
            "was run once to compare."
        )
    return text


def compare_gradients(one: PreTrainedModel, other: PreTrainedModel) -> tuple[float, float]:
    """The largest difference between entries of their gradients, and the largest entry."""
    pairs = [(a.grad, b.grad) for a, b in zip(one.parameters(), other.parameters(), strict=True)]
    return max(float((a - b).abs().max()) for a, b in pairs), max(float(a.abs().max()) for a, _ in pairs)


def record_attention(masks: list[str]) -> AbstractContextManager[Any]:
    """Notes the mask of each call of torch's fused attention."""
    plain = functional.scaled_dot_product_attention

    def recording(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **more: Any) -> Tensor:
        masks.append("none" if attn_mask is None else str(tuple(attn_mask.shape)))
        return plain(query, key, value, attn_mask=attn_mask, **more)

    return patch.object(functional, "scaled_dot_product_attention", recording)


def to_row(outcome: Outcome) -> tuple[str, ...]:
    """A row of a cell's table."""
    return (
        outcome.variant,
        f"{1e3 * outcome.seconds:,.1f}",
        f"{1e3 * outcome.cpu_seconds:,.1f}",
        str(outcome.speedup or 1),
        str(outcome.cpu_speedup or 1),
        f"{outcome.tokens_per_second:,.0f}",
        *("" if math.isnan(share) else f"{100 * share:.1f}" for share in (outcome.mfu, outcome.executed)),
        f"{outcome.extra_bytes / 1e9:.1f}" if outcome.extra_bytes else "",
        f"{outcome.first_seconds:.1f}",
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
