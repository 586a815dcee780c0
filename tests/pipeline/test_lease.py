"""One driver a folder: a living one keeps others out, a dead one never stands in the way."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import psutil
import pytest

from pipeline import score_corpus, tokenize_corpus
from pipeline.lease import holding, living_driver
from scorer import files
from scorer.errors import ConfigurationError

LEASE = "_driver.json"


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty folder on a local disk and in an object store."""
    if request.param == "local":
        yield str(tmp_path)
        return
    path = f"memory://{uuid.uuid4().hex}"
    files.make_folder(path)
    yield path
    fsspec.filesystem("memory").rm(path, recursive=True)


def own_lease(tmp_path: Path) -> dict[str, Any]:
    """What this process writes."""
    (tmp_path / "own").mkdir()
    with holding(str(tmp_path / "own")):
        value: dict[str, Any] = json.loads((tmp_path / "own" / LEASE).read_bytes())
    return value


@pytest.fixture
def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def leave(folder: Path, lease: object, age: float = 0.0) -> None:
    """A lease that was renewed so many seconds ago."""
    path = folder / LEASE
    path.write_bytes(lease if isinstance(lease, bytes) else json.dumps(lease).encode())
    os.utime(path, (time.time() - age,) * 2)


def test_a_folder_living_driver_while_its_driver_works(folder: str) -> None:
    assert not living_driver(folder)
    with holding(folder):
        assert living_driver(folder)
        with pytest.raises(
            ConfigurationError, match=f"another driver.*process {os.getpid()} on {socket.gethostname()}"
        ):
            holding(folder).__enter__()
        assert living_driver(folder)
    assert not living_driver(folder)
    assert files.names(folder) == []
    with holding(folder):
        assert living_driver(folder)


def test_a_lease_is_released_on_an_error(folder: str) -> None:
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), holding(folder):
            raise error
        assert not living_driver(folder)
        assert files.names(folder) == []


def test_a_folder_that_is_not_there_is_not_driven(tmp_path: Path) -> None:
    assert not living_driver(str(tmp_path / "nowhere"))


def check_free(folder: Path) -> None:
    """Nobody drives it, and whoever wants to may."""
    assert not living_driver(str(folder))
    with holding(str(folder)):
        assert living_driver(str(folder))
        assert json.loads((folder / LEASE).read_bytes())["pid"] == os.getpid()
    assert not (folder / LEASE).exists()


def check_taken(folder: Path, *words: str) -> None:
    before = (folder / LEASE).read_bytes()
    assert living_driver(str(folder))
    with pytest.raises(ConfigurationError) as error, holding(str(folder)):
        pass
    assert all(word in str(error.value) for word in words)
    assert (folder / LEASE).read_bytes() == before


def test_another_living_process_keeps_its_folder_however_long_it_was_silent(tmp_path: Path) -> None:
    parent = psutil.Process(os.getppid())
    lease = own_lease(tmp_path) | {"pid": parent.pid, "started": parent.create_time()}
    leave(tmp_path, lease, age=3600)
    check_taken(tmp_path, f"process {parent.pid}", "another --output")


def test_a_process_that_died_keeps_nothing(tmp_path: Path, dead_pid: int) -> None:
    leave(tmp_path, own_lease(tmp_path) | {"pid": dead_pid})
    check_free(tmp_path)


def test_a_process_of_the_same_number_that_began_at_another_time_is_another_one(tmp_path: Path) -> None:
    parent = psutil.Process(os.getppid())
    leave(tmp_path, own_lease(tmp_path) | {"pid": parent.pid, "started": parent.create_time() - 100})
    check_free(tmp_path)


@pytest.mark.parametrize("changes", [{"boot": "another"}, {"boot": "another", "host": "elsewhere"}])
def test_a_driver_elsewhere_is_known_by_its_signs_of_life(
    tmp_path: Path, dead_pid: int, changes: dict[str, str]
) -> None:
    lease = own_lease(tmp_path) | {"pid": dead_pid} | changes
    leave(tmp_path, lease, age=30)
    check_taken(tmp_path, f"process {dead_pid} on {lease['host']}", "last heard of")
    leave(tmp_path, lease, age=90)
    check_free(tmp_path)


@pytest.mark.parametrize("data", [b"", b'{"host": "a', b"[]", b"{}", b'"text"', b"\xff\xfe"])
def test_a_lease_that_cannot_be_read_is_respected_for_a_while(tmp_path: Path, data: bytes) -> None:
    leave(tmp_path, data)
    check_taken(tmp_path, "cannot be read")
    leave(tmp_path, data, age=90)
    check_free(tmp_path)


def test_a_lease_is_renewed_while_its_driver_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.lease._RENEW_SECONDS", 0.01)
    with holding(str(tmp_path)):
        os.utime(tmp_path / LEASE, (0, 0))
        deadline = time.monotonic() + 60
        while (tmp_path / LEASE).stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert list(tmp_path.iterdir()) == []


def test_jobs_refuse_a_folder_that_living_driver(
    block_folder: Path, corpus_folder: Path, tokenizer_folder: Path, alm_folder: Path, tmp_path: Path
) -> None:
    """And touch nothing in it; once it is free, they run."""
    output, mode = tmp_path / "output", ["--direct_running_mode", "in_memory"]
    flags = {
        tokenize_corpus: ["--input", corpus_folder, "--tokenizer", tokenizer_folder],
        score_corpus: ["--input", block_folder, "--alm", alm_folder, "--device", "cpu"],
    }
    for command, given in flags.items():
        output = tmp_path / command.__name__
        output.mkdir()
        arguments = [*map(str, given), "--output", str(output), *mode]
        with holding(str(output)):
            with pytest.raises(ConfigurationError, match="another driver is at work"):
                command.main(arguments)
            assert list(output.glob("*.parquet")) == []
            assert living_driver(str(output))
        assert command.main(arguments) == 0
        assert not (output / LEASE).exists()


def test_a_driver_in_another_container_of_this_machine_is_known_by_its_signs_of_life(
    tmp_path: Path, dead_pid: int
) -> None:
    """Containers share the kernel's boot id, and not its process ids."""
    lease = own_lease(tmp_path)
    boot, _ = lease["boot"].split(" ")
    leave(tmp_path, lease | {"pid": dead_pid, "boot": f"{boot} pid:[1]"}, age=30)
    with pytest.raises(ConfigurationError, match="last heard of 3"):
        holding(str(tmp_path)).__enter__()


@pytest.mark.parametrize("pid", [-1, "x", 2**70])
def test_a_lease_of_no_process_is_taken(tmp_path: Path, pid: object) -> None:
    leave(tmp_path, own_lease(tmp_path) | {"pid": pid})
    with holding(str(tmp_path)):
        assert living_driver(str(tmp_path)) is not None
