"""Jobs on real engines: the same bytes as on this machine alone, and nothing that stays behind.

`make engines` fetches what these tests need. Without it they are skipped, unless `HARDNESS_REQUIRE_ENGINES` is set.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pytest

from benchmarks.small_job import Job, Run, files_in, shards_in, wait_until, write_alm, write_corpus
from pipeline import score_corpus, verify
from pipeline.engines import local_flink, runners
from pipeline.engines.flink_rest import Flink
from pipeline.engines.installation import flink_home, job_server, require_java
from pipeline.engines.local_flink import LocalFlink
from pipeline.engines.placement import ENGINE_NAME
from pipeline.engines.services import marked
from pipeline.plan import read_plan
from pipeline.progress import measure
from scorer.errors import ConfigurationError

pytestmark = [pytest.mark.slow, pytest.mark.engines, pytest.mark.xdist_group("engines")]
Start = Callable[..., Run]


def require(*parts: Callable[[], object]) -> None:
    """Skips, or fails where engines have to be there."""
    try:
        for part in parts:
            part()
    except ConfigurationError as error:
        if os.environ.get("HARDNESS_REQUIRE_ENGINES"):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Some 20 shards, which one worker makes in seconds."""
    folder = tmp_path_factory.mktemp("job")
    corpus = write_corpus(folder / "corpus", documents=220)
    return Job(corpus, write_alm(folder / "alm", corpus, dimensions=128), split_bytes=7500, workers=1)


@pytest.fixture(scope="module")
def expected(job: Job, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the job gives on this machine alone."""
    output = tmp_path_factory.mktemp("local") / "shards"
    assert score_corpus.main([*job.flags(output), "--direct_running_mode", "in_memory"]) == 0
    return files_in(output)


@pytest.fixture(scope="module")
def flink_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("flink")


@pytest.fixture(scope="module")
def flink(flink_folder: Path) -> Iterator[LocalFlink]:
    """Two TaskManagers."""
    require(require_java, flink_home, lambda: job_server("flink"))
    try:
        yield local_flink.up(flink_folder)
    finally:
        local_flink.down(flink_folder)
        assert not marked(flink_folder)
        assert not (flink_folder / "tmp").exists()


@pytest.fixture
def start(job: Job, output: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts the job as a user would, with more flags; whatever still runs in the end is killed."""
    with ExitStack() as stack:

        def begin(*flags: str) -> Run:
            run = job.start(output, tmp_path / f"{os.urandom(4).hex()}.log", flags=flags)
            stack.callback(run.kill_group)
            return run

        yield begin


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "shards"


def on(cluster: LocalFlink) -> list[str]:
    flags = {"--runner": "FlinkRunner", "--flink_master": cluster.rest, "--job_endpoint": cluster.job_endpoint}
    return [part for flag in flags.items() for part in flag]


def workers(folder: Path) -> frozenset[int]:
    """Scoring processes of a cluster that live."""
    found = set()
    for process in marked(folder):
        with suppress(psutil.Error):
            if "pipeline.worker" in process.cmdline():
                found.add(process.pid)
    return frozenset(found)


def test_flink_gives_the_bytes_of_one_machine_by_two_workers_at_once(
    flink: LocalFlink, flink_folder: Path, start: Start, output: Path, expected: dict[str, bytes]
) -> None:
    run = start(*on(flink))
    seen: set[frozenset[int]] = set()

    def look() -> bool:
        seen.add(workers(flink_folder))
        return run.is_over

    assert wait_until(look)
    assert run.code == 0, run.text
    assert files_in(output) == expected
    assert verify.main([str(output)]) == 0
    assert max(map(len, seen)) == 2
    slots = Flink(flink.rest).slots()
    assert (slots.taskmanagers, slots.free) == (2, 2)


def test_ctrl_c_ends_the_job_on_flink_and_a_rerun_completes_it(
    flink: LocalFlink, start: Start, output: Path, expected: dict[str, bytes]
) -> None:
    run = start(*on(flink))
    assert wait_until(lambda: run.is_over or bool(shards_in(output)))
    plan = read_plan(str(output))
    assert plan is not None
    engine = measure(str(output), plan).engine
    assert engine is not None
    assert (engine.runner, engine.state) == ("FlinkRunner", "RUNNING")
    assert engine.page is not None
    assert flink.rest in engine.page
    os.killpg(run.process.pid, signal.SIGINT)
    assert run.wait() == 130, run.text
    assert "run the same command again" in run.text
    assert Flink(flink.rest).slots().free == 2
    assert not (output / ENGINE_NAME).exists()
    published = {path.name: path.stat().st_ino for path in shards_in(output)}

    again = start(*on(flink))
    assert again.wait() == 0, again.text
    assert files_in(output) == expected
    assert {name: (output / name).stat().st_ino for name in published} == published


def test_spark_ends_with_a_driver_that_was_killed_and_a_rerun_gives_the_bytes_of_one_machine(
    start: Start, output: Path, expected: dict[str, bytes]
) -> None:
    require(require_java, lambda: job_server("spark"))
    flags = ("--runner", "SparkRunner", "--spark_master_url", "local[2,4]")
    run = start(*flags)
    assert wait_until(lambda: run.is_over or bool(shards_in(output)))
    run.process.kill()
    assert run.wait() == -signal.SIGKILL, run.text
    assert wait_until(lambda: not run.group())
    published = {path.name: path.stat().st_ino for path in shards_in(output)}
    again = start(*flags)
    assert again.wait() == 0, again.text
    assert files_in(output) == expected
    assert {name: (output / name).stat().st_ino for name in published} == published


def test_a_cluster_that_is_not_there_is_an_error_that_says_how_to_start_one(
    job: Job, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HARDNESS_ENGINES", str(tmp_path / "engines"))
    with pytest.raises(ConfigurationError, match=r"no Flink cluster: `make flink-up`.*FLINK_MASTER"):
        score_corpus.main([*job.flags(output), "--runner", "FlinkRunner"])
    monkeypatch.setattr(runners, "_PATIENCE_SECONDS", 0.0)
    with pytest.raises(ConfigurationError, match="localhost:9 does not answer"):
        score_corpus.main(
            [*job.flags(output), "--runner=FlinkRunner", "--flink_master=localhost:9", "--job_endpoint=localhost:9"]
        )
    assert not output.exists()
