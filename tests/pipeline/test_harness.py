"""What an engine starts on its machines: it ends with its engine, and does not outlive a harness that hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from benchmarks.small_job import wait_until
from pipeline.engines.placement import ENGINE_NAME

FLAGS = ("--id", "1-1", "--provision_endpoint", "localhost:9")  # where nobody listens: the child goes on asking
ENGINE = f"""
import subprocess, sys
print(subprocess.Popen([sys.executable, "-m", "pipeline.engines.harness", *{FLAGS!r}]).pid, flush=True)
sys.stdin.read()
"""
Start = Callable[..., psutil.Process]

pytestmark = pytest.mark.slow


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a harness from a process that stands for the engine, until it has a child; gives the parent."""
    engines = []

    def begin(**environment: str) -> psutil.Process:
        engine = subprocess.Popen(
            [sys.executable, "-c", ENGINE],
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        engines.append(engine)
        assert engine.stdout is not None
        parent = psutil.Process(int(engine.stdout.readline()))
        assert wait_until(lambda: len(parent.children()) == 1)
        return parent

    yield begin
    for engine in engines:
        with suppress(ProcessLookupError):
            os.killpg(engine.pid, signal.SIGKILL)
        engine.communicate()


def is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_a_harness_that_is_stopped_is_killed(start: Start) -> None:
    parent = start(HARDNESS_HARNESS_SILENT_SECONDS="2")
    (child,) = parent.children()
    child.suspend()
    assert wait_until(lambda: is_gone(child) and is_gone(parent))


def test_a_harness_ends_when_its_job_is_over(start: Start, tmp_path: Path) -> None:
    """An engine that recovered from a failure may have forgotten it."""
    placement = tmp_path / ENGINE_NAME
    placement.write_text('{"runner": "FlinkRunner", "job": "mine", "page": null}')
    parent = start(HARDNESS_SHARDS=str(tmp_path), HARDNESS_JOB="mine")
    (child,) = parent.children()
    assert not wait_until(lambda: is_gone(child), seconds=15)
    placement.write_text('{"runner": "FlinkRunner", "job": "a later run\'s", "page": null}')
    assert wait_until(lambda: is_gone(child) and is_gone(parent))


def test_a_harness_that_starts_slowly_is_left_alone(start: Start) -> None:
    """Its heart beats while it imports, and while it waits for the engine."""
    parent = start(HARDNESS_HARNESS_SILENT_SECONDS="5")
    (child,) = parent.children()
    assert not wait_until(lambda: is_gone(child), seconds=8)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_the_harness_ends_with_its_parent(start: Start, how: signal.Signals) -> None:
    parent = start()
    (child,) = parent.children()
    parent.send_signal(how)
    assert wait_until(lambda: is_gone(child) and is_gone(parent))


def test_both_end_with_an_engine_that_was_killed(start: Start) -> None:
    parent = start()
    (child,) = parent.children()
    parent.parent().kill()
    assert wait_until(lambda: is_gone(child) and is_gone(parent))


def test_a_job_server_that_will_not_end_ends_with_the_signals_that_beam_sends() -> None:
    """An interrupt a second, five times; then it kills the process that holds the leash."""
    stubborn = (
        "import signal, time; signal.signal(15, signal.SIG_IGN); signal.signal(2, signal.SIG_IGN); time.sleep(600)"
    )
    script = f"import sys; from pipeline.engines.leash import hold; hold([sys.executable, '-c', {stubborn!r}])"
    with subprocess.Popen([sys.executable, "-c", script]) as leash:
        parent = psutil.Process(leash.pid)
        assert wait_until(lambda: len(parent.children()) == 1)
        (child,) = parent.children()
        for _ in range(2):
            leash.send_signal(signal.SIGINT)
        assert wait_until(lambda: is_gone(child))


def test_the_parent_ends_with_its_harness(start: Start) -> None:
    parent = start()
    parent.children()[0].kill()
    assert wait_until(lambda: is_gone(parent))
