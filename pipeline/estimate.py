"""What a job will make of its corpus, from a sample: tokens, and bytes on disk."""

from __future__ import annotations

import io
import logging
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from pipeline.corpus import Document, FileRange, RangeReader
from pipeline.inputs import BlockInput, TextInput
from pipeline.plan import ASSUMED_COMPRESSION_RATIO, Kind, Plan
from pipeline.tokenization import DocumentEncoder, Ids, pack
from scorer import files
from scorer.compression import decompressed
from scorer.errors import ArchiveError, ConfigurationError
from scorer.vocabulary import Vocabulary

_BYTES_PER_TOKEN: dict[Kind, float] = {"blocks": 1.6, "hardness": 5.3}
"""Of shards, RoBERTa's tokenizer on English: benchmarks/results/2026-11-21-real-data-cpu.md."""
_SAMPLED_RANGES = 4
"""Of each form of file, spread evenly over the corpus."""
_SAMPLED_BYTES = 256 << 10
_CERTAIN = 0.8
"""Of what is estimated will be written, whatever the error of the sample."""
_SPARE = 1.5
"""What a shard may take of a disk, against what it takes on average."""


@dataclass(frozen=True)
class Sample:
    """Some documents of a corpus, tokenized."""

    tokens: int
    """Document separators included."""
    seconds: float
    """That the tokenizer took."""
    blocks: list[Ids]
    """The same tokens in blocks [N, 512]."""


@dataclass(frozen=True)
class Estimate:
    """What a corpus becomes."""

    tokens: int
    shard_bytes: int
    """Of all shards together."""
    sample: Sample | None
    """None for block shards, of which everything is known."""


class Estimator:
    """Samples a corpus of text, each form of file by itself, since a byte of one is not a byte of the other."""

    def __init__(self, corpus: TextInput, tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary):
        self._corpus = corpus
        self._vocabulary = vocabulary
        self._encoder = DocumentEncoder(tokenizer, vocabulary)
        self._stream: list[Ids] = []
        self._seconds = 0.0

    def estimate(self, ranges: Sequence[FileRange], kind: Kind) -> Estimate:
        """Extrapolates from samples to all ranges of a plan."""
        forms: dict[tuple[object, ...], list[FileRange]] = defaultdict(list)
        for range_ in ranges:
            forms[range_.form, range_.compression].append(range_)
        tokens = 0.0
        for members in forms.values():
            step = -(-len(members) // _SAMPLED_RANGES)
            with _without_warnings():
                sampled = [self._sample(range_) for range_ in members[::step]]
            units = sum(units for _, units in sampled)
            density = sum(count for count, _ in sampled) / units if units else 0.0
            tokens += density * sum(range_.end - range_.start for range_ in members)
        blocks = list(pack(self._stream, self._vocabulary))
        sample = Sample(sum(map(len, self._stream)), self._seconds, blocks)
        return Estimate(round(tokens), round(tokens * _BYTES_PER_TOKEN[kind]), sample)

    def _sample(self, range_: FileRange) -> tuple[int, float]:
        """Tokens in some documents from the beginning of a range, and how many bytes or rows of it these take."""
        reader = iter(RangeReader(self._corpus.root, range_, self._corpus.text_format))
        documents = list(_head(reader))
        beyond = next(reader, None)
        texts = [document.text for document in documents if document.text is not None]
        began = time.perf_counter()
        encoded = [ids for ids in self._encoder.encode(texts) if ids is not None and len(ids)]
        self._seconds += time.perf_counter() - began
        separator = np.array([self._vocabulary.end_id], dtype=self._vocabulary.id_dtype)
        self._stream += [piece for ids in encoded for piece in (ids, separator)]
        tokens = sum(len(ids) + 1 for ids in encoded)
        if beyond is None:
            return tokens, range_.end - range_.start
        if beyond.offset is None or documents[0].offset is None:
            return tokens, beyond.line - documents[0].line
        return tokens, (beyond.offset - documents[0].offset) / self._compression_ratio(range_)

    def _compression_ratio(self, range_: FileRange) -> float:
        """How many bytes a compressed byte stands for, in the beginning of an archive."""
        if range_.compression is None:
            return 1.0
        with files.open_binary(files.join(self._corpus.root, range_.file)) as stream:
            head = stream.read(_SAMPLED_BYTES)
        inside = 0
        try:
            with decompressed(io.BytesIO(head), range_.compression) as stream:
                while chunk := stream.read1(_SAMPLED_BYTES):  # type: ignore[attr-defined]
                    inside += len(chunk)
        except ArchiveError:
            pass  # the head of an archive is a cut archive
        return inside / len(head) if inside else ASSUMED_COMPRESSION_RATIO


def estimate(
    corpus: TextInput | BlockInput, plan: Plan, tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary
) -> Estimate:
    """Estimates what the shards of a job will hold; exact for block shards, from some megabytes of text otherwise."""
    kind = plan.configuration.kind
    if isinstance(corpus, BlockInput):
        return Estimate(corpus.manifest.tokens, round(corpus.manifest.tokens * _BYTES_PER_TOKEN[kind]), None)
    ranges = [range_ for split in plan.splits for range_ in split.ranges]
    return Estimator(corpus, tokenizer, vocabulary).estimate(ranges, kind)


def require_room(folder: str, shard_bytes: float, missing: int) -> int:
    """Holds what is still to be written to the free space of the disk.

    Args:
        folder: of the shards.
        shard_bytes: what a shard takes on average, as estimated.
        missing: shards that are still to be written.

    Returns:
        Bytes that should be free before a shard is begun.

    Raises:
        ConfigurationError: the shards will not fit.
    """
    place = files.staging_folder(folder)
    is_store = files.local_path(folder) is None
    free = files.free_bytes(place)
    needed = shard_bytes if is_store else shard_bytes * missing
    if free is not None and free < _CERTAIN * needed:
        raise ConfigurationError(
            f"{place} has {free / 1e9:,.2f} GB free, and {'each shard' if is_store else 'the shards'} will take about "
            f"{needed / 1e9:,.2f} GB: make room, or choose another {'folder by TMPDIR' if is_store else '--output'}"
        )
    return round(_SPARE * shard_bytes)


@contextmanager
def _without_warnings() -> Iterator[None]:
    """What is wrong with an archive is said once, by the worker that reads all of it."""
    logger = logging.getLogger("pipeline.documents")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _head(documents: Iterator[Document]) -> Iterator[Document]:
    taken = 0
    for document in documents:
        yield document
        taken += len(document.text or "")
        if taken >= _SAMPLED_BYTES:
            return
