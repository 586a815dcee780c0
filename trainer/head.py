"""A masked LM that computes what is asked for: the vocabulary projection, and the last layer, at masked positions only.

A masked LM is asked about 15 % of its tokens, but its head projects them all to the vocabulary and lets the loss throw
away 85 % of the result: for RoBERTa base a quarter of the arithmetic of a step, and most of its memory (a micro-batch
of 32 blocks: 3.3 GB of float32 logits, against 0.5 GB). M is the same for every block, so the shapes stay static:

    hidden states [B, T, d] ── gather ──▶ [B, M, d] ── head ──▶ logits [B, M, V]

Nobody else reads what the last layer gives, so there too only its keys and values are needed everywhere.

The model stays what it is, class name and weights: what `save_pretrained` writes is an ordinary checkpoint.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from trainer.masking import IGNORED_LABEL

logger = logging.getLogger(__name__)

_HEADS = {
    "bert": ("cls",),
    "camembert": ("lm_head",),
    "distilbert": ("vocab_transform", "activation", "vocab_layer_norm", "vocab_projector"),
    "electra": ("generator_predictions", "generator_lm_head"),
    "modernbert": ("head", "decoder"),
    "mpnet": ("lm_head",),
    "roberta": ("lm_head",),
    "xlm-roberta": ("lm_head",),
}
"""What each architecture's forward applies to the last hidden states, in order."""
_PLAIN_ENCODERS = ("bert", "camembert", "roberta", "xlm-roberta")
"""Embeddings, then layers of one shape: for these the last layer is computed at masked positions only."""


class _MaskedPositions(PreTrainedModel):
    """Takes the place of a masked LM's forward; what it leaves out is the head at positions that nobody asked for."""

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        masked_positions: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **inputs: Any,
    ) -> MaskedLMOutput:
        """Predicts the tokens at `masked_positions`.

        Args:
            input_ids: [B, T].
            labels: [B, M], the true ids there; -100 where a block has fewer than M. Without them no loss.
            masked_positions: int64 [B, M]; any position where the label is -100. Without them the model's own forward.
            num_items_in_batch: labels of the whole global batch, by which the summed loss is divided; without it, the
                labels of this call.
            **inputs: the encoder's other inputs.

        Returns:
            `loss` in nats a masked token and `logits` [B, M, vocabulary].
        """
        if masked_positions is None:
            output: MaskedLMOutput = super().forward(input_ids=input_ids, labels=labels, **inputs)
            return output
        logits = self._logits_at(masked_positions, input_ids, inputs)
        loss = None if labels is None else masked_loss(logits, labels, num_items_in_batch)
        return MaskedLMOutput(loss=loss, logits=logits)

    def _logits_at(self, positions: Tensor, input_ids: Tensor, inputs: dict[str, Any]) -> Tensor:
        head = _HEADS.get(self.config.model_type)
        if head is None:
            return at_positions(super().forward(input_ids=input_ids, **inputs).logits, positions)
        if self.config.model_type in _PLAIN_ENCODERS and not inputs:
            states = self.base_model.embeddings(input_ids=input_ids)
            *layers, last = self.base_model.encoder.layer
            for layer in layers:  # without an attention mask: blocks have no padding
                states = layer(states)
            states = last(states, masked_positions=positions)
        else:
            states = at_positions(self.base_model(input_ids=input_ids, **inputs)[0], positions)
        for name in head:
            states = getattr(self, name)(states)
        logits: Tensor = states
        return logits


class _LastLayer(nn.Module):
    """Takes the place of the forward of BERT's layers, of which RoBERTa's are copies."""

    attention: Any
    feed_forward_chunk: Any

    def forward(self, hidden_states: Tensor, *rest: Any, masked_positions: Tensor | None = None, **more: Any) -> Tensor:
        """Queries, and all that follows from them, at int64 positions [B, M]: [B, T, d] -> [B, M, d]."""
        if masked_positions is None:
            output: Tensor = super().forward(hidden_states, *rest, **more)
            return output
        asked = at_positions(hidden_states, masked_positions)
        own = self.attention.self

        def heads(states: Tensor) -> Tensor:
            split: Tensor = states.unflatten(-1, (own.num_attention_heads, own.attention_head_size))
            return split.transpose(1, 2)

        attended = functional.scaled_dot_product_attention(
            heads(own.query(asked)),
            heads(own.key(hidden_states)),
            heads(own.value(hidden_states)),
            dropout_p=own.dropout.p if self.training else 0.0,
            scale=own.scaling,
        )
        states: Tensor = self.feed_forward_chunk(self.attention.output(attended.transpose(1, 2).flatten(2), asked))
        return states


def on_masked_positions(model: PreTrainedModel) -> PreTrainedModel:
    """Gives a masked LM the forward of `_MaskedPositions`; the very object is returned, its weights untouched.

    An architecture whose head is not in the table projects all positions first: correct, and no faster than before.
    """
    if model.config.model_type not in _HEADS:
        logger.warning(
            "%s: the vocabulary projection is computed at all positions, since its head is not one of %s",
            type(model).__name__,
            ", ".join(_HEADS),
        )
    _put_before(model, _MaskedPositions)
    if model.config.model_type in _PLAIN_ENCODERS:
        _put_before(model.base_model.encoder.layer[-1], _LastLayer)
    return model


def _put_before(module: nn.Module, methods: type[nn.Module]) -> None:
    """Lets `methods` come before a module's own; its class keeps its name, which transformers writes and reads."""
    plain = type(module)
    module.__class__ = type(plain.__name__, (methods, plain), {"__module__": plain.__module__})


def at_positions(states: Tensor, positions: Tensor) -> Tensor:
    """What stands at each row's positions: [B, T, d] and int64 [B, M] -> [B, M, d]."""
    return states.gather(1, positions[..., None].expand(-1, -1, states.shape[-1]))


def masked_loss(logits: Tensor, labels: Tensor, num_items: Tensor | int | None = None) -> Tensor:
    """Mean NLL in nats over the labels that are not -100.

    Args:
        logits: [B, M, vocabulary], of any floating dtype; the loss is computed in float32.
        labels: int64 [B, M].
        num_items: what the sum is divided by; by default the number of labels.
    """
    total = functional.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum"
    )
    count = (labels != IGNORED_LABEL).sum() if num_items is None else num_items
    return total / torch.as_tensor(count, device=total.device).clamp(min=1)
