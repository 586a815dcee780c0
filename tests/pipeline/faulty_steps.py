"""Recipes that fail on purpose. Worker processes import this module by its name, so it is not in a test's own."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.corpus import TextFormat
from pipeline.plan import Split
from pipeline.shard_making import FillRows, Rows
from pipeline.sources import ReadSplit
from pipeline.tokenization import Account, SplitTokenizer
from scorer.errors import ConfigurationError, CorpusError, ShardError, StorageError
from scorer.shards import ShardContent
from scorer.tokenizer import load_tokenizer
from scorer.vocabulary import Vocabulary

Ids = npt.NDArray[Any]
FIRST_ID = 10
"""What stands for split 0 in toy blocks."""


class PanicError(BaseException):
    """As the tokenizer's panics are: no Exception."""


def _raise(error: BaseException) -> None:
    raise error


DEEDS: dict[str, Callable[[], object]] = {
    "value": lambda: _raise(ValueError("what the step found\nand more of it")),
    "os": lambda: _raise(OSError(5, "the disk hiccups")),
    "panic": lambda: _raise(PanicError("what the step panicked at")),
    "configuration": lambda: _raise(ConfigurationError("the configuration is wrong")),
    "storage": lambda: _raise(StorageError("the disk is full")),
    "corpus": lambda: _raise(CorpusError("the text is hopeless")),
    "shard": lambda: _raise(ShardError("the shard is torn")),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "exit": lambda: os._exit(3),
}


@dataclass(frozen=True)
class Notes:
    """A list in a file, since those who write it may die of what they do next."""

    path: str

    def add(self, **note: object) -> None:
        """Adds an entry, with the process that adds it."""
        with open(self.path, "a") as stream:
            stream.write(json.dumps({"pid": os.getpid(), **note}) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """All entries so far."""
        path = Path(self.path)
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@dataclass(frozen=True)
class Fault:
    """Does what a step must not do, on certain splits and their first attempts."""

    notes: Notes
    deeds: Mapping[int, str] = field(default_factory=dict)
    """By split."""
    times: int = 1000

    def __call__(self, index: int) -> None:
        attempts = sum(note["split"] == index for note in self.notes.read())
        self.notes.add(split=index)
        if index in self.deeds and attempts < self.times:
            DEEDS[self.deeds[index]]()


# --- Toy splits: two documents of a block each, without a tokenizer


def toy_ids(index: int) -> Ids:
    """The blocks of a toy split."""
    ids = np.full((2, 512), FIRST_ID + index, dtype=np.uint16)
    ids[:, 0], ids[0, 2], ids[:, -1] = 0, 7, 2
    return ids


@dataclass(frozen=True)
class ToySource:
    """Splits whose every block says which split it is of."""

    def open(self) -> ReadSplit:
        return ToyBlocks


class ToyBlocks:
    """The blocks of one toy split."""

    def __init__(self, split: Split, careful: bool = False, report: Callable[[str], None] = lambda _: None):
        self._split = split
        self._report = report
        self._manner = "one by one" if careful else "at a stroke"

    def __iter__(self) -> Iterator[Ids]:
        self._report(f"toy.txt, byte {self._split.index * 1000}, {self._manner}")
        yield toy_ids(self._split.index)

    @property
    def account(self) -> Account:
        return Account([{"file": "toy.txt", "start": 0, "end": 1}], 2, 0, 0)


@dataclass(frozen=True)
class ToyStep:
    """Keeps blocks, and calls something with the split's index first."""

    call: Callable[[int], object]
    at_open: Callable[[], object] = lambda: None

    def open(self) -> FillRows:
        self.at_open()

        def fill(ids: Ids) -> Rows:
            self.call(int(ids[0, 1]) - FIRST_ID)
            return Rows(ShardContent(ids))

        return fill


@dataclass(frozen=True)
class ExitingStep:
    """Takes its process down while it is opened."""

    notes: Notes

    def open(self) -> FillRows:
        self.notes.add(split=-1)
        os._exit(3)


# --- A tokenizer that a document brings down


@dataclass(frozen=True)
class DeadlyTokenizerSource:
    """Text, and a tokenizer that a word kills."""

    root: str
    tokenizer: str
    vocabulary: Vocabulary
    word: str
    notes: Notes

    def open(self) -> ReadSplit:
        tokenizer = load_tokenizer(self.tokenizer)
        tokenize = SplitTokenizer(self.root, TextFormat(), _Deadly(tokenizer, self.word), self.vocabulary).tokenize

        def read(split: Split, careful: bool = False, report: Callable[[str], None] = lambda _: None) -> Any:
            self.notes.add(split=split.index, careful=careful)
            return tokenize(split, careful, report)

        return read


class _Deadly:
    """A tokenizer in all that `SplitTokenizer` asks of it; its backend too."""

    def __init__(self, tokenizer: Any, word: str):
        self._backend, self._word = tokenizer.backend_tokenizer, word
        self.unk_token_id = tokenizer.unk_token_id

    @property
    def backend_tokenizer(self) -> Any:
        return self

    def encode_batch_fast(self, texts: list[str], **flags: Any) -> Any:
        if any(self._word in text for text in texts):
            DEEDS["kill"]()
        return self._backend.encode_batch_fast(texts, **flags)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)


# --- Scorers for whole jobs


@dataclass(frozen=True)
class FormulaScorer:
    """Scores by a formula; does some deed first where a certain block is scored."""

    notes: Notes
    row: bytes = b""
    """`input_ids` of the block that the deed is done at."""
    deed: str = ""
    at_open: str = ""
    times: int = 1000
    alm: Mapping[str, str] = field(default_factory=lambda: {"forward_sha256": "f" * 64, "backward_sha256": "b" * 64})
    device: str = "cpu"
    dtype: str = "float32"
    micro_batch: int = 256

    def open(self) -> Callable[[Ids], tuple[Ids, Ids]]:
        if self.at_open:
            DEEDS[self.at_open]()
        return self._score

    def _score(self, ids: Ids) -> tuple[Ids, Ids]:
        if self.row and any(row.tobytes() == self.row for row in ids):
            attempts = len(self.notes.read())
            self.notes.add(split=-1)
            if attempts < self.times:
                DEEDS[self.deed]()
        forward = (ids % 7).astype(np.float32)
        return forward, forward / 2
