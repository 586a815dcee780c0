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
    rows, slots = np.nonzero(positions >= 0)
    columns = positions[rows, slots]
    action = noise.uniform(keys[rows], Stream.CORRUPTION, columns[:, None])[:, 0]
    seen = input_ids.astype(np.int64)
    is_masked = action < MASK_SHARE
    seen[rows[is_masked], columns[is_masked]] = vocabulary.mask_id
    is_random = ~is_masked & (action < MASK_SHARE + RANDOM_SHARE)
    rows, columns = rows[is_random], columns[is_random]
    drawn = noise.integers(keys[rows], Stream.REPLACEMENT, columns[:, None], len(vocabulary.ordinary_ids))[:, 0]
    seen[rows, columns] = vocabulary.ordinary_ids[drawn]
    return seen
