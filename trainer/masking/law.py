"""Eq. (3) and Eq. (4): from two perplexities a token to the law from which masked positions are drawn."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from scorer.errors import ConfigurationError
from trainer.batches import Floats

MASK_RATE = 0.15

Float64 = npt.NDArray[np.float64]

PERPLEXITY: dict[str, Callable[[Floats, Floats], Float64]] = {
    "arithmetic": lambda forward, backward: (forward.astype(np.float64) + backward) / 2,
    "geometric": lambda forward, backward: np.sqrt(forward.astype(np.float64)) * np.sqrt(backward.astype(np.float64)),
    "forward": lambda forward, backward: forward.astype(np.float64),
    "backward": lambda forward, backward: backward.astype(np.float64),
}
"""What of a token's two perplexities its hardness is made of; the paper's is the arithmetic mean."""


def check_alpha(alpha: float) -> float:
    """Returns `alpha` if Eq. (4) is defined for it.

    Raises:
        ConfigurationError: it is negative or NaN.
    """
    if math.isnan(alpha) or alpha < 0:
        raise ConfigurationError(
            f"alpha = {alpha}: expected a number from 0 (all hardness) to inf (uniform); the paper uses 0, 0.001, 0.005"
        )
    return alpha


def budget(block_length: int) -> int:
    """M, the number of positions masked in a block: 15 % of its length, rounded; 77 of 512."""
    return round(MASK_RATE * block_length)


def hardness(forward: Floats, backward: Floats, of: str = "arithmetic") -> Float64:
    """P(X): the mean of the two perplexities, over its L1 norm.

    Args:
        forward: [B, T], exp(nats); 0 where a token is not eligible (special tokens).
        backward: [B, T], likewise.
        of: one of PERPLEXITY.

    Returns:
        float64 [B, T]; each row sums to 1, or to 0 where no token is eligible.

    Source: paper Eq. (3); another `of` than the arithmetic mean is an ablation of it.
    """
    return normalized(PERPLEXITY[of](forward, backward))


def probabilities(forward: Floats, backward: Floats, alpha: float) -> Float64:
    """The law from which masked positions are drawn: (P(X) + alpha) / ||P(X) + alpha||_1 over the eligible positions.

    Args:
        forward: [B, T], exp(nats); 0 where a token is not eligible. Such a token gets no share of alpha either.
        backward: [B, T], likewise.
        alpha: from 0 (all hardness) to inf (uniform).

    Returns:
        float64 [B, T]; each row sums to 1, or to 0 where no token is eligible.

    Raises:
        ConfigurationError: alpha is negative or NaN.

    Source: paper Eq. (4).

    >>> one, four = np.array([[0, 1, 3, 4, 0.0]]), np.array([[0, 1, 1, 6, 0.0]])
    >>> probabilities(one, four, 0.0)
    array([[0.   , 0.125, 0.25 , 0.625, 0.   ]])
    """
    return normalized(shifted(hardness(forward, backward), alpha))


def shifted(law: Float64, alpha: float, relative: bool = False) -> Float64:
    """Eq. (4) before it is normalized: P + alpha, or P / alpha + 1, where P > 0, else 0. float64 [B, T], at most 2.

    Args:
        law: [B, T], P(X).
        alpha: from 0 to inf.
        relative: whether alpha counts in shares of 1/n, n the row's eligible positions. Its uniform share is
            n alpha / (1 + n alpha), which depends on n; that of a relative one is alpha / (1 + alpha).

    Raises:
        ConfigurationError: alpha is negative or NaN.
    """
    is_eligible = law > 0
    share: float | Float64 = 1.0
    if relative:
        share = np.maximum(is_eligible.sum(axis=1, keepdims=True), 1).astype(np.float64)
    # Of a large alpha divided by alpha / n: what is added stays 1, up to inf.
    weights = law * (share / alpha) + 1 if check_alpha(alpha) > 1 else law + alpha / share
    weights *= is_eligible
    return weights


def normalized(weights: Float64) -> Float64:
    """Rows over their L1 norm; rows of zeros stay."""
    norm = weights.sum(axis=1, keepdims=True)
    if not np.isfinite(norm).all():  # divided by the largest first, so that no sum overflows
        weights = weights / np.maximum(weights.max(axis=1, keepdims=True), 1.0)
        norm = weights.sum(axis=1, keepdims=True)
    return weights / np.where(norm > 0, norm, 1.0)
