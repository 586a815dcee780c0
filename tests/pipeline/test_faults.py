"""Jobs that are killed, stopped, met by another driver: what is published stays, and the bytes come out the same.

Four faults are struck in `make test`; every kind of `benchmarks.faults` in `make test-faults`.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from benchmarks.fault_campaign import Campaign, prepare
from benchmarks.faults import KINDS, LEASE_NAME, Ledger
from benchmarks.small_job import Job, Run, files_in, shards_in, wait_until, write_alm, write_corpus
from pipeline import score_corpus, verify

IN_THREADS = ("--direct_running_mode", "in_memory")
Start = Callable[[], Run]

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("faults")]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Some 20 shards, which one worker makes in seconds."""
    folder = tmp_path_factory.mktemp("job")
    corpus = write_corpus(folder / "corpus", documents=220)
    alm = write_alm(folder / "alm", corpus, dimensions=128)
    return Job(corpus, alm, split_bytes=7500, workers=1, environment={"TMPDIR": str(folder)})


def finish(job: Job, output: Path) -> None:
    """The same command to its end; in this process, which has imported everything already."""
    assert score_corpus.main([*job.flags(output), *IN_THREADS]) == 0
    assert verify.main([str(output)]) == 0


@pytest.fixture(scope="module")
def expected(job: Job, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the job gives when nothing disturbs it."""
    output = tmp_path_factory.mktemp("undisturbed") / "shards"
    finish(job, output)
    return files_in(output)


@pytest.fixture
def start(job: Job, output: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts the job as a user would; whatever still runs in the end is killed."""
    with ExitStack() as stack:

        def begin() -> Run:
            run = job.start(output, tmp_path / f"{os.urandom(4).hex()}.log")
            stack.callback(run.kill_group)
            return run

        yield begin


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "shards"


def wait_for_shards(run: Run, output: Path, count: int = 2) -> None:
    assert wait_until(lambda: run.is_over or len(shards_in(output)) >= count)
    assert not run.is_over, run.text


def ends(run: Run, code: int) -> bool:
    assert run.wait() == code, run.text
    assert "Traceback" not in run.text, run.text
    return True


def leaves_no_process(run: Run) -> bool:
    return wait_until(lambda: not run.group())


@pytest.fixture
def ledger(expected: dict[str, bytes]) -> Ledger:
    return Ledger(expected)


def test_a_killed_worker_is_replaced(start: Start, output: Path, expected: dict[str, bytes], ledger: Ledger) -> None:
    run = start()
    wait_for_shards(run, output)
    (worker,) = run.workers()
    ledger.look(output)
    worker.kill()
    assert ends(run, 0)
    assert files_in(output) == expected
    assert len(ledger) >= 2
    assert ledger.remade(output) == []


def test_a_killed_driver_takes_its_workers_along_and_bars_no_rerun(
    start: Start, job: Job, output: Path, expected: dict[str, bytes], ledger: Ledger
) -> None:
    run = start()
    wait_for_shards(run, output)
    os.kill(run.process.pid, signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    assert leaves_no_process(run)
    assert (output / LEASE_NAME).exists()
    ledger.look(output)
    assert 2 <= len(ledger) < len(shards_of(expected))
    finish(job, output)
    assert files_in(output) == expected
    assert ledger.remade(output) == []


def test_an_interrupted_job_says_so_and_tidies_up(
    start: Start, job: Job, output: Path, expected: dict[str, bytes], ledger: Ledger
) -> None:
    """As Ctrl-C does it: the whole group gets the signal."""
    run = start()
    wait_for_shards(run, output)
    os.killpg(run.process.pid, signal.SIGINT)
    assert ends(run, 130)
    assert "run the same command again" in run.text
    assert leaves_no_process(run)
    assert [name for name in files_in(output) if name.endswith(".tmp") or name == LEASE_NAME] == []
    ledger.look(output)
    finish(job, output)
    assert files_in(output) == expected
    assert ledger.remade(output) == []


def test_a_second_driver_is_refused_and_harms_nothing(
    *,
    start: Start,
    job: Job,
    output: Path,
    expected: dict[str, bytes],
    ledger: Ledger,
    run_command: Callable[..., tuple[int, str]],
) -> None:
    first = start()
    wait_for_shards(first, output)
    ledger.look(output)
    driver = psutil.Process(first.process.pid)
    driver.suspend()  # so that it is there, however long the second one takes to start
    code, message = run_command(score_corpus.main, *job.flags(output))
    assert code == 2
    assert "another driver is at work" in message
    driver.resume()
    assert ends(first, 0)
    assert files_in(output) == expected
    assert ledger.remade(output) == []


def shards_of(files: dict[str, bytes]) -> list[str]:
    return [name for name in files if name.endswith(".parquet")]


# --- All kinds


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    folder = tmp_path_factory.mktemp("campaign")
    corpus = write_corpus(folder / "corpus")
    return prepare(folder, Job(corpus, write_alm(folder / "alm", corpus), environment={"TMPDIR": str(folder)}))


@pytest.mark.faults
@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_costs_what_is_in_flight_and_nothing_else(campaign: Campaign, kind: str) -> None:
    outcome = campaign.strike(kind, 0)
    if outcome.skipped:
        pytest.skip(outcome.skipped)
    assert outcome.violations == []
    assert outcome.remade_without_need == []
