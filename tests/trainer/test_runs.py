"""The recipe's batch, and runs that stop and go on: torn checkpoints, other runs' checkpoints, kill -9."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from scorer.errors import ConfigurationError
from trainer import pretrain, runs
from trainer.reader import ShardCorpus, hold_out
from trainer.runs import RecipeArguments, newest_checkpoint, plan_stream

ROOT = Path(__file__).parents[2]
RUN = {"shards": ["abc"], "seed": 42, "global_batch_size": 4, "max_steps": 12, "learning_rate": 1e-3}


@pytest.fixture
def recipe(tmp_path):
    """RecipeArguments on one CPU device."""

    def make(**settings):
        return RecipeArguments(output_dir=str(tmp_path / "run"), use_cpu=True, report_to="none", **settings)

    return make


@pytest.fixture(scope="module")
def corpus(write_shards):
    """227 blocks, of which 163 are trained on."""
    corpus = ShardCorpus([str(write_shards([127, 100]))])
    return corpus, hold_out(corpus.row_groups())[0]


class TestGlobalBatch:
    @pytest.mark.parametrize(("batch", "at_once", "accumulation"), [(12, 4, 3), (8, 8, 1), (160, 1, 160)])
    def test_gives_the_accumulation(self, recipe, corpus, batch, at_once, accumulation):
        arguments = recipe(global_batch_size=batch, per_device_train_batch_size=at_once)
        plan_stream(arguments, *corpus)
        assert arguments.gradient_accumulation_steps == accumulation

    @pytest.mark.parametrize(("batch", "at_once"), [(10, 4), (4, 8), (7, 2)])
    def test_that_does_not_divide_is_an_error(self, recipe, corpus, batch, at_once):
        arguments = recipe(global_batch_size=batch, per_device_train_batch_size=at_once)
        with pytest.raises(ConfigurationError, match=f"--global_batch_size {batch} is no multiple of {at_once}"):
            plan_stream(arguments, *corpus)

    def test_of_the_recipe_is_2560(self, recipe):
        assert recipe().global_batch_size == 2560

    @pytest.mark.parametrize("batch", [0, -4])
    def test_is_at_least_1(self, recipe, batch):
        with pytest.raises(ConfigurationError, match="--global_batch_size"):
            recipe(global_batch_size=batch)

    def test_larger_than_the_corpus_is_an_error(self, recipe, corpus):
        with pytest.raises(ConfigurationError, match="163 blocks to train on are fewer than one global batch of 164"):
            plan_stream(recipe(global_batch_size=164, per_device_train_batch_size=4), *corpus)

    def test_accumulation_that_contradicts_it_is_an_error(self, recipe, corpus):
        arguments = recipe(global_batch_size=8, per_device_train_batch_size=4, gradient_accumulation_steps=3)
        with pytest.raises(ConfigurationError, match="from which 2 follows"):
            plan_stream(arguments, *corpus)

    @pytest.mark.parametrize(
        ("settings", "steps"),
        [({"num_train_epochs": 2.0}, 40), ({"num_train_epochs": 0.5}, 10), ({"max_steps": 7}, 7)],
    )
    def test_and_the_epochs_give_the_steps(self, recipe, corpus, settings, steps):
        """163 // 8 = 20 steps an epoch: its last 3 blocks are dropped."""
        arguments = recipe(global_batch_size=8, **settings)
        stream = plan_stream(arguments, *corpus)
        assert arguments.max_steps == steps
        assert len(stream) == 8 * steps


class TestFlags:
    @pytest.mark.parametrize(
        "settings", [{"remove_unused_columns": True}, {"train_sampling_strategy": "random"}, {"output_dir": None}]
    )
    def test_that_would_break_the_stream_are_refused(self, settings, tmp_path):
        with pytest.raises(ConfigurationError):
            RecipeArguments(**{"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none"} | settings)

    def test_an_unknown_flag_exits_2(self, run_in_process):
        code, _, error = run_in_process(pretrain.main, "--shard", "x", "--output_dir", "y")
        assert code == 2
        assert "--shard" in error

    def test_help_can_be_printed(self, run_in_process):
        code, printed, _ = run_in_process(pretrain.main, "--help")
        assert code == 0
        for flag in ("--shards", "--alpha", "--global_batch_size", "--model_name_or_path", "--learning_rate"):
            assert flag in printed

    def test_no_shards_named_is_an_error_that_names_the_flag(self, run_in_process, tmp_path):
        code, _, error = run_in_process(pretrain.main, "--output_dir", tmp_path, "--model_type", "roberta")
        assert code == 2
        assert "--shards" in error


def checkpoint(output, step, run=RUN):
    """A checkpoint's folder, torn where `run` is None."""
    folder = output / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    if run is not None:
        (folder / "complete.json").write_text(json.dumps(run))
    return str(folder)


class TestNewestCheckpoint:
    def test_is_the_one_of_the_largest_step(self, tmp_path):
        checkpoint(tmp_path, 9)
        newest = checkpoint(tmp_path, 100)
        checkpoint(tmp_path, 20)
        assert newest_checkpoint(str(tmp_path), RUN) == newest

    def test_is_none_in_a_new_folder(self, tmp_path):
        assert newest_checkpoint(str(tmp_path), RUN) is None
        assert newest_checkpoint(str(tmp_path / "nowhere"), RUN) is None

    def test_ignores_a_torn_one(self, tmp_path):
        whole = checkpoint(tmp_path, 3)
        checkpoint(tmp_path, 6, run=None)
        assert newest_checkpoint(str(tmp_path), RUN) == whole

    def test_is_none_where_all_are_torn(self, tmp_path):
        checkpoint(tmp_path, 6, run=None)
        assert newest_checkpoint(str(tmp_path), RUN) is None

    @pytest.mark.parametrize(
        ("changed", "said"),
        [
            ({"seed": 43}, "seed was 42, now 43"),
            ({"max_steps": 24}, "max_steps was 12, now 24"),
            ({"alpha": "0.0"}, 'alpha was null, now "0.0"'),
        ],
    )
    def test_of_another_run_is_refused_and_what_differs_is_said(self, tmp_path, changed, said):
        checkpoint(tmp_path, 3)
        with pytest.raises(ConfigurationError, match="belongs to another run") as error:
            newest_checkpoint(str(tmp_path), RUN | changed)
        assert said in str(error.value)
        assert "shards" not in str(error.value)  # what agrees is not listed

    def test_of_the_same_run_may_hold_tuples(self, tmp_path):
        checkpoint(tmp_path, 3)
        assert newest_checkpoint(str(tmp_path), RUN | {"shards": ("abc",)})


# Resuming -------------------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from scorer.console import run_command
from trainer import pretrain, runs

def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

where, step = sys.argv.pop(1), int(sys.argv.pop(1))
if where == "in a step":
    read = runs.TrainingStream.__getitems__
    def read_or_die(self, positions):
        return kill() if positions[0] >= 4 * step else read(self, positions)
    runs.TrainingStream.__getitems__ = read_or_die
else:
    mark = runs.MarkComplete.on_save
    def mark_or_die(self, args, state, control, **more):
        return kill() if state.global_step == step else mark(self, args, state, control, **more)
    runs.MarkComplete.on_save = mark_or_die
run_command(pretrain.main)
"""


@pytest.fixture(scope="module")
def arguments(hardness_folder, tiny_roberta, quick):
    """12 steps of 4 blocks, a checkpoint every 3; dropout on, as the model's default has it."""
    model = [*tiny_roberta, "--learning_rate", "1e-3", "--max_steps", "12", "--save_steps", "3"]
    return ["--shards", str(hardness_folder), *model, "--alpha", "0.001", *quick]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, arguments):
    output = tmp_path_factory.mktemp("undisturbed")
    assert pretrain.main([*arguments, "--output_dir", str(output)]) == 0
    return output


def checkpoints(output):
    """Steps with a whole checkpoint, and steps with a torn one."""
    folders = {int(path.name.rpartition("-")[2]): path for path in output.glob("checkpoint-*")}
    whole = {step for step, path in folders.items() if (path / "complete.json").exists()}
    return whole, set(folders) - whole


def assert_same_run(output, undisturbed):
    weights, expected = (load_file(folder / "model.safetensors") for folder in (output, undisturbed))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    results, wanted = (json.loads((folder / "all_results.json").read_text()) for folder in (output, undisturbed))
    for name in ("eval_uniform_loss", "eval_own_loss", "eval_own_accuracy", "eval_mask_rate"):
        assert results[name] == wanted[name]


LIVES = """
import os, random, signal, sys
from scorer.console import run_command
from trainer import pretrain, runs

lives, log = int(sys.argv.pop(1)), sys.argv.pop(1)
read = runs.TrainingStream.__getitems__
steps = random.Random(7)

def live(life, left):
    def read_until_killed(self, positions):
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        with open(log, "a") as lines:
            print(life, *positions, file=lines)
        return read(self, positions)

    runs.TrainingStream.__getitems__ = read_until_killed
    run_command(pretrain.main)

# Each life is a fork of this process, which has imported everything and runs no threads.
for life in range(lives + 1):
    last = steps.randint(1, 6) if life < lives else -1
    child = os.fork()
    if not child:
        live(life, last)
    status = os.waitpid(child, 0)[1]
    expected = signal.SIGKILL if life < lives else 0
    if (os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)) != expected:
        sys.exit(f"life {life} ended with {status}")
"""


@pytest.mark.slow  # 30 s
def test_ten_kills_at_random_steps_cost_no_bit_and_read_no_batch_that_was_trained_on_before_the_checkpoint(
    tmp_path, arguments
):
    """A checkpoint every second step of 30; every life reads from its checkpoint on, step by step, and nothing else."""
    arguments = [*arguments, "--max_steps", "30", "--save_steps", "2"]
    assert pretrain.main([*arguments, "--output_dir", str(tmp_path / "undisturbed")]) == 0
    log = tmp_path / "read.txt"
    command = [sys.executable, "-c", LIVES, "10", str(log), *arguments, "--output_dir", str(tmp_path / "killed")]
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert_same_run(tmp_path / "killed", tmp_path / "undisturbed")
    read = [[int(number) for number in line.split()] for line in log.read_text().splitlines()]
    lives = [[batch[1:] for batch in read if batch[0] == life] for life in range(11)]
    reached = 0
    for batches in lives:
        first = batches[0][0] // 4
        assert batches == [[*range(4 * step, 4 * step + 4)] for step in range(first, first + len(batches))]
        assert first % 2 == 0  # a checkpoint's step
        assert reached - 3 <= first <= reached  # the newest one: a batch is read one step ahead of its use
        reached = first + len(batches)
    assert reached == 30


@pytest.mark.slow  # 20 s for the two
@pytest.mark.parametrize(
    ("kill", "left"),
    [
        (("while a checkpoint is written", "6"), ({3}, {6})),
        (("in a step", "1"), (set(), set())),
    ],
)
def test_a_killed_run_goes_on_to_bit_identical_weights(tmp_path, arguments, undisturbed, kill, left):
    command = [sys.executable, "-c", KILLED, *kill, *arguments, "--output_dir", str(tmp_path)]
    killed = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert checkpoints(tmp_path) == left
    assert not (tmp_path / "model.safetensors").exists()
    assert pretrain.main([*arguments, "--output_dir", str(tmp_path)]) == 0
    assert_same_run(tmp_path, undisturbed)


def test_a_crash_while_saving_loses_no_older_checkpoint_where_few_are_kept(tmp_path, arguments, monkeypatch):
    """An older checkpoint may go only after the newer one has its mark."""

    class CrashError(Exception):
        pass

    mark = runs.MarkComplete.on_save

    def crash(self, args, state, control, **more):
        if state.global_step == 6:
            raise CrashError
        mark(self, args, state, control, **more)

    monkeypatch.setattr(runs.MarkComplete, "on_save", crash)
    with pytest.raises(CrashError):
        pretrain.main([*arguments, "--output_dir", str(tmp_path), "--save_total_limit", "1"])
    assert checkpoints(tmp_path)[0] == {3}


def test_an_undisturbed_run_leaves_whole_checkpoints_only(undisturbed):
    assert checkpoints(undisturbed) == ({3, 6, 9, 12}, set())


def test_a_resume_reads_no_row_before_its_position(tmp_path, arguments, undisturbed, monkeypatch):
    shutil.copytree(undisturbed / "checkpoint-9", tmp_path / "checkpoint-9")
    read, positions_read = runs.TrainingStream.__getitems__, []

    def record(self, positions):
        positions_read.extend(positions)
        return read(self, positions)

    monkeypatch.setattr(runs.TrainingStream, "__getitems__", record)
    assert pretrain.main([*arguments, "--output_dir", str(tmp_path)]) == 0
    assert positions_read == list(range(36, 48))
    assert_same_run(tmp_path, undisturbed)


def test_a_finished_run_that_is_run_again_evaluates_again_and_trains_no_more(
    tmp_path, arguments, undisturbed, monkeypatch
):
    shutil.copytree(undisturbed / "checkpoint-12", tmp_path / "checkpoint-12")

    def fail(self, positions):
        raise AssertionError(f"reads {positions}")

    monkeypatch.setattr(runs.TrainingStream, "__getitems__", fail)
    assert pretrain.main([*arguments, "--output_dir", str(tmp_path)]) == 0
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--alpha", "0"], 'alpha was "0.001", now "0.0"'),
        (["--seed", "1"], "seed was 42, now 1"),
        (["--learning_rate", "1e-4"], "learning_rate was 0.001, now 0.0001"),
        (["--max_steps", "20"], "max_steps was 12, now 20"),
        (["--config_overrides", "hidden_size=16,num_hidden_layers=1,num_attention_heads=2"], "another run"),
        (["--weight_decay", "0.1"], "another run"),
        (["--warmup_steps", "6"], "another run"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, arguments, undisturbed, flags, said):
    shutil.copytree(undisturbed / "checkpoint-3", tmp_path / "checkpoint-3")
    with pytest.raises(ConfigurationError) as error:
        pretrain.main([*arguments, "--output_dir", str(tmp_path), *flags])
    assert "belongs to another run" in str(error.value)
    assert said in str(error.value)


def test_a_checkpoint_that_trained_on_other_rows_of_the_same_shards_is_refused(
    tmp_path, arguments, undisturbed, hardness_folder
):
    """With --validation_shards the training blocks are all of them, so the stream's order is another."""
    shutil.copytree(undisturbed / "checkpoint-3", tmp_path / "checkpoint-3")
    with pytest.raises(ConfigurationError, match="belongs to another run"):
        pretrain.main([*arguments, "--output_dir", str(tmp_path), "--validation_shards", str(hardness_folder)])
