"""A scorer that costs next to nothing, so that everything else shows; it also counts where a worker's time goes."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.tokenization import DocumentEncoder, Ids

Nll = npt.NDArray[np.float32]
_MODULUS = 1000
_FIELDS = struct.Struct("<4d")


@dataclass(frozen=True)
class WorkerTime:
    """CPU seconds of one worker process."""

    start: float
    """Until tokenizer and scorer were there: imports, above all."""
    tokenizer: float
    """Inside `encode_batch_fast`."""
    scorer: float
    """Inside the scorer."""
    total: float
    """Since the process began."""

    @property
    def outside(self) -> float:
        """Neither the start, nor inside tokenizer or scorer."""
        return self.total - self.start - self.tokenizer - self.scorer


@dataclass(frozen=True)
class TrivialScorer:
    """NLLs that anybody can check: log(1 + id mod 1000) nats, in both directions."""

    account: str | None = None
    """A folder to which each worker writes its `WorkerTime`; None: nothing is counted."""
    micro_batch: int = 256
    device: str = "cpu"
    dtype: str = "float32"

    @property
    def alm(self) -> Mapping[str, str]:
        """Stands for the fingerprints of a model."""
        return {"forward": "log(1 + id mod 1000)", "backward": "log(1 + id mod 1000)"}

    def open(self) -> Callable[[Ids], tuple[Nll, Nll]]:
        """Gives the function itself, or one that counts."""
        return trivial_nll if self.account is None else _Clock(Path(self.account)).count(trivial_nll)


def trivial_nll(ids: Ids) -> tuple[Nll, Nll]:
    """Blocks [B, 512] to NLLs in nats, float32 [B, 512] twice; NaN where a direction has no context."""
    forward = np.log1p((ids % _MODULUS).astype(np.float32))
    backward = forward.copy()
    forward[:, 0] = backward[:, -1] = np.nan
    return forward, backward


def read_times(account: Path) -> list[WorkerTime]:
    """What the workers of a job wrote, one a process."""
    return [WorkerTime(*_FIELDS.unpack(path.read_bytes())) for path in sorted(account.iterdir())]


class _Clock:
    """Writes a worker's account after each call of the scorer: workers end without a word.

    Counts CPU time of the process, since other processes share the machine; a worker on CPU makes one shard at a time,
    so that all of it is spent where the one thread that works is.
    """

    def __init__(self, account: Path):
        account.mkdir(parents=True, exist_ok=True)
        self._file = os.open(account / f"{os.getpid()}", os.O_CREAT | os.O_WRONLY)
        self._start = time.process_time()
        self._tokenizer = self._scorer = 0.0
        self._count_tokenizer()

    def count(self, score: Callable[[Ids], tuple[Nll, Nll]]) -> Callable[[Ids], tuple[Nll, Nll]]:
        """The same function, its time counted."""

        def counted(ids: Ids) -> tuple[Nll, Nll]:
            began = time.process_time()
            nll = score(ids)
            self._scorer += time.process_time() - began
            self._write()
            return nll

        return counted

    def add_tokenizer(self, seconds: float) -> None:
        """Adds the time of one batch."""
        self._tokenizer += seconds
        self._write()

    def _write(self) -> None:
        fields = (self._start, self._tokenizer, self._scorer, time.process_time())
        os.pwrite(self._file, _FIELDS.pack(*fields), 0)

    def _count_tokenizer(self) -> None:
        """Puts a stopwatch between this process's encoders and their backends; the pipeline's code stays as it is."""
        encode = DocumentEncoder.encode

        def counted(encoder: DocumentEncoder, texts: list[str]) -> list[Ids | None]:
            if not isinstance(encoder._backend, _CountedBackend):
                encoder._backend = _CountedBackend(encoder._backend, self.add_tokenizer)
            return encode(encoder, texts)

        DocumentEncoder.encode = counted  # type: ignore[method-assign]


@dataclass(frozen=True)
class _CountedBackend:
    """A tokenizer's backend, as far as encoding needs it."""

    backend: Any
    add: Callable[[float], None]

    def encode_batch_fast(self, texts: list[str], add_special_tokens: bool) -> Any:
        """Encodes, and says how long it took."""
        began = time.process_time()
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        self.add(time.process_time() - began)
        return encodings
