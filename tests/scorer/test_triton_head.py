"""The fused head against a float64 log-softmax, on a GPU where there is one and else under Triton's interpreter.

The interpreter is numpy: it holds the values, the masks and the NaN handling to account, not the machine code. It
multiplies bfloat16 by its bit patterns, so that dtype needs a GPU.
"""

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from scorer.engine import triton_head, triton_kernels
from scorer.engine.triton_head import TILES, Tiles, TritonHead, default_tiles
from scorer.errors import ConfigurationError

ROOT = Path(__file__).parents[2]
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None
HAS_GPU = torch.cuda.is_available() and not IS_INTERPRETED
HAS_DESCRIPTORS = IS_INTERPRETED or (HAS_GPU and torch.cuda.get_device_capability()[0] >= 9)
DEVICE = "cuda" if HAS_GPU else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * HAS_GPU
SMALL = Tiles(32, 32, 16, warps=4, stages=2, splits=3)

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
runs_kernels = pytest.mark.skipif(
    not HAS_TRITON or not (HAS_GPU or IS_INTERPRETED),
    reason="no Triton, or no GPU for it: test_all_of_this_holds_under_the_interpreter runs these on the CPU",
)


def make_case(rows, vocabulary, width, dtype=torch.float32, seed=0):
    """Hidden states, weight, bias and targets, logits some 10 nats apart."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator) * 10 / width**0.5
    weight, bias = torch.randn(vocabulary, width, generator=generator), torch.randn(vocabulary, generator=generator)
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    return [*(tensor.to(DEVICE, dtype) for tensor in (hidden, weight, bias)), targets.to(DEVICE)]


def exact_nll(hidden, weight, bias, targets):
    """-log softmax in float64, written out: [N]."""
    logits = hidden.double().cpu().numpy() @ weight.double().cpu().numpy().T
    if bias is not None:
        logits = logits + bias.double().cpu().numpy()
    largest = logits.max(axis=1)
    normalizer = largest + np.log(np.exp(logits - largest[:, None]).sum(axis=1))
    return normalizer - logits[np.arange(len(logits)), targets.cpu().numpy()]


def assert_exact(case, tiles, atol=2e-5):
    hidden, weight, bias, targets = case
    found = TritonHead(weight, bias, tiles)(hidden, targets)
    assert (found.dtype, found.shape, found.device) == (torch.float32, targets.shape, hidden.device)
    np.testing.assert_allclose(found.cpu().numpy(), exact_nll(*case), rtol=1e-6, atol=atol)


@runs_kernels
class TestValues:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("descriptors", [False, True])
    @pytest.mark.parametrize("shape", [(1, 37, 16), (5, 500, 64), (70, 300, 48), (64, 96, 24)], ids=str)
    def test_equal_float64_for_any_shape(self, shape, descriptors, dtype):
        if descriptors and not HAS_DESCRIPTORS:
            pytest.skip("no tensor descriptors before compute capability 9.0")
        case = make_case(*shape, dtype)
        assert_exact(case, replace(SMALL, descriptors=descriptors))
        assert_exact([*case[:2], None, case[3]], replace(SMALL, descriptors=descriptors))

    @pytest.mark.parametrize("name", sorted(TILES))
    def test_equal_float64_for_all_tiles(self, name):
        if TILES[name].descriptors and not HAS_DESCRIPTORS:
            pytest.skip("no tensor descriptors before compute capability 9.0")
        if HAS_GPU and max(TILES[name].rows, TILES[name].tokens) > 128 and torch.cuda.get_device_capability()[0] != 9:
            pytest.skip("tiles for the shared memory of Hopper")
        assert_exact(make_case(130, 520, 72, torch.bfloat16 if HAS_GPU else torch.float16), TILES[name])

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_equal_float64_for_the_default_tiles(self, dtype):
        assert_exact(make_case(70, 700, 40, dtype), None)

    @pytest.mark.parametrize("splits", [1, 2, 5, 16, 40])
    def test_equal_float64_for_more_and_fewer_splits_than_tiles(self, splits):
        assert_exact(make_case(20, 500, 32), replace(SMALL, splits=splits))

    def test_equal_float64_with_the_loops_as_one(self):
        assert_exact(make_case(20, 500, 48), replace(SMALL, flatten=True))

    def test_first_last_and_boundary_targets(self):
        """500 ids are 16 tiles of 32; 3 splits begin at tiles 0, 5 and 10."""
        hidden, weight, bias, _ = make_case(10, 500, 32)
        targets = torch.tensor([0, 31, 32, 159, 160, 319, 320, 479, 480, 499], device=DEVICE)
        assert_exact([hidden, weight, bias, targets], SMALL)

    def test_all_logits_equal_is_log_of_their_number(self):
        hidden, weight, _, targets = make_case(5, 500, 32)
        found = TritonHead(weight * 0, None, SMALL)(hidden, targets)
        np.testing.assert_allclose(found.cpu().numpy(), np.log(500), rtol=1e-7)

    @pytest.mark.parametrize("size", [1e2, 1e4])
    def test_extreme_logits(self, size):
        """Float32 products of that size; a row whose target has all probability, and one whose target has none."""
        hidden, weight, _, _ = make_case(5, 500, 32)
        hidden = hidden * size / 10
        best = (hidden.double() @ weight.double().T).argmax(1)
        found = TritonHead(weight, None, SMALL)(hidden, best)
        assert (found >= -1e-6 * size).all()
        assert_exact([hidden, weight, None, best], SMALL, atol=1e-6 * size)
        assert_exact([hidden, weight, None, (best + 1) % 500], SMALL, atol=1e-6 * size)

    def test_no_rows(self):
        hidden, weight, bias, targets = make_case(5, 50, 16)
        assert TritonHead(weight, bias, SMALL)(hidden[:0], targets[:0]).shape == (0,)

    def test_strided_and_unaligned_inputs(self):
        _, weight, bias, targets = make_case(5, 50, 16, torch.float16)
        memory = torch.randn(10 * 16 + 4, device=DEVICE).half()
        tiles = [SMALL] + [replace(SMALL, descriptors=True)] * HAS_DESCRIPTORS
        for hidden in (memory[4:].view(10, 16)[:5], memory[4:].view(10, 16)[::2], memory[:160].view(16, 10).T[:5]):
            for choice in tiles:
                assert_exact([hidden, weight, bias, targets], choice, atol=1e-4)
                assert_exact([hidden, weight.T.contiguous().T, bias, targets], choice, atol=1e-4)


@runs_kernels
class TestBytes:
    def test_are_the_same_in_every_run(self):
        hidden, weight, bias, targets = make_case(70, 300, 48)
        first, second = (TritonHead(weight, bias, SMALL)(hidden, targets) for _ in range(2))
        assert torch.equal(first, second)

    def test_of_a_row_do_not_depend_on_the_other_rows(self):
        hidden, weight, bias, targets = make_case(70, 500, 48)
        head = TritonHead(weight, bias, SMALL)
        together = head(hidden, targets)
        assert torch.equal(head(hidden[:40], targets[:40]), together[:40])
        assert torch.equal(head(hidden[32:33], targets[32:33]), together[32:33])

    def test_inputs_are_left_alone(self):
        case = make_case(20, 100, 32)
        before = [tensor.clone() for tensor in case]
        hidden, weight, bias, targets = case
        TritonHead(weight, bias, SMALL)(hidden, targets)
        assert all(torch.equal(*pair) for pair in zip(case, before, strict=True))


@runs_kernels
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the NaNs that are meant
class TestNotFinite:
    def test_nan_in_a_hidden_row_shows_in_that_row_alone(self):
        hidden, weight, bias, targets = make_case(20, 500, 32)
        hidden[7, 3] = torch.nan
        found = TritonHead(weight, bias, SMALL)(hidden, targets)
        assert found.isnan().nonzero().flatten().tolist() == [7]

    @pytest.mark.parametrize("token", [0, 160, 499])
    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_nan_or_infinity_in_a_bias_shows_in_all_rows(self, token, value):
        hidden, weight, bias, targets = make_case(20, 500, 32)
        bias[token] = value
        assert not TritonHead(weight, bias, SMALL)(hidden, targets).isfinite().any()

    @pytest.mark.parametrize("token", [0, 160, 499])
    def test_nan_in_a_weight_shows_in_all_rows(self, token):
        hidden, weight, bias, targets = make_case(20, 500, 32)
        weight[token, 5] = torch.nan
        assert TritonHead(weight, bias, SMALL)(hidden, targets).isnan().all()

    def test_infinity_in_a_weight_shows_where_the_plain_way_shows_it(self):
        """+inf in a logit is NaN in a log-softmax; -inf is a probability of 0, and leaves the other ids as they are."""
        hidden, weight, bias, targets = make_case(20, 500, 32)
        weight[160, 5], targets[:] = torch.inf, 3
        targets[10:] = 160
        logits = (hidden @ weight.T + bias).double().cpu()
        expected = -torch.log_softmax(logits, dim=1).gather(1, targets.cpu()[:, None])[:, 0]
        found = TritonHead(weight, bias, SMALL)(hidden, targets).cpu()
        assert 0 < expected[:10].isfinite().sum() < 10
        assert torch.equal(found.isfinite(), expected.isfinite())
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=2e-5, equal_nan=True)

    def test_a_whole_split_of_impossible_ids_leaves_the_others_as_they_are(self):
        hidden, weight, bias, targets = make_case(20, 500, 32)
        bias[:160] = -torch.inf
        assert_exact([hidden, weight, bias, targets % 300 + 160], SMALL)

    @pytest.mark.parametrize("target", [-1, 500, 511, 2**32 + 5])
    def test_a_target_outside_the_vocabulary_is_nan(self, target):
        hidden, weight, bias, targets = make_case(20, 500, 32)
        targets[3] = target
        found = TritonHead(weight, bias, SMALL)(hidden, targets)
        assert found.isnan().nonzero().flatten().tolist() == [3]


class TestRefusals:
    @pytest.mark.skipif(not HAS_TRITON or IS_INTERPRETED, reason="no Triton, or its interpreter, which takes the CPU")
    def test_a_model_that_is_not_on_a_gpu(self):
        with pytest.raises(ConfigurationError, match="runs on CUDA devices, and the model is on 'cpu'"):
            TritonHead(torch.zeros(50, 16))

    def test_no_triton(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "triton", None)
        with pytest.raises(ConfigurationError, match=r"needs Triton.*install a CUDA build of torch"):
            TritonHead(torch.zeros(50, 16))

    def test_the_engine_can_be_imported_where_triton_cannot(self):
        code = "import sys; sys.modules['triton'] = None; from scorer.engine import triton_head, triton_kernels"
        finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
        assert finished.returncode == 0, finished.stderr

    @runs_kernels
    def test_other_dtypes(self):
        with pytest.raises(ConfigurationError, match=r"not torch\.float64"):
            TritonHead(torch.zeros(50, 16, device=DEVICE).double())

    @runs_kernels
    def test_descriptors_over_rows_that_are_not_aligned(self):
        with pytest.raises(ConfigurationError, match="multiple of 16 bytes"):
            TritonHead(torch.zeros(50, 18, device=DEVICE).half(), None, replace(SMALL, descriptors=True))

    @runs_kernels
    def test_inputs_that_do_not_fit_the_weight(self):
        hidden, weight, bias, targets = make_case(5, 50, 16)
        head = TritonHead(weight, bias, SMALL)
        for wrong in (hidden[:, :8], hidden[:4], hidden.half(), hidden[0]):
            with pytest.raises(ValueError, match="head"):
                head(wrong, targets)
        with pytest.raises(ValueError, match="head"):
            head(hidden, targets.int())

    def test_default_tiles_need_no_gpu_to_be_chosen(self):
        assert default_tiles(torch.zeros(50, 16)) == TILES["pointers-64x64"]
        assert default_tiles(torch.zeros(50, 16).bfloat16()) == TILES["pointers-128x128"]


def compile_for(capability, tiles, dtype, bias):
    """Compiles the kernel for a GPU that need not be here; returns what Triton made of it."""
    import triton  # noqa: PLC0415
    from triton.backends.compiler import GPUTarget  # noqa: PLC0415
    from triton.compiler import ASTSource  # noqa: PLC0415

    kernel = triton_kernels.partial_nll
    constants = {
        "width": 512,
        "splits": tiles.splits,
        "has_bias": bias,
        "uses_descriptors": tiles.descriptors,
        "flatten": tiles.flatten,
        "precision": "ieee",
        "tile_rows": tiles.rows,
        "tile_tokens": tiles.tokens,
        "tile_width": tiles.width,
    }
    types = {"targets": "*i64", "rows": "i32", "vocabulary": "i32", "row_tiles": "i32", "bias": f"*{dtype}"}
    types |= dict.fromkeys(("references", "totals", "picks"), "*fp32") | dict.fromkeys(constants, "constexpr")
    for name, rows in (("hidden", tiles.rows), ("weight", tiles.tokens)):
        types[name] = f"tensordesc<{dtype}[{rows}, {tiles.width}]>" if tiles.descriptors else f"*{dtype}"
    names = kernel.arg_names
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in names if types[name].startswith("*")}
    source = ASTSource(kernel, {name: types[name] for name in names}, constants, aligned)
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@needs_triton
@pytest.mark.slow
@pytest.mark.skipif(IS_INTERPRETED, reason="the interpreter compiles nothing")
class TestMachineCode:
    """What can be said of the kernel for GPUs that are not here: it compiles, to tensor cores, and fits."""

    @pytest.fixture(autouse=True)
    def _fresh_cache(self, tmp_path, monkeypatch):
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    @pytest.mark.parametrize("name", sorted(set(TILES) - {"pointers-64x64"}))
    def test_for_hopper_multiplies_on_its_tensor_cores(self, name):
        compiled = compile_for(90, TILES[name], "bf16", bias=True)
        assert "wgmma.mma_async" in compiled.asm["ptx"]
        assert ("cp.async.bulk.tensor" in compiled.asm["ptx"]) == TILES[name].descriptors
        assert compiled.metadata.shared <= 232_448

    @pytest.mark.parametrize("capability", [80, 89, 120])
    def test_for_other_gpus_multiplies_on_their_tensor_cores(self, capability):
        compiled = compile_for(capability, TILES["pointers-128x128"], "bf16", bias=False)
        assert "mma.sync" in compiled.asm["ptx"]
        assert compiled.metadata.shared <= 101_376

    @pytest.mark.parametrize("capability", [80, 90])
    def test_in_float32_multiplies_exactly(self, capability):
        compiled = compile_for(capability, TILES["pointers-64x64"], "fp32", bias=True)
        assert "mma" not in compiled.asm["ptx"].replace("fma", "")
        assert compiled.metadata.shared <= 101_376


@needs_triton
@pytest.mark.skipif(IS_INTERPRETED, reason="this is the interpreter")
def test_all_of_this_holds_under_the_interpreter():
    """The interpreter is chosen before the kernels are imported, so in a process of its own."""
    options = ["-q", "-k", "not import", "-p", "no:cacheprovider", "-p", "no:xdist"]
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, *options],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "passed" in finished.stdout


def test_parts_are_combined_where_probability_is_all_on_the_target():
    """Logits of 1e4: log2 of the sum and the target's logit agree to 8 digits, and their difference is what is left."""
    references, totals = torch.tensor([[14427.0], [14400.0]]), torch.tensor([[1.0], [0.5]])
    picks = torch.tensor([[14427.0 * np.log(2)], [0.0]], dtype=torch.float64)
    found = triton_head._combine(references, totals, picks)
    np.testing.assert_allclose(found, [2.0**-28], rtol=1e-2)
