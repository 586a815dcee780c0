"""Documents to blocks: batch encoding in which no text can pass for a special token, and the block layout.

A split's documents form one stream, cut into runs of 510; each run is framed:

    stream   doc₁ </s> doc₂ </s> … docₖ </s>
    block    <s> └──── 510 tokens ────┘ </s>

Documents without a token give nothing. What is left over at the end of the split (fewer than 510) is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from pipeline.corpus import Document, FileRange, RangeReader, TextFormat
from pipeline.plan import Split
from scorer.errors import CorpusError
from scorer.manifest import Reject
from scorer.shards import BLOCK_LENGTH, ROW_GROUP_BLOCKS, RUN_LENGTH
from scorer.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH_BYTES = 1 << 20
_BATCH_DOCUMENTS = 1024
_MAX_REJECTS = 1_000_000
"""Rejects that one split may list: they are held in memory until its receipt is written."""

Ids = npt.NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True)
class Account:
    """What became of a split's documents: all that its blocks do not say."""

    source: list[dict[str, Any]]
    """The byte ranges of text behind the blocks, for the shard's footer."""
    documents: int
    """Documents that gave at least one token."""
    leftover_tokens: int
    rejected_documents: int
    lines: Mapping[str, int] = field(default_factory=dict)
    """Lines that begin in the split's range of each file."""
    rejects: list[Reject] = field(default_factory=list)
    """Lines relative to the byte range."""


class BlockStream(Protocol):
    """The blocks of one split: iterate once, then ask for the account."""

    def __iter__(self) -> Iterator[Ids]:
        """Gives uint16 or uint32 [N, 512], 256 blocks at a time but for the last."""

    @property
    def account(self) -> Account:
        """What became of the documents, once all blocks were taken."""


class DocumentEncoder:
    """Encodes documents so that decoding the ids gives them back, whatever is written in them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary):
        """Takes over the tokenizer: its backend is set to treat special tokens in text as text."""
        self._backend = tokenizer.backend_tokenizer
        self._backend.encode_special_tokens = True
        self._backend.no_padding()
        self._backend.no_truncation()
        self._is_forbidden = vocabulary.special_mask()
        unknown_id = tokenizer.unk_token_id
        if unknown_id is not None and not _is_byte_level(self._backend):
            self._is_forbidden[unknown_id] = False
        self._dtype = vocabulary.id_dtype

    def encode(self, texts: list[str]) -> list[Ids | None]:
        """Ids of each text, without a frame; None where the tokenizer would make a special token out of plain text."""
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [self._checked(np.array(encoding.ids, dtype=self._dtype)) for encoding in encodings]

    def _checked(self, ids: Ids) -> Ids | None:
        return None if self._is_forbidden[ids].any() else ids


class SplitTokenizer:
    """Reads, encodes and packs splits."""

    def __init__(self, root: str, text_format: TextFormat, tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary):
        self._root = root
        self._format = text_format
        self._vocabulary = vocabulary
        self._encoder = DocumentEncoder(tokenizer, vocabulary)

    def tokenize(
        self, split: Split, careful: bool = False, report: Callable[[str], None] = lambda _: None
    ) -> TextBlocks:
        """Opens a split; documents that cannot be used are listed in the account, never raised.

        Args:
            split: what to read.
            careful: encode document by document, so that `report` names the very one that brings a tokenizer down.
            report: told before each batch of documents where it begins.
        """
        return TextBlocks(
            split,
            read=lambda range_: RangeReader(self._root, range_, self._format),
            encoder=self._encoder,
            vocabulary=self._vocabulary,
            batch_documents=1 if careful else _BATCH_DOCUMENTS,
            report=report,
        )


class TextBlocks:
    """The `BlockStream` of a split of text; memory is that of some documents and a row group of blocks."""

    def __init__(
        self,
        split: Split,
        *,
        read: Callable[[FileRange], RangeReader],
        encoder: DocumentEncoder,
        vocabulary: Vocabulary,
        batch_documents: int,
        report: Callable[[str], None],
    ):
        self._split = split
        self._read = read
        self._encoder = encoder
        self._vocabulary = vocabulary
        self._batch_documents = batch_documents
        self._report = report
        self._documents = self._leftover = 0
        self._rejects: list[Reject] = []
        self._lines: dict[str, int] = {}

    def __iter__(self) -> Iterator[Ids]:
        self._leftover = yield from pack(self._stream(), self._vocabulary)

    @property
    def account(self) -> Account:
        """Where every document went, once all blocks were taken."""
        return Account(
            source=[{"file": range_.file, "start": range_.start, "end": range_.end} for range_ in self._split.ranges],
            documents=self._documents,
            leftover_tokens=self._leftover,
            rejected_documents=len(self._rejects),
            lines=self._lines,
            rejects=self._rejects,
        )

    def _stream(self) -> Iterator[Ids]:
        """The ids of all documents, each followed by the separator."""
        separator = np.array([self._vocabulary.end_id], dtype=self._vocabulary.id_dtype)
        for range_ in self._split.ranges:
            reader = self._read(range_)
            for document, ids in self._encode(range_, reader):
                if ids is None:
                    reason = document.reason or _LOOKALIKE
                    self._reject(Reject(range_.file, document.line, document.offset, reason, document.unit))
                elif len(ids):
                    self._documents += 1
                    yield ids
                    yield separator
            self._lines[range_.file] = reader.lines

    def _encode(self, range_: FileRange, documents: Iterable[Document]) -> Iterator[tuple[Document, Ids | None]]:
        for batch in _batches(documents, self._batch_documents):
            self._report(f"{range_.file}, {_place(batch[0])}")
            good = [document.text for document in batch if document.text is not None]
            encoded = iter(self._encoder.encode(good))
            for document in batch:
                yield document, None if document.text is None else next(encoded)

    def _reject(self, reject: Reject) -> None:
        if len(self._rejects) == _MAX_REJECTS:
            raise CorpusError(
                f"{reject.file} has more than {_MAX_REJECTS:,} bad documents in one split; the last, at line "
                f"{reject.line}: {reject.reason}. Check that it is what its name says, and the flags on its form"
            )
        self._rejects.append(reject)


_LOOKALIKE = "this tokenizer reads a special token out of the document's plain text"


def pack(stream: Iterable[Ids], vocabulary: Vocabulary) -> Generator[Ids, None, int]:
    """Cuts a token stream into framed blocks.

    Args:
        stream: pieces of ids, separators included; they are concatenated.
        vocabulary: gives the frame tokens and the dtype.

    Yields:
        ids [256, 512]; the last may have fewer rows, but never none.

    Returns:
        How many tokens (0 to 509) were left over.
    """
    held: list[Ids] = []
    count = 0
    for piece in stream:
        held.append(piece)
        count += len(piece)
        if count >= _ROW_GROUP_TOKENS:
            tokens = np.concatenate(held)
            whole = count - count % _ROW_GROUP_TOKENS
            for start in range(0, whole, _ROW_GROUP_TOKENS):
                yield _frame(tokens[start : start + _ROW_GROUP_TOKENS], vocabulary)
            held, count = [tokens[whole:].copy()], count - whole
    runs, leftover = divmod(count, RUN_LENGTH)
    if runs:
        yield _frame(np.concatenate(held)[: runs * RUN_LENGTH], vocabulary)
    return leftover


_ROW_GROUP_TOKENS = ROW_GROUP_BLOCKS * RUN_LENGTH


def _frame(tokens: Ids, vocabulary: Vocabulary) -> Ids:
    """Frames the runs of `tokens` [n x 510]: ids [n, 512]."""
    blocks = np.empty((len(tokens) // RUN_LENGTH, BLOCK_LENGTH), dtype=vocabulary.id_dtype)
    blocks[:, 0] = vocabulary.start_id
    blocks[:, 1:-1] = tokens.reshape(-1, RUN_LENGTH)
    blocks[:, -1] = vocabulary.end_id
    return blocks


def _place(document: Document) -> str:
    """Where a document is, for people; lines are counted from the beginning of the range, so bytes are better."""
    return f"{document.unit} {document.line}" if document.offset is None else f"byte {document.offset}"


def _batches(documents: Iterable[Document], batch_documents: int) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text or "")
        if characters >= _BATCH_BYTES or len(batch) >= batch_documents:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _is_byte_level(backend: Any) -> bool:
    """Byte-level tokenizers know every byte, so that an unknown token in their output would be a lookalike."""
    pre_tokenizer = backend.pre_tokenizer
    return pre_tokenizer is not None and "ByteLevel" in repr(pre_tokenizer)
