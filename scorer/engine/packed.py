"""Linear layers for inference on a CPU: oneDNN's matrix product, on weights that lie as its kernels read them.

Torch multiplies float32 matrices through MKL, which uses AVX-512 on its maker's processors alone; oneDNN uses what
there is. On 2 cores of a Zen 5 that is 425 GFLOP/s against 185, and in bfloat16 850 (`make bench-scoring`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_REORDERED_FOR_ROWS = 512
"""Rows that the weights' order is chosen for; any number may come."""


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this machine and this build of torch have the product."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def multiply(rows: Tensor, columns: Tensor, plus: Tensor | None = None) -> Tensor:
    """The product rows @ columns.T of [N, D] and [M, D], none of them packed, plus a matrix [N, M]."""
    if plus is None:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, columns, None, "none", [], "")
    else:
        product = torch.ops.mkldnn._linear_pointwise.binary(rows, plus, columns, None, "add")
    return product


class PackedLinear(nn.Module):
    """x @ weight.T + bias, with GELU (by its tanh) behind it where that is wanted; for inference only."""

    def __init__(self, weight: Tensor, bias: Tensor | None, has_gelu: bool = False):
        """Copies the weights into their new order.

        Args:
            weight: float32 or bfloat16 [out, in], on the CPU.
            bias: [out] of the same dtype.
            has_gelu: whether the activation follows in the same pass over the output.
        """
        super().__init__()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), _REORDERED_FOR_ROWS)
        self._bias = None if bias is None else bias.detach()
        self._activation = ("gelu", "tanh") if has_gelu else ("none", "")

    def forward(self, inputs: Tensor) -> Tensor:
        """[…, in] to […, out]."""
        name, algorithm = self._activation
        product: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self._weight, self._bias, name, [], algorithm)
        return product
