"""Engines are fetched once and whole; what a cluster is made of is started, found again, and ended."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pipeline.engines import installation, services
from pipeline.engines.installation import fetch, flink_home, job_server, require_java
from pipeline.engines.services import Service, end, marked
from scorer.errors import ConfigurationError

STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
)
PARENT = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {STUBBORN!r}])"


@pytest.fixture
def pins(tmp_path: Path) -> Path:
    path = tmp_path / "pins.txt"
    path.write_text("one 1.0\n")
    return path


def write_executable(path: Path, script: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_what_is_pinned_is_made_once_and_again_when_the_pins_change(tmp_path: Path, pins: Path) -> None:
    target = tmp_path / "engine"
    made: list[Path] = []

    def make(path: Path) -> None:
        made.append(path)
        path.mkdir()
        (path / "lib.jar").write_text(pins.read_text())

    for _ in range(2):
        installation._once(target, pins, make)
    assert len(made) == 1
    pins.write_text("one 2.0\n")
    for _ in range(2):
        installation._once(target, pins, make)
    assert len(made) == 2
    assert (target / "lib.jar").read_text() == "one 2.0\n"
    assert target not in made, "it must be made aside, and moved into its place when it is whole"
    assert len([path for path in tmp_path.iterdir() if path.name.startswith(".engine.")]) == 1


def test_what_could_not_be_fetched_leaves_nothing(tmp_path: Path, pins: Path) -> None:
    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError("the network is gone")

    with pytest.raises(OSError, match="network"):
        installation._once(tmp_path / "engine.jar", pins, fail)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pins.txt"]


def test_no_java_is_said_before_anything_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("HARDNESS_ENGINES", str(tmp_path / "engines"))
    with pytest.raises(ConfigurationError, match=r"no java .* Java 11 or 17"):
        fetch("flink")
    assert not (tmp_path / "engines").exists()


@pytest.mark.parametrize(("version", "is_good"), [("1.8.0_402", False), ("11.0.2", True), ("17.0.15", True)])
def test_java_has_to_be_new_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, is_good: bool
) -> None:
    write_executable(tmp_path / "bin" / "java", f"echo 'openjdk version \"{version}\"' >&2")
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    if is_good:
        assert require_java() == str(tmp_path / "bin" / "java")
    else:
        with pytest.raises(ConfigurationError, match="too old"):
            require_java()


def test_an_engine_that_was_not_fetched_is_named_with_the_way_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HARDNESS_ENGINES", str(tmp_path))
    for find, name in ((flink_home, "flink-1.19.3"), (lambda: job_server("spark"), "spark-job-server.jar")):
        with pytest.raises(ConfigurationError, match=f"{tmp_path}/{name} is missing: run `make engines`"):
            find()


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.setattr(services, "_STOP_SECONDS", 1.0)
    yield Service(tmp_path, "one")
    for process in marked(tmp_path):
        process.kill()


def wait_for(service: Service, word: str) -> None:
    assert services.wait_until(lambda: word in service.last_words(), 60.0)


def test_a_service_is_found_again_by_whoever_knows_its_folder(service: Service, tmp_path: Path) -> None:
    assert service.process() is None
    service.start([sys.executable, "-c", STUBBORN], {})
    wait_for(service, "up")
    found = Service(tmp_path, "one").process()
    assert found is not None
    assert os.getsid(found.pid) == found.pid, "no Ctrl-C of a terminal must reach it"
    assert [process.pid for process in marked(tmp_path)] == [found.pid]


def test_a_process_id_that_belongs_to_another_process_by_now_is_not_the_service(
    service: Service, tmp_path: Path
) -> None:
    (tmp_path / "one.pid").write_text(f'{{"pid": {os.getpid()}, "started": 1.0}}')
    assert service.process() is None
    service.stop()
    assert psutil.pid_exists(os.getpid())


@pytest.mark.parametrize("is_stopped", [False, True])
def test_all_that_a_service_started_ends_with_the_cluster(service: Service, tmp_path: Path, is_stopped: bool) -> None:
    service.start([sys.executable, "-c", PARENT], {})
    wait_for(service, "up")
    processes = marked(tmp_path)
    assert len(processes) == 2
    if is_stopped:
        for process in processes:
            process.send_signal(signal.SIGSTOP)
    end(processes)
    assert marked(tmp_path) == []
    assert service.process() is None
