"""A model's body for inference: its own code and its own weights, with the slow parts exchanged for faster ones."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import NewGELUActivation
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.pytorch_utils import Conv1D

from scorer.engine.attention import use_onednn_attention
from scorer.engine.float8 import Float8Linear
from scorer.engine.packed import PackedLinear


def make_twin(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the model's body in evaluation mode; its tensors are the model's own, not copies."""
    tensors = (*model.parameters(), *model.buffers())
    twin: PreTrainedModel = copy.deepcopy(model.base_model, {id(tensor): tensor for tensor in tensors})
    return twin.eval()


def pack(twin: PreTrainedModel) -> None:
    """Makes a twin on a CPU as fast as it gets: packed linear layers, GELU in one pass, attention of our own.

    In bfloat16 attention stays torch's, whose scores are float32 inside.
    """
    for module in list(twin.modules()):
        if type(module) is GPT2MLP and type(module.act) is NewGELUActivation:
            module.c_fc = PackedLinear(*_weights(module.c_fc), has_gelu=True)
            module.act = nn.Identity()
        for name, child in list(module.named_children()):
            if type(child) in (nn.Linear, Conv1D):
                setattr(module, name, PackedLinear(*_weights(child)))
            elif type(child) is NewGELUActivation:
                setattr(module, name, nn.GELU(approximate="tanh"))  # the same formula, in one pass instead of eight
    if twin.config._attn_implementation == "sdpa" and twin.dtype == torch.float32:
        use_onednn_attention(twin)


def round_to_8_bits(twin: PreTrainedModel) -> None:
    """Exchanges a twin's linear layers for such as multiply in 8 bits."""
    for module in list(twin.modules()):
        for name, child in list(module.named_children()):
            if type(child) in (nn.Linear, Conv1D):
                setattr(module, name, Float8Linear(*_weights(child)))


def _weights(linear: nn.Linear | Conv1D) -> tuple[Tensor, Tensor | None]:
    """The weight as [out, in], and the bias."""
    return linear.weight.t() if type(linear) is Conv1D else linear.weight, linear.bias
