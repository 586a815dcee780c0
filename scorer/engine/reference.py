"""Per-token NLL in the plainest way, which says what is meant and which everything faster is held to."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel


def reference_nll(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """NLL of each token under one causal LM: all logits, then log-softmax, then gather.

    Args:
        model: a causal LM.
        input_ids: int64 [B, T], in the model's reading order.

    Returns:
        Float32 [B, T] in nats; NaN at position 0, which has no context.

    Source: paper Eq. (1) and (2), of which it is the logarithm.
    """
    logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1].float()
    log_probabilities = functional.log_softmax(logits, dim=-1)
    nll = -log_probabilities.gather(2, input_ids[:, 1:, None]).squeeze(2)
    return functional.pad(nll, (1, 0), value=torch.nan)
