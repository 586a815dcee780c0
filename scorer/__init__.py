"""Scoring: the bidirectional ALM, per-token perplexities, and the shard format that carries them.

Nothing here needs Beam.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scorer.alm import load_alm
    from scorer.scoring import score

__all__ = ["load_alm", "score"]

_HOMES = {"load_alm": "scorer.alm", "score": "scorer.scoring"}


def __getattr__(name: str) -> Any:
    """Imports torch only when scoring is asked for: commands that read shards start without it (PEP 562)."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
