"""The vocabulary projection on a CPU: oneDNN's product of one chunk of the vocabulary after the other.

Beside the product it is the exponentials that cost. In float32 the weights are therefore moved by their mean over the
vocabulary, which moves all logits of a token by the same, and no probability; and logits are taken in base 2:

    y = hidden · (W − mean(W)).T / ln 2        log-sum-exp = ln 2 · log2(Σ 2^y)

The mean of y is 0, so Σ 2^y is at least the size of the vocabulary, and only a logit some 80 nats above the mean
overflows it. So 2^y is summed as it is, where log-softmax goes over the logits twice more. What overflows is computed
once more, by log-softmax.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from scorer.engine.cores import side_by_side
from scorer.engine.packed import PackedLinear, can_pack
from scorer.errors import ConfigurationError

_ROWS, _COLUMNS = 256, 1536
"""1.5 MB of float32 logits, which the second-level caches of two cores hold; smaller ones cost more in calls."""
_ALIGNMENT = 64
"""Columns. What is left of an operation's elements after whole vectors, torch's exp2 rounds in another way."""
_LN_2 = math.log(2.0)
_SMALLEST_SUM = 2.0**-60
"""Below it, terms that are too small for float32 may count."""


class PackedHead:
    """See `scorer.engine.heads.Head`."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        """Packs the weights.

        Args:
            weight: float32 or bfloat16 [V, D], on the CPU.
            bias: [V] of the same dtype.

        Raises:
            ConfigurationError: this machine, device or dtype has no such product.
        """
        if not can_pack(weight.device, weight.dtype):
            raise ConfigurationError(
                f"no packed product of {weight.dtype} on {weight.device}: expected float32, or bfloat16 where the CPU "
                "has it; take the head 'chunked'"
            )
        # In bfloat16 the moved weights would round to other ones.
        self._is_binary = weight.dtype == torch.float32
        chunks = (_binary_chunks if self._is_binary else _chunks)(weight.detach(), bias)
        self._products = [PackedLinear(*chunk) for chunk in chunks]
        self._columns_of_last = len(weight) - _COLUMNS * (len(self._products) - 1)

    def __call__(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Hidden states [N, D] and the tokens that come next, int64 [N], to NLLs in nats, float32 [N]."""
        compute = self._nll_of_binary if self._is_binary else self._nll
        pairs = list(zip(hidden.split(_ROWS), targets.split(_ROWS), strict=True))
        return torch.cat(side_by_side(compute, pairs))

    @torch.inference_mode()
    def _nll_of_binary(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        sums, own = self._reduce(*pair, lambda logits: logits.exp2_().sum(dim=1))
        total = sums.sum(dim=0)
        nll = (_LN_2 * (total.double().log2() - own)).float()
        is_exact = (total > _SMALLEST_SUM) & (total < torch.inf)
        return nll if is_exact.all() else torch.where(is_exact, nll, self._nll(pair))

    @torch.inference_mode()
    def _nll(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        normalizers, own = self._reduce(*pair, lambda logits: _log_sum_exp(self._in_nats(logits)))
        return normalizers.logsumexp(dim=0) - self._in_nats(own)

    def _in_nats(self, logits: Tensor) -> Tensor:
        return logits * _LN_2 if self._is_binary else logits.float()

    def _reduce(self, hidden: Tensor, targets: Tensor, reduce: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """What becomes of each chunk's logits, which are its to overwrite: [C, N]; and the targets' logits [N]."""
        chunk, column = targets // _COLUMNS, (targets % _COLUMNS)[:, None]
        column_of_last = column.clamp(max=self._columns_of_last - 1)
        reduced, picked = [], []
        for product in self._products:
            logits = product(hidden)
            picked.append(logits.gather(1, column_of_last if product is self._products[-1] else column))
            reduced.append(reduce(logits))
            del logits  # so that the next ones take their place, and not other cache lines
        return torch.stack(reduced), torch.cat(picked, dim=1).gather(1, chunk[:, None])[:, 0]


def _log_sum_exp(logits: Tensor) -> Tensor:
    """Of each row, by the one fused pass over a row that torch has: x − lse(x). Any column gives lse(x) back."""
    return logits[:, 0] - torch.log_softmax(logits, dim=1)[:, 0]


def _chunks(weight: Tensor, bias: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    columns = weight.split(_COLUMNS)
    return zip(columns, [None] * len(columns) if bias is None else bias.detach().split(_COLUMNS), strict=True)


def _binary_chunks(weight: Tensor, bias: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Of logits around 0 in base 2. What a chunk is filled up with has the logit -inf."""
    centre = weight.mean(dim=0, dtype=torch.float64)
    # An id that cannot come may have a bias of -inf.
    level = 0.0 if bias is None else bias.detach().double()[bias.isfinite()].mean()
    for columns, some in _chunks(weight, bias):
        missing = -len(columns) % _ALIGNMENT
        moved = ((columns.double() - centre) / _LN_2).float()
        biases = None if some is None else ((some.double() - level) / _LN_2).float()
        if missing:
            biases = moved.new_zeros(len(moved)) if biases is None else biases
            biases = functional.pad(biases, (0, missing), value=-torch.inf)
        yield functional.pad(moved, (0, 0, 0, missing)), biases
