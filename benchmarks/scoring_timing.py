"""Sides against each other and against matrix products, turn by turn."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.gemm import Gemm, candidates
from benchmarks.interleaved import Ratio, Sample, Table, interleave, median, ratio, timed
from benchmarks.parts import Parts
from benchmarks.scoring_memory import Memory, on_gpu
from benchmarks.scoring_sides import TINY, USUAL, Case, Score, make_blocks
from scorer.engine import Settings

SHOWN_GEMMS = 6


@dataclass(frozen=True)
class Candidate:
    """A side that is yet to be built."""

    name: str
    make: Callable[[], Score]
    settings: Settings | None = None
    """Of the engine, where they are not its own choice."""


@dataclass(frozen=True)
class Outcome:
    """One side, for batches of one size."""

    side: str
    blocks: int
    settings: Settings | None
    """Of the engine, where they are not its own choice."""
    seconds: float
    """Of one call, both directions; the median over turns."""
    cpu_seconds: float
    tokens_per_second: float
    """A token that both directions scored counts once."""
    mfu: float
    ratio_over_best_usual: Ratio | None
    """The best usual loop's seconds over its own; None for that loop itself."""
    cpu_ratio_over_best_usual: Ratio | None
    first_seconds: float
    """Of the first call: packing, compiling."""


@dataclass(frozen=True)
class Started:
    """A side that works."""

    score: Score
    first_seconds: float
    memory: Memory | None
    """On a GPU."""


class Timing:
    """Times sides of one case; knows the best matrix product once it was measured."""

    def __init__(self, parts: Parts, case: Case, turns: int):
        """Takes what names failures, and how many turns count."""
        # What is compiled too often would silently run as it is, and be measured as compiled.
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        self._parts = parts
        self._case = case
        self._turns = turns
        self._peak = math.nan
        self.memory: list[Memory] = []
        """On a GPU, of every side that was started."""

    @property
    def peak(self) -> float:
        """FLOP/s of the best matrix product; measured by itself where no side was timed before."""
        if math.isnan(self._peak):
            gemms = dict(candidates(self._case.device, self._case.dtype, self._case.shape == TINY))
            self._take_peak(gemms, interleave(self._runs(gemms), self._turns))
        return self._peak

    def compare(self, made: Sequence[Candidate], blocks: int, has_gemms: bool = False) -> list[Outcome]:
        """Builds and warms up sides, then times them turn by turn; matrix products take turns with them if asked to."""
        ids = make_blocks(self._case, blocks)
        started: dict[str, Started] = {}
        for candidate in made:
            if found := self._parts.attempt(candidate.name, partial(self._start, candidate, ids)):
                started[candidate.name] = found
        self.memory += [one.memory for one in started.values() if one.memory]
        gemms: dict[Gemm, Callable[[], object]] = {}
        if has_gemms:
            gemms = dict(candidates(self._case.device, self._case.dtype, self._case.shape == TINY))
        runs = self._runs({name: partial(one.score, ids) for name, one in started.items()}) | self._runs(gemms)
        samples = interleave(runs, self._turns)
        self._take_peak(gemms, samples)
        usual = min((name for name in started if name in USUAL), key=lambda name: median(samples[name]), default=None)
        return [
            self._outcome(candidate, ids, samples, usual, started[candidate.name].first_seconds)
            for candidate in made
            if candidate.name in started
        ]

    def _start(self, candidate: Candidate, ids: Tensor) -> Started:
        """Builds a side and calls it, once or on a GPU twice."""
        loaded = torch.cuda.memory_allocated() if self._case.is_gpu else 0
        score = candidate.make()
        seconds = timed(partial(score, ids), self._case.device).seconds
        return Started(score, seconds, on_gpu(candidate.name, score, ids, loaded) if self._case.is_gpu else None)

    def _runs(self, functions: Mapping[object, Callable[[], object]]) -> dict[str, Callable[[], Sample]]:
        return {str(name): partial(timed, function, self._case.device) for name, function in functions.items()}

    def _outcome(
        self,
        candidate: Candidate,
        ids: Tensor,
        samples: Mapping[str, Sequence[Sample]],
        usual: str | None,
        first: float,
    ) -> Outcome:
        own = samples[candidate.name]
        seconds = median(own)
        other = samples[usual] if usual and usual != candidate.name else None
        return Outcome(
            side=candidate.name,
            blocks=len(ids),
            settings=candidate.settings,
            seconds=seconds,
            cpu_seconds=median(own, "cpu_seconds"),
            tokens_per_second=ids.numel() / seconds,
            mfu=2 * self._case.shape.flops() * ids.numel() / seconds / self.peak,
            ratio_over_best_usual=ratio(other, own) if other else None,
            cpu_ratio_over_best_usual=ratio(other, own, "cpu_seconds") if other else None,
            first_seconds=first,
        )

    def _take_peak(self, gemms: Mapping[Gemm, object], samples: Mapping[str, Sequence[Sample]]) -> None:
        """The best of the products' medians, if there were any."""
        if not gemms:
            return
        rates = {gemm: gemm.flops / median(samples[str(gemm)]) for gemm in gemms}
        self._peak = max(rates.values())
        self._parts.figures["peak_flops_per_second"] = self._peak
        self._parts.figures["gemms"] = [asdict(gemm) | {"flops_per_second": rate} for gemm, rate in rates.items()]
        best = sorted(rates.items(), key=lambda item: -item[1])[:SHOWN_GEMMS]
        shown = "; ".join(f"{gemm}: {rate / 1e9:,.0f}" for gemm, rate in best)
        self._parts.note(f"The best of {len(rates)} matrix products, GFLOP/s: {shown}.")


def to_table(outcomes: Sequence[Outcome], title: str) -> Table:
    """A row a side."""
    header = ("", "ms", "CPU ms", "tokens/s", "MFU, %", "best usual over it", "in CPU time", "first call, s")
    rows = [
        (
            outcome.side,
            f"{1e3 * outcome.seconds:,.1f}",
            f"{1e3 * outcome.cpu_seconds:,.1f}",
            f"{outcome.tokens_per_second:,.0f}",
            f"{100 * outcome.mfu:.1f}",
            str(outcome.ratio_over_best_usual or 1),
            str(outcome.cpu_ratio_over_best_usual or 1),
            f"{outcome.first_seconds:.1f}",
        )
        for outcome in outcomes
    ]
    return Table(title, header, rows)
