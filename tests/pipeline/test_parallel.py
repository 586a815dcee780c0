"""However many workers there are, of whatever kind: the same bytes, and a scorer that is not kept waiting."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import score_corpus, sources, tokenize_corpus
from pipeline.plan import read_plan
from pipeline.publication import find_published, write_manifest
from pipeline.tokenization import BlockStream

IN_THREADS = ("--direct_running_mode", "in_memory")
LookAt = Callable[[Path], dict[str, tuple[bytes, int]]]


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, corpus_folder: Path, tokenizer_folder: Path, alm_folder: Path
) -> Callable[..., Path]:
    """Runs one of three jobs, each of some four splits."""
    blocks = tmp_path_factory.mktemp("parallel") / "blocks"
    text: list[object] = ["--input", corpus_folder / "b.txt", "--tokenizer", tokenizer_folder, "--split_bytes", 25_000]
    scoring = ["--alm", alm_folder, "--device", "cpu"]

    def run(job: str, output: Path, *mode: object) -> Path:
        if job == "tokenize":
            code = tokenize_corpus.main([*map(str, [*text, "--output", output, *mode])])
        else:
            if not blocks.exists() and job == "score blocks":
                run("tokenize", blocks, *IN_THREADS)
            source = text if job == "score text" else ["--input", blocks]
            code = score_corpus.main([*map(str, [*source, *scoring, "--output", output, *mode])])
        assert code == 0
        return output

    return run


@pytest.fixture(scope="module")
def expected(
    undisturbed: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory, state_of: LookAt
) -> Callable[[str], dict[str, bytes]]:
    """What one thread makes of a job."""
    found: dict[str, dict[str, bytes]] = {}

    def look(job: str) -> dict[str, bytes]:
        if job not in found:
            folder = undisturbed(job, tmp_path_factory.mktemp("expected") / "output", *IN_THREADS)
            found[job] = {name: data for name, (data, _) in state_of(folder).items()}
            assert sum(name.endswith(".parquet") for name in found[job]) >= 4
        return found[job]

    return look


def in_processes(job: str, workers: int) -> Any:
    return pytest.param(job, "multi_processing", workers, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("job", "mode", "workers"),
    [
        *((job, "in_memory", workers) for job in ("tokenize", "score text", "score blocks") for workers in (2, 4)),
        *(in_processes("tokenize", workers) for workers in (1, 2, 4)),
        # One process computes with all cores, four with a core or less each. Processes take seconds to start.
        *(in_processes("score text", workers) for workers in (1, 4)),
        in_processes("score blocks", 2),
    ],
)
def test_shards_receipts_and_manifest_have_the_same_bytes_however_many_workers_make_them(
    *,
    undisturbed: Callable[..., Path],
    expected: Callable[[str], dict[str, bytes]],
    tmp_path: Path,
    state_of: LookAt,
    job: str,
    mode: str,
    workers: int,
) -> None:
    flags = ["--direct_running_mode", mode, "--direct_num_workers", workers]
    folder = undisturbed(job, tmp_path / "output", *flags)
    assert {name: data for name, (data, _) in state_of(folder).items()} == expected(job)


def test_the_manifest_does_not_depend_on_the_order_in_which_shards_are_done(shards: Path) -> None:
    plan = read_plan(str(shards))
    assert plan is not None
    before = (shards / "_manifest.json").read_bytes()
    published = [shard for split in plan.splits if (shard := find_published(str(shards), split))]
    for order in (published[::-1], published[1:] + published[:1]):
        (shards / "_manifest.json").unlink()
        write_manifest(str(shards), plan, order)
        assert (shards / "_manifest.json").read_bytes() == before


# --- Overlap


class Stage:
    """What the threads of one test's workers have come to; all of them are of this process."""

    def __init__(self, splits: int) -> None:
        self.changed = threading.Condition()
        self.splits = splits
        self.tokenized: set[str] = set()
        """Splits whose blocks are ready to be scored."""
        self.scored = 0
        self.starved: list[int] = []


STAGES: dict[str, Stage] = {}


@dataclass(frozen=True)
class WaitingScorer:
    """Each call lasts until another split is ready to be scored next, as long as any is left."""

    stage: str
    alm: Mapping[str, str]
    device: str = "cpu"
    dtype: str = "float32"
    micro_batch: int = 256

    def open(self) -> Callable[[Any], tuple[Any, Any]]:
        stage = STAGES[self.stage]

        def score(ids: Any) -> tuple[Any, Any]:
            with stage.changed:
                beyond_this = min(stage.scored + 2, stage.splits)
                if not stage.changed.wait_for(lambda: len(stage.tokenized) >= beyond_this, timeout=60):
                    stage.starved.append(stage.scored)
                stage.scored += 1
            scores = (ids % 7).astype(np.float32)
            return scores, scores

        return score


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Stage]:
    """Six splits, whose reading is watched."""
    stage = STAGES[request.node.name] = Stage(6)
    open_source = sources.TextSource.open

    class Watched:
        """A `BlockStream`, of one batch of blocks."""

        def __init__(self, name: str, blocks: BlockStream):
            self._name, self._blocks = name, blocks

        def __iter__(self) -> Iterator[Any]:
            for ids in self._blocks:
                with stage.changed:
                    stage.tokenized.add(self._name)
                    stage.changed.notify_all()
                yield ids

        @property
        def account(self) -> Any:
            return self._blocks.account

    def open_watched(source: sources.TextSource) -> Any:
        read = open_source(source)
        return lambda split, *arguments: Watched(split.shard, read(split, *arguments))

    monkeypatch.setattr(sources.TextSource, "open", open_watched)
    yield stage
    del STAGES[request.node.name]


@pytest.mark.parametrize("threads", [2, 3])
def test_other_splits_are_tokenized_while_one_is_scored(
    *,
    stage: Stage,
    request: pytest.FixtureRequest,
    tokenizer_folder: Path,
    tmp_path: Path,
    random_text: Callable[[int, int], str],
    threads: int,
) -> None:
    """No call of the scorer ends before the next split is ready for it, so that it never waits for one."""
    (tmp_path / "corpus").mkdir()
    for index in range(6):
        (tmp_path / "corpus" / f"{index}.txt").write_text(random_text(2000, index))
    scorer = WaitingScorer(request.node.name, {"forward_sha256": "f" * 64, "backward_sha256": "b" * 64})
    flags = ["--input", tmp_path / "corpus", "--tokenizer", tokenizer_folder, "--output", tmp_path / "output"]
    more = ["--split_bytes", 2000, *IN_THREADS, "--direct_num_workers", threads]
    assert score_corpus.main([*map(str, [*flags, *more])], scorer=scorer) == 0
    assert stage.scored == 6
    assert stage.starved == []
