"""One direction of an ALM, made ready for its device: the body a few blocks at a time, then the head."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from scorer.console import first_line
from scorer.engine.compilation import compiled
from scorer.engine.cores import side_by_side
from scorer.engine.heads import HEADS, plain_projection
from scorer.engine.packed import can_pack
from scorer.engine.reference import reference_nll
from scorer.engine.twin import make_twin, pack, round_to_8_bits
from scorer.errors import ConfigurationError

logger = logging.getLogger(__name__)

_CPU_TOKENS = 2048
"""Of the forward passes on all cores: their activations stay in the last cache, and there are few calls for them."""
_CUDA_BLOCKS = 64
"""Of a forward pass on a GPU: 32,768 tokens, 3 TFLOP a direction, against which the launches do not count."""
_MAX_DIFFERENCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
"""Of the packed body's hidden states from the model's own, as a share of the largest."""

Body = Callable[[Tensor], Tensor]
"""int64 [B, T] to hidden states [B, T, D]."""


@dataclass(frozen=True)
class Settings:
    """How an engine computes. The bytes of a shard depend on it, within rounding."""

    head: str
    """One of `HEADS`."""
    compiled: bool
    """Whether torch compiles the body, for one shape of batch; no kernel is chosen by timing."""
    micro_batch: int
    """Blocks of a forward pass; on CUDA, fewer are filled up to as many. 0: a core's share of 2,048 tokens."""
    float8: bool = False
    """Whether the body's linear layers multiply in 8 bits, for GPUs that are faster so; see `scorer.engine.float8`."""

    @classmethod
    def default(cls, device: torch.device, dtype: torch.dtype) -> Settings:
        """What measures best on CPUs; on CUDA, where nothing was measured yet, the cautious choice."""
        if device.type == "cuda":
            return cls(head="chunked", compiled=True, micro_batch=_CUDA_BLOCKS)
        return cls(head="packed" if can_pack(device, dtype) else "chunked", compiled=False, micro_batch=0)


class Engine:
    """`reference_nll` of one model, fast. The model's weights must stay as they are while it lives."""

    def __init__(self, model: PreTrainedModel, settings: Settings | None = None):
        """Prepares the body and the head; what is compiled is compiled at the first call.

        Args:
            model: a causal LM on its device. If its logits are more than a linear layer's, it is scored the plain way.
            settings: (default: what suits its device).

        Raises:
            ConfigurationError: the settings do not fit the device.
        """
        parameter = next(model.parameters())
        self.settings = settings or Settings.default(parameter.device, parameter.dtype)
        if self.settings.head not in HEADS:
            raise ConfigurationError(f"there is no head {self.settings.head!r}: expected one of {', '.join(HEADS)}")
        self._model = model
        self._is_cuda = parameter.device.type == "cuda"
        projection = plain_projection(model)
        self.is_fast = projection is not None
        """Whether the logits are never all there."""
        if projection is not None:
            # Entered by whoever calls a part by itself, too.
            without_gradients = torch.inference_mode()
            self.head = without_gradients(HEADS[self.settings.head](projection.weight, projection.bias))
            self.body = without_gradients(_make_body(model, self.settings))

    @torch.inference_mode()
    def __call__(self, input_ids: Tensor) -> Tensor:
        """NLL of each token.

        Args:
            input_ids: int64 [B, T] on the model's device, in its reading order.

        Returns:
            Float32 [B, T] in nats; NaN at position 0, which has no context. NaN or infinite elsewhere only where the
            model's logits are. A row's values do not depend on the others.
        """
        if not input_ids.numel():
            return torch.empty(input_ids.shape, device=input_ids.device)
        count, blocks = len(input_ids), self.settings.micro_batch or _share_of_a_core(*input_ids.shape)
        if not self.is_fast:
            return torch.cat([reference_nll(self._model, ids) for ids in input_ids.split(blocks)])
        if self._is_cuda:  # one shape, so one kernel: the same bytes however many come together
            input_ids = torch.cat([input_ids, input_ids[-1:].expand(-count % blocks, -1)])
        passes = input_ids.split(blocks)
        if self._is_cuda or self.settings.compiled or len(passes) < torch.get_num_threads():
            return torch.cat([self._pass(ids) for ids in passes])[:count]
        return torch.cat(side_by_side(self._pass, passes))

    @torch.inference_mode()
    def _pass(self, ids: Tensor) -> Tensor:
        targets = functional.pad(ids[:, 1:], (0, 1))  # the last one has none: any will do
        nll = self.head(self.body(ids).flatten(0, 1), targets.flatten()).view(ids.shape)
        return functional.pad(nll[:, :-1], (1, 0), value=torch.nan)


def _share_of_a_core(blocks: int, length: int) -> int:
    """Blocks of a pass such that all cores have about as many tokens, and not too many; all, if there are too few."""
    cores = torch.get_num_threads()
    if blocks < cores:
        return max(1, _CPU_TOKENS // length)
    rounds = math.ceil(blocks / cores / max(1, _CPU_TOKENS // (length * cores)))
    return math.ceil(blocks / cores / rounds)


def _make_body(model: PreTrainedModel, settings: Settings) -> Body:
    parameter = next(model.parameters())
    twin = make_twin(model)
    if settings.float8:
        round_to_8_bits(twin)
    elif can_pack(parameter.device, parameter.dtype) and not settings.compiled:
        try:
            pack(twin)
            _require_same(model, twin)
        except Exception as error:  # whatever a foreign model's code makes of layers that are not its own
            logger.warning("%s runs on its own layers, which are slower: %s", type(model).__name__, first_line(error))
            twin = make_twin(model)

    def body(ids: Tensor) -> Tensor:
        hidden: Tensor = twin(input_ids=ids, use_cache=False).last_hidden_state
        return hidden

    return compiled(body) if settings.compiled else body


@torch.inference_mode()
def _require_same(model: PreTrainedModel, twin: PreTrainedModel) -> None:
    """Tries a twin on a few tokens.

    Raises:
        ArithmeticError: its hidden states are not the model's.
    """
    ids = torch.arange(32).remainder(model.config.vocab_size).view(2, 16)
    was_training = model.training
    expected = model.eval().base_model(input_ids=ids, use_cache=False).last_hidden_state.float()
    model.train(was_training)
    found = twin(input_ids=ids, use_cache=False).last_hidden_state.float()
    difference, largest = (found - expected).abs().max(), expected.abs().max()
    if difference > _MAX_DIFFERENCE[next(model.parameters()).dtype] * largest:
        raise ArithmeticError(f"hidden states differ by {difference:.2g}, of {largest:.2g}")
