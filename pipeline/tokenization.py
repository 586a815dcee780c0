"""Documents to blocks: batch encoding in which no text can pass for a special token, and the block layout.

A split's documents form one stream, cut into runs of 510; each run is framed:

    stream   doc₁ </s> doc₂ </s> … docₖ </s>
    block    <s> └──── 510 tokens ────┘ </s>

Documents without a token give nothing. What is left over at the end of the split (fewer than 510) is counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from pipeline.corpus import Document, RangeReader, TextFormat
from pipeline.plan import Split
from scorer.manifest import Reject
from scorer.shards import BLOCK_LENGTH, RUN_LENGTH
from scorer.vocabulary import Vocabulary

_BATCH_BYTES = 1 << 20
_BATCH_DOCUMENTS = 1024

Ids = npt.NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True)
class TokenizedSplit:
    """The blocks of one split, and the account of everything that is not in them."""

    split: Split
    input_ids: Ids
    """uint16 or uint32 [N, 512]."""
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
    """Reads, encodes and packs one split at a time."""

    def __init__(self, root: str, text_format: TextFormat, tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary):
        self._root = root
        self._format = text_format
        self._vocabulary = vocabulary
        self._encoder = DocumentEncoder(tokenizer, vocabulary)

    def tokenize(self, split: Split) -> TokenizedSplit:
        """Turns the split's documents into blocks; documents that cannot be used are listed, never raised."""
        separator = np.array([self._vocabulary.end_id], dtype=self._vocabulary.id_dtype)
        stream: list[Ids] = []
        documents = 0
        rejects: list[Reject] = []
        lines: dict[str, int] = {}
        for range_ in split.ranges:
            reader = RangeReader(self._root, range_, self._format)
            for document, ids in self._encode(reader):
                if ids is None:
                    reason = document.reason or _LOOKALIKE
                    rejects.append(Reject(range_.file, document.line, document.offset, reason, document.unit))
                elif len(ids):
                    stream += [ids, separator]
                    documents += 1
            lines[range_.file] = reader.lines
        blocks, leftover = pack(stream, self._vocabulary)
        return TokenizedSplit(
            split=split,
            input_ids=blocks,
            source=[{"file": range_.file, "start": range_.start, "end": range_.end} for range_ in split.ranges],
            documents=documents,
            leftover_tokens=leftover,
            rejected_documents=len(rejects),
            lines=lines,
            rejects=rejects,
        )

    def _encode(self, documents: Iterable[Document]) -> Iterator[tuple[Document, Ids | None]]:
        for batch in _batches(documents):
            good = [document.text for document in batch if document.text is not None]
            encoded = iter(self._encoder.encode(good))
            for document in batch:
                yield document, None if document.text is None else next(encoded)


_LOOKALIKE = "this tokenizer reads a special token out of the document's plain text"


def pack(stream: list[Ids], vocabulary: Vocabulary) -> tuple[Ids, int]:
    """Cuts a token stream into framed blocks.

    Args:
        stream: pieces of ids, separators included; they are concatenated.
        vocabulary: gives the frame tokens and the dtype.

    Returns:
        ids [N, 512], and how many tokens (0 to 509) were left over.
    """
    tokens = np.concatenate([np.empty(0, dtype=vocabulary.id_dtype), *stream])
    count, leftover = divmod(len(tokens), RUN_LENGTH)
    blocks = np.empty((count, BLOCK_LENGTH), dtype=vocabulary.id_dtype)
    blocks[:, 0] = vocabulary.start_id
    blocks[:, 1:-1] = tokens[: count * RUN_LENGTH].reshape(count, RUN_LENGTH)
    blocks[:, -1] = vocabulary.end_id
    return blocks, leftover


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text or "")
        if characters >= _BATCH_BYTES or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _is_byte_level(backend: Any) -> bool:
    """Byte-level tokenizers know every byte, so that an unknown token in their output would be a lookalike."""
    pre_tokenizer = backend.pre_tokenizer
    return pre_tokenizer is not None and "ByteLevel" in repr(pre_tokenizer)
