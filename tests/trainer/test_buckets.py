"""Training on shards in a bucket gives, bit for bit, what training on the same shards on a local disk gives.

Also while the store fails, after kills, and in several processes. The runs are of a folder of many small shards, in
pools of two shards, so that a run of 15 steps downloads all the time.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import load_file

from scorer import files
from scorer.tokenizer import describe, load_tokenizer
from trainer import pretrain, replay, runs, simulate, stream, train_alm

ROOT = Path(__file__).parents[2]
SHARDS, BLOCKS = 10, 12
STEPS = 14
"""Of 4 blocks: an epoch is of 60 - the last half of 120 is held out - and so of 15 steps."""

PROGRAM = """
import os, signal, sys
from pathlib import Path
from scorer import files
from scorer.console import run_command
from trainer import pretrain, runs, stream

log, kill_after = sys.argv.pop(1), int(sys.argv.pop(1))
stream.POOL_BLOCKS = runs.POOL_BLOCKS = {pool}
stream.WINDOW_ROW_GROUPS = 1
download = files.download

def logged(path, local):
    if not path.endswith(".parquet"):
        return download(path, local)
    with open(log, "a") as lines:
        print(path, file=lines, flush=True)
    if 0 < kill_after <= len(open(log).readlines()):
        Path(local).write_bytes(b"half a shard")
        os.kill(os.getpid(), signal.SIGKILL)
    download(path, local)

files.download = logged
if __name__ == "__main__":
    run_command(runs.leaving_the_group(pretrain.main))
"""
POOL = 2 * BLOCKS


@pytest.fixture(scope="module")
def folder(tmp_path_factory, write_shards, tokenizer_folder):
    """Shards by formula, with the small tokenizer beside them."""
    folder = tmp_path_factory.mktemp("many")
    shutil.copytree(tokenizer_folder, folder / "tokenizer")
    return write_shards([BLOCKS] * SHARDS, folder, vocabulary=describe(load_tokenizer(str(tokenizer_folder))))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HARDNESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def small_pools(monkeypatch):
    for module in (stream, runs):
        monkeypatch.setattr(module, "POOL_BLOCKS", POOL)
    monkeypatch.setattr(stream, "WINDOW_ROW_GROUPS", 1)


@pytest.fixture
def durable(s3_server):
    if not s3_server.is_durable:
        pytest.skip("moto's data does not outlive it, and it knows no secrets: run `make s3-server`")
    return s3_server


@pytest.fixture
def url(bucket, folder):
    """The folder in the bucket."""
    url = f"s3://{bucket}/shards"
    fsspec.filesystem("s3").put(f"{folder}/", f"{url}/", recursive=True)
    return url


@pytest.fixture(scope="module")
def flags(tiny_roberta, quick):
    steps = ["--max_steps", str(STEPS), "--save_steps", "5", "--logging_steps", "1"]
    return [*tiny_roberta, "--learning_rate", "1e-3", *steps, "--alpha", "0.001", *quick]


@pytest.fixture
def train(flags, small_pools):
    """Trains in this process, to its end."""

    def train(shards, output):
        assert pretrain.main(["--shards", str(shards), *flags, "--output_dir", str(output)]) == 0

    return train


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, folder, flags):
    """On the local disk."""
    output = tmp_path_factory.mktemp("undisturbed")
    patch = pytest.MonkeyPatch()
    for module in (stream, runs):
        patch.setattr(module, "POOL_BLOCKS", POOL)
    patch.setattr(stream, "WINDOW_ROW_GROUPS", 1)
    assert pretrain.main(["--shards", str(folder), *flags, "--output_dir", str(output)]) == 0
    patch.undo()
    return output


@pytest.fixture
def downloads(monkeypatch):
    """Names of the shards that this process downloads, one after the other."""
    found, download = [], files.download

    def noted(path, local):
        if path.endswith(".parquet"):
            found.append(path.rpartition("/")[2])
        download(path, local)

    monkeypatch.setattr(files, "download", noted)
    return found


def losses(output):
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [(entry["step"], entry["loss"], entry["grad_norm"]) for entry in log if "grad_norm" in entry]


def results(output):
    found = json.loads((output / "all_results.json").read_text())
    return {name: value for name, value in found.items() if not name.endswith(("runtime", "per_second"))}


def assert_same_run(output, expected):
    weights, wanted = (load_file(folder / "model.safetensors") for folder in (output, expected))
    assert weights.keys() == wanted.keys()
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)
    assert losses(output) == losses(expected)
    found, wanted = ({k: v for k, v in results(folder).items() if "eval" in k} for folder in (output, expected))
    assert len(wanted) >= 3
    assert found == wanted


def leftovers(cache):
    return [path.name for path in cache.iterdir() if path.suffix != ".parquet" and path.name != ".lock"]


def write_program(tmp_path, *arguments, kill_after=0, processes=1):
    """`pretrain` with small pools: its command line, its environment, and where it says what it downloads."""
    program, log = tmp_path / "program.py", tmp_path / "downloads.txt"
    program.write_text(PROGRAM.format(pool=POOL))
    log.unlink(missing_ok=True)
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)] if processes > 1 else []
    command = [sys.executable, *launcher, str(program), str(log), str(kill_after), *map(str, arguments)]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return command, {**os.environ, "PYTHONPATH": paths}, log


def run_program(tmp_path, *arguments, **settings):
    """Runs `pretrain` with small pools; returns how it ended, and what it downloaded."""
    command, environment, log = write_program(tmp_path, *arguments, **settings)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)
    lines = log.read_text().splitlines() if log.exists() else []
    return done, [line.rpartition("/")[2] for line in lines]


@pytest.fixture
def resume(train, undisturbed, monkeypatch):
    """Goes on after step 10; returns the shards that were read."""
    needed, read = set(), runs.ShardCorpus.read_all

    def noted(self, groups):
        needed.update(group.shard for group in groups)
        return read(self, groups)

    def resume(shards, output):
        shutil.copytree(undisturbed / "checkpoint-10", output / "checkpoint-10")
        train(shards, output)
        return needed

    monkeypatch.setattr(runs.ShardCorpus, "read_all", noted)
    return resume


# The same as on a local disk ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_pretraining_over_a_bucket_is_that_over_a_local_folder(tmp_path, train, url, undisturbed, downloads):
    train(url, tmp_path / "run")
    assert_same_run(tmp_path / "run", undisturbed)
    assert max(Counter(downloads).values()) == 1
    assert len(downloads) == SHARDS
    assert leftovers(tmp_path / "cache") == []


@pytest.mark.slow
def test_a_resume_downloads_only_what_is_still_needed(tmp_path, resume, url, undisturbed, downloads):
    """Of its last 4 of 14 steps a run needs the shards of their blocks, and those that it is evaluated on."""
    needed = resume(url, tmp_path)
    assert_same_run(tmp_path, undisturbed)
    assert len(needed) < SHARDS
    assert sorted(downloads) == [f"shard-{shard:05d}-of-{SHARDS:05d}.parquet" for shard in sorted(needed)]


@pytest.mark.slow
@pytest.mark.usefixtures("small_pools")
def test_an_alm_over_a_bucket_is_that_over_a_local_folder(tmp_path, folder, url, quick, tiny_gpt2):
    flags = [*tiny_gpt2, "--learning_rate", "1e-3", "--max_steps", "4", "--logging_steps", "1", *quick]
    for name, blocks in (("local", folder), ("remote", url)):
        assert train_alm.main(["--blocks", str(blocks), "--output_dir", str(tmp_path / name), *flags]) == 0
    for direction in ("forward", "backward"):
        assert_same_run(tmp_path / "remote" / direction, tmp_path / "local" / direction)


def test_replay_and_simulate_print_of_a_bucket_what_they_print_of_a_local_folder(folder, url, capsys, downloads):
    printed = []
    for shards in (folder, url):
        capsys.readouterr()
        rows = ["--shard", "3", "--rows", "2:9", "--epochs", "0:2"]
        assert replay.main(["--shards", str(shards), "--alpha", "0.001", "--json", *rows]) == 0
        assert simulate.main(["--shards", str(shards), "--blocks", "40", "--json"]) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        printed.append([{key: value for key, value in line.items() if key != "shards"} for line in lines])
    assert len(printed[0]) == 14 + 1
    assert printed[0] == printed[1]
    assert max(Counter(downloads).values()) == 1


# Faults ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_bad_weather_costs_no_bit(tmp_path, train, url, undisturbed, weather):
    """All of it at once; the server's connections are dropped, cut and put off, and its answers late."""
    weather.every(drops=7, cuts=3, slow_downs=5)
    weather.slow(delay=0.01)
    train(url, tmp_path)
    assert_same_run(tmp_path, undisturbed)
    for fault in ("drops", "cuts", "slow_downs", "delays"):
        assert weather.done[fault] > 1


@pytest.fixture
def outage(durable, monkeypatch):
    """The server is killed as the fourth shard is asked for, and comes back after two seconds."""
    download, calls, lock = files.download, [], threading.Lock()

    def come_back():
        time.sleep(2)
        durable.start()

    def noted(path, local):
        with lock:
            if path.endswith(".parquet"):
                calls.append(path)
            if len(calls) == 4 and path == calls[-1]:
                durable.kill()
                threading.Thread(target=come_back).start()
        download(path, local)

    monkeypatch.setattr(files, "download", noted)


@pytest.mark.slow
@pytest.mark.usefixtures("outage")
def test_a_server_that_is_away_for_seconds_in_mid_epoch_costs_no_bit(tmp_path, train, url, undisturbed, weather):
    train(url, tmp_path)
    assert_same_run(tmp_path, undisturbed)
    assert weather.done["outages"] > 0


@pytest.mark.slow  # 30 s
def test_a_trainer_that_is_killed_in_mid_download_goes_on_to_the_same_bits(tmp_path, url, flags, undisturbed, cache):
    arguments = ["--shards", url, *flags, "--output_dir", tmp_path / "run"]
    killed, first = run_program(tmp_path, *arguments, kill_after=6)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-4000:]
    assert len(first) >= 6
    assert any(name.endswith(".part") for name in leftovers(cache))
    done, second = run_program(tmp_path, *arguments)
    assert done.returncode == 0, done.stderr[-4000:]
    assert_same_run(tmp_path / "run", undisturbed)
    assert len(second) <= SHARDS - 1
    assert max(Counter(second).values()) == 1


@pytest.mark.slow  # 15 s
def test_a_trainer_that_waits_for_a_download_ends_when_it_is_told_to(tmp_path, url, flags, weather):
    """At 1 kB/s the download would take minutes."""
    arguments = ["--shards", url, *flags, "--output_dir", tmp_path / "run"]
    command, environment, log = write_program(tmp_path, *arguments)
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
        weather.slow(bandwidth=100_000)
        while not log.exists():
            assert process.poll() is None
            time.sleep(0.05)
        weather.slow(bandwidth=1_000)
        process.send_signal(signal.SIGTERM)
        try:
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 143, said
    assert "run the same command again" in said


@pytest.mark.slow  # 30 s
def test_two_processes_share_a_cache_and_download_each_shard_once(tmp_path, url, flags, cache):
    arguments = ["--shards", url, *flags, "--output_dir", tmp_path / "run", "--ddp_backend", "gloo"]
    at_once = ["--per_device_train_batch_size", "2"]
    done, found = run_program(tmp_path, *arguments, *at_once, processes=2)
    assert done.returncode == 0, done.stderr[-4000:]
    assert len(losses(tmp_path / "run")) == STEPS
    assert max(Counter(found).values()) == 1
    assert len(found) == SHARDS
    assert leftovers(cache) == []


@pytest.mark.slow  # 15 s
def test_loader_workers_share_a_cache_and_cost_no_bit(tmp_path, url, flags, undisturbed):
    """They are forks of a process that has read from the bucket before."""
    arguments = ["--shards", url, *flags, "--output_dir", tmp_path / "run", "--dataloader_num_workers", "2"]
    done, found = run_program(tmp_path, *arguments)
    assert done.returncode == 0, done.stderr[-4000:]
    assert_same_run(tmp_path / "run", undisturbed)
    assert max(Counter(found).values()) == 1
    assert len(found) == SHARDS


# What no patience mends -----------------------------------------------------------------------------------------------


class TestRefusals:
    """Exit code 2, one message, no traceback; and none of the patience that is for passing failures."""

    @pytest.fixture
    def refused(self, run_in_process, flags, tmp_path):
        def refused(url):
            code, _, error = run_in_process(pretrain.main, "--shards", url, *flags, "--output_dir", tmp_path / "run")
            assert code == 2
            assert "Traceback" not in error
            (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
            return line

        return refused

    @pytest.mark.usefixtures("durable")
    def test_a_wrong_secret(self, refused, url, monkeypatch):
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        line = refused(url)
        assert url in line
        assert "AWS_SECRET_ACCESS_KEY" in line

    def test_no_credentials(self, refused, url, monkeypatch):
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        line = refused(url)
        assert url in line
        assert "credentials" in line

    def test_a_bucket_that_is_not_there(self, refused, url):
        assert "s3://no-such-bucket/shards" in refused("s3://no-such-bucket/shards")

    def test_a_limit_below_two_pools(self, refused, url, monkeypatch):
        monkeypatch.setenv("HARDNESS_CACHE_GB", "1e-4")
        assert "HARDNESS_CACHE_GB" in refused(url)

    def test_a_cache_folder_that_is_a_file(self, refused, url, cache):
        cache.write_text("")
        assert "HARDNESS_CACHE" in refused(url)
