"""Masked-LM pretraining: which model, what is evaluated and under which masks, and what is refused."""

import json
import math
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import (
    AutoModelForMaskedLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    pipeline,
)

from scorer.errors import ConfigurationError
from scorer.shards import ShardReader
from trainer import pretrain
from trainer.masking import HardnessCollator
from trainer.masking.arguments import MaskingArguments
from trainer.models import ModelArguments, build_model

KEYS = {"eval_uniform_loss", "eval_own_loss", "eval_own_accuracy", "eval_mask_rate"}
TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


def tiny_config(**changes):
    ids = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    return RobertaConfig(**{"vocab_size": 500, "max_position_embeddings": 514, **TINY, **ids} | changes)


@pytest.fixture(scope="module")
def run(tmp_path_factory, hardness_folder, tiny_roberta, quick):
    """run(flags…) pretrains a fresh tiny RoBERTa for 3 steps, unless the flags name another model."""

    def run(*flags, output=None):
        output = output or tmp_path_factory.mktemp("pretrained")
        model = [] if {"--model_name_or_path", "--config_name"} & set(flags) else tiny_roberta
        arguments = ["--shards", hardness_folder, "--output_dir", output, *model, "--max_steps", 3, *quick, *flags]
        assert pretrain.main([*map(str, arguments)]) == 0
        return output

    return run


@pytest.fixture(scope="module")
def pretrained(run):
    return run("--alpha", "0.001", "--learning_rate", "1e-3")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A RoBERTa to go on from, saved in bfloat16."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(3)
    RobertaForMaskedLM(tiny_config()).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def held_out(hardness_folder):
    """Features of the held-out blocks, by pyarrow: the last max(64, 1 %), at most half, in plan order."""
    names = [entry["name"] for entry in json.loads((hardness_folder / "_manifest.json").read_text())["shards"]]
    tables = [pq.read_table(hardness_folder / name) for name in names]
    columns = {
        name: np.array([row for table in tables for row in table[name].to_pylist()])
        for name in ("input_ids", "forward_perplexity", "backward_perplexity")
    }
    blocks = len(columns["input_ids"])
    first = blocks - min(max(64, blocks // 100), blocks // 2)
    return [{name: values[row] for name, values in columns.items()} for row in range(first, blocks)]


@pytest.fixture(scope="module")
def vocabulary(hardness_folder):
    with ShardReader(str(next(iter(sorted(hardness_folder.glob("*.parquet")))))) as reader:
        return reader.metadata.vocabulary


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)


def results(output):
    return json.loads((output / "all_results.json").read_text())


@torch.no_grad()
def exact_evaluation(folder, features, vocabulary, alpha):
    """Loss and accuracy over the masked tokens of all blocks, in float64 from the saved model."""
    model = RobertaForMaskedLM.from_pretrained(folder, dtype=torch.float64).eval()
    batch = HardnessCollator(vocabulary, alpha, seed=0)([feature | {"epoch": 0} for feature in features])
    losses, right = [], []
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        masked = (labels >= 0).numpy()
        logits = model(input_ids=ids[None]).logits[0].numpy()[masked]
        targets = labels.numpy()[masked]
        losses.append(np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(targets)), targets])
        right.append(logits.argmax(axis=1) == targets)
    return np.concatenate(losses).mean(), np.concatenate(right).mean()


class TestEvaluation:
    def test_results_have_the_documented_keys(self, pretrained):
        assert results(pretrained).keys() >= KEYS

    def test_mask_rate_is_77_of_512(self, pretrained):
        assert results(pretrained)["eval_mask_rate"] == pytest.approx(77 / 512)

    def test_uniform_loss_is_that_of_one_fixed_uniform_mask(self, pretrained, held_out, vocabulary):
        loss, _ = exact_evaluation(pretrained, held_out, vocabulary, math.inf)
        assert results(pretrained)["eval_uniform_loss"] == pytest.approx(loss, rel=1e-5)

    def test_hardness_loss_is_that_of_one_fixed_mask_of_alpha_0(self, pretrained, held_out, vocabulary):
        loss, _ = exact_evaluation(pretrained, held_out, vocabulary, 0.0)
        assert results(pretrained)["eval_hardness_loss"] == pytest.approx(loss, rel=1e-5)

    def test_own_loss_and_accuracy_are_those_of_alphas_masks(self, pretrained, held_out, vocabulary):
        loss, accuracy = exact_evaluation(pretrained, held_out, vocabulary, 0.001)
        assert results(pretrained)["eval_own_loss"] == pytest.approx(loss, rel=1e-5)
        assert results(pretrained)["eval_own_accuracy"] == pytest.approx(accuracy, abs=1e-3)

    def test_masks_do_not_depend_on_the_runs_seed(self, run, checkpoint):
        """At a learning rate of 0 runs differ in their seeds alone."""
        first, second = (
            results(run("--model_name_or_path", checkpoint, "--learning_rate", 0, "--seed", seed)) for seed in (1, 2)
        )
        assert {key: first[key] for key in KEYS} == {key: second[key] for key in KEYS}
        assert first["train_loss"] != second["train_loss"]

    def test_the_uniform_mask_is_the_same_for_every_alpha(self, run, checkpoint):
        flags = ("--model_name_or_path", checkpoint, "--learning_rate", 0)
        hardness, uniform = (results(run(*flags, "--alpha", alpha)) for alpha in ("0", "inf"))
        assert hardness["eval_uniform_loss"] == uniform["eval_uniform_loss"]
        assert hardness["eval_own_loss"] != uniform["eval_own_loss"]
        assert uniform["eval_own_loss"] == uniform["eval_uniform_loss"]

    def test_does_not_depend_on_the_evaluation_batch(self, run, checkpoint):
        """64 blocks in batches of 16 and of 10."""
        flags = ("--model_name_or_path", checkpoint, "--learning_rate", 0)
        whole, partial = (results(run(*flags, "--per_device_eval_batch_size", size)) for size in (16, 10))
        for key in KEYS:
            assert partial[key] == pytest.approx(whole[key], rel=1e-5)

    @pytest.mark.parametrize("persistent", ["false", "true"])
    def test_does_not_depend_on_loader_workers(self, run, checkpoint, persistent):
        """Trainer keeps loaders that have persistent workers; each of our masks needs a loader of its own."""
        flags = ("--model_name_or_path", checkpoint, "--learning_rate", 0, "--alpha", 0)
        workers = ("--dataloader_num_workers", 1, "--dataloader_persistent_workers", persistent)
        alone, shared = results(run(*flags)), results(run(*flags, *workers))
        assert {key: shared[key] for key in KEYS} == {key: alone[key] for key in KEYS}

    @pytest.mark.slow
    def test_other_folders_can_be_evaluated_on(self, run, checkpoint, hardness_folder, vocabulary):
        flags = ("--model_name_or_path", checkpoint, "--learning_rate", 0, "--validation_shards", hardness_folder)
        output = run(*flags)
        names = [entry["name"] for entry in json.loads((hardness_folder / "_manifest.json").read_text())["shards"]]
        rows = [row for name in names for row in pq.read_table(hardness_folder / name).to_pylist()]
        features = [{name: np.array(values) for name, values in row.items()} for row in rows]
        loss, _ = exact_evaluation(output, features, vocabulary, math.inf)
        assert results(output)["eval_uniform_loss"] == pytest.approx(loss, rel=1e-5)


class TestTraining:
    def test_alpha_changes_masks_without_rescoring(self, run, checkpoint, hardness_folder):
        before = {path.name: path.read_bytes() for path in hardness_folder.iterdir() if path.is_file()}
        losses = [
            results(run("--model_name_or_path", checkpoint, "--learning_rate", 0, "--alpha", alpha))["train_loss"]
            for alpha in ("0", "0.005", "inf")
        ]
        assert len(set(losses)) == 3
        assert before == {path.name: path.read_bytes() for path in hardness_folder.iterdir() if path.is_file()}

    def test_initial_weights_are_the_same_for_every_alpha(self, run):
        outputs = [run("--learning_rate", 0, "--alpha", alpha) for alpha in ("0", "inf")]
        weights = [(output / "model.safetensors").read_bytes() for output in outputs]
        assert weights[0] == weights[1]

    def test_trains(self, run):
        output = run("--learning_rate", "1e-2", "--max_steps", 40, "--alpha", "inf", "--logging_steps", 1)
        history = json.loads((output / "trainer_state.json").read_text())["log_history"]
        losses = [entry["loss"] for entry in history if "loss" in entry]
        assert len(losses) == 40
        assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.3

    def test_a_step_is_the_mean_over_its_whole_global_batch(self, run, checkpoint):
        """Accumulating 2 x 2 blocks is a step of 4 (dropout off)."""
        off = ("--config_overrides", "hidden_dropout_prob=0.0,attention_probs_dropout_prob=0.0")
        flags = ("--model_name_or_path", checkpoint, "--learning_rate", "1e-3", *off)
        at_once, accumulated = (run(*flags, "--per_device_train_batch_size", size) for size in (4, 2))
        models = [RobertaForMaskedLM.from_pretrained(output).state_dict() for output in (at_once, accumulated)]
        for name, expected in models[0].items():
            torch.testing.assert_close(models[1][name], expected, rtol=0, atol=2e-5)

    def test_logged_loss_and_gradient_norm_do_not_depend_on_accumulation(self, run, checkpoint):
        """Adam does not see a constant factor, but clipping and people do."""
        off = ("--config_overrides", "hidden_dropout_prob=0.0,attention_probs_dropout_prob=0.0")
        logs = []
        for size in (4, 2, 1):
            flags = ("--model_name_or_path", checkpoint, *off, "--learning_rate", "1e-3", "--logging_steps", 1)
            output = run(*flags, "--per_device_train_batch_size", size)
            history = json.loads((output / "trainer_state.json").read_text())["log_history"]
            logs.append([(entry["loss"], entry["grad_norm"]) for entry in history if "grad_norm" in entry])
        assert logs[0]
        np.testing.assert_allclose(logs[1], logs[0], rtol=1e-3)
        np.testing.assert_allclose(logs[2], logs[0], rtol=1e-3)

    def test_weights_do_not_depend_on_loader_workers(self, run):
        flags = ("--learning_rate", "1e-3", "--alpha", "0.001")
        alone, shared = (run(*flags, "--dataloader_num_workers", workers) for workers in (0, 2))
        assert (alone / "model.safetensors").read_bytes() == (shared / "model.safetensors").read_bytes()

    def test_bf16_means_autocast_over_float32_weights(self, run):
        flags = ("--learning_rate", "1e-6", "--alpha", "0.001")
        output, untrained = run(*flags, "--bf16"), run("--learning_rate", 0, "--alpha", "0.001")
        after, before = (RobertaForMaskedLM.from_pretrained(folder).state_dict() for folder in (output, untrained))
        name = "roberta.encoder.layer.0.attention.self.query.weight"
        assert after[name].dtype == torch.float32
        assert not torch.equal(after[name], before[name])

    def test_run_again_evaluates_again(self, run, pretrained, tmp_path):
        output = tmp_path / "again"
        shutil.copytree(pretrained, output)
        (output / "all_results.json").unlink()
        before = (output / "model.safetensors").read_bytes()
        run("--alpha", "0.001", "--learning_rate", "1e-3", output=output)
        assert (output / "model.safetensors").read_bytes() == before
        assert {key: results(output)[key] for key in KEYS} == {key: results(pretrained)[key] for key in KEYS}

    def test_logs_how_far_it_is_and_what_waiting_for_data_costs(self, run):
        output = run("--max_steps", 4, "--logging_steps", 1)
        log = json.loads((output / "trainer_state.json").read_text())["log_history"]
        steps = [entry for entry in log if "loss" in entry]
        assert [entry["progress"] for entry in steps] == [0.25, 0.5, 0.75, 1.0]
        assert all(0 < entry["data_wait"] < 1 for entry in steps)

    def test_epochs_in_the_log_are_passes_over_the_blocks(self, run, hardness_folder):
        blocks = json.loads((hardness_folder / "_manifest.json").read_text())["blocks"]
        per_epoch = (blocks - max(64, blocks // 100)) // 16
        output = run("--max_steps", 2 * per_epoch, "--global_batch_size", 16, "--logging_steps", per_epoch)
        log = json.loads((output / "trainer_state.json").read_text())["log_history"]
        assert [entry["epoch"] for entry in log if "loss" in entry] == [1.0, 2.0]

    @pytest.mark.parametrize(
        ("shape", "alphas"), [("linear", [0.1, 0.07, 0.04, 0.01]), ("cosine", [0.1, 0.0775, 0.0325, 0.01])]
    )
    def test_alpha_follows_its_schedule_to_the_last_step(self, run, held_out, vocabulary, shape, alphas):
        flags = ("--alpha", 0.1, "--alpha_end", 0.01, "--alpha_schedule", shape, "--max_steps", 4, "--logging_steps", 1)
        output = run(*flags)
        log = json.loads((output / "trainer_state.json").read_text())["log_history"]
        assert [entry["alpha"] for entry in log if "alpha" in entry] == pytest.approx(alphas)
        loss, _ = exact_evaluation(output, held_out, vocabulary, 0.01)
        assert results(output)["eval_own_loss"] == pytest.approx(loss, rel=1e-5)

    def test_a_schedule_masks_each_step_by_its_own_alpha(self, run, checkpoint):
        """At a learning rate of 0 a step's loss depends on its blocks and masks alone."""
        flags = ("--model_name_or_path", checkpoint, "--learning_rate", 0, "--max_steps", 3, "--logging_steps", 1)
        off = ("--config_overrides", "hidden_dropout_prob=0.0,attention_probs_dropout_prob=0.0")

        def losses(*more):
            log = json.loads((run(*flags, *off, *more) / "trainer_state.json").read_text())["log_history"]
            return [entry["loss"] for entry in log if "loss" in entry]

        scheduled = losses("--alpha", 0.02, "--alpha_end", 0, "--alpha_schedule", "linear")
        constant = [losses("--alpha", alpha) for alpha in (0.02, 0.01, 0.0)]
        assert scheduled == [constant[step][step] for step in range(3)]

    @pytest.mark.parametrize("strategy", ["random", "topk", "whole-word", "hardness-whole-word", "span"])
    def test_every_strategy_trains_and_is_evaluated_on_masks_of_its_own(self, run, checkpoint, strategy):
        flags = ("--model_name_or_path", checkpoint, "--learning_rate", 0)
        ours, plain = results(run(*flags, "--masking_strategy", strategy)), results(run(*flags))
        assert ours["eval_uniform_loss"] == plain["eval_uniform_loss"]
        assert ours["eval_mask_rate"] == pytest.approx(77 / 512, abs=0.003)
        assert (ours["eval_own_loss"] == ours["eval_uniform_loss"]) == (strategy == "random")
        assert ours["eval_own_perplexity"] == pytest.approx(math.exp(ours["eval_own_loss"]), rel=1e-6)

    def test_the_fill_mask_pipeline_opens_what_it_saves(self, pretrained):
        fill = pipeline("fill-mask", model=str(pretrained), tokenizer=str(pretrained))
        answers = fill("the <mask> of")
        assert len(answers) == 5
        assert all(0 < answer["score"] < 1 for answer in answers)

    def test_curves_are_where_tensorboard_looks_for_them(self, run):
        output = run("--report_to", "tensorboard", "--logging_steps", 1)
        (folder,) = output.glob("runs/*")
        reader = EventAccumulator(str(folder)).Reload()
        tags = set(reader.Tags()["scalars"])
        assert tags >= {"train/loss", "train/data_wait", "eval/uniform_loss", "eval/own_loss", "eval/own_accuracy"}
        assert [event.step for event in reader.Scalars("train/loss")] == [1, 2, 3]

    def test_saves_model_and_tokenizer_that_transformers_loads(self, pretrained, tokenizer):
        model = AutoModelForMaskedLM.from_pretrained(pretrained)
        saved = PreTrainedTokenizerFast.from_pretrained(pretrained)
        assert type(model) is RobertaForMaskedLM
        assert saved.get_vocab() == tokenizer.get_vocab()
        assert saved.mask_token_id == 499

    def test_the_recipe_is_the_papers(self, tmp_path):
        recipe = pretrain.MlmRecipe(output_dir=str(tmp_path), use_cpu=True, report_to="none")
        assert (recipe.num_train_epochs, recipe.learning_rate, recipe.global_batch_size) == (6.0, 1e-6, 2560)
        assert recipe.get_warmup_steps(1000) == 100
        assert MaskingArguments().schedule(steps=1).start == 0.001
        assert MaskingArguments().masking_strategy == "hardness"


class TestModel:
    @pytest.fixture
    def build(self, vocabulary, tokenizer):
        def build(**arguments):
            return build_model(AutoModelForMaskedLM, ModelArguments(**arguments), vocabulary, tokenizer, {})

        return build

    def overrides(self, **more):
        return ",".join(f"{key}={value}" for key, value in (TINY | more).items())

    def test_of_a_type_is_fresh_with_the_tokenizers_ids_and_514_positions(self, build):
        config = build(model_type="roberta", config_overrides=self.overrides()).config
        assert config.max_position_embeddings == 514
        assert config.vocab_size == 500
        assert (config.bos_token_id, config.pad_token_id, config.eos_token_id) == (0, 1, 2)
        assert {name: getattr(config, name) for name in TINY} == TINY

    def test_of_a_configuration_is_fresh_with_the_tokenizers_ids(self, build, tmp_path):
        tiny_config(vocab_size=999, max_position_embeddings=512, hidden_size=64).save_pretrained(tmp_path)
        model = build(config_name=str(tmp_path), config_overrides="num_hidden_layers=2")
        assert model.config.vocab_size == 500
        assert model.config.max_position_embeddings == 514
        assert (model.config.hidden_size, model.config.num_hidden_layers) == (64, 2)

    def test_of_another_architecture_will_do(self, build):
        model = build(model_type="bert", config_overrides=self.overrides())
        assert model.config.max_position_embeddings == 512
        assert model(input_ids=torch.zeros(1, 512, dtype=torch.long)).logits.shape == (1, 512, 500)

    def test_of_a_checkpoint_is_float32_whatever_was_saved(self, build, checkpoint):
        model = build(model_name_or_path=str(checkpoint))
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        saved = RobertaForMaskedLM.from_pretrained(checkpoint, dtype=torch.bfloat16).state_dict()
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, saved[name].float(), rtol=0, atol=0)

    def test_of_a_checkpoint_saved_in_bfloat16_moves_and_is_saved_in_float32(self, run, checkpoint):
        output = run("--model_name_or_path", checkpoint, "--learning_rate", "1e-6")
        before, after = (
            RobertaForMaskedLM.from_pretrained(folder, dtype=torch.float32).state_dict()
            for folder in (checkpoint, output)
        )
        moved = [name for name in before if not torch.equal(before[name], after[name])]
        assert "roberta.encoder.layer.0.attention.self.query.weight" in moved
        assert json.loads((output / "config.json").read_text())["dtype"] == "float32"

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"max_position_embeddings": 512}, "512 positions.*need 514.*max_position_embeddings=514"),
            ({"vocab_size": 400}, "400 ids.*500"),
        ],
    )
    def test_of_a_checkpoint_that_does_not_fit_is_refused(self, build, tmp_path, changes, message):
        RobertaForMaskedLM(tiny_config(**changes)).save_pretrained(tmp_path)
        with pytest.raises(ConfigurationError, match=message):
            build(model_name_or_path=str(tmp_path))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({}, "no model named"),
            ({"config_overrides": "hidden_size=32"}, "no model named"),
            ({"model_name_or_path": "a", "model_type": "roberta"}, "pass one"),
            ({"model_name_or_path": "a", "config_name": "b"}, "pass one"),
            ({"model_type": "robberta"}, "robberta"),
            ({"model_name_or_path": "/nowhere/at/all"}, "/nowhere/at/all"),
            ({"config_name": "/nowhere/at/all"}, "/nowhere/at/all"),
            ({"model_type": "roberta", "config_overrides": "hidden_sice=32"}, "hidden_sice"),
            ({"model_type": "roberta", "config_overrides": "hidden_size"}, "roberta"),
            ({"model_type": "roberta", "config_overrides": "hidden_size=30,num_attention_heads=4"}, "roberta"),
            ({"model_type": "gpt2"}, "gpt2"),
        ],
    )
    def test_that_cannot_be_made_is_a_configuration_error(self, build, arguments, message):
        with pytest.raises(ConfigurationError, match=message):
            build(**arguments)

    def test_whose_weights_are_torn_is_a_configuration_error(self, build, checkpoint, tmp_path):
        folder = tmp_path / "torn"
        shutil.copytree(checkpoint, folder)
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(ConfigurationError, match=str(folder)):
            build(model_name_or_path=str(folder))


class TestRefusals:
    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--alpha", "-1"], "alpha = -1"),
            (["--alpha", "nan"], "alpha = nan"),
            (["--alpha", "hard"], "hard"),
            (["--model_name_or_path", "/nowhere/at/all"], "pass one"),
            (["--global_batch_size", "10"], "no multiple of 4"),
            (["--global_batch_size", "4000"], "fewer than one global batch of 4000"),
            (["--shards", "/nowhere/at/all"], "/nowhere/at/all"),
            (["--tokenizer_name", "/nowhere/at/all"], "/nowhere/at/all"),
            (["--learning_rat", "1"], "--learning_rat"),
        ],
    )
    def test_wrong_flags_exit_2_say_why_and_write_no_model(self, arguments, run_in_process, tmp_path, flags, message):
        code, _, error = run_in_process(pretrain.main, *arguments, "--output_dir", tmp_path / "out", *flags)
        assert code == 2
        assert message in error
        assert not list(tmp_path.rglob("*.safetensors"))

    @pytest.fixture
    def arguments(self, hardness_folder, tiny_roberta, quick):
        return ["--shards", str(hardness_folder), *tiny_roberta, *quick]

    def test_no_model_exits_2_and_names_the_flags(self, run_in_process, hardness_folder, tmp_path, quick):
        code, _, error = run_in_process(pretrain.main, "--shards", hardness_folder, "--output_dir", tmp_path, *quick)
        assert code == 2
        assert "--model_name_or_path" in error
        assert "--config_name" in error

    def test_no_output_folder_exits_2_and_names_the_flag(self, run_in_process, arguments):
        code, _, error = run_in_process(pretrain.main, *arguments)
        assert code == 2
        assert "--output_dir" in error

    def test_a_tokenizer_of_another_vocabulary(self, arguments, tokenizer, tmp_path):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, mask_token="<mask>")
        tokenizer.add_tokens(["one more"])
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        with pytest.raises(ConfigurationError, match="different tokenizers"):
            pretrain.main([*arguments, "--output_dir", str(tmp_path), "--tokenizer_name", str(tmp_path / "tokenizer")])

    def test_shards_of_a_tokenizer_without_a_mask_token(self, arguments, write_shards, synthetic_vocabulary, tmp_path):
        shards = write_shards([200], vocabulary=synthetic_vocabulary(mask=False))
        with pytest.raises(ConfigurationError, match="no mask token"):
            pretrain.main([*arguments, "--output_dir", str(tmp_path), "--shards", str(shards)])

    def test_block_shards(self, arguments, block_folder, tmp_path):
        with pytest.raises(ConfigurationError, match="block shards without perplexities"):
            pretrain.main([*arguments, "--output_dir", str(tmp_path), "--shards", str(block_folder)])
