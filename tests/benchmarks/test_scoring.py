"""The scoring benchmark: its figures, its bounds, its reading of memory. Nothing here depends on how fast it is."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.interleaved import Report
from benchmarks.parts import Parts
from benchmarks.scoring import PARTS
from benchmarks.scoring_bounds import Bound, Figures, bounds_for, share
from benchmarks.scoring_growth import FACTORS, places
from benchmarks.scoring_heads import ALL_LOGITS
from benchmarks.scoring_memory import on_cpu, read_status
from benchmarks.scoring_precision import ALPHAS, compare, exact_nll
from benchmarks.scoring_sides import OURS, TINY, USUAL, Case, Shape, build_alm, make_blocks, make_side
from scorer.engine.heads import HEADS
from scorer.engine.reference import reference_nll

ROOT = Path(__file__).parents[2]
KEPT = Figures(speedup=1.6, mfu=0.8, memory_share=0.05, error_ratio=1.2, head_speedup=1.1)
STATUS = "Name:\tpython\nVmHWM:\t  2048 kB\nVmRSS:\t  1024 kB\nThreads:\t3\n"


@pytest.fixture
def case():
    return Case(TINY, torch.device("cpu"), torch.float32)


def test_a_token_of_the_papers_alm_costs_92_4_mflop_a_direction():
    shape = Shape()
    assert shape.body_flops() == 12 * 6 * 512**2 * 2
    assert shape.attention_flops() == 6 * 512 * 512 * 2
    assert shape.head_flops() == 2 * 512 * 50265
    assert shape.flops() == pytest.approx(92.4e6, abs=5e4)


def test_matrix_flops_are_those_that_torch_counts(case):
    """All but attention, of which torch counts both halves of the block."""
    from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: PLC0415
    from torch.utils.flop_counter import FlopCounterMode  # noqa: PLC0415

    ids = make_blocks(case, 2)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        build_alm(case).left_to_right(input_ids=ids, use_cache=False)
    expected = TINY.body_flops() + 2 * TINY.attention_flops() + TINY.head_flops()
    assert counter.get_total_flops() / ids.numel() == pytest.approx(expected)


@pytest.mark.parametrize("name", [OURS, *(name for name, usual in USUAL.items() if not usual.is_compiled)])
def test_every_side_gives_the_reference_in_the_blocks_own_order(case, name):
    alm = build_alm(case)
    ids = make_blocks(case, 2)
    forward, backward = make_side(name, alm)(ids)
    with torch.inference_mode():
        expected = reference_nll(alm.left_to_right, ids), reference_nll(alm.right_to_left, ids.flip(1)).flip(1)
    torch.testing.assert_close(forward, expected[0], equal_nan=True, rtol=0, atol=1e-4)
    torch.testing.assert_close(backward, expected[1], equal_nan=True, rtol=0, atol=1e-4)


def test_logits_spread_as_a_trained_models_do(case):
    logits = build_alm(case).left_to_right(input_ids=make_blocks(case, 2)).logits
    assert float(logits.std()) == pytest.approx(3.0, rel=0.1)


def test_an_exact_side_has_no_error_and_a_shifted_one_its_shift(case):
    exact = exact_nll(build_alm(replace(case, dtype=torch.float64)), make_blocks(case, 2))
    assert all(nll.dtype == torch.float64 for nll in exact)
    same = compare("same", torch.float64, exact, exact)
    assert same.nll_max_error == 0
    assert all(spread.max < 1e-6 for spread in same.total_variation.values())  # perplexities are float32
    # All NLLs of a block larger by the same amount: the same law without alpha, and with one, since P is normalized.
    shifted = compare("shifted", torch.float32, [nll + 0.5 for nll in exact], exact)
    assert shifted.nll_mean_error == pytest.approx(0.5)
    assert shifted.total_variation["0"].max < 1e-6
    assert list(shifted.total_variation) == [f"{alpha:g}" for alpha in ALPHAS]


def test_bounds_are_kept_or_missed_one_by_one():
    assert all(bound.is_kept() for bound in bounds_for("cpu", "float32", KEPT))
    for name, worse in {"speedup": 1.4, "mfu": 0.7, "memory_share": 0.11, "error_ratio": 2.1}.items():
        missed = [
            bound for bound in bounds_for("cpu", "float32", replace(KEPT, **{name: worse})) if not bound.is_kept()
        ]
        assert [bound.value for bound in missed] == [worse]
        assert "FAIL" in str(missed[0])


def test_what_was_not_measured_is_not_kept():
    (bound, *_) = bounds_for("cpu", "float32", replace(KEPT, speedup=None))
    assert not bound.is_kept()
    assert "not measured" in str(bound)


def test_bounds_of_a_gpu_have_aims_and_other_dtypes_have_none():
    bounds = bounds_for("cuda", "bfloat16", KEPT)
    assert [bound.is_kept() for bound in bounds] == [True, False, True]
    assert str(bounds[0]).endswith("at least 0.55: pass; aim 0.7: reached")
    assert bounds_for("cpu", "bfloat16", KEPT) == bounds_for("cuda", "float32", KEPT) == ()
    assert {bound.part for bound in bounds} <= set(PARTS)


def test_a_limit_itself_is_kept():
    assert Bound("sides", "x", 1.5, 1.5).is_kept()
    assert Bound("memory", "x", 0.1, 0.1, is_least=False).is_kept()
    assert share(None, 1.0) is share(1.0, None) is share(1.0, 0) is None
    assert share(1.0, 4.0) == 0.25


def test_memory_is_read_in_bytes():
    assert read_status("VmHWM", STATUS) == 2 * 2**20
    assert read_status("VmRSS", STATUS) == 2**20
    with pytest.raises(ValueError, match="VmSwap"):
        read_status("VmSwap", STATUS)


def test_peak_is_that_of_the_call_alone(tmp_path):
    (tmp_path / "status").write_text(STATUS)

    def call():
        assert (tmp_path / "clear_refs").read_text() == "5"  # the peak was reset before
        (tmp_path / "status").write_text(STATUS.replace("2048", "5120"))

    assert on_cpu(call, tmp_path) == (2**20, 4 * 2**20)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux resets a peak")
def test_a_tensor_of_64_mib_shows_in_the_peak_though_it_is_gone():
    size = 64 * 2**20
    _, extra = on_cpu(lambda: torch.ones(size, dtype=torch.uint8).max())
    assert 0.95 * size < extra < 1.5 * size  # the kernel counts pages in batches


def test_growth_changes_one_factor_at_a_time():
    found = list(places(Shape(), "cpu"))
    assert list(dict.fromkeys(place.factor for place in found)) == list(FACTORS)
    for place in found:
        assert place.shape.width == 64 * place.shape.heads
        changed = {
            name
            for name in ("block_length", "vocabulary", "width")
            if getattr(place.shape, name) != getattr(Shape(), name)
        }
        assert changed <= {place.factor}


def test_what_fails_is_named_and_what_is_done_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    report = Report("title", "benchmarks.scoring", [], "method", ["torch"])
    parts = Parts(report, tmp_path / "results.md", "scoring", minutes=1)
    assert parts.attempt("a part", lambda: 1 / 0) is None
    assert Parts(report, None, "scoring", minutes=0).attempt("late", lambda: 1) is None
    parts.figures["answer"] = 42
    parts.save()
    for path in (tmp_path / "results.json", tmp_path / "out" / "scoring.json"):
        figures = json.loads(path.read_text())
        assert figures["answer"] == 42
        assert figures["notes"][0] == "a part left out: ZeroDivisionError: division by zero"
        assert figures["notes"][1].startswith("late left out: TimeoutError: begun too late")


@pytest.mark.slow
def test_a_tiny_run_of_everything(tmp_path):
    output, plot = tmp_path / "scoring.md", tmp_path / "growth.png"
    words = ["--quick", "--device", "cpu", "--turns", "1", "--grow", "--output", output, "--plot", plot]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.scoring", *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert output.read_text().count("\n## ") >= 6
    check(json.loads(output.with_suffix(".json").read_text()))


def check(figures):
    usual = [name for name, one in USUAL.items() if not one.is_compiled]
    assert figures["flops_per_token_and_direction"] == TINY.flops()
    assert figures["peak_flops_per_second"] == max(gemm["flops_per_second"] for gemm in figures["gemms"])
    assert [one["side"] for one in figures["sides"]] == [OURS, *usual]
    for one in figures["sides"]:
        assert {"tokens_per_second", "mfu", "peak_extra_bytes", "ratio_over_best_usual", "first_seconds"} <= set(one)
        rate = 2 * one["tokens_per_second"] * TINY.flops() / figures["peak_flops_per_second"]
        assert one["mfu"] == pytest.approx(rate)
        assert one["peak_extra_bytes"] > 0
    assert sum(one["ratio_over_best_usual"] is None for one in figures["sides"]) == 1
    precise = {(one["side"], one["dtype"]): one for one in figures["precision"]}
    assert {side for side, dtype in precise if dtype == "float32"} >= {OURS, *usual}
    for (_, dtype), one in precise.items():
        assert 0 < one["nll_mean_error"] <= one["nll_max_error"] < (1e-3 if dtype == "float32" else 1.0)
        assert set(one["total_variation"]) == {"0", "0.001", "0.005"}
        assert all(0 <= spread["mean"] <= spread["max"] <= 1 for spread in one["total_variation"].values())
    heads = {one["head"]: one for one in figures["heads"]}
    assert ALL_LOGITS in heads
    assert any(name in HEADS and one["is_ours"] for name, one in heads.items())
    assert {one["factor"] for one in figures["growth"]} == set(FACTORS)
    assert all(math.isfinite(one["tokens_per_second"]) for one in figures["growth"] + figures["variants"])
    assert [set(one) >= {"what", "value", "limit", "is_kept"} for one in figures["verdicts"]] == [True] * 4
    # The one head that needs a GPU is named, and nothing else.
    assert [note for note in figures["notes"] if " left out: " in note and "triton" not in note] == []
