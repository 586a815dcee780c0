"""What becomes of the positions that were chosen."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from scorer.errors import ConfigurationError
from scorer.vocabulary import Vocabulary
from trainer import noise
from trainer.batches import Ids
from trainer.masking.selection import Positions
from trainer.noise import Stream

MASK_SHARE, RANDOM_SHARE = 0.8, 0.1
"""Of the drawn positions; the rest stays as it is."""


@dataclass(frozen=True)
class MaskingVocabulary:
    """What corruption needs to know of a tokenizer; made once, used for every batch."""

    mask_id: int
    ordinary_ids: npt.NDArray[np.int64]
    """Every id that is not special, ascending."""

    @classmethod
    def of(cls, vocabulary: Vocabulary) -> MaskingVocabulary:
        """Takes it from what a shard or a tokenizer says.

        Raises:
            ConfigurationError: the tokenizer has no mask token.
        """
        if vocabulary.mask_id is None:
            raise ConfigurationError(
                "the tokenizer has no mask token, which masked-LM training needs: add one "
                "(tokenizer.add_special_tokens({'mask_token': '<mask>'})) before the corpus is tokenized"
            )
        return cls(vocabulary.mask_id, vocabulary.ordinary_ids())


def corrupted(input_ids: Ids, positions: Positions, vocabulary: MaskingVocabulary, keys: noise.UInt64) -> Positions:
    """Replaces the drawn positions: 80 % by the mask token, 10 % by a random ordinary token, 10 % stay.

    Which of the three a position gets depends on where it is, not on when it was drawn: with weighted draws the first
    drawn are the hardest.

    Args:
        input_ids: [B, T].
        positions: int64 [B, M]; -1 is no position.
        vocabulary: the mask token's id, and the ids of ordinary tokens.
        keys: uint64 [B], of the rows' noise.

    Returns:
        int64 [B, T], as the model sees the rows.
    """
    action = noise.uniform(keys, Stream.CORRUPTION, positions)
    drawn = noise.integers(keys, Stream.REPLACEMENT, positions, len(vocabulary.ordinary_ids))
    seen = input_ids.astype(np.int64)
    rows, slots = np.nonzero((positions >= 0) & (action < MASK_SHARE + RANDOM_SHARE))
    seen[rows, positions[rows, slots]] = np.where(
        action[rows, slots] < MASK_SHARE, vocabulary.mask_id, vocabulary.ordinary_ids[drawn[rows, slots]]
    )
    return seen
