"""An output folder in an object store: checkpoints whole or not at all, and runs that go on from any machine."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.numpy import load

from scorer import files
from trainer import pretrain, train_alm
from trainer.stored_output import COMPLETE_MARK, StoredOutput

ROOT = Path(__file__).parents[2]


@pytest.fixture
def output(tmp_path, monkeypatch):
    """An output at a URL of its own."""
    monkeypatch.setenv("HARDNESS_CACHE", str(tmp_path / "cache"))
    yield StoredOutput.at(f"memory://{tmp_path.name}/run")
    MemoryFileSystem.store.clear()


def write_checkpoint(output, step, content):
    folder = Path(output.folder, f"checkpoint-{step}")
    folder.mkdir(parents=True)
    (folder / "weights").write_text(content)
    (folder / COMPLETE_MARK).write_text("{}")
    output.push_checkpoint(folder.name)
    return folder.name


def test_a_checkpoint_without_its_mark_is_not_fetched(output):
    output.complete_checkpoint(write_checkpoint(output, 2, "two"), keep=None)
    write_checkpoint(output, 4, "four")  # its writer died before the mark
    output.fetch()
    assert [path.name for path in Path(output.folder).iterdir()] == ["checkpoint-2"]
    assert Path(output.folder, "checkpoint-2", "weights").read_text() == "two"


def test_the_newest_checkpoint_is_fetched_by_its_number(output):
    for step in (90, 100):
        output.complete_checkpoint(write_checkpoint(output, step, str(step)), keep=None)
    output.fetch()
    assert [path.name for path in Path(output.folder).iterdir()] == ["checkpoint-100"]


def test_what_an_earlier_run_left_in_the_local_copy_is_removed(output):
    Path(output.folder, "checkpoint-8").mkdir(parents=True)
    Path(output.folder, "checkpoint-8", COMPLETE_MARK).write_text("{}")
    output.fetch()
    assert list(Path(output.folder).iterdir()) == []


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [(None, None, [2, 4, 6, 8]), (2, None, [6, 8]), (0, None, [8]), (2, "checkpoint-2", [2, 6, 8])],
)
def test_only_the_checkpoints_that_are_kept_stay(output, keep, best, left):
    """Also where the local copy, after a resume, has only the newest one."""
    for step in (2, 4, 6, 8):
        output.complete_checkpoint(write_checkpoint(output, step, str(step)), keep, best)
        output.fetch()
    there = [name for name in files.names(output.url) if files.names(files.join(output.url, name))]
    assert there == [f"checkpoint-{step}" for step in left]


def test_each_url_has_a_copy_of_its_own_however_it_is_spelled(output):
    assert StoredOutput.at(output.url + "/") == output
    assert StoredOutput.at(output.url + "2").folder != output.folder


def test_a_sweep_into_a_store_is_refused(run_in_process):
    from trainer import sweep  # noqa: PLC0415 - it draws, and the others need not wait for that

    code, _, said = run_in_process(sweep.main, "--shards", "x", "--output_dir", "s3://bucket/sweep")
    assert code == 2
    assert "s3://bucket/sweep: a sweep needs a local folder" in said


# Whole runs, on a real server -----------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from scorer.console import run_command
from trainer import pretrain, stored_output

upload, left = stored_output.files.upload_folder, [1]

def upload_or_die(local, folder, skipped=()):
    if folder.endswith("checkpoint-6"):
        stored_output.files.replace(folder + "/model.safetensors", b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    upload(local, folder, skipped)

stored_output.files.upload_folder = upload_or_die
run_command(pretrain.main)
"""


@pytest.fixture
def arguments(hardness_folder, tiny_roberta, quick, tmp_path, monkeypatch):
    """8 steps of 4 blocks, a checkpoint every second; dropout on."""
    monkeypatch.setenv("HARDNESS_CACHE", str(tmp_path / "cache"))
    model = [*tiny_roberta, "--learning_rate", "1e-3", "--max_steps", "8", "--save_steps", "2"]
    return ["--shards", str(hardness_folder), *model, "--alpha", "0.001", *quick, "--save_total_limit", "2"]


def results(folder):
    found = json.loads(files.read_bytes(files.join(folder, "all_results.json")))
    own = ("loss", "accuracy", "mask_rate")  # of the training loss each life has its own mean
    return {name: value for name, value in found.items() if name.startswith("eval") and name.endswith(own)}


@pytest.mark.slow  # 30 s
def test_a_run_that_is_killed_in_an_upload_goes_on_elsewhere_to_the_same_bits(arguments, bucket, tmp_path):
    url, local = f"s3://{bucket}/run", str(tmp_path / "local")
    assert pretrain.main([*arguments, "--output_dir", local]) == 0
    command = [sys.executable, "-c", KILLED, *arguments, "--output_dir", url]
    killed = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert files.names(url) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    shutil.rmtree(tmp_path / "cache")  # another machine
    assert pretrain.main([*arguments, "--output_dir", url]) == 0
    weights, wanted = (files.read_bytes(files.join(folder, "model.safetensors")) for folder in (url, local))
    assert {name: values.tolist() for name, values in load(weights).items()} == {
        name: values.tolist() for name, values in load(wanted).items()
    }
    assert results(url) == results(local)
    assert [name for name in files.names(url) if name.startswith("checkpoint")] == ["checkpoint-6", "checkpoint-8"]
    assert not (tmp_path / "cache").exists()
    before = files.read_json(files.join(url, "all_results.json"))
    assert pretrain.main([*arguments, "--output_dir", url]) == 0  # nothing is left to train
    assert results(url) == results(local)
    assert files.read_json(files.join(url, "all_results.json")).keys() == before.keys()


@pytest.mark.slow  # 15 s
def test_an_alm_is_trained_into_a_store_as_into_a_folder(block_folder, quick, bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("HARDNESS_CACHE", str(tmp_path / "cache"))
    model = ["--model_type", "gpt2", "--config_overrides", "n_layer=1,n_embd=32,n_head=2", "--max_steps", "2"]
    flags = ["--blocks", str(block_folder), *model, *quick, "--output_dir"]
    url, local = f"s3://{bucket}/alm", tmp_path / "alm"
    for output in (url, str(local)):
        assert train_alm.main([*flags, output]) == 0
    files.download_folder(url, str(tmp_path / "copy"))
    copied = {path.relative_to(tmp_path / "copy").as_posix() for path in (tmp_path / "copy").rglob("*")}
    assert copied == {path.relative_to(local).as_posix() for path in local.rglob("*")}
    for name in ("tokenizer.json", "forward/model.safetensors", "backward/model.safetensors", "forward/config.json"):
        assert (tmp_path / "copy" / name).read_bytes() == (local / name).read_bytes()


def test_a_store_that_may_not_be_written_to_is_said_before_the_first_step(
    arguments, bucket, s3_server, monkeypatch, run_in_process
):
    reader = s3_server.read_only_environment(bucket)
    if reader is None:
        pytest.skip("this server has no users of fewer rights")
    for name, value in reader.items():
        monkeypatch.setenv(name, value)
    url = f"s3://{bucket}/run"
    monkeypatch.setattr(pretrain.MaskedLmTrainer, "train", lambda *_, **__: pytest.fail("it trained"))
    code, _, said = run_in_process(pretrain.main, *arguments, "--output_dir", url)
    assert code == 2
    assert f"error: {url}/" in said
    assert "the store refuses" in said
