"""What shards know of a tokenizer: its ids, its frame tokens, and fingerprints that tell two apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from scorer.errors import ConfigurationError


@dataclass(frozen=True)
class Vocabulary:
    """The ids of a tokenizer, as every shard's footer records them.

    An *ordinary* token is an id below `size` that is not in `special_ids`: only these are scored and masked.
    """

    size: int
    """Number of ids: the largest id + 1."""
    special_ids: Mapping[str, int]
    """Special tokens and their ids; the unknown token is one of them."""
    start_id: int
    """Frames a block on the left: bos, or cls where there is no bos."""
    end_id: int
    """Frames a block on the right and separates documents: eos, or sep where there is no eos."""
    mask_id: int | None
    """None where the tokenizer has no mask token: fine for scoring, not for masked-LM training."""
    vocabulary_sha256: str
    """Fingerprint of the id → token map and the special ids: shards of another one are refused."""
    tokenizer_sha256: str
    """Fingerprint of merges, normalizer and pre-tokenizer: another one is worth a warning."""

    @property
    def fingerprints(self) -> dict[str, str]:
        """The two fingerprints, as plans, footers and manifests carry them."""
        return {"vocabulary_sha256": self.vocabulary_sha256, "tokenizer_sha256": self.tokenizer_sha256}

    @property
    def id_dtype(self) -> np.dtype[Any]:
        """uint16 where every id fits, else uint32."""
        return np.dtype(np.uint16 if self.size <= 1 << 16 else np.uint32)

    def special_mask(self) -> npt.NDArray[np.bool_]:
        """Bool [size]: True at the ids of special tokens."""
        mask = np.zeros(self.size, dtype=bool)
        mask[list(self.special_ids.values())] = True
        return mask

    def ordinary_ids(self) -> npt.NDArray[np.int64]:
        """Int64 [ordinary tokens], ascending: what a random replacement is drawn from."""
        return np.flatnonzero(~self.special_mask())

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return {**asdict(self), "special_ids": dict(self.special_ids)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Vocabulary:
        """The inverse of `to_json`."""
        return cls(**value)


def require_same_vocabulary(expected: Mapping[str, str], found: Mapping[str, str], what: str, way_out: str) -> bool:
    """Holds two tokenizers' fingerprints against each other.

    Returns:
        False where the vocabularies agree but merges or pre-tokenizer differ: worth a warning by the caller.

    Raises:
        ConfigurationError: the vocabularies differ, so ids mean different tokens.
    """
    if expected["vocabulary_sha256"] != found["vocabulary_sha256"]:
        raise ConfigurationError(
            f"{what} belong to different tokenizers (vocabulary {expected['vocabulary_sha256'][:12]}… "
            f"against {found['vocabulary_sha256'][:12]}…): {way_out}"
        )
    return expected["tokenizer_sha256"] == found["tokenizer_sha256"]
