"""Per-token NLLs of both directions of the ALM: the scorer against the usual loops and the best matrix product.

    python -m benchmarks.scoring [--device cpu|cuda] [--dtype bfloat16] [--grow --plot growth.png] [--output results.md]

    ours                  scorer.scoring.score_nll
    usual, cross_entropy  all logits of GPT2LMHeadModel, then cross_entropy without reduction
    usual, log_softmax    all logits, log_softmax, gather
    …, compiled           the same under torch.compile for one shape; by default on a GPU

FLOPs of a token and direction are those of the matrix products: the layers' weights, half of the block for attention,
and the logits. MFU is their rate over that of the best large matrix product, of several shapes and through every one of
torch's functions; these take turns with the sides.

The ALM is the paper's (6 layers, 512 dimensions, vocabulary 50,265). Its weights are random, the head's such that
logits have a standard deviation of 3; ids are random too, so NLLs are larger than a trained ALM's, 15 nats.

On a CPU set THP_MEM_ALLOC_ENABLE=1 as make does, without which all logits at once are page faults, and
OMP_WAIT_POLICY=PASSIVE, without which threads that wait for a core count as CPU time.

What fails or finds no time is named. What is done is written after each part: to `--output`, its figures as JSON
beside it, and to `$OUT/scoring.md` and `.json` where there is that variable. On a CPU a missed bound is exit code 1.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch

from benchmarks import scoring_heads, scoring_memory, scoring_precision
from benchmarks.interleaved import Report, hardware
from benchmarks.parts import Parts
from benchmarks.scoring_bounds import Figures, bounds_for, share
from benchmarks.scoring_heads import BOUNDING_PEERS, HeadOutcome
from benchmarks.scoring_memory import Memory
from benchmarks.scoring_precision import Precision
from benchmarks.scoring_sides import (
    OURS,
    TINY,
    USUAL,
    Case,
    Shape,
    build_alm,
    make_blocks,
    make_engines,
    make_side,
    make_variant,
    usable_heads,
)
from benchmarks.scoring_timing import Candidate, Outcome, Timing, to_table
from scorer.engine import Settings
from scorer.engine.heads import HEADS
from scorer.scoring import score_nll

MODULE = "benchmarks.scoring"
PARTS = ("sides", "memory", "precision", "heads", "variants", "growth")
"""In this order; the most important first, since time may run out."""
PLAIN = tuple(name for name, usual in USUAL.items() if not usual.is_compiled)
PACKAGES = ("torch", "transformers", "triton", "cut-cross-entropy", "liger-kernel", "quack-kernels")


class Benchmark:
    """The flags, and the results so far."""

    def __init__(self, flags: argparse.Namespace, arguments: Sequence[str]):
        """Takes the parsed flags, and the words of the command for the results file."""
        report = Report(
            title="Scoring: per-token NLLs of both directions, against the usual loops and the best matrix product",
            module=MODULE,
            arguments=arguments,
            method=describe_method(flags),
            packages=PACKAGES,
        )
        self._flags = flags
        self._case = Case(TINY if flags.quick else Shape(), torch.device(flags.device), getattr(torch, flags.dtype))
        self._parts = Parts(report, flags.output, "scoring", flags.minutes)
        self._timing = Timing(self._parts, self._case, flags.turns)
        self._sides: list[Outcome] = []
        self._variants: list[Outcome] = []
        self._memory: list[Memory] = []
        self._precision: list[Precision] = []
        self._heads: list[HeadOutcome] = []

    def run(self) -> bool:
        """Measures all parts that were asked for; whether the bounds that bind here were kept."""
        self._describe()
        for part in PARTS:
            if part in self._flags.parts:
                torch._dynamo.reset()  # what was compiled for other models is of no use any more
                self._parts.attempt(part, getattr(self, f"_measure_{part}"))
                self._save()
        is_kept = self._conclude()
        self._save()
        self._parts.say_where()
        return is_kept

    def _describe(self) -> None:
        """What all parts have in common."""
        shape = self._case.shape
        self._parts.figures |= {
            "device": self._flags.device,
            "dtype": self._flags.dtype,
            "hardware": hardware(),
            "torch": torch.__version__,
            "shape": asdict(shape),
            "blocks": self._flags.blocks,
            "flops_per_token_and_direction": shape.flops(),
        }
        self._parts.note(
            f"A token of one direction is {shape.flops() / 1e6:.1f} MFLOP: layers {shape.body_flops() / 1e6:.1f}, "
            f"attention {shape.attention_flops() / 1e6:.2f}, logits {shape.head_flops() / 1e6:.1f}."
        )

    def _save(self) -> None:
        """Writes what there is so far."""
        extra = {memory.side: memory.peak_extra_bytes for memory in self._memory}
        self._parts.figures |= {
            "sides": [asdict(outcome) | {"peak_extra_bytes": extra.get(outcome.side)} for outcome in self._sides],
            "memory": [asdict(outcome) for outcome in self._memory],
            "precision": [asdict(outcome) for outcome in self._precision],
            "heads": [asdict(outcome) for outcome in self._heads],
            "variants": [asdict(outcome) for outcome in self._variants],
        }
        self._parts.save()

    # --- Parts

    def _measure_sides(self) -> None:
        """All sides and all matrix products, turn by turn."""
        alm = build_alm(self._case)
        self._parts.note(f"Attention of the usual loops is {alm.left_to_right.config._attn_implementation}.")
        names = [OURS, *(USUAL if self._flags.compiled else PLAIN)]
        made = [Candidate(name, partial(make_side, name, alm, self._flags.compile_mode)) for name in names]
        self._sides = self._timing.compare(made, self._flags.blocks, has_gemms=True)
        self._parts.add(to_table(self._sides, f"{self._flags.blocks} blocks, {self._flags.dtype}"))

    def _measure_memory(self) -> None:
        """On a CPU each side in a process of its own; on a GPU it was measured with the sides."""
        self._memory = list(self._timing.memory)
        for name in () if self._case.is_gpu else (OURS, *PLAIN):
            run = partial(scoring_memory.in_own_process, name, self._case, self._flags.blocks)
            if memory := self._parts.attempt(f"memory of {name}", run):
                self._memory.append(memory)
        if self._memory:
            self._parts.add(scoring_memory.to_table(self._memory, f"Memory, {self._flags.blocks} blocks"))

    def _measure_precision(self) -> None:
        """Ours, our other heads and the usual loops in each dtype, this run's first."""
        ids = make_blocks(self._case, self._flags.checked_blocks)
        exact = scoring_precision.exact_nll(build_alm(replace(self._case, dtype=torch.float64)), ids)
        for dtype in sorted((torch.float32, torch.bfloat16), key=lambda dtype: dtype != self._case.dtype):
            for candidate in self._precision_candidates(Case(self._case.shape, self._case.device, dtype)):
                what = f"precision of {candidate.name}, {dtype}"
                found = self._parts.attempt(what, lambda candidate=candidate: candidate.make()(ids))
                if found is not None:
                    self._precision.append(scoring_precision.compare(candidate.name, dtype, found, exact))
        title = f"Against float64 of the float32 weights, {len(ids)} blocks"
        self._parts.add(scoring_precision.to_table(self._precision, title))

    def _precision_candidates(self, case: Case) -> list[Candidate]:
        """What is compiled is so for the run's own dtype only: it takes long."""
        alm = build_alm(case)
        default = Settings.default(case.device, case.dtype)
        has_ours = not default.compiled or case.dtype == self._case.dtype
        made = [Candidate(name, partial(make_side, name, alm)) for name in ([OURS] if has_ours else []) + [*PLAIN]]
        engines = make_engines(alm, Settings(default.head, False, default.micro_batch))
        for head in usable_heads(case):
            if head != default.head or not has_ours:
                made.append(Candidate(f"ours, head {head}", partial(make_variant, alm, engines, head)))
        if case.dtype == torch.bfloat16:
            in_8_bits = Settings(default.head, False, default.micro_batch, float8=True)
            made.append(Candidate("ours, layers in 8 bits", partial(partial, score_nll, alm, settings=in_8_bits)))
        return made

    def _measure_heads(self) -> None:
        """Heads alone, over the hidden states of a batch."""
        task = scoring_heads.make_task(self._case, self._flags.blocks)
        self._heads = scoring_heads.measure_heads(self._parts, task, self._timing.peak, self._flags.turns)
        title = f"Heads alone, {len(task.hidden):,} rows, {self._flags.dtype}"
        self._parts.add(scoring_heads.to_table(self._heads, title))

    def _measure_variants(self) -> None:
        """Head, compiled or not, micro-batch, two streams; and the best usual loop at the same micro-batch."""
        for micro_batch in self._flags.micro_batches:
            found = self._parts.attempt(f"variants, micro-batch {micro_batch}", partial(self._vary, micro_batch))
            self._variants += found or []
            self._save()
        if own := [outcome for outcome in self._variants if outcome.settings]:
            best = max(own, key=lambda outcome: outcome.tokens_per_second)
            self._parts.note(
                f"The fastest variant is {best.side} at {best.blocks} blocks: {best.tokens_per_second:,.0f} tokens/s, "
                f"MFU {100 * best.mfu:.1f} %."
            )

    def _vary(self, micro_batch: int) -> list[Outcome]:
        """All variants of one micro-batch."""
        torch._dynamo.reset()  # as above
        alm = build_alm(self._case)
        default = Settings.default(self._case.device, self._case.dtype)
        made = []
        for compiled in (True, False) if self._flags.compiled else (False,):
            engines = make_engines(alm, Settings(default.head, compiled, micro_batch))
            for head in usable_heads(self._case):
                settings = Settings(head, compiled, micro_batch)
                name = f"head {head}{', compiled' if compiled else ''}"
                made.append(Candidate(name, partial(make_variant, alm, engines, head), settings))
                if self._case.is_gpu:
                    in_two = partial(make_variant, alm, engines, head, has_two_streams=True)
                    made.append(Candidate(f"{name}, two streams", in_two, settings))
            if self._case.dtype == torch.bfloat16:
                in_8_bits = Settings(default.head, compiled, micro_batch, float8=True)
                name = f"head {default.head}{', compiled' if compiled else ''}, layers in 8 bits"
                made.append(Candidate(name, partial(partial, score_nll, alm, settings=in_8_bits), in_8_bits))
        usual = self._best_usual()
        name = usual.side if usual else PLAIN[0]
        made.append(Candidate(name, partial(make_side, name, alm, self._flags.compile_mode)))
        outcomes = self._timing.compare(made, micro_batch or self._flags.blocks)
        self._parts.add(to_table(outcomes, f"Variants, micro-batch {micro_batch or 'of 512 tokens'}"))
        return outcomes

    def _measure_growth(self) -> None:
        """One factor at a time."""
        from benchmarks import scoring_growth  # noqa: PLC0415 - matplotlib is slow to import

        plain = [outcome for outcome in self._sides if outcome.side in PLAIN]
        usual = min(plain, key=lambda outcome: outcome.seconds).side if plain else PLAIN[0]
        points: list[scoring_growth.Point] = []
        for point in scoring_growth.measure_growth(self._parts, self._case, self._timing.peak, usual):
            points.append(point)
            self._parts.figures["growth"] = [asdict(one) for one in points]
            self._save()
        self._parts.add(scoring_growth.to_table(points, f"As the work grows, {self._flags.dtype}"))
        for path in self._plot_paths():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(scoring_growth.draw_png(points, f"Scoring in {self._flags.dtype}: {hardware()}"))

    def _plot_paths(self) -> list[Path]:
        """Where the plot goes."""
        return [path for path in (self._flags.plot, self._parts.out("growth.png")) if path]

    # --- Results

    def _best_usual(self) -> Outcome | None:
        usual = [outcome for outcome in self._sides if outcome.side in USUAL]
        return min(usual, key=lambda outcome: outcome.seconds, default=None)

    def _conclude(self) -> bool:
        """Says whether the bounds were kept; a GPU's and a tiny model's only warn."""
        found = bounds_for(self._flags.device, self._flags.dtype, self._collect())
        bounds = [bound for bound in found if bound.part in self._flags.parts]
        for bound in bounds:
            self._parts.note(f"{bound}.")
        self._parts.figures["verdicts"] = [asdict(bound) | {"is_kept": bound.is_kept()} for bound in bounds]
        if self._flags.quick:
            self._parts.note("Of a tiny model no bound is asked.")
        return self._flags.quick or self._case.is_gpu or all(bound.is_kept() for bound in bounds)

    def _collect(self) -> Figures:
        """What bounds are about."""
        ours = next((outcome for outcome in self._sides if outcome.side == OURS), None)
        usual = self._best_usual()
        plain = usual.side.removesuffix(", compiled") if usual else PLAIN[0]
        extra = {memory.side: memory.peak_extra_bytes for memory in self._memory}
        errors = {one.side: one.nll_max_error for one in self._precision if one.dtype == self._flags.dtype}
        heads = {one.head: one.seconds for one in self._heads}
        own, peers = ([heads[name] for name in names if name in heads] for names in (HEADS, BOUNDING_PEERS))
        speedup = ours.ratio_over_best_usual if ours else None
        return Figures(
            speedup=speedup.of_medians if speedup else None,
            mfu=ours.mfu if ours else None,
            memory_share=share(extra.get(OURS), extra.get(plain)),
            error_ratio=share(errors.get(OURS), errors.get(plain)),
            head_speedup=share(min(peers, default=None), min(own, default=None)),
        )


def describe_method(flags: argparse.Namespace) -> str:
    """Warm-up, repeats, arithmetic."""
    clock = "device events" if flags.device == "cuda" else "wall-clock, with CPU time of all threads beside it"
    memory = "by the allocator" if flags.device == "cuda" else "of one call in a process of its own"
    return (
        f"Sides and matrix products take turns (A B A B …) in one process: {flags.turns} turns after a call and a turn "
        f"of each to warm up, by {clock}. Medians, and ratios of medians with the range of the turns' own. GPT-2 with "
        f"random weights in {flags.dtype}, logits of standard deviation 3, random ids, both directions of "
        f"{flags.blocks} blocks a call. Memory at the peak beyond the loaded and prepared model, {memory}."
    )


def main(arguments: Sequence[str]) -> int:
    """Runs the benchmark; exit code 1 where a bound is missed."""
    return 0 if Benchmark(parse(arguments), arguments).run() else 1


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The flags, with what suits the device where nothing is said."""
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--blocks", type=int, help="a call")
    parser.add_argument("--turns", type=int, help="of all sides, one after the other")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="default: all but growth; variants on a GPU only")
    parser.add_argument("--grow", action="store_true", help="measure growth too")
    parser.add_argument("--plot", type=Path, help="a PNG file for growth")
    parser.add_argument("--micro_batches", nargs="+", type=int, help="of variants; 0: as many as have 512 tokens")
    parser.add_argument("--checked_blocks", type=int, help="blocks of the comparison with float64")
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, help="such sides too; default: on a GPU")
    parser.add_argument("--compile_mode", default="default", help="of torch.compile, for the usual loops")
    parser.add_argument("--minutes", type=float, help="after which nothing new is begun; default on a GPU: 9")
    parser.add_argument("--quick", action="store_true", help="a tiny model: to try the benchmark itself")
    parser.add_argument("--output", type=Path, help="a Markdown file for the results; figures go into .json beside it")
    flags = parser.parse_args(list(arguments))
    for name, value in defaults_for(flags.device == "cuda", flags.quick).items():
        if getattr(flags, name) is None:
            setattr(flags, name, value)
    flags.parts += ["growth"] if flags.grow else []
    return flags


def defaults_for(is_gpu: bool, is_quick: bool) -> dict[str, object]:
    """Of the flags that depend on the device."""
    return {
        "dtype": "bfloat16" if is_gpu else "float32",
        "blocks": 2 if is_quick else 64 if is_gpu else 8,
        "turns": 2 if is_quick else 10 if is_gpu else 5,
        "parts": [part for part in PARTS if part != "growth" and (part != "variants" or is_gpu or is_quick)],
        "micro_batches": [0, 1] if is_quick else [64, 128, 32, 256, 16] if is_gpu else [0, 1, 8],
        "checked_blocks": 16 if is_gpu and not is_quick else 2,
        "compiled": is_gpu,
        "minutes": 9.0 if is_gpu else math.inf,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
