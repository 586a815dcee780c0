"""Per-token scoring: the fast path against the plain one and against float64, over several architectures."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    OPTConfig,
    Qwen2Config,
    RobertaConfig,
)

from pipeline.scoring import score_rows
from scorer.alm import BidirectionalALM, check_alm, fingerprint_alm, load_alm
from scorer.engine import Engine, reference_nll
from scorer.errors import ConfigurationError, ScoringError
from scorer.scoring import MAX_NLL, score, score_nll, to_perplexity
from scorer.vocabulary import Vocabulary

ROOT = Path(__file__).parents[2]
VOCABULARY = 500
LLAMA_LIKE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "head_dim": 16,
}
CONFIGS = {
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_positions=512, n_embd=32, n_layer=1, n_head=2),
    "llama": LlamaConfig(**LLAMA_LIKE),
    "qwen2": Qwen2Config(**LLAMA_LIKE),
    "gpt_neox": GPTNeoXConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    ),
    "opt": OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=512,
        word_embed_proj_dim=32,
    ),
    "bert as a decoder": BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        is_decoder=True,
    ),
    "granite, which scales its logits": GraniteConfig(
        **{k: v for k, v in LLAMA_LIKE.items() if k != "head_dim"}, logits_scaling=0.25
    ),
    "gemma2, which caps its logits": Gemma2Config(**LLAMA_LIKE, final_logit_softcapping=2.0),
}
FAST = ("gpt2", "llama", "qwen2", "gpt_neox", "opt")


def make_model(config, seed=0, scale=4.0):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model


def make_ids(rows=3, length=64, seed=1):
    """Framed rows of ordinary ids."""
    ids = torch.randint(4, VOCABULARY - 1, (rows, length), generator=torch.Generator().manual_seed(seed))
    ids[:, 0], ids[:, -1] = 0, 2
    return ids


def make_alm(name="gpt2", scale=4.0):
    return BidirectionalALM(make_model(CONFIGS[name], 0, scale), make_model(CONFIGS[name], 1, scale))


@torch.no_grad()
def exact_nll(model, ids):
    """-log p of each next token in float64, the log-sum-exp written out: float64 [B, T - 1]."""
    logits = model.double()(input_ids=ids).logits.numpy()[:, :-1]
    model.float()
    largest = logits.max(axis=-1)
    normalizer = largest + np.log(np.exp(logits - largest[..., None]).sum(axis=-1))
    return normalizer - np.take_along_axis(logits, ids.numpy()[:, 1:, None], axis=2)[..., 0]


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def architecture(request):
    return request.param


class TestNll:
    def test_equals_float64_in_both_directions(self, architecture):
        alm, ids = make_alm(architecture), make_ids()
        forward, backward = (nll.numpy() for nll in score_nll(alm, ids))
        expected = exact_nll(alm.left_to_right, ids)
        np.testing.assert_allclose(forward[:, 1:], expected, rtol=1e-5, atol=1e-4)
        expected = exact_nll(alm.right_to_left, torch.from_numpy(ids.numpy()[:, ::-1].copy()))[:, ::-1]
        np.testing.assert_allclose(backward[:, :-1], expected, rtol=1e-5, atol=1e-4)

    def test_takes_the_fast_path_for_plain_heads_only(self, architecture):
        assert Engine(make_model(CONFIGS[architecture])).is_fast == (architecture in FAST)

    def test_equals_the_reference(self, architecture):
        alm, ids = make_alm(architecture), make_ids(5, 130)
        with torch.no_grad():
            expected = reference_nll(alm.left_to_right, ids)
        found, _ = score_nll(alm, ids)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5, equal_nan=True)

    def test_depends_on_nothing_behind_the_token_in_reading_order(self, architecture):
        alm, ids = make_alm(architecture), make_ids(1)
        changed = ids.clone()
        changed[0, 40] = 5 + (ids[0, 40] - 5 + 7) % 400
        first, second = (score_nll(alm, row) for row in (ids, changed))
        np.testing.assert_array_equal(first[0][0, 1:40], second[0][0, 1:40])
        np.testing.assert_array_equal(first[1][0, 41:63], second[1][0, 41:63])
        assert not torch.equal(first[0][0, 41:], second[0][0, 41:])
        assert not torch.equal(first[1][0, :40], second[1][0, :40])

    def test_is_missing_where_there_is_no_context(self):
        forward, backward = score_nll(make_alm(), make_ids())
        assert forward[:, 0].isnan().all()
        assert backward[:, -1].isnan().all()
        assert forward[:, 1:].isfinite().all()
        assert backward[:, :-1].isfinite().all()

    @pytest.mark.parametrize("name", ["gpt2", "gpt_neox"])
    def test_batch_composition_does_not_matter(self, name):
        alm, ids = make_alm(name), make_ids(5)
        together = score_nll(alm, ids)
        for row in range(5):
            for all_rows, alone in zip(together, score_nll(alm, ids[row : row + 1]), strict=True):
                torch.testing.assert_close(all_rows[row : row + 1], alone, rtol=0, atol=1e-5, equal_nan=True)
        for all_rows, reversed_rows in zip(together, score_nll(alm, ids.flip(0)), strict=True):
            torch.testing.assert_close(all_rows, reversed_rows.flip(0), rtol=0, atol=1e-5, equal_nan=True)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    @pytest.mark.parametrize("name", ["gpt2", "gpt_neox"])
    @pytest.mark.parametrize("direction", ["left_to_right", "right_to_left"])
    def test_of_a_broken_model_is_a_scoring_error(self, name, direction, value):
        alm = make_alm(name)
        with torch.no_grad():
            getattr(alm, direction).get_output_embeddings().weight[7] = value
        with pytest.raises(ScoringError, match="NaN or infinity"):
            score(alm, make_ids())

    @pytest.mark.parametrize("name", ["gpt2", "bert as a decoder"])
    def test_of_a_bfloat16_model_is_a_float32_log_sum_exp_of_its_logits(self, name):
        """All logits alike: log(500) has 6.2146 nats, the bfloat16 next to it 6.2188."""
        model = make_model(CONFIGS[name])
        with torch.no_grad():
            for parameter in model.get_output_embeddings().parameters():
                parameter.zero_()
        alm = BidirectionalALM(model, model).to(torch.bfloat16)
        for nll in score_nll(alm, make_ids()):
            assert nll.dtype == torch.float32
            np.testing.assert_allclose(nll[nll.isfinite()].numpy(), math.log(VOCABULARY), rtol=1e-6)

    def test_of_a_bfloat16_model_is_near_that_of_its_weights_in_float64(self, architecture):
        alm, ids = make_alm(architecture, scale=2.0).to(torch.bfloat16), make_ids()
        forward, _ = score_nll(alm, ids)
        exact = exact_nll(alm.left_to_right, ids)
        assert np.abs(forward[:, 1:].numpy() - exact).mean() < 0.01 * exact.mean()


class TestScore:
    @pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
    def test_is_two_float32_matrices_of_perplexities(self, dtype):
        ids = make_ids() % 250
        perplexities = score(make_alm(), ids.to(dtype))
        nlls = score_nll(make_alm(), ids)
        for found, nll in zip(perplexities, nlls, strict=True):
            assert found.shape == (3, 64)
            assert found.dtype == torch.float32
            assert not found.requires_grad
            expected = np.where(nll.isnan(), 0, np.exp(np.minimum(nll.double().numpy(), 80)))
            np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)

    def test_is_0_where_there_is_no_context_and_at_least_1_elsewhere(self):
        forward, backward = score(make_alm(), make_ids())
        assert (forward[:, 0] == 0).all()
        assert (backward[:, -1] == 0).all()
        assert (forward[:, 1:] >= 1).all()
        assert (backward[:, :-1] >= 1).all()

    def test_scores_special_tokens_inside_a_block_like_any_other(self):
        ids = make_ids()
        ids[:, 20] = 2
        forward, backward = score(make_alm(), ids)
        assert (forward[:, 20] >= 1).all()
        assert (backward[:, 20] >= 1).all()
        assert (forward[:, -1] >= 1).all()

    def test_cuts_nlls_above_80_nats(self):
        found = to_perplexity(torch.tensor([0.0, 1.0, 79.99, 80.0, 80.01, 1e4, -1e-6, math.nan]))
        top = math.exp(80)
        expected = [1, math.e, math.exp(79.99), top, top, top, 1, 0]
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)
        assert MAX_NLL == 80.0
        assert found.isfinite().all()

    def test_is_finite_for_a_model_that_is_sure_and_wrong(self):
        alm = make_alm(scale=40.0)
        assert max(nll[nll.isfinite()].max() for nll in score_nll(alm, make_ids())) > 100
        for perplexity in score(alm, make_ids()):
            assert perplexity.isfinite().all()
            assert perplexity.max() == pytest.approx(math.exp(80), rel=1e-6)


class TestScoreRows:
    VOCABULARY = Vocabulary(
        VOCABULARY, {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 499}, 0, 2, 499, "vocabulary", "tokenizer"
    )

    def score(self, alm, ids, micro_batch):
        def nlls(batch):
            return [nll.numpy() for nll in score_nll(alm, torch.from_numpy(batch.astype(np.int64)))]

        return score_rows(nlls, ids.numpy().astype(np.uint16), self.VOCABULARY, mantissa_bits=23)

    @pytest.mark.parametrize("micro_batch", [1, 2, 8])
    def test_is_score_with_special_tokens_at_0(self, micro_batch):
        alm, ids = make_alm(), make_ids(5)
        ids[:, 20], ids[2, 30] = 2, 3
        result = self.score(alm, ids, micro_batch)
        special = np.isin(ids.numpy(), [0, 1, 2, 3, 499])
        for found, expected in zip(
            (result.content.forward_perplexity, result.content.backward_perplexity), score(alm, ids), strict=True
        ):
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, np.where(special, 0, expected.numpy()), rtol=1e-4)
        assert result.clamped_values == 0

    def test_counts_the_values_it_cut_at_ordinary_tokens(self):
        alm, ids = make_alm(scale=40.0), make_ids(5)
        ids[:, 20] = 2
        result = self.score(alm, ids, micro_batch=2)
        special = np.isin(ids.numpy(), [0, 1, 2, 3, 499])
        expected = 0
        for model, row_ids, is_special in (
            (alm.left_to_right, ids, special),
            (alm.right_to_left, ids.flip(1), special[:, ::-1]),
        ):
            expected += int(((exact_nll(model, row_ids) > 80) & ~is_special[:, 1:]).sum())
        assert expected > 100
        assert abs(result.clamped_values - expected) <= 2  # float32 against float64 at the border

    def test_of_no_blocks_is_empty(self):
        result = self.score(make_alm(), make_ids(0), micro_batch=8)
        assert result.content.forward_perplexity.shape == (0, 64)
        assert result.clamped_values == 0


@pytest.fixture
def copied_alm(alm_folder, tmp_path):
    return Path(shutil.copytree(alm_folder, tmp_path / "alm"))


def edit_config(folder, direction, **changes):
    path = folder / direction / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if changes.get(key, 0) is not None}))


def swap(folder):
    (folder / "forward").rename(folder / "other")
    (folder / "backward").rename(folder / "forward")
    (folder / "other").rename(folder / "backward")


class TestLoadAlm:
    def test_gives_both_directions_for_scoring(self, alm_folder):
        alm = load_alm(str(alm_folder))
        assert not alm.training
        assert not any(parameter.requires_grad for parameter in alm.parameters())
        assert {parameter.dtype for parameter in alm.parameters()} == {torch.float32}
        ids = make_ids()
        expected = AutoModelForCausalLM.from_pretrained(alm_folder / "forward").eval()
        np.testing.assert_allclose(score_nll(alm, ids)[0].numpy()[:, 1:], exact_nll(expected, ids), rtol=0, atol=1e-4)

    @pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
    def test_takes_a_dtype_by_name_or_as_torch_has_it(self, alm_folder, dtype):
        assert {parameter.dtype for parameter in load_alm(str(alm_folder), dtype=dtype).parameters()} == {
            torch.bfloat16
        }

    def test_is_float32_on_the_cpu_whatever_was_saved(self, alm_folder, tmp_path):
        for direction in ("forward", "backward"):
            model = AutoModelForCausalLM.from_pretrained(alm_folder / direction, dtype=torch.bfloat16)
            model.save_pretrained(tmp_path / direction)
        assert {parameter.dtype for parameter in load_alm(str(tmp_path)).parameters()} == {torch.float32}

    @pytest.mark.parametrize("direction", ["forward", "backward"])
    def test_names_a_direction_that_is_missing(self, copied_alm, direction):
        shutil.rmtree(copied_alm / direction)
        for load in (load_alm, fingerprint_alm, lambda folder: check_alm(folder, VOCABULARY)):
            with pytest.raises(ConfigurationError, match=f"{copied_alm}/{direction}"):
                load(str(copied_alm))

    def test_names_weights_that_are_missing(self, copied_alm):
        (copied_alm / "backward" / "model.safetensors").unlink()
        for load in (load_alm, fingerprint_alm):
            with pytest.raises(ConfigurationError, match=f"{copied_alm}/backward"):
                load(str(copied_alm))

    def test_torn_weights_are_an_error_with_the_folder(self, copied_alm):
        path = copied_alm / "forward" / "model.safetensors"
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(ConfigurationError, match=f"{copied_alm}/forward"):
            load_alm(str(copied_alm))

    def test_a_config_that_is_not_json_is_an_error_with_its_path(self, copied_alm):
        (copied_alm / "forward" / "config.json").write_text("{")
        with pytest.raises(ConfigurationError, match=r"config\.json"):
            check_alm(str(copied_alm), VOCABULARY)

    @pytest.mark.parametrize(("device", "count"), [("cuda", 0), ("cuda:0", 0), ("cuda:3", 2)])
    def test_a_device_that_is_not_there_is_an_error_and_never_the_cpu(self, alm_folder, monkeypatch, device, count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        with pytest.raises(ConfigurationError, match=f"--device {device} was asked for"):
            load_alm(str(alm_folder), device)

    def test_refuses_swapped_directions(self, copied_alm):
        swap(copied_alm)
        with pytest.raises(ConfigurationError, match=r"right_to_left.*swapped"):
            load_alm(str(copied_alm))

    def test_refuses_a_model_too_short_for_a_block(self, copied_alm, tmp_path):
        config = GPT2Config(vocab_size=VOCABULARY, n_positions=256, n_embd=32, n_layer=1, n_head=2)
        AutoModelForCausalLM.from_config(config).save_pretrained(copied_alm / "forward")
        with pytest.raises(ConfigurationError, match="256 positions"):
            load_alm(str(copied_alm))

    def test_refuses_a_model_that_sees_both_sides(self, copied_alm):
        """AutoModelForCausalLM loads an encoder without `is_decoder` too; its context is not Eq. (1)'s."""
        config = BertConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(copied_alm / "forward")
        with pytest.raises(ConfigurationError):
            load_alm(str(copied_alm))


class TestCheckAlm:
    def test_has_nothing_to_say_of_a_sound_one(self, alm_folder):
        assert check_alm(str(alm_folder), VOCABULARY) == []

    def test_refuses_swapped_directions(self, copied_alm):
        swap(copied_alm)
        with pytest.raises(ConfigurationError, match=r"forward reads right_to_left, expected left_to_right.*swapped"):
            check_alm(str(copied_alm), VOCABULARY)

    def test_warns_where_a_direction_does_not_say(self, copied_alm):
        edit_config(copied_alm, "backward", reading_direction=None)
        (warning,) = check_alm(str(copied_alm), VOCABULARY)
        assert "backward" in warning
        assert "right_to_left" in warning

    def test_refuses_too_small_a_vocabulary(self, copied_alm):
        with pytest.raises(ConfigurationError, match="knows 500 ids, the tokenizer has 501"):
            check_alm(str(copied_alm), VOCABULARY + 1)

    def test_takes_a_padded_vocabulary(self, copied_alm):
        assert check_alm(str(copied_alm), VOCABULARY - 5) == []

    @pytest.mark.parametrize("key", ["n_positions", "max_position_embeddings"])
    def test_refuses_too_few_positions(self, copied_alm, key):
        edit_config(copied_alm, "forward", **{"n_positions": None, key: 256})
        with pytest.raises(ConfigurationError, match="256 positions"):
            check_alm(str(copied_alm), VOCABULARY)

    def test_counts_robertas_positions_from_its_padding_id(self, copied_alm):
        """512 positions are too few for 512 tokens, as in the trainer: scoring would end in an IndexError."""
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = RobertaConfig(vocab_size=VOCABULARY, max_position_embeddings=512, is_decoder=True, **sizes)
        config.reading_direction = "left_to_right"
        AutoModelForCausalLM.from_config(config).save_pretrained(copied_alm / "forward")
        with pytest.raises(ConfigurationError, match="512 positions"):
            check_alm(str(copied_alm), VOCABULARY)


class TestFingerprint:
    def test_ignores_where_the_alm_lies_and_which_transformers_saved_it(self, alm_folder, copied_alm):
        edit_config(copied_alm, "forward", transformers_version="0.0.0", _name_or_path="elsewhere")
        assert fingerprint_alm(str(copied_alm)) == fingerprint_alm(str(alm_folder))

    def test_changes_with_a_weight_and_with_the_configuration_of_its_direction_alone(self, alm_folder, copied_alm):
        original = fingerprint_alm(str(alm_folder))
        assert original.keys() == {"forward_sha256", "backward_sha256"}
        path = copied_alm / "backward" / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"\x01")
        changed = fingerprint_alm(str(copied_alm))
        assert changed["forward_sha256"] == original["forward_sha256"]
        assert changed["backward_sha256"] != original["backward_sha256"]
        edit_config(copied_alm, "forward", n_head=4)
        assert fingerprint_alm(str(copied_alm))["forward_sha256"] != original["forward_sha256"]


@pytest.mark.slow
def test_scorer_imports_torch_only_when_scoring_is_asked_for():
    code = (
        "import sys, scorer, scorer.shards, scorer.manifest, scorer.files\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
        "assert callable(scorer.load_alm) and callable(scorer.score)\n"
        "assert 'torch' in sys.modules\n"
        "from scorer.scoring import score\n"
        "assert scorer.score is score\n"
        "assert sorted(scorer.__all__) == ['load_alm', 'score'] and not hasattr(scorer, 'nothing')\n"
    )
    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
