"""Training a bidirectional ALM: what each direction reads, what is saved, and evaluation against float64."""

import json
import math

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, PreTrainedTokenizerFast

from scorer.alm import check_alm, load_alm
from scorer.errors import ConfigurationError
from scorer.scoring import score
from scorer.shards import ShardReader
from trainer import train_alm
from trainer.models import ModelArguments, build_model
from trainer.train_alm import CausalCollator

SPECIAL_IDS = [0, 1, 2, 3, 499]
READING = {"forward": "left_to_right", "backward": "right_to_left"}


@pytest.fixture(scope="module")
def rows(block_folder):
    """All blocks in plan order, read by pyarrow, and how many of them are trained on."""
    names = [entry["name"] for entry in json.loads((block_folder / "_manifest.json").read_text())["shards"]]
    ids = np.array([row for name in names for row in pq.read_table(block_folder / name)["input_ids"].to_pylist()])
    return ids, len(ids) - min(max(64, len(ids) // 100), len(ids) // 2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, block_folder, quick):
    """Both directions, 100 steps of 4 blocks."""
    output = tmp_path_factory.mktemp("trained")
    flags = [
        "--model_type",
        "gpt2",
        "--config_overrides",
        "n_layer=1,n_embd=64,n_head=2,initializer_range=0.1",
        "--learning_rate",
        "1e-2",
    ]
    arguments = ["--blocks", str(block_folder), "--output_dir", str(output), *flags, "--max_steps", "100", *quick]
    assert train_alm.main(arguments) == 0
    return output


def in_reading_order(ids, direction):
    return ids[:, ::-1].copy() if direction == "backward" else ids


@pytest.fixture(scope="module")
def exact(trained, rows):
    """Of each direction: NLL and correctness at each held-out ordinary token, in float64 from the saved model."""

    @torch.no_grad()
    def measure(direction):
        model = GPT2LMHeadModel.from_pretrained(trained / direction).double().eval()
        nlls, right = [], []
        for row in in_reading_order(rows[0][rows[1] :], direction):
            logits = model(input_ids=torch.from_numpy(row[None])).logits[0, :-1].numpy()
            targets = row[1:]
            normalizer = np.log(np.exp(logits).sum(axis=1))
            ordinary = ~np.isin(targets, SPECIAL_IDS)
            nlls.append((normalizer - logits[np.arange(511), targets])[ordinary])
            right.append((logits.argmax(axis=1) == targets)[ordinary])
        return np.concatenate(nlls), np.concatenate(right)

    return {direction: measure(direction) for direction in READING}


def results(folder, direction):
    return json.loads((folder / direction / "all_results.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("direction", READING)
def test_eval_perplexity_is_exp_of_the_mean_nll_of_ordinary_held_out_tokens(trained, exact, direction):
    assert results(trained, direction)["eval_perplexity"] == pytest.approx(
        math.exp(exact[direction][0].mean()), rel=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize("direction", READING)
def test_eval_accuracy_is_that_of_ordinary_held_out_tokens(trained, exact, direction):
    assert results(trained, direction)["eval_accuracy"] == pytest.approx(exact[direction][1].mean(), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("direction", READING)
def test_training_beats_the_unigram_distribution_of_the_training_blocks(trained, rows, direction):
    ids, border = rows
    training, held_out = (part[~np.isin(part, SPECIAL_IDS)] for part in (ids[:border], ids[border:]))
    counts = np.bincount(training, minlength=500) + 1
    unigram = math.exp(-np.log(counts / counts.sum())[held_out].mean())
    assert results(trained, direction)["eval_perplexity"] < 0.95 * unigram


@pytest.mark.slow
@pytest.mark.parametrize("direction", READING)
def test_each_direction_is_better_at_its_own_reading_order(trained, rows, direction):
    """Fails where both were trained on the same order."""
    model = AutoModelForCausalLM.from_pretrained(trained / direction).eval()
    held_out = torch.from_numpy(rows[0][rows[1] :][:16].copy())

    @torch.no_grad()
    def loss(ids):
        return float(model(input_ids=ids, labels=ids).loss)

    own, other = (held_out.flip(1), held_out) if direction == "backward" else (held_out, held_out.flip(1))
    assert loss(own) < loss(other) - 0.05


@pytest.mark.slow
@pytest.mark.parametrize("direction", READING)
def test_a_direction_is_an_ordinary_checkpoint_that_says_how_it_reads(trained, direction):
    config = json.loads((trained / direction / "config.json").read_text())
    assert config["reading_direction"] == READING[direction]
    assert (config["vocab_size"], config["n_positions"]) == (500, 512)
    assert (config["bos_token_id"], config["eos_token_id"]) == (0, 2)
    assert (trained / direction / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("direction", READING)
def test_results_name_perplexity_and_accuracy(trained, direction):
    found = results(trained, direction)
    assert {"eval_perplexity", "eval_accuracy", "train_loss"} <= found.keys()
    assert 0 < found["eval_accuracy"] < 1


@pytest.mark.slow
def test_the_tokenizer_is_at_the_root(trained, tokenizer_folder):
    saved, original = (PreTrainedTokenizerFast.from_pretrained(folder) for folder in (trained, tokenizer_folder))
    assert saved.get_vocab() == original.get_vocab()
    assert saved("Some text.").input_ids == original("Some text.").input_ids


@pytest.mark.slow
def test_the_alm_loads_for_scoring_and_scores_what_evaluation_measured(trained, rows, exact):
    assert check_alm(str(trained), 500) == []
    ids = rows[0][rows[1] :]
    perplexities = score(load_alm(str(trained)), torch.from_numpy(ids))
    for direction, perplexity in zip(READING, perplexities, strict=True):
        values = perplexity.double().numpy()[~np.isin(ids, SPECIAL_IDS)]
        assert np.log(values).mean() == pytest.approx(exact[direction][0].mean(), rel=1e-5)


def test_the_collator_reverses_blocks_for_the_backward_model_alone():
    features = [{"input_ids": np.array([0, 5, 6, 7, 2], dtype=np.uint16)}, {"input_ids": np.array([0, 8, 2, 9, 2])}]
    forward, backward = CausalCollator("forward")(features), CausalCollator("backward")(features)
    assert forward["input_ids"].tolist() == [[0, 5, 6, 7, 2], [0, 8, 2, 9, 2]]
    assert backward["input_ids"].tolist() == [[2, 7, 6, 5, 0], [2, 9, 2, 8, 0]]
    for batch in (forward, backward):
        assert batch["labels"].tolist() == batch["input_ids"].tolist()
        assert batch["input_ids"].dtype == torch.int64


def test_a_fresh_alm_is_the_papers(block_folder, tokenizer_folder):
    vocabulary = shard_vocabulary(block_folder)
    arguments = ModelArguments(model_type=train_alm.DEFAULT_MODEL_TYPE)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    config = build_model(
        AutoModelForCausalLM, arguments, vocabulary, tokenizer, train_alm._fresh_defaults(arguments)
    ).config
    assert config.model_type == "gpt2"
    assert (config.n_layer, config.n_embd, config.n_head, config.n_positions) == (6, 512, 8, 512)
    assert (config.vocab_size, config.bos_token_id, config.eos_token_id) == (500, 0, 2)
    assert {config.resid_pdrop, config.embd_pdrop, config.attn_pdrop} == {0.1}


def shard_vocabulary(folder):
    with ShardReader(str(next(iter(sorted(folder.glob("*.parquet")))))) as reader:
        return reader.metadata.vocabulary


def test_the_recipe_is_the_papers(tmp_path):
    recipe = train_alm.AlmRecipe(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    assert (recipe.num_train_epochs, recipe.learning_rate, recipe.global_batch_size) == (2.0, 5e-4, 2560)


class TestCommand:
    @pytest.fixture
    def arguments(self, block_folder, tmp_path, tiny_gpt2, quick):
        return ["--blocks", block_folder, "--output_dir", tmp_path / "out", *tiny_gpt2, "--max_steps", 2, *quick]

    @pytest.fixture
    def train(self, arguments, tmp_path):
        def run(*flags):
            assert train_alm.main([*map(str, arguments), *map(str, flags)]) == 0
            return tmp_path / "out"

        return run

    def test_one_direction_alone(self, train):
        output = train("--direction", "backward")
        assert (output / "backward" / "model.safetensors").exists()
        assert not (output / "forward").exists()

    def test_hardness_shards_will_do(self, train, hardness_folder):
        output = train("--blocks", hardness_folder, "--direction", "forward")
        assert (output / "forward" / "model.safetensors").exists()

    def test_directions_in_two_commands_are_those_of_one(self, train, tmp_path):
        train()
        both = [(tmp_path / "out" / direction / "model.safetensors").read_bytes() for direction in READING]
        (tmp_path / "out").rename(tmp_path / "first")
        for direction in READING:
            train("--direction", direction)
        again = [(tmp_path / "out" / direction / "model.safetensors").read_bytes() for direction in READING]
        assert both == again

    def test_folders_for_validation_leave_all_blocks_for_training(self, train, block_folder, rows, write_shards):
        output = train(
            "--validation_blocks",
            block_folder,
            "--direction",
            "forward",
            "--num_train_epochs",
            "0.1",
            "--max_steps",
            -1,
        )
        state = json.loads((output / "forward" / "trainer_state.json").read_text())
        assert state["max_steps"] == math.ceil(0.1 * (len(rows[0]) // 4))

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--direction", "sideways"], "sideways"),
            (["--config_overrides", "n_positions=256"], "256 positions"),
            (["--config_overrides", "no_such_setting=1"], "no_such_setting"),
            (["--global_batch_size", "4000"], "fewer than one global batch"),
            (["--model_name_or_path", "/nowhere/at/all"], "pass one"),
        ],
    )
    def test_wrong_flags_exit_2_and_say_why(self, run_in_process, arguments, flags, message):
        code, _, error = run_in_process(train_alm.main, *arguments, *flags)
        assert code == 2
        assert message in error

    def test_an_encoder_is_not_taken_for_a_causal_lm(self, block_folder, tmp_path, quick):
        """transformers makes a BERT without `is_decoder` that sees the token it predicts."""
        arguments = ["--blocks", str(block_folder), "--output_dir", str(tmp_path), *quick, "--max_steps", "1"]
        overrides = "hidden_size=32,num_hidden_layers=1,num_attention_heads=2,intermediate_size=64"
        with pytest.raises(ConfigurationError):
            train_alm.main([*arguments, "--model_type", "bert", "--config_overrides", overrides])
