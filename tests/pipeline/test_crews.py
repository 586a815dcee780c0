"""How many workers a machine runs, from Beam's options."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from apache_beam.options.pipeline_options import PipelineOptions

from pipeline import tokenize_corpus
from pipeline.job import assemble_crew
from pipeline.options import command_parser, parse
from pipeline.supervision import Crew
from scorer.errors import ConfigurationError


def options(*flags: str) -> PipelineOptions:
    """As the commands parse them."""
    return parse(command_parser("a command", ""), ["--input", "a", "--output", "b", *flags])[1]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """A machine of so many cores and CUDA devices."""

    def make(cores: int, devices: int) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
        monkeypatch.setattr("pipeline.job.device_count", lambda: devices)

    return make


IN_MEMORY = "--direct_running_mode=in_memory"


@pytest.mark.parametrize(
    ("flags", "device", "crew"),
    [
        ([], "cpu", Crew(processes=8, threads=1, cores=1)),
        (["--direct_num_workers=0"], "cpu", Crew(processes=8, threads=1, cores=1)),
        (["--direct_num_workers=1"], "cpu", Crew(processes=1, threads=1, cores=8)),
        (["--direct_num_workers", "3"], "cpu", Crew(processes=3, threads=1, cores=2)),
        (["--direct_num_workers=100"], "cpu", Crew(processes=100, threads=1, cores=1)),
        ([], "cuda", Crew(processes=2, threads=3, cores=4)),
        (["--direct_num_workers=1"], "cuda", Crew(processes=1, threads=3, cores=8)),
        (["--direct_num_workers=2"], "cuda", Crew(processes=2, threads=3, cores=4)),
        ([], "cuda:1", Crew(processes=1, threads=3, cores=8)),
        ([IN_MEMORY], "cpu", Crew(processes=0, threads=1, cores=None)),
        ([IN_MEMORY, "--direct_num_workers=4"], "cpu", Crew(processes=0, threads=4, cores=None)),
        ([IN_MEMORY, "--direct_num_workers=0"], "cpu", Crew(processes=0, threads=8, cores=None)),
        ([IN_MEMORY], "cuda", Crew(processes=0, threads=3, cores=None)),
        (["--runner=FlinkRunner"], "cpu", Crew(processes=1, threads=1, cores=None)),
        (["--runner=FlinkRunner"], "cuda", Crew(processes=1, threads=3, cores=None)),
    ],
)
def test_a_worker_a_core_or_device_unless_told_otherwise(
    machine: Callable[[int, int], None], flags: list[str], device: str, crew: Crew
) -> None:
    machine(8, 2)
    assert assemble_crew(options(*flags), device) == crew


@pytest.mark.parametrize(
    ("workers", "device", "there"), [(3, "cuda", 2), (9, "cuda", 2), (1, "cuda", 0), (2, "cuda:1", 1)]
)
def test_more_workers_than_devices_are_refused(
    machine: Callable[[int, int], None], workers: int, device: str, there: int
) -> None:
    machine(16, 0 if there == 0 else 2)
    message = f"--direct_num_workers {workers} with --device {device}, but there are {there} device"
    with pytest.raises(ConfigurationError, match=message):
        assemble_crew(options(f"--direct_num_workers={workers}"), device)


def test_no_device_at_all_is_refused(machine: Callable[[int, int], None]) -> None:
    machine(8, 0)
    with pytest.raises(ConfigurationError, match="usable CUDA"):
        assemble_crew(options(), "cuda")


def test_threads_of_one_process_do_not_score_on_several_devices(machine: Callable[[int, int], None]) -> None:
    machine(8, 2)
    with pytest.raises(ConfigurationError, match="in_memory scores on one device"):
        assemble_crew(options(IN_MEMORY, "--direct_num_workers=2"), "cuda")


def test_a_number_of_workers_below_zero_is_refused(
    run_command: Callable[..., tuple[int, str]], corpus_folder: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    flags = ["--input", corpus_folder, "--tokenizer", tokenizer_folder, "--output", tmp_path / "blocks"]
    code, err = run_command(tokenize_corpus.main, *flags, "--direct_num_workers=-1")
    assert code == 2
    assert "--direct_num_workers -1: expected 0" in err
    assert list(tmp_path.glob("blocks/*.parquet")) == []
