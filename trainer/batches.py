"""What a reader hands to a collator: rows by the column, not one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from scorer.errors import ConfigurationError
from scorer.shards import ID_COLUMN, PERPLEXITY_COLUMNS, ShardContent

Floats = npt.NDArray[np.floating[Any]]
Ids = npt.NDArray[np.integer[Any]]
Feature = Mapping[str, Any]
"""A row: `input_ids`, `forward_perplexity`, `backward_perplexity`, each [T]; `epoch`, and `step`, its global batch."""


@dataclass(frozen=True, eq=False)
class Batch(Sequence[Feature]):
    """Rows that are collated together: a sequence of them, held by the column.

    A DataLoader passes on what `__getitems__` returns; a batch of columns spares it a dict, and three copies, a row.
    """

    content: ShardContent
    epochs: npt.NDArray[np.int64]
    """[B]"""
    steps: npt.NDArray[np.int64]
    """[B], the global batch that each row belongs to."""

    @classmethod
    def of(cls, features: Sequence[Feature], epoch: int = 0) -> Batch:
        """Stacks rows; `epoch` is that of rows that do not say theirs.

        Raises:
            ConfigurationError: a row has no ids.
        """
        if any(ID_COLUMN not in feature for feature in features):
            raise ConfigurationError(f"the batch has no {ID_COLUMN}: expected rows of shards")
        content = {
            name: np.stack([np.asarray(feature[name]) for feature in features])
            for name in (ID_COLUMN, *PERPLEXITY_COLUMNS)
            if all(name in feature for feature in features)
        }
        return cls(
            ShardContent(**content),
            np.array([int(feature.get("epoch", epoch)) for feature in features]),
            np.array([int(feature.get("step", 0)) for feature in features]),
        )

    def __len__(self) -> int:
        return len(self.content)

    def __getitem__(self, row: Any) -> Any:
        columns = dict(self.content.columns()) | {"epoch": self.epochs, "step": self.steps}
        return {name: values[row] for name, values in columns.items()}

    @property
    def input_ids(self) -> Ids:
        """Of shape [B, T]."""
        return self.content.input_ids

    def perplexities(self) -> tuple[Floats, Floats]:
        """Forward and backward perplexities, [B, T].

        Raises:
            ConfigurationError: the rows have none.
        """
        forward, backward = self.content.forward_perplexity, self.content.backward_perplexity
        if forward is None or backward is None:
            missing = [name for name in PERPLEXITY_COLUMNS if getattr(self.content, name) is None]
            raise ConfigurationError(
                f"the batch has no {', '.join(missing)}: pass remove_unused_columns=False to the Trainer, "
                "and read hardness shards, not block shards"
            )
        return forward, backward
