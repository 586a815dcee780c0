"""Linear layers in 8-bit floats (e4m3), for GPUs whose tensor cores are twice as fast with them.

Every row of the weight and every row of the input has a scale of its own, so that its largest element becomes 448,
the largest number of e4m3. An element keeps 4 significant bits: it is off by 1/16 of itself at most, or 2^-10 of a
scale where it is small.

What was tried: the arithmetic, on the CPU, where torch computes the same product from the same 8-bit numbers. What was
not: a GPU. Off by default: what it does to scores has to be known for the ALM at hand.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from scorer.errors import ConfigurationError

LARGEST = 448.0
"""Of e4m3."""
_DIMENSION = 16
"""What in and out must be multiples of."""


class Float8Linear(nn.Module):
    """`nn.Linear` with an 8-bit weight, and an input that is rounded to 8 bits at each call. Inference only."""

    weight: Tensor
    """float8_e4m3fn [out, in]."""
    weight_scale: Tensor
    """Float32 [1, out]."""
    bias: Tensor | None
    """bfloat16 [out]."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        """Rounds a layer's weight to 8 bits.

        Args:
            weight: floating [out, in], both multiples of 16, finite, on the CPU or on CUDA of capability 8.9 or newer.
            bias: floating [out], or None.

        Raises:
            ConfigurationError: a dimension is no multiple of 16, or the GPU has no 8-bit tensor cores.
        """
        super().__init__()
        if weight.shape[0] % _DIMENSION or weight.shape[1] % _DIMENSION:
            raise ConfigurationError(
                f"a linear layer of {weight.shape[1]} to {weight.shape[0]} cannot be computed in 8 bits, which takes "
                f"multiples of {_DIMENSION}: leave this layer as it is"
            )
        _check_device(weight.device)
        # A weight that lies transposed, as GPT-2's do, would stay so, and a GPU's product refuses it.
        rounded, scale = quantize_rows(weight.detach().contiguous())
        self.register_buffer("weight", rounded)
        self.register_buffer("weight_scale", scale.t().contiguous())
        self.register_buffer("bias", None if bias is None else bias.detach().bfloat16())

    @torch.no_grad()
    def forward(self, hidden: Tensor) -> Tensor:
        """The layer's output.

        Args:
            hidden: floating [..., in].

        Returns:
            bfloat16 [..., out]: hidden · weightᵀ + bias. A row with a NaN or an infinity in it gives a row of NaN.
        """
        rows, scale = quantize_rows(hidden.reshape(-1, hidden.shape[-1]))
        product = torch._scaled_mm(
            rows,
            self.weight.t(),  # column-major, as is asked for
            scale_a=scale,
            scale_b=self.weight_scale,
            bias=self.bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,  # sums of 14 bits, with inputs of 4
        )
        return product.view(*hidden.shape[:-1], len(self.weight))

    def extra_repr(self) -> str:
        """What `print` shows of the layer."""
        return f"in_features={self.weight.shape[1]}, out_features={self.weight.shape[0]}, bias={self.bias is not None}"


def quantize_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds each row to 8 bits in units of its own.

    A handful of elementwise operations around one maximum: a compiler makes one pass over the matrix of them, and
    without one they cost more than a small product does.

    Args:
        matrix: floating [M, K].

    Returns:
        float8_e4m3fn [M, K] and float32 scales [M, 1], of which the product is the matrix again. A row of zeros stays
        one; a row with a NaN or an infinity has a scale that is not finite.
    """
    values = matrix.float()
    # The smallest normal number keeps the scale of a row of zeros from being 0, and that of tiny rows as well.
    scale = (values.abs().amax(dim=1, keepdim=True) / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    return (values / scale).to(torch.float8_e4m3fn), scale


def _check_device(device: torch.device) -> None:
    """Checks that a device multiplies 8-bit floats.

    Raises:
        ConfigurationError: it does not.
    """
    if device.type != "cuda":
        return
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 9):
        raise ConfigurationError(
            f"8-bit floats need CUDA compute capability 8.9 or newer, and {device} has {major}.{minor}: "
            "score in bfloat16"
        )
