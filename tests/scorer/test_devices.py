"""A device for each scoring process: claimed by one, free again when it ends, and never another than was asked for."""

import multiprocessing
import os
import signal
from types import SimpleNamespace

import pytest
import torch

from scorer import devices
from scorer.devices import claim_device, claim_one, device_count, require_device
from scorer.errors import ConfigurationError

NAMES = ["cuda-one", "cuda-two", "cuda-three"]


@pytest.fixture(autouse=True)
def _claims_end_with_the_test(monkeypatch):
    monkeypatch.setattr(devices, "_PATIENCE_SECONDS", 0.0)
    claims = {}
    monkeypatch.setattr(devices, "_claims", claims)
    yield
    for descriptor in claims.values():
        os.close(descriptor)


def claim_and_wait(names, folder, results):
    """In a process of its own, until that is killed."""
    devices._claims.clear()  # of the process that this one was forked from
    try:
        results.send((os.getpid(), claim_one(names, folder)))
    except ConfigurationError as error:
        results.send((os.getpid(), str(error)))
    signal.pause()


@pytest.fixture
def claim_elsewhere(tmp_path):
    """Claims one of the names in a new process, which lives on: its process id, and what it got."""
    context = multiprocessing.get_context("fork")
    started = []

    def claim(names=NAMES):
        ours, theirs = context.Pipe()
        process = context.Process(target=claim_and_wait, args=(names, str(tmp_path), theirs))
        process.start()
        started.append(process)
        assert ours.poll(60)
        return ours.recv()

    yield claim
    for process in started:
        process.kill()
        process.join()


def test_each_process_gets_another_device(claim_elsewhere, tmp_path):
    found = [claim_elsewhere() for _ in NAMES]
    assert [index for _, index in found] == [0, 1, 2]
    _, message = claim_elsewhere()
    assert "all 3 CUDA device(s) that were asked for are taken" in message
    for name, (pid, _) in zip(NAMES, found, strict=True):
        assert f"{name} by process {pid} of " in message
    with pytest.raises(ConfigurationError, match="all 1 CUDA"):
        claim_one(NAMES[1:2], str(tmp_path))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_device_is_free_when_its_process_ends_however_it_ends(claim_elsewhere, tmp_path, how):
    pids = [claim_elsewhere()[0] for _ in NAMES]
    os.kill(pids[1], how)
    child = next(process for process in multiprocessing.active_children() if process.pid == pids[1])
    child.join()
    assert claim_one(NAMES, str(tmp_path)) == 1


def test_a_device_is_waited_for_while_its_process_is_ending(claim_elsewhere, tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "_PATIENCE_SECONDS", 300.0)
    pids = [claim_elsewhere()[0] for _ in NAMES]
    monkeypatch.setattr(devices.time, "sleep", lambda _: os.kill(pids[2], signal.SIGKILL))
    assert claim_one(NAMES, str(tmp_path)) == 2


def test_a_process_may_claim_its_device_again(claim_elsewhere, tmp_path):
    claim_elsewhere(NAMES[:1])
    assert [claim_one(NAMES, str(tmp_path)) for _ in range(3)] == [1, 1, 1]
    assert claim_elsewhere()[1] == 2
    assert claim_one(NAMES[1:2], str(tmp_path)) == 0


def test_a_claim_does_not_pass_to_child_processes(tmp_path):
    """Or else a child that outlives a killed worker would keep the device from the worker's successor."""
    claim_one(NAMES, str(tmp_path))
    (descriptor,) = devices._claims.values()
    assert not os.get_inheritable(descriptor)


def test_locks_lie_where_every_process_of_the_machine_finds_them(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    claim_one(["cuda-one"])
    assert [path.name for path in tmp_path.iterdir()] == ["hardness-cuda-one.lock"]


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine that says it has so many CUDA devices."""

    def make(count):
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"a-machine's-{index}")
        )

    return make


def test_the_cpu_needs_no_claim(machine, tmp_path):
    machine(0)
    require_device("cpu")
    assert [claim_device("cpu") for _ in range(2)] == ["cpu", "cpu"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("count", "device"), [(0, "cuda"), (0, "cuda:0"), (1, "cuda:1"), (2, "cuda:7")])
def test_a_device_that_is_not_there_is_an_error_and_never_another_one(machine, count, device):
    machine(count)
    assert device_count() == count
    for refuse in (require_device, claim_device):
        with pytest.raises(ConfigurationError, match=f"--device {device} .* {count} usable CUDA"):
            refuse(device)


@pytest.mark.parametrize(("count", "device"), [(1, "cuda"), (1, "cuda:0"), (3, "cuda:2")])
def test_a_device_that_is_there_is_one_to_ask_for(machine, count, device):
    machine(count)
    require_device(device)


def test_driver_without_devices_counts_none(monkeypatch):
    """A CUDA build of torch on a machine whose driver does not work."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert device_count() == 0


def test_any_device_is_the_first_that_is_free_and_a_named_one_is_that_one(machine, claim_elsewhere):
    machine(3)
    assert claim_elsewhere(["cuda-a-machine's-0"])[1] == 0
    assert claim_device("cuda") == "cuda:1"
    assert claim_device("cuda") == "cuda:1"
    assert claim_device("cuda:2") == "cuda:2"
    with pytest.raises(ConfigurationError, match="taken"):
        claim_device("cuda:0")


def test_a_lock_can_be_tried_by_every_user(tmp_path):
    before = os.umask(0o077)
    try:
        claim_one(["a"], str(tmp_path))
    finally:
        os.umask(before)
    assert (tmp_path / "hardness-a.lock").stat().st_mode & 0o444 == 0o444
