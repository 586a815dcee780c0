"""Causal attention on the CPU, 128 queries at a time: each slice of queries against the keys up to its end.

Torch's fused kernel multiplies 64 x 64 tiles a head, too small for the matrix product to reach its speed. Slices of 128
queries for all heads of a block together take about two thirds of its time, although they compute more of what the mask
then hides: with T = 512, 10 of 16 tiles of scores against 9 of 16.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "causal_in_slices"
_QUERIES = 128


def use_sliced_attention(twin: PreTrainedModel) -> None:
    """Has a model attend so wherever its attention is plainly causal, and by torch's kernel elsewhere."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    twin.set_attn_implementation(NAME)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """softmax(Q K^T · scaling, causal) V.

    Args:
        query: [B, H, T, D].
        key: [B, H, T, D].
        value: [B, H, T, D].
        scaling: of the scores.

    Returns:
        [B, T, H, D].
    """
    blocks, heads, length, width = query.shape
    # Rows of one matrix a block and head: else every product would copy its operands again.
    queries, keys, values = (part.reshape(blocks * heads, length, width) for part in (query * scaling, key, value))
    mixed = torch.empty_like(queries)
    for start in range(0, length, _QUERIES):
        end = min(start + _QUERIES, length)
        scores = torch.bmm(queries[:, start:end], keys[:, :end].transpose(1, 2))
        scores[..., start:] += _mask(end - start, query.dtype)
        torch.bmm(torch.softmax(scores, dim=-1), values[:, :end], out=mixed[:, start:end])
    return mixed.view(blocks, heads, length, width).transpose(1, 2)


@cache
def _mask(length: int, dtype: torch.dtype) -> Tensor:
    """[length, length]: 0 where a query sees a key, -inf where the key comes later."""
    return torch.full((length, length), -math.inf, dtype=dtype).triu(1)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls: our attention, or torch's for whatever is more than causal."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    is_more = attention_mask is not None or any(others.get(name) is not None for name in ("position_bias", "softcap"))
    if is_more or not causal or query.shape != key.shape or query.shape != value.shape:
        arguments = {"scaling": scaling, "is_causal": is_causal, **others}
        attended: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **arguments)
        return attended
    return causal_attention(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling), None
