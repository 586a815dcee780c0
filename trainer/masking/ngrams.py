"""N-grams that are masked as one: a list, one a line, in the format of AI21's published PMI lists."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from scorer import files
from scorer.errors import ConfigurationError
from trainer.batches import Ids
from trainer.masking.selection import Bools
from trainer.masking.words import SPACE_MARK, Words

_MARKS_OF_TOKENS = ("##", SPACE_MARK, "Ġ")


@dataclass(frozen=True)
class Ngrams:
    """N-grams as the tokenizer's words see them; the words of the list are numbered from 1."""

    words: Words
    numbers: Mapping[str, int]
    ngrams: frozenset[tuple[int, ...]]
    lengths: Mapping[int, Sequence[int]]
    """Of the n-grams that begin with a word, the longest first."""
    alone: npt.NDArray[np.int64]
    """For each token id the number of the word that it is by itself; 0 where it is none of the list."""
    opens: Bools
    """Whether a token is the beginning of a longer word of the list."""

    @classmethod
    def read(cls, path: str, tokenizer: PreTrainedTokenizerBase, words: Words) -> Ngrams:
        """Reads a list: one n-gram a line, in lower case, words between single spaces.

        Raises:
            ConfigurationError: the file is missing or empty, or a line is malformed or of another tokenizer.
        """
        lines = list(_lines(path))
        backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        backend.no_padding()
        backend.no_truncation()
        encoded = backend.encode_batch([f" {line}" for line in lines], add_special_tokens=False)
        unknown = tokenizer.unk_token_id
        ngrams = []
        for number, (line, encoding) in enumerate(zip(lines, encoded, strict=True), start=1):
            if unknown is not None and unknown in encoding.ids:
                raise _malformed(path, number, line, "holds what this tokenizer has no token for")
            ngrams.append(tuple(words.split(encoding.ids)))
        return cls.of(ngrams, words)

    @classmethod
    def of(cls, ngrams: Sequence[tuple[str, ...]], words: Words) -> Ngrams:
        """Takes n-grams as words in lower case; those of one word are whole words anyway."""
        numbers: dict[str, int] = {}
        numbered = {tuple(numbers.setdefault(word, len(numbers) + 1) for word in ngram) for ngram in ngrams}
        lengths: dict[int, set[int]] = {}
        for ngram in numbered:
            if len(ngram) > 1:
                lengths.setdefault(ngram[0], set()).add(len(ngram))
        texts = [words.text([id_]) for id_ in range(len(words.spelling))]
        openings = {word[:end] for word in numbers for end in range(1, len(word))}
        return cls(
            words,
            numbers,
            frozenset(numbered),
            {word: sorted(found, reverse=True) for word, found in lengths.items()},
            np.array([numbers.get(text, 0) for text in texts]),
            # A space by itself, and the first bytes of a character, may open any word.
            np.array([not text or text in openings or "\ufffd" in text for text in texts]),
        )

    def number(self, input_ids: Ids, starts: Bools, sizes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The number of the word that starts at each position, 0 for words that are not in the list: int64 [B, T].

        Args:
            input_ids: [B, T].
            starts: [B, T], where words start.
            sizes: [B, T], how many tokens the word that starts there has.
        """
        numbers = np.where(starts & (sizes == 1), self.alone[input_ids], 0)
        for row, start in zip(*np.nonzero(starts & (sizes > 1) & self.opens[input_ids]), strict=True):
            word = input_ids[row, start : start + sizes[row, start]].tolist()
            numbers[row, start] = self.numbers.get(self.words.text(word), 0)
        return numbers

    def occurrences(self, words: Sequence[int]) -> list[tuple[int, int]]:
        """Where n-grams are among numbered words, as ranges of them, without those that lie within longer ones."""
        found: list[tuple[int, int]] = []
        end = 0
        for start, word in enumerate(words):
            for length in self.lengths.get(word, ()):
                if start + length <= len(words) and tuple(words[start : start + length]) in self.ngrams:
                    # Starts ascend, so what ends no later than one before it lies within that one.
                    if start + length > end:
                        end = start + length
                        found.append((start, end))
                    break
        return found


def _lines(path: str) -> Iterator[str]:
    if not files.exists(path) or files.is_folder(path):
        raise ConfigurationError(f"no n-gram list at {path}: expected a text file with an n-gram a line")
    content = files.read_bytes(path)
    for number, raw in enumerate(content.splitlines(), start=1):
        try:
            line = raw.decode()
        except UnicodeDecodeError as error:
            raise _malformed(path, number, repr(raw[:60]), "is not UTF-8") from error
        if line != " ".join(line.split()) or not line.isprintable():
            raise _malformed(path, number, line, "has tabs, control characters, or more than single spaces")
        if len(line.split()) < 2:
            raise _malformed(path, number, line, "is no n-gram of two words or more")
        if any(word.startswith(_MARKS_OF_TOKENS) for word in line.split()):
            raise _malformed(path, number, line, "is written in the tokens of another tokenizer, not in words")
        if line != line.lower():
            raise _malformed(path, number, line, "is not in lower case")
        yield line
    if not content.strip():
        raise ConfigurationError(f"{path} holds no n-gram: expected one a line")


def _malformed(path: str, number: int, line: str, what: str) -> ConfigurationError:
    return ConfigurationError(
        f"{path}, line {number}: {line[:60]!r} {what}; expected an n-gram of plain words in lower case with single "
        "spaces between them, as in 'los angeles'"
    )
