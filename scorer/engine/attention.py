"""Causal attention on the CPU through oneDNN's matrix product: a head and 256 queries at a time.

Torch's fused kernel multiplies 64 x 64 tiles by way of MKL, too small and too slow a product. A head's 256 queries
against the keys up to their end are large enough for full speed, although they compute more of what the mask then
hides: with 512 tokens three quarters of all scores, where half are wanted.
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

from scorer.engine.packed import multiply

NAME = "causal_by_onednn"
_QUERIES = 256


def use_onednn_attention(twin: PreTrainedModel) -> None:
    """Has a float32 model attend so wherever its attention is plainly causal, and by torch's kernel elsewhere."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    twin.set_attn_implementation(NAME)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """softmax(Q K^T · scaling, causal) V.

    Args:
        query: float32 [B, H, T, D].
        key: float32 [B, H, T, D].
        value: float32 [B, H, T, D].
        scaling: of the scores.

    Returns:
        [B, T, H, D].
    """
    blocks, heads, length, width = query.shape
    mixed = query.new_empty(blocks, length, heads * width)
    for block in range(blocks):
        # A block's own copies, in the order that the products want, stay in a cache until its heads are through.
        queries = torch.mul(query[block], scaling, out=query.new_empty(heads, length, width))
        keys = key[block].contiguous()
        for start in range(0, length, _QUERIES):
            end = min(start + _QUERIES, length)
            columns = value[block, :, :end].transpose(1, 2).contiguous()
            weights = (
                torch.softmax(multiply(some, others[:end], plus=_mask(start, end)), dim=1)
                for some, others in zip(queries[:, start:end], keys, strict=True)
            )
            outputs = [multiply(some, others) for some, others in zip(weights, columns, strict=True)]
            torch.cat(outputs, dim=1, out=mixed[block, start:end])
    return mixed.view(blocks, length, heads, width)


@cache
def _mask(start: int, end: int) -> Tensor:
    """[end - start, end]: 0 where a query sees a key, -inf where the key comes later."""
    return torch.full((end - start, end), -math.inf).triu(start + 1)


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
