"""How far NLLs are from float64, and how far that moves the law from which masks are drawn (Eq. 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from benchmarks.interleaved import Table
from benchmarks.scoring_sides import Nll, in_both_directions
from scorer.alm import BidirectionalALM
from scorer.scoring import MAX_NLL, to_perplexity
from trainer.masking import probabilities

ALPHAS = (0.0, 0.001, 0.005)
"""The paper's."""


@dataclass(frozen=True)
class Spread:
    """Over blocks."""

    mean: float
    max: float


@dataclass(frozen=True)
class Precision:
    """One side."""

    side: str
    dtype: str
    blocks: int
    nll_mean_error: float
    """In nats, of every token and direction that has an NLL."""
    nll_max_error: float
    total_variation: dict[str, Spread]
    """By alpha: between the law of a block's masks and the law of exact NLLs, from 0 (the same) to 1."""


@torch.inference_mode()
def exact_nll(alm: BidirectionalALM, ids: Tensor) -> Nll:
    """NLLs [B, T] of an ALM in float64, from the first product to the last."""
    directions = [partial(_exact_direction, model) for model in (alm.left_to_right, alm.right_to_left)]
    return in_both_directions(*directions, ids)


def _exact_direction(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """One block at a time, since its logits are 200 MB."""
    rows = []
    for block in ids.split(1):
        log_probabilities = model(input_ids=block, use_cache=False).logits[:, :-1].log_softmax(dim=-1)
        rows.append(-log_probabilities.gather(2, block[:, 1:, None]).squeeze(2))
    return functional.pad(torch.cat(rows), (1, 0), value=torch.nan)


def compare(side: str, dtype: torch.dtype, found: Nll, exact: Nll) -> Precision:
    """Errors of a side's NLLs, and of what becomes of them."""
    errors = torch.cat([(one.double() - other).abs().flatten() for one, other in zip(found, exact, strict=True)])
    known = torch.cat([other.isfinite().flatten() for other in exact])
    laws = [to_perplexity(nll).cpu().numpy() for nll in found]
    exact_laws = [_exact_perplexity(nll) for nll in exact]
    total_variation = {}
    for alpha in ALPHAS:
        distance = 0.5 * np.abs(probabilities(*laws, alpha) - probabilities(*exact_laws, alpha)).sum(axis=1)
        total_variation[f"{alpha:g}"] = Spread(float(distance.mean()), float(distance.max()))
    return Precision(
        side=side,
        dtype=str(dtype).removeprefix("torch."),
        blocks=len(exact[0]),
        nll_mean_error=float(errors[known].mean()),
        nll_max_error=float(errors[known].max()),
        total_variation=total_variation,
    )


def _exact_perplexity(nll: Tensor) -> np.ndarray:
    """exp(NLL) in float64; 0 where there is no NLL."""
    return np.asarray(torch.where(nll.isnan(), 0.0, nll.clamp(0.0, MAX_NLL).exp()).cpu().numpy())


def to_table(outcomes: Sequence[Precision], title: str) -> Table:
    """Errors in nats, distances from 0 to 1."""
    header = ("", "dtype", "mean error, nats", "max error", *(f"TV, alpha {alpha:g}: mean (max)" for alpha in ALPHAS))
    rows = [
        (
            outcome.side,
            outcome.dtype,
            f"{outcome.nll_mean_error:.1e}",
            f"{outcome.nll_max_error:.1e}",
            *(f"{spread.mean:.1e} ({spread.max:.1e})" for spread in outcome.total_variation.values()),
        )
        for outcome in outcomes
    ]
    return Table(title, header, rows)
