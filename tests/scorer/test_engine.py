"""The engine's parts: heads, attention, the twin of a model's body, and what its results may depend on."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from transformers.pytorch_utils import Conv1D

from scorer.alm import BidirectionalALM
from scorer.engine import Engine, Settings, reference_nll
from scorer.engine.attention import causal_attention
from scorer.engine.heads import HEADS
from scorer.engine.packed import PackedLinear, can_pack
from scorer.errors import ConfigurationError
from scorer.scoring import score_nll

CPU_HEADS = ("packed", "chunked", "rows")
PLAIN = Settings(head="chunked", compiled=False, micro_batch=2)

needs_packing = pytest.mark.skipif(not can_pack(torch.device("cpu"), torch.float32), reason="no oneDNN in this torch")


def make_gpt2(vocabulary=500, seed=0, **changes):
    sizes = {"n_positions": 512, "n_embd": 32, "n_layer": 2, "n_head": 2} | changes
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, **sizes)).eval()


def make_ids(rows, length, vocabulary=500, seed=1):
    return torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))


def exact_nll(hidden, weight, bias, targets):
    """-log softmax(hidden · weight.T + bias)[target], in float64, written out."""
    logits = hidden.double().numpy() @ weight.double().numpy().T
    if bias is not None:
        logits = logits + bias.double().numpy()
    largest = logits.max(axis=1, keepdims=True)
    normalizer = largest[:, 0] + np.log(np.exp(logits - largest).sum(axis=1))
    return normalizer - logits[np.arange(len(logits)), targets.numpy()]


class TestHeads:
    @pytest.mark.parametrize("name", CPU_HEADS)
    @pytest.mark.parametrize(("rows", "vocabulary"), [(1, 7), (3, 1536), (255, 1537), (257, 3100), (20, 9000)])
    @pytest.mark.parametrize("has_bias", [False, True])
    def test_equal_float64(self, name, rows, vocabulary, has_bias):
        """Fewer rows and columns than a chunk, as many, and one more; targets first, last and at chunks' borders."""
        generator = torch.Generator().manual_seed(rows)
        hidden, weight = (torch.randn(size, 24, generator=generator) for size in (rows, vocabulary))
        bias = torch.randn(vocabulary, generator=generator) if has_bias else None
        targets = torch.randint(0, vocabulary, (rows,), generator=generator)
        borders = [id for id in (0, vocabulary - 1, 1535, 1536, 8191, 8192) if id < vocabulary]
        targets[: len(borders)] = torch.tensor(borders)[:rows]
        with torch.inference_mode():
            found = HEADS[name](weight, bias)(hidden, targets)
        assert found.dtype == torch.float32
        np.testing.assert_allclose(found.numpy(), exact_nll(hidden, weight, bias, targets), rtol=0, atol=2e-5)

    @pytest.mark.parametrize("name", CPU_HEADS)
    def test_bear_huge_logits(self, name):
        hidden, weight = torch.full((2, 4), 50.0), torch.zeros(3000, 4)
        weight[5], weight[2000] = 50.0, -50.0  # logits 1e4 and -1e4
        with torch.inference_mode():
            found = HEADS[name](weight, None)(hidden, torch.tensor([5, 2000]))
        np.testing.assert_allclose(found.numpy(), [0.0, 2e4], atol=1e-2)

    @pytest.mark.parametrize("name", CPU_HEADS)
    def test_bear_what_all_logits_of_a_token_have_in_common(self, name):
        """Trained models' may all be far below 0."""
        generator = torch.Generator().manual_seed(1)
        hidden, weight = torch.randn(40, 24, generator=generator), torch.randn(3100, 24, generator=generator)
        hidden[:, 0], weight[:, 0] = 10.0, -30.0
        targets = torch.randint(0, 3100, (40,), generator=generator)
        with torch.inference_mode():
            found = HEADS[name](weight, None)(hidden, targets)
        np.testing.assert_allclose(found.numpy(), exact_nll(hidden, weight, None, targets), rtol=0, atol=2e-4)

    @pytest.mark.parametrize("name", CPU_HEADS)
    def test_take_a_bias_of_minus_infinity_for_an_id_that_cannot_come(self, name):
        generator = torch.Generator().manual_seed(1)
        hidden, weight = torch.randn(300, 24, generator=generator), torch.randn(3100, 24, generator=generator)
        bias = torch.randn(3100, generator=generator)
        bias[[0, 7, 1536, 3099]] = -math.inf
        targets = torch.randint(8, 1500, (300,), generator=generator)
        with torch.inference_mode():
            found = HEADS[name](weight, bias)(hidden, targets)
        np.testing.assert_allclose(found.numpy(), exact_nll(hidden, weight, bias, targets), rtol=0, atol=2e-5)

    @needs_packing
    def test_packed_gives_a_token_the_same_bytes_beside_others_that_overflow(self):
        generator = torch.Generator().manual_seed(1)
        hidden, weight = torch.randn(300, 24, generator=generator), torch.randn(3100, 24, generator=generator)
        targets = torch.randint(0, 3100, (300,), generator=generator)
        huge = hidden.clone()
        huge[5], huge[299] = 100.0, -100.0
        with torch.inference_mode():
            head = HEADS["packed"](weight, None)
            alone, beside = head(hidden, targets), head(huge, targets)
        np.testing.assert_allclose(beside.numpy(), exact_nll(huge, weight, None, targets), rtol=2e-6, atol=2e-5)
        ordinary = torch.ones(300, dtype=torch.bool)
        ordinary[[5, 299]] = False
        assert torch.equal(alone[ordinary], beside[ordinary])

    @needs_packing
    def test_packed_gives_a_token_the_same_bytes_wherever_it_stands(self):
        """Where the last few ids, which fill no vector, are nearly all of the sum."""
        generator = torch.Generator().manual_seed(1)
        hidden, weight = torch.randn(256, 24, generator=generator), torch.randn(1543, 24, generator=generator)
        weight[:1536] *= 0.01
        targets = torch.randint(1536, 1543, (256,), generator=generator)
        with torch.inference_mode():
            head = HEADS["packed"](weight, None)
            together = head(hidden, targets)
            for count in range(1, 256):
                assert torch.equal(head(hidden[:count], targets[:count]), together[:count])

    @pytest.mark.parametrize("name", CPU_HEADS)
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_never_hide_what_is_not_finite(self, name, value):
        weight = torch.randn(3000, 4)
        weight[2500, 1] = value
        with torch.inference_mode():
            found = HEADS[name](weight, None)(torch.ones(3, 4), torch.tensor([0, 1, 2500]))
        assert not found.isfinite().any()

    def test_unknown_ones_are_an_error_that_names_those_there_are(self):
        with pytest.raises(ConfigurationError, match=r"'gold'.*packed"):
            Engine(make_gpt2(), Settings("gold", False, 1))

    def test_packed_refuses_what_the_cpu_cannot_multiply(self):
        with pytest.raises(ConfigurationError, match="float64"):
            HEADS["packed"](torch.zeros(8, 8, dtype=torch.float64), None)


class Largest(TorchDispatchMode):
    """Remembers the elements of the largest tensor that any operation gives."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


@pytest.mark.parametrize("settings", [None, PLAIN], ids=["default", "chunked"])
def test_never_makes_all_logits(settings):
    model, ids = make_gpt2(vocabulary=20_000), make_ids(4, 512, 20_000)
    engine = Engine(model, settings)
    with Largest() as largest:
        engine(ids)
    weights = 20_000 * 32
    assert largest.elements <= max(512 * 8192, weights)
    assert largest.elements < 4 * 512 * 20_000 / 8


class TestAttention:
    @pytest.mark.parametrize("length", [1, 2, 127, 128, 129, 300, 512])
    def test_equals_float64(self, length):
        generator = torch.Generator().manual_seed(length)
        query, key, value = (torch.randn(2, 3, length, 8, generator=generator) for _ in range(3))
        found = causal_attention(query, key, value, 0.3).numpy()
        scores = np.einsum("bhqd,bhkd->bhqk", *(part.double().numpy() for part in (query, key))) * 0.3
        scores[..., np.triu_indices(length, 1)[0], np.triu_indices(length, 1)[1]] = -np.inf
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        expected = np.einsum("bhqk,bhkd->bqhd", weights, value.double().numpy())
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)

    def test_of_grouped_heads_and_sliding_windows_is_the_models_own(self):
        sizes = {"vocab_size": 500, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
        for model in (
            LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval(),
            MistralForCausalLM(MistralConfig(**sizes, **heads, sliding_window=20)).eval(),
        ):
            ids = make_ids(2, 100)
            with torch.no_grad():
                expected = reference_nll(model, ids)
            torch.testing.assert_close(Engine(model)(ids), expected, rtol=0, atol=1e-5, equal_nan=True)


class TestTwin:
    @needs_packing
    def test_is_packed_and_leaves_the_model_as_it_was(self):
        model = make_gpt2()
        kinds = [type(module) for module in model.modules()]
        before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
        packed = []
        engine = Engine(model)
        model_forward = PackedLinear.forward
        try:
            PackedLinear.forward = lambda self, inputs: (packed.append(self), model_forward(self, inputs))[1]
            engine(make_ids(1, 64))
        finally:
            PackedLinear.forward = model_forward
        assert len(packed) == 2 * 4 + 1  # four linear layers in each of two, and one chunk of the vocabulary
        assert [type(module) for module in model.modules()] == kinds
        assert Conv1D in kinds
        assert model.config._attn_implementation == "sdpa"
        assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before

    @needs_packing
    def test_that_does_not_compute_the_same_is_not_used(self, monkeypatch, caplog):
        forward = PackedLinear.forward
        monkeypatch.setattr(PackedLinear, "forward", lambda self, inputs: forward(self, inputs) * 1.01)
        model, ids = make_gpt2(), make_ids(2, 64)
        found = Engine(model, PLAIN)(ids)
        assert "hidden states differ" in caplog.text
        with torch.no_grad():
            torch.testing.assert_close(found, reference_nll(model, ids), rtol=0, atol=1e-5, equal_nan=True)

    def test_of_a_model_in_training_mode_drops_nothing(self):
        model, ids = make_gpt2().train(), make_ids(2, 64)
        assert torch.equal(Engine(model)(ids)[:, 1:], Engine(model)(ids)[:, 1:])
        assert model.training


class TestFloat8:
    def test_is_off_unless_asked_for(self):
        for device in ("cpu", "cuda"):
            for dtype in (torch.float32, torch.bfloat16):
                assert not Settings.default(torch.device(device), dtype).float8

    def test_is_near_bfloat16(self):
        model, ids = make_gpt2(n_embd=64).to(torch.bfloat16), make_ids(2, 128)
        exact, rounded = (Engine(model, Settings("chunked", False, 1, float8))(ids)[:, 1:] for float8 in (False, True))
        assert not torch.equal(exact, rounded)
        assert (exact - rounded).abs().mean() < 0.05


class TestBytes:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("length", [512, 96])
    def test_of_a_block_do_not_depend_on_the_others_of_its_batch(self, dtype, length):
        model, ids = make_gpt2(vocabulary=3100, n_embd=64).to(dtype), make_ids(11, length, 3100)
        engine = Engine(model)
        together = engine(ids)[:, 1:]
        assert torch.equal(engine(ids.flip(0))[:, 1:].flip(0), together)
        assert torch.equal(torch.cat([engine(row[None]) for row in ids])[:, 1:], together)
        assert torch.equal(torch.cat([engine(ids[:4]), engine(ids[4:])])[:, 1:], together)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(("rows", "length"), [(2, 512), (7, 512), (5, 77)])
    def test_do_not_depend_on_threads(self, dtype, rows, length):
        """Fewer blocks than threads, more, and more than go round; ids that leave some of the last chunk over."""
        model, ids = make_gpt2(vocabulary=3100, n_embd=64).to(dtype), make_ids(rows, length, 3100)
        engine, threads, found = Engine(model), torch.get_num_threads(), []
        try:
            for count in (1, 2, 3, 5):
                torch.set_num_threads(count)
                found.append(engine(ids)[:, 1:])
        finally:
            torch.set_num_threads(threads)
        for other in found[1:]:
            assert torch.equal(found[0], other)


class TestAlm:
    def test_is_prepared_once_and_again_when_a_weight_changes(self):
        alm = BidirectionalALM(make_gpt2(seed=0), make_gpt2(seed=1))
        ids = make_ids(1, 64)
        first = alm.engines()
        before = score_nll(alm, ids)
        assert alm.engines() is first
        with torch.no_grad():
            alm.left_to_right.transformer.h[0].mlp.c_fc.weight.mul_(3.0)
        assert alm.engines() is not first
        after = score_nll(alm, ids)
        assert not torch.equal(before[0][:, 1:], after[0][:, 1:])
        assert torch.equal(before[1][:, :-1], after[1][:, :-1])
        assert {engine.body(ids).dtype for engine in alm.to(torch.bfloat16).engines()} == {torch.bfloat16}

    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda alm: pickle.loads(pickle.dumps(alm))])
    def test_can_be_copied_after_it_scored(self, duplicate):
        alm, ids = BidirectionalALM(make_gpt2(seed=0), make_gpt2(seed=1)), make_ids(1, 64)
        expected = score_nll(alm, ids)
        for found, wanted in zip(score_nll(duplicate(alm), ids), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("count", [1, 4, 6])
def test_on_a_gpu_batches_are_filled_up_to_one_shape(monkeypatch, count):
    """The kernels are chosen by it. A GPU's way is taken here by a model on the CPU."""
    model, ids, shapes = make_gpt2(), make_ids(count, 64), []
    engine = Engine(model, Settings("chunked", compiled=False, micro_batch=4))
    with torch.no_grad():
        expected = reference_nll(model, ids)
    body = engine.body
    monkeypatch.setattr(engine, "_is_cuda", True)
    monkeypatch.setattr(engine, "body", lambda some: (shapes.append(tuple(some.shape)), body(some))[1])
    torch.testing.assert_close(engine(ids), expected, rtol=0, atol=1e-5, equal_nan=True)
    assert set(shapes) == {(4, 64)}


@pytest.mark.slow
def test_compiled_equals_the_reference():
    """The way of a GPU, compiled for this CPU."""
    model, ids = make_gpt2(vocabulary=9000), make_ids(3, 128, 9000)
    engine = Engine(model, Settings(head="chunked", compiled=True, micro_batch=4))
    with torch.no_grad():
        torch.testing.assert_close(engine(ids), reference_nll(model, ids), rtol=0, atol=1e-4, equal_nan=True)
