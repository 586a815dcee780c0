"""Per-token perplexities of a block under both directions of the ALM: Eq. (1) and (2).

`score` is the fast twin: it never holds more than a chunk of the [tokens, vocabulary] logits. `reference_nll` is the
plain one that says what is meant. A test holds the two together.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from scorer.alm import BidirectionalALM
from scorer.errors import ScoringError

MAX_NLL = 80.0
"""Nats. exp of more than 88.7 leaves float32."""
_HEAD_CHUNK_TOKENS = 512
"""Rows of logits at a time: 512 x 50,265 float32 is 103 MB, against 824 MB for a micro-batch of 8 blocks."""


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


@torch.inference_mode()
def score_nll(alm: BidirectionalALM, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The same as `score` in nats, not clamped: float32 [B, T] twice; NaN where a position has no context.

    The backward model reads each block reversed (not the corpus reversed, which would move the boundaries), and its
    scores are flipped back to the block's own order.
    """
    ids = input_ids.to(alm.device, torch.long)
    forward = _nll(alm.left_to_right, ids)
    backward = _nll(alm.right_to_left, ids.flip(1)).flip(1)
    return forward, backward


def to_perplexity(nll: Tensor) -> Tensor:
    """exp(NLL) with NLL clamped to [0, 80] nats; 0 where there is no NLL (NaN). Float32, any shape."""
    return torch.where(nll.isnan(), 0.0, nll.clamp(0.0, MAX_NLL).double().exp()).float()


def reference_nll(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """NLL of each token under one causal LM, in the plainest way: all logits, then log-softmax, then gather.

    Args:
        model: a causal LM.
        input_ids: int64 [B, T], in the model's reading order.

    Returns:
        Float32 [B, T] in nats; NaN at position 0, which has no context.
    """
    logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1].float()
    log_probabilities = functional.log_softmax(logits, dim=-1)
    nll = -log_probabilities.gather(2, input_ids[:, 1:, None]).squeeze(2)
    return functional.pad(nll, (1, 0), value=torch.nan)


def _nll(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    head = plain_linear_head(model)
    nll = reference_nll(model, input_ids) if head is None else _chunked_nll(model, head, input_ids)
    if not bool(nll[:, 1:].isfinite().all()):
        raise ScoringError(
            f"{type(model).__name__} returned NaN or infinity for a block: check the ALM's training, "
            "or score with --dtype float32"
        )
    return nll


def plain_linear_head(model: PreTrainedModel) -> nn.Linear | None:
    """The output layer, where logits are nothing but that layer on the body's last hidden states.

    None for architectures that scale, cap or otherwise change their logits; these are scored the plain way.
    """
    head = model.get_output_embeddings()
    is_plain = model.config.model_type in {"gpt2", "llama", "mistral", "qwen2", "qwen3"}
    return head if is_plain and type(head) is nn.Linear else None


def _chunked_nll(model: PreTrainedModel, head: nn.Linear, input_ids: Tensor) -> Tensor:
    """`reference_nll` without the [B·T, V] logits: `_HEAD_CHUNK_TOKENS` rows of them at a time, in float32."""
    hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
    targets = input_ids[:, 1:].flatten()
    nll = torch.cat(
        [
            functional.cross_entropy(head(rows).float(), wanted, reduction="none")
            for rows, wanted in zip(hidden.split(_HEAD_CHUNK_TOKENS), targets.split(_HEAD_CHUNK_TOKENS), strict=True)
        ]
    )
    return functional.pad(nll.view(len(input_ids), -1), (1, 0), value=torch.nan)
