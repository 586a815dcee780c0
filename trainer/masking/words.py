"""Words, from token ids alone: which tokens begin one, and what a word says.

A word is what the pre-tokenizer of GPT-2 and RoBERTa makes of text: a run of letters, of digits, or of other marks,
with the space before it. So a comma is a word of its own, and "los angeles," holds the n-gram "los angeles". The same
for tokenizers that mark spaces with `▁`; for WordPiece a word is what its `##` says.
"""

from __future__ import annotations

import itertools
import json
import unicodedata
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


class Kind(IntEnum):
    """What the first or last character of a token is; between two kinds a word ends."""

    SPACE = 0
    LETTER = 1
    DIGIT = 2
    MARK = 3
    PART = 4
    """Some bytes of a character; it goes with whatever is beside it."""


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
            begins[id_], spelling[id_] = spell(token)
            first[id_], last[id_] = _kinds(spelling[id_].decode(errors="replace"))
            begins[id_] |= spelling[id_][:1].isspace()
        return cls(begins, first, last, spelling)

    def starts(self, input_ids: Ids, is_eligible: Bools) -> Bools:
        """Where words begin: [B, T] -> bool [B, T].

        A position that is not eligible is a unit of its own, so that no word reaches over one.
        """
        before, after = input_ids[:, :-1], input_ids[:, 1:]
        last, first = self.last[before], self.first[after]
        is_joined = (last == first) | (last == Kind.PART) | (first == Kind.PART)
        is_joined &= ~self.begins[after] & (last != Kind.SPACE)
        starts = np.ones(input_ids.shape, dtype=bool)
        starts[:, 1:] = ~(is_joined & is_eligible[:, :-1] & is_eligible[:, 1:])
        return starts

    def split(self, ids: Sequence[int]) -> list[str]:
        """The words of some text's ids, in lower case."""
        row = np.asarray([ids], dtype=np.int64)
        starts = [*np.flatnonzero(self.starts(row, np.ones(row.shape, dtype=bool))[0]), len(ids)]
        words = [self.text(ids[a:b]) for a, b in itertools.pairwise(starts)]
        return [word for word in words if word]

    def text(self, ids: Sequence[int]) -> str:
        """A word in lower case, without spaces around it."""
        return b"".join([self.spelling[id_] for id_ in ids]).decode(errors="replace").strip().lower()


def _kinds(text: str) -> tuple[Kind, Kind]:
    stripped = text.lstrip()
    return (_kind(stripped[0]), _kind(text[-1])) if stripped else (Kind.SPACE, Kind.SPACE)


def _kind(character: str) -> Kind:
    if character == "\ufffd":
        return Kind.PART
    if character.isspace():
        return Kind.SPACE
    return {"L": Kind.LETTER, "N": Kind.DIGIT}.get(unicodedata.category(character)[0], Kind.MARK)


def _speller(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], tuple[bool, bytes]]:
    """A function from a token as the vocabulary writes it to (whether it says that a word begins, its bytes)."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    if backend["model"]["type"] == "WordPiece":
        prefix = backend["model"]["continuing_subword_prefix"]
        return lambda token: (not token.startswith(prefix), token.removeprefix(prefix).encode())
    steps = json.dumps([backend["pre_tokenizer"], backend["decoder"]])
    if '"ByteLevel"' in steps:
        byte = {character: code for code, character in bytes_to_unicode().items()}
        # An added token is written as it is; one with other characters cannot come out of the bytes.
        return lambda token: (
            False,
            bytes(byte[c] for c in token) if all(c in byte for c in token) else token.encode(),
        )
    if SPACE_MARK in steps:
        return lambda token: (False, token.replace(SPACE_MARK, " ").encode())
    raise ConfigurationError(
        "this tokenizer's tokens do not say where words begin: whole words, spans and n-grams need a byte-level BPE, "
        f"WordPiece, or one that marks spaces with {SPACE_MARK}; --masking_strategy hardness and random need none"
    )
