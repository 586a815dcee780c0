"""What a worker and its supervisor say to each other."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.plan import Split
from pipeline.publication import PublishedShard
from scorer.errors import HardnessError


@dataclass(frozen=True)
class Task:
    """To the worker: make this shard."""

    split: Split
    careful: bool
    """Go document by document: the split failed before."""


@dataclass(frozen=True)
class Ready:
    """From the worker: tokenizer and model are loaded."""


@dataclass(frozen=True)
class Beat:
    """From the worker: where a shard is."""

    index: int
    place: str
    """In the corpus: what is being read."""
    blocks: int
    """Ready to be written."""


@dataclass(frozen=True)
class Done:
    """From the worker: this shard is published."""

    shard: PublishedShard


@dataclass(frozen=True)
class Failed:
    """From the worker: this shard failed."""

    index: int
    message: str
    place: str
    is_final: bool
    """Another attempt would end the same way."""
    is_last: bool
    """The worker ends itself now: what failed may have left it in any state."""


@dataclass(frozen=True)
class Hopeless:
    """From the worker: configuration or storage is wrong, which is the same for every shard."""

    error: HardnessError


Report = Ready | Beat | Done | Failed | Hopeless
