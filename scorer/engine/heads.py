"""From hidden states to NLLs without the [tokens, vocabulary] logits: 200 kB of them a token, read several times.

A head takes a rectangle of them at a time, some tokens by some of the vocabulary, small enough to stay in a cache, and
keeps of each the log-sum-exp and the logit of the token that came next, if it is there:

                 vocabulary ─▶
    tokens   ┌────────┬────────┬──────┐
      │      │ ▓ lse  │   lse  │ lse  │   NLL = log-sum-exp of a row's lse − logit of its target (▓)
      ▼      └────────┴────────┴──────┘

Log-sum-exp is float32 whatever the dtype of the logits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from scorer.engine.compilation import compiled
from scorer.engine.packed_head import PackedHead
from scorer.engine.triton_head import TritonHead

Head = Callable[[Tensor, Tensor], Tensor]
"""Hidden states [N, D] and the tokens that come next, int64 [N], to NLLs in nats, float32 [N]."""
MakeHead = Callable[[Tensor, Tensor | None], Head]
"""Weights [V, D] and bias [V], if any, of the vocabulary projection to a head on their device."""

_PLAIN_ROWS, _PLAIN_COLUMNS = 512, 8192
_CUDA_ROWS, _CUDA_COLUMNS = 4096, 4096
"""32 MiB of bfloat16 logits, less than an H200's second-level cache."""
_ALIGNMENT = 64
"""Columns, of which a GPU's matrix products want a multiple."""


class ChunkedHead:
    """On any device: the library's matrix product, and what follows compiled into one pass where asked for."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int, columns: int, is_compiled: bool):
        """Pads the vocabulary so that all chunks are alike; what is padded has a bias of -inf."""
        columns = min(columns, _padded(len(weight), _ALIGNMENT))
        missing = _padded(len(weight), columns) - len(weight)
        biases = weight.new_zeros(len(weight), dtype=torch.float32) if bias is None else bias.float()
        self._biases = functional.pad(biases, (0, missing), value=-torch.inf).split(columns)
        self._weights = functional.pad(weight.detach(), (0, 0, 0, missing)).split(columns)
        self._rows, self._columns = rows, columns
        # As one graph, for one number of tokens: launched piece by piece, the launches would take longer than the work.
        self._compute = compiled(self._nlls) if is_compiled else self._nlls

    def __call__(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """See `Head`."""
        return self._compute(hidden, targets)

    def _nlls(self, hidden: Tensor, targets: Tensor) -> Tensor:
        pairs = zip(hidden.split(self._rows), targets.split(self._rows), strict=True)
        return torch.cat([self._nll(rows, wanted) for rows, wanted in pairs])

    def _nll(self, hidden: Tensor, targets: Tensor) -> Tensor:
        chunk, column = targets // self._columns, targets % self._columns
        parts = [
            _reduce(functional.linear(hidden, weight), bias, column)
            for weight, bias in zip(self._weights, self._biases, strict=True)
        ]
        normalizers, picked = (torch.stack(some) for some in zip(*parts, strict=True))
        return _combine(normalizers, picked, chunk)


def _reduce(logits: Tensor, bias: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of each row, and its logit in a column of its own."""
    biased = logits.float() + bias
    return torch.logsumexp(biased, dim=1), biased.gather(1, column[:, None])[:, 0]


def _combine(normalizers: Tensor, picked: Tensor, chunk: Tensor) -> Tensor:
    """NLL [N] from the log-sum-exp [C, N] of each chunk, the logits [C, N] picked of it, and the target's chunk [N]."""
    return normalizers.logsumexp(dim=0) - picked.gather(0, chunk[None])[0].float()


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _chunked(weight: Tensor, bias: Tensor | None) -> Head:
    """Rectangles that stay in a cache."""
    if weight.device.type == "cuda":
        return ChunkedHead(weight, bias, _CUDA_ROWS, _CUDA_COLUMNS, is_compiled=True)
    return ChunkedHead(weight, bias, _PLAIN_ROWS, _PLAIN_COLUMNS, is_compiled=False)


def _in_rows(weight: Tensor, bias: Tensor | None) -> Head:
    """All logits of some tokens: fewer and larger products."""
    columns = _padded(len(weight), _ALIGNMENT)
    return ChunkedHead(weight, bias, _CUDA_ROWS, columns, is_compiled=weight.device.type == "cuda")


HEADS: dict[str, MakeHead] = {"packed": PackedHead, "chunked": _chunked, "rows": _in_rows, "triton": TritonHead}
"""`packed` on CPUs; on GPUs `chunked` keeps logits in the cache, `rows` makes fewer products, `triton` keeps none."""


def plain_projection(model: PreTrainedModel) -> nn.Linear | None:
    """The output layer of a causal LM whose logits are nothing but that layer on its body's last hidden states.

    Found out by trying: the same product of the same numbers gives the same bits. None for models that scale, cap or
    otherwise change their logits; those are scored the plain way.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        return None
    ids = torch.arange(16, device=head.weight.device).remainder(model.config.vocab_size)[None]
    was_training = model.training
    try:
        with torch.inference_mode():
            model.eval()
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            same = torch.equal(head(hidden), model(input_ids=ids, use_cache=False).logits)
    except (AttributeError, RuntimeError, TypeError):  # a body that gives something else
        return None
    finally:
        model.train(was_training)
    return head if same else None
