"""Per-token perplexities of a block under both directions of the ALM: Eq. (1) and (2).

How one direction is computed fast is `scorer.engine`'s business; `reference_nll` there says what is meant, and a test
holds the two together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scorer.alm import BidirectionalALM
from scorer.engine import Settings
from scorer.errors import ScoringError

MAX_NLL = 80.0
"""Nats. exp of more than 88.7 leaves float32."""


def score(alm: BidirectionalALM, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Perplexity of every token given what is to its left, and given what is to its right.

    Args:
        alm: both directions (`scorer.load_alm`).
        input_ids: int [B, T], whole blocks with their frames, on any device.

    Returns:
        Two float32 [B, T] on the ALM's device, exp(nats), between 1 and exp(80). Position 0 of the first and T-1 of
        the second are 0: they have no context. Special tokens inside a block are scored like any other token; the
        pipeline sets them to 0 when it writes shards.

    Raises:
        ScoringError: the ALM returned NaN or infinity.

    Source: paper Eq. (1) and (2), perplexity = 1 / p(token | context) = exp(NLL); NLL clamped to 80 nats.
    """
    forward, backward = score_nll(alm, input_ids)
    return to_perplexity(forward), to_perplexity(backward)


def score_nll(alm: BidirectionalALM, input_ids: Tensor, settings: Settings | None = None) -> tuple[Tensor, Tensor]:
    """The same as `score` in nats, not clamped: float32 [B, T] twice; NaN where a position has no context.

    The backward model reads each block reversed (not the corpus reversed, which would move the boundaries), and its
    scores are flipped back to the block's own order.

    Raises:
        ScoringError: the ALM returned NaN or infinity.
        ConfigurationError: the settings do not fit the ALM's device.
    """
    forward, backward = enqueue_nll(alm, input_ids, settings)
    if not bool(forward[:, 1:].isfinite().all() and backward[:, :-1].isfinite().all()):
        raise broken(alm)
    return forward, backward


def broken(alm: BidirectionalALM) -> ScoringError:
    """What to say where NLLs are not finite."""
    return ScoringError(
        f"{type(alm.left_to_right).__name__} returned NaN or infinity for a block: check the ALM's training, "
        "or score with --dtype float32"
    )


@torch.inference_mode()
def enqueue_nll(alm: BidirectionalALM, input_ids: Tensor, settings: Settings | None = None) -> tuple[Tensor, Tensor]:
    """`score_nll` without a look at the result, for which a GPU would have to be waited for."""
    ids = input_ids.to(alm.device, torch.long)
    left_to_right, right_to_left = alm.engines(settings)
    return left_to_right(ids), right_to_left(ids.flip(1)).flip(1)


def to_perplexity(nll: Tensor) -> Tensor:
    """exp(NLL) with NLL clamped to [0, 80] nats; 0 where there is no NLL (NaN). Float32, any shape."""
    return torch.where(nll.isnan(), 0.0, nll.clamp(0.0, MAX_NLL).double().exp()).float()
