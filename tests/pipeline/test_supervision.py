"""Workers and their supervisor: what fails is tried again, then set aside with its place, and costs nothing else."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from pipeline import score_corpus, supervision
from pipeline.corpus import FileRange
from pipeline.failures import SetAside, Tolerance
from pipeline.plan import Split, read_plan
from pipeline.publication import Provenance, PublishedShard
from pipeline.shard_making import KeepBlocks, PackedRecipe, Recipe
from pipeline.supervision import Crew, Limits, Outcome, Supervisor
from scorer.errors import ConfigurationError, CorpusError, HardnessError, StorageError, WorkerError
from scorer.tokenizer import describe, load_tokenizer
from scorer.vocabulary import Vocabulary
from tests.pipeline.faulty_steps import (
    DEEDS,
    DeadlyTokenizerSource,
    ExitingStep,
    Fault,
    FormulaScorer,
    Notes,
    ToySource,
    ToyStep,
    toy_ids,
)

IN_THREADS = ("--direct_running_mode", "in_memory")
ONE_THREAD = Crew(processes=0, threads=1, cores=None)
THREE_THREADS = Crew(processes=0, threads=3, cores=None)
Read = Callable[[Path], Any]
Start = Callable[..., Supervisor]


@pytest.fixture(autouse=True)
def _attempts_follow_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "_RETRY_SECONDS", 0.01)


@pytest.fixture
def notes(tmp_path: Path) -> Notes:
    return Notes(str(tmp_path / "notes"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An output folder as a job prepares it."""
    (tmp_path / "shards" / "_receipts").mkdir(parents=True)
    return tmp_path / "shards"


@pytest.fixture(scope="module")
def vocabulary(tokenizer_folder: Path) -> Vocabulary:
    return describe(load_tokenizer(str(tokenizer_folder)))


class NotPacked(PackedRecipe):
    """For threads of this process: a step may share locks and events with its test."""

    def __init__(self, recipe: Recipe):
        super().__init__(recipe.folder, b"")
        object.__setattr__(self, "_recipe", recipe)

    def unpack(self) -> Recipe:
        recipe: Recipe = self._recipe  # type: ignore[attr-defined]
        return recipe


@pytest.fixture
def start(folder: Path, vocabulary: Vocabulary) -> Iterator[Start]:
    """Makes supervisors of toy splits, and closes them."""
    started = []

    def make(step: Any, crew: Crew = ONE_THREAD, source: Any = None, splits: int = 100) -> Supervisor:
        provenance = Provenance(vocabulary, None, None, None, None, {})
        made = Recipe(str(folder), source or ToySource(), step, provenance)
        recipe = PackedRecipe.of(made) if crew.processes else NotPacked(made)
        started.append(Supervisor(recipe, crew, Limits(Tolerance(), splits, 0)))
        return started[-1]

    yield make
    for supervisor in started:
        supervisor.close()


def toy_splits(count: int) -> list[Split]:
    names = [f"shard-{index:05d}-of-{count:05d}.parquet" for index in range(count)]
    return [Split(index, name, (FileRange("toy.txt", index, index + 1),)) for index, name in enumerate(names)]


def drive(supervisor: Supervisor, splits: Sequence[Split]) -> list[Outcome]:
    """What became of each split, in their order."""
    outcomes = [outcome for split in splits for outcome in supervisor.submit(split)]
    outcomes += supervisor.drain()
    assert len(outcomes) == len({outcome.index for outcome in outcomes}), "some split has two outcomes"
    return sorted(outcomes, key=lambda outcome: outcome.index)


def check_published(folder: Path, splits: Sequence[Split], read_shard: Read) -> None:
    """These shards and no others are there, whole, with their receipts and nothing half-written."""
    assert sorted(path.name for path in folder.glob("*.parquet")) == [split.shard for split in splits]
    assert sorted(path.name for path in folder.glob("_receipts/*.json")) == [f"{s.index:05d}.json" for s in splits]
    for split in splits:
        arrays, footer = read_shard(folder / split.shard)
        np.testing.assert_array_equal(arrays["input_ids"], toy_ids(split.index))
        assert footer["blocks"] == footer["documents"] == 2


def wait_until(condition: Callable[[], object]) -> None:
    """Until it holds, or the test fails."""
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come to pass within a minute")


def attempts(notes: Notes) -> dict[int, int]:
    found = [note["split"] for note in notes.read()]
    return {index: found.count(index) for index in sorted(set(found))}


# --- What fails is tried again, then set aside


@pytest.mark.parametrize("crew", [ONE_THREAD, THREE_THREADS])
@pytest.mark.parametrize(
    ("deed", "cause"),
    [
        ("value", "ValueError: what the step found"),
        ("os", "OSError: [Errno 5] the disk hiccups"),
        ("panic", "PanicError: what the step panicked at"),
    ],
)
def test_what_fails_three_times_is_set_aside_with_its_place_and_costs_no_other_split(
    *, start: Start, notes: Notes, folder: Path, read_shard: Read, crew: Crew, deed: str, cause: str
) -> None:
    splits = toy_splits(5)
    outcomes = drive(start(ToyStep(Fault(notes, {2: deed})), crew), splits)
    failure = outcomes.pop(2)
    assert isinstance(failure, SetAside)
    assert (failure.index, failure.shard) == (2, splits[2].shard)
    assert failure.place == "toy.txt, byte 2000, one by one"
    assert failure.message.startswith(cause)
    assert all(isinstance(outcome, PublishedShard) for outcome in outcomes)
    assert attempts(notes) == {0: 1, 1: 1, 2: 3, 3: 1, 4: 1}
    (record,) = (folder / "_set_aside").iterdir()
    assert record.name == "00002.json"
    assert json.loads(record.read_bytes()) == {
        **{"index": 2, "shard": splits[2].shard, "place": failure.place, "message": failure.message}
    }
    check_published(folder, splits[:2] + splits[3:], read_shard)


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("deed", ["os", "value", "panic"])
def test_what_fails_once_or_twice_is_made_all_the_same(
    *, start: Start, notes: Notes, folder: Path, read_shard: Read, deed: str, times: int
) -> None:
    outcomes = drive(start(ToyStep(Fault(notes, {1: deed}, times))), toy_splits(3))
    assert all(isinstance(outcome, PublishedShard) for outcome in outcomes)
    assert attempts(notes) == {0: 1, 1: 1 + times, 2: 1}
    assert not (folder / "_set_aside").exists()
    check_published(folder, toy_splits(3), read_shard)


@pytest.mark.parametrize(("deed", "cause"), [("corpus", "the text is hopeless"), ("shard", "the shard is torn")])
def test_what_would_fail_again_is_set_aside_at_once(start: Start, notes: Notes, deed: str, cause: str) -> None:
    failure = drive(start(ToyStep(Fault(notes, {1: deed}))), toy_splits(3))[1]
    assert failure == SetAside(1, toy_splits(3)[1].shard, "toy.txt, byte 1000, at a stroke", cause)
    assert attempts(notes) == {0: 1, 1: 1, 2: 1}


def test_a_split_that_failed_before_has_its_worker_for_itself(start: Start) -> None:
    """Three at a time, but none beside the second attempt: whatever it does, it does to itself."""
    at_work: list[int] = []
    beside: list[set[int]] = []
    together = threading.Barrier(3)
    lock = threading.Lock()

    def work(index: int) -> None:
        with lock:
            at_work.append(index)
            is_again = index == 1 and len(beside) > 0
            if index == 1:
                beside.append(set(at_work) - {1})
        try:
            if not is_again and index < 3:
                together.wait(60)
            if is_again:
                time.sleep(0.1)  # room for one that should not begin
                with lock:
                    beside[-1] |= set(at_work) - {1}
            elif index == 1:
                raise OSError("once")
        finally:
            with lock:
                at_work.remove(index)

    outcomes = drive(start(ToyStep(work), THREE_THREADS), toy_splits(9))
    assert all(isinstance(outcome, PublishedShard) for outcome in outcomes)
    assert len(beside) == 2
    assert beside[1] == set()


def test_ten_splits_in_a_row_that_fail_stop_the_job(start: Start, notes: Notes, folder: Path) -> None:
    supervisor = start(ToyStep(Fault(notes, dict.fromkeys(range(1, 100), "corpus"))))
    with pytest.raises(CorpusError, match=r"10 splits in a row.*shard-00010-of-00100\.parquet at toy\.txt.*hopeless"):
        drive(supervisor, toy_splits(100))
    assert attempts(notes) == dict.fromkeys(range(11), 1)
    assert len(list(folder.glob("_set_aside/*.json"))) == 10


def test_splits_that_fail_here_and_there_do_not_stop_the_job(start: Start, notes: Notes) -> None:
    outcomes = drive(
        start(ToyStep(Fault(notes, {index: "corpus" for index in range(30) if index % 10}))), toy_splits(30)
    )
    assert [isinstance(outcome, SetAside) for outcome in outcomes] == [index % 10 > 0 for index in range(30)]


# --- What ends the job


def test_wrong_configuration_ends_the_job_before_any_shard(start: Start, notes: Notes, folder: Path) -> None:
    supervisor = start(ToyStep(Fault(notes), DEEDS["configuration"]))
    with pytest.raises(ConfigurationError, match="the configuration is wrong"):
        drive(supervisor, toy_splits(3))
    assert list(folder.glob("*.parquet")) == notes.read() == []


@pytest.mark.parametrize(("deed", "error"), [("storage", StorageError), ("configuration", ConfigurationError)])
def test_what_is_the_same_for_every_shard_ends_the_job_at_once(
    *, start: Start, notes: Notes, folder: Path, read_shard: Read, deed: str, error: type[Exception]
) -> None:
    supervisor = start(ToyStep(Fault(notes, {1: deed})))
    with pytest.raises(error):
        drive(supervisor, toy_splits(5))
    assert attempts(notes) == {0: 1, 1: 1}
    check_published(folder, toy_splits(5)[:1], read_shard)


# --- What is in flight


def test_what_is_in_flight_is_on_record_until_the_end(
    start: Start, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervision, "_REPORT_SECONDS", 0.0)
    seen: dict[str, Any] = {}

    def reports() -> list[Path]:
        return [path for path in folder.iterdir() if "in-flight" in path.name and path.name.count(".tmp") == 1]

    def work(index: int) -> None:
        def is_on_record() -> bool:
            for path in reports():
                report = json.loads(path.read_bytes())
                for entry in report["in_flight"]:
                    if entry["shard"].startswith(f"shard-{index:05d}"):
                        seen[entry["shard"]] = report | {"in_flight": [entry]}
            return f"shard-{index:05d}-of-00002.parquet" in seen

        wait_until(is_on_record)

    supervisor = start(ToyStep(work), THREE_THREADS)
    drive(supervisor, toy_splits(2))
    assert sorted(seen) == [split.shard for split in toy_splits(2)]
    for shard, report in seen.items():
        assert set(report) == {"host", "pid", "in_flight"}
        (entry,) = report["in_flight"]
        assert 0 <= entry.pop("seconds") < 120
        assert entry == {"shard": shard, "blocks": 0, "attempt": 1}
    supervisor.close()
    assert reports() == []
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


# --- Worker processes


ONE_PROCESS = Crew(processes=1, threads=1, cores=1)
TWO_PROCESSES = Crew(processes=2, threads=1, cores=1)


@pytest.mark.slow
def test_a_document_that_kills_workers_is_named_and_costs_no_other_split(
    *,
    start: Start,
    notes: Notes,
    folder: Path,
    tmp_path: Path,
    tokenizer_folder: Path,
    vocabulary: Vocabulary,
    read_shard: Read,
) -> None:
    """Three workers die of it; the other splits, also those of the worker beside it, are read once."""
    documents = [f"document {index} of some words" for index in range(40)]
    documents[17] += " deadly"
    data = "\n\n".join(documents).encode()
    (tmp_path / "a.txt").write_bytes(data)
    place = data.index(b"document 17")
    cuts = [0, place - 200, place - 100, place + 200, place + 300, len(data)]
    splits = [
        Split(index, f"shard-{index:05d}-of-00005.parquet", (FileRange("a.txt", *cuts[index : index + 2]),))
        for index in range(5)
    ]
    source = DeadlyTokenizerSource(f"{tmp_path}/", str(tokenizer_folder), vocabulary, "deadly", notes)
    outcomes = drive(start(KeepBlocks(), TWO_PROCESSES, source), splits)
    failure = outcomes.pop(2)
    assert isinstance(failure, SetAside)
    assert failure.place == f"a.txt, byte {place}"
    assert "died (signal 9)" in failure.message
    assert all(isinstance(outcome, PublishedShard) for outcome in outcomes)
    assert sum(outcome.documents for outcome in outcomes if isinstance(outcome, PublishedShard)) < 40
    assert attempts(notes) == {0: 1, 1: 1, 2: 3, 3: 1, 4: 1}
    assert [note["careful"] for note in notes.read() if note["split"] == 2] == [False, True, True]
    assert sorted(path.name for path in folder.glob("*.parquet")) == [
        split.shard for split in splits if split.index != 2
    ]


@pytest.mark.slow
def test_workers_that_end_while_they_start_end_the_job(start: Start, notes: Notes) -> None:
    with pytest.raises(WorkerError, match=r"end while they start \(exit code 3\)"):
        drive(start(ExitingStep(notes), ONE_PROCESS), toy_splits(2))
    assert len({note["pid"] for note in notes.read()}) == 3


@pytest.mark.slow
def test_after_a_panic_a_fresh_process_goes_on(start: Start, notes: Notes, folder: Path, read_shard: Read) -> None:
    splits = toy_splits(3)
    outcomes = drive(start(ToyStep(Fault(notes, {1: "panic"}, times=1)), ONE_PROCESS), splits)
    assert all(isinstance(outcome, PublishedShard) for outcome in outcomes)
    before, panicked, *after = [note["pid"] for note in notes.read()]
    assert before == panicked
    assert len(after) == 2
    assert panicked not in after
    check_published(folder, splits, read_shard)


@pytest.mark.slow
def test_a_stopped_worker_holds_up_its_own_split_only_and_is_ended_at_the_close(
    start: Start, notes: Notes, folder: Path, read_shard: Read
) -> None:
    """Splits go to whoever is free."""
    supervisor = start(ToyStep(Fault(notes, {0: "stop"})), TWO_PROCESSES)
    splits = toy_splits(6)
    outcomes = [outcome for split in splits for outcome in supervisor.submit(split)]
    remaining = supervisor.drain()
    while len(outcomes) < 5:
        outcomes.append(next(remaining))
    check_published(folder, splits[1:], read_shard)
    (stopped,) = {note["pid"] for note in notes.read() if note["split"] == 0}
    (other,) = {note["pid"] for note in notes.read() if note["split"] != 0}
    supervisor.close()
    for pid in (stopped, other):
        assert not psutil.pid_exists(pid)


# --- Whole jobs


Run = Callable[..., tuple[int, str]]


@pytest.fixture
def score(run_command: Run, block_folder: Path, tmp_path: Path) -> Run:
    """score_corpus of the small corpus, by a scorer."""

    def run(scorer: FormulaScorer, *more: object, output: Path = tmp_path / "scored") -> tuple[int, str]:
        flags = ["--input", block_folder, "--output", output, *(more or IN_THREADS)]
        return run_command(lambda arguments: score_corpus.main(arguments, scorer=scorer), *flags)

    return run


@pytest.fixture
def row_of(block_folder: Path, read_shard: Read) -> Callable[[int], bytes]:
    """Bytes of the first block of a shard of the small corpus, which no other shard holds."""

    def row(index: int) -> bytes:
        plan = read_plan(str(block_folder))
        assert plan is not None
        return bytes(read_shard(block_folder / plan.splits[index].shard)[0]["input_ids"][0].tobytes())

    return row


def check_set_aside(result: tuple[int, str], folder: Path, cause: str) -> None:
    """Exit code 1, a message with shard, place and cause; all other shards are there, and no manifest."""
    code, err = result
    shard = "shard-00001-of-00003.parquet"
    message = err.rpartition("error: ")[2]
    assert code == 1
    assert "Traceback" not in message
    for word in ("1 of 3 splits failed and were set aside", f"{shard} at {shard}", cause):
        assert word in message
    (record,) = (folder / "_set_aside").iterdir()
    assert json.loads(record.read_bytes())["shard"] == shard
    assert not (folder / "_manifest.json").exists()
    assert sorted(path.name for path in folder.glob("*.parquet")) == [
        *("shard-00000-of-00003.parquet", "shard-00002-of-00003.parquet"),
    ]


@pytest.mark.parametrize(
    ("mode", "deed", "cause"),
    [
        (IN_THREADS, "value", "ValueError: what the step found"),
        (IN_THREADS, "panic", "PanicError: what the step panicked at"),
        (IN_THREADS, "os", "the disk hiccups"),
        pytest.param(("--direct_num_workers", 1), "kill", "died (signal 9)", marks=pytest.mark.slow),
    ],
)
def test_a_job_with_a_split_set_aside_fails_and_its_rerun_makes_what_is_missing(
    *,
    score: Run,
    row_of: Callable[[int], bytes],
    notes: Notes,
    tmp_path: Path,
    state_of: Callable[[Path], dict[str, tuple[bytes, int]]],
    mode: tuple[object, ...],
    deed: str,
    cause: str,
) -> None:
    folder = tmp_path / "scored"
    check_set_aside(score(FormulaScorer(notes, row_of(1), deed), *mode), folder, cause)
    assert len(notes.read()) == 3
    before = state_of(folder)
    assert score(FormulaScorer(notes))[0] == 0
    after = state_of(folder)
    shards = [name for name in before if name.endswith(".parquet")]
    assert [after[name] for name in shards] == [before[name] for name in shards]
    assert list(folder.glob("_set_aside/*")) == []
    assert score(FormulaScorer(notes), output=tmp_path / "undisturbed")[0] == 0
    expected = state_of(tmp_path / "undisturbed")
    assert {name: data for name, (data, _) in after.items()} == {name: data for name, (data, _) in expected.items()}


@pytest.mark.parametrize(
    ("scorer", "code", "message"),
    [
        ({"at_open": "configuration"}, 2, "the configuration is wrong"),
        ({"at_open": "storage"}, 1, "the disk is full"),
        ({"deed": "storage"}, 1, "the disk is full"),
        ({"deed": "configuration"}, 2, "the configuration is wrong"),
    ],
)
def test_errors_of_workers_are_the_jobs_own(
    *,
    score: Run,
    row_of: Callable[[int], bytes],
    notes: Notes,
    tmp_path: Path,
    scorer: dict[str, str],
    code: int,
    message: str,
) -> None:
    found, err = score(FormulaScorer(notes, row_of(1), **scorer))
    assert found == code
    assert err.rpartition("error: ")[2].strip() == message
    assert "Traceback" not in err
    assert len(notes.read()) == ("deed" in scorer)
    assert not (tmp_path / "scored" / "_set_aside").exists()
    assert not [path for path in (tmp_path / "scored").iterdir() if path.name.startswith(".")]
    assert not (tmp_path / "scored" / "_manifest.json").exists()


# --- The end


def test_nothing_is_started_after_the_close(start: Start, notes: Notes) -> None:
    supervisor = start(ToyStep(Fault(notes)))
    supervisor.submit(toy_splits(2)[0])
    supervisor.close()
    with pytest.raises(HardnessError, match="stopped"):
        supervisor.submit(toy_splits(2)[1])


def test_threads_publish_nothing_after_the_close(start: Start, folder: Path) -> None:
    began, go = threading.Event(), threading.Event()

    def work(_: int) -> None:
        began.set()
        go.wait(60)

    supervisor = start(ToyStep(work))
    supervisor.submit(toy_splits(1)[0])
    assert began.wait(60)
    supervisor.close()
    threads = [thread for thread in threading.enumerate() if thread.name == "worker"]
    for thread in threads:
        thread.join(60)  # the worker has seen that nobody listens
    go.set()
    for thread in [thread for thread in threading.enumerate() if thread.name.startswith("shard")]:
        thread.join(60)
    assert list(folder.glob("*.parquet")) == []
