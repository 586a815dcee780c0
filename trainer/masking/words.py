"""Words, from token ids alone: which tokens begin one, and what a word says.

A word is what the pre-tokenizer of GPT-2 and RoBERTa makes of text: a run of letters, of digits, or of other marks,
with the space before it. So a comma is a word of its own, and "los angeles," holds the n-gram "los angeles". The same
for tokenizers that mark spaces with `▁`; for WordPiece a word is what its `##` says.
"""

from __future__ import annotations

import itertools
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from scorer.errors import ConfigurationError
from trainer.batches import Ids
from trainer.masking.selection import Bools

SPACE_MARK = "▁"
_BYTE = re.compile("<0x[0-9A-F]{2}>")
"""How tokenizers with ▁ write a byte of a character that they have no token for."""


class Kind(IntEnum):
    """What the first or last character of a token is; between two kinds a word ends."""

    SPACE = 0
    LETTER = 1
    DIGIT = 2
    MARK = 3
    PART = 4
    """The later bytes of a character: it is what its first bytes, in the token before, are."""
    OPEN = 5
    """A space by itself: what follows is its word."""


@dataclass(frozen=True)
class Words:
    """What is known of each token id: arrays over the vocabulary."""

    begins: Bools
    """Whether the token begins with a space (WordPiece: does not begin with ##)."""
    first: npt.NDArray[np.int8]
    """Kind of its first character, spaces aside."""
    last: npt.NDArray[np.int8]
    """Kind of its last character."""
    spelling: Sequence[bytes]
    """The token's bytes."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Words:
        """Reads a tokenizer's vocabulary.

        Raises:
            ConfigurationError: its tokens do not say where words begin.
        """
        tokens: dict[str, int] = tokenizer.get_vocab()
        size = max(tokens.values()) + 1
        begins, first, last = np.zeros(size, dtype=bool), np.zeros(size, np.int8), np.zeros(size, np.int8)
        spelling = [b""] * size
        spell = _speller(tokenizer)
        for token, id_ in tokens.items():
            begins[id_], spelling[id_], (first[id_], last[id_]) = spell(token)
        return cls(begins, first, last, spelling)

    def starts(self, input_ids: Ids, is_eligible: Bools) -> Bools:
        """Where words begin: [B, T] -> bool [B, T].

        A position that is not eligible is a unit of its own, so that no word reaches over one.
        """
        last = self.last[input_ids]
        known = np.maximum.accumulate(np.where(last != Kind.PART, np.arange(last.shape[1]), 0), axis=1)
        last, first = np.take_along_axis(last, known, axis=1)[:, :-1], self.first[input_ids[:, 1:]]
        is_joined = ((last == first) & (last != Kind.SPACE)) | (first == Kind.PART) | (last == Kind.OPEN)
        is_joined &= ~self.begins[input_ids[:, 1:]]
        starts = np.ones(input_ids.shape, dtype=bool)
        starts[:, 1:] = ~(is_joined & is_eligible[:, :-1] & is_eligible[:, 1:])
        return starts

    def split(self, ids: Sequence[int]) -> list[str]:
        """The words of some text's ids, as `text` has them."""
        row = np.asarray([ids], dtype=np.int64)
        starts = [*np.flatnonzero(self.starts(row, np.ones(row.shape, dtype=bool))[0]), len(ids)]
        words = [self.text(ids[a:b]) for a, b in itertools.pairwise(starts)]
        return [word for word in words if word]

    def text(self, ids: Sequence[int]) -> str:
        """A word without case, and without spaces around it."""
        # Not lower(): what that makes of a sigma depends on what follows, and tokens cut words.
        return b"".join([self.spelling[id_] for id_ in ids]).decode(errors="replace").strip().casefold()


def _kinds(spelling: bytes) -> tuple[Kind, Kind]:
    """Kinds of the first character, spaces aside, and of the last."""
    if spelling == b" ":
        return Kind.SPACE, Kind.OPEN
    text = spelling.decode(errors="surrogateescape")  # bytes of parts of characters become U+DC80 to U+DCFF
    if not (stripped := text.lstrip()):
        return Kind.SPACE, Kind.SPACE
    last = len(text) - 1
    while last and _is_later_byte(text[last]):
        last -= 1
    return _kind(stripped), _kind(text[last:])


def _kind(text: str) -> Kind:
    """The kind of a text's first character, of which only the first bytes may be there."""
    if _is_later_byte(text[0]):
        return Kind.PART
    if "\udc80" <= text[0] <= "\udcff":
        later = itertools.takewhile(_is_later_byte, text[1:])
        return _kind_of_most((text[0] + "".join(later)).encode(errors="surrogateescape"))
    if text[0].isspace():
        return Kind.SPACE
    return {"L": Kind.LETTER, "N": Kind.DIGIT}.get(unicodedata.category(text[0])[0], Kind.MARK)


def _is_later_byte(character: str) -> bool:
    return "\udc80" <= character <= "\udcbf"


def _kind_of_most(begun: bytes) -> Kind:
    """What most characters that begin with these bytes of UTF-8 are: of E2 80 marks (dashes, quotes), of C3 letters."""
    missing = (1 if begun[0] < 0xE0 else 2 if begun[0] < 0xF0 else 3) - (len(begun) - 1)
    candidates = (
        (begun + bytes(0x80 + (index >> 6 * place) % 64 for place in reversed(range(missing)))).decode(errors="ignore")
        for index in range(0, 64**missing, max(1, 64**missing // 4096))
    )
    kinds = Counter(_kind(character) for character in candidates if character)
    return kinds.most_common(1)[0][0] if kinds else Kind.PART


Spelling = tuple[bool, bytes, tuple[Kind, Kind]]
"""Whether a word begins, the token's bytes, the kinds of its ends."""


def _speller(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], Spelling]:
    """How tokens are read from the way in which the vocabulary writes them."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    if backend["model"]["type"] == "WordPiece":
        prefix = backend["model"]["continuing_subword_prefix"]
        # Its words are what the prefix says, whatever they are made of.
        return lambda token: (
            not token.startswith(prefix),
            token.removeprefix(prefix).encode(),
            (Kind.PART, Kind.LETTER),
        )
    steps = json.dumps([backend[step] for step in ("normalizer", "pre_tokenizer", "decoder")], ensure_ascii=False)
    if '"ByteLevel"' in steps:
        byte = {character: code for code, character in bytes_to_unicode().items()}
        # An added token is written as it is; one with other characters cannot come out of the bytes.
        return lambda token: _spelled(
            bytes(byte[c] for c in token) if all(c in byte for c in token) else token.encode()
        )
    if SPACE_MARK in steps:
        return lambda token: _spelled(
            bytes([int(token[3:5], 16)]) if _BYTE.fullmatch(token) else token.replace(SPACE_MARK, " ").encode()
        )
    raise ConfigurationError(
        "this tokenizer's tokens do not say where words begin: whole words, spans and n-grams need a byte-level BPE, "
        f"WordPiece, or one that marks spaces with {SPACE_MARK}; --masking_strategy hardness and random need none"
    )


def _spelled(spelling: bytes) -> Spelling:
    return spelling[:1].isspace(), spelling, _kinds(spelling)
