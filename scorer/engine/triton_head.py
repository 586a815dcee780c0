"""NLL of tokens from a language model's last hidden states, without its logits: one Triton kernel of our own.

What it computes, for hidden states h, the head's rows W and biases b, and targets t:

    nll[n] = log Σ_v exp(h[n]·W[v] + b[v]) - (h[n]·W[t_n] + b[t_n])

A matrix product, and nothing of it is kept but three numbers per row and part of the vocabulary: see
`scorer.engine.triton_kernels`. For V = 50,265 the logits of 32,768 tokens would be 3.3 GB in bfloat16.

What was tried: values and NaN handling under Triton's interpreter, which is numpy, in float32 and float16, with
pointers and with descriptors; compilation with triton 3.6.0 and 3.7.1 for compute capabilities 8.0 to 12.0, to tensor
cores, and with the default tiles without a spilled register. What was not: a run on a GPU, and so bfloat16 and speed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scorer.errors import ConfigurationError

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_DESCRIPTOR_ALIGNMENT = 16
"""Bytes. What a tensor memory accelerator asks of a matrix's address and of its rows' distance."""


@dataclass(frozen=True)
class Tiles:
    """How the product is cut up. Which one is used changes the speed, and the last bits of the results."""

    rows: int
    """Rows of a program; a power of two of 16 or more, as are the next two."""
    tokens: int
    """Ids of the vocabulary at a time."""
    width: int
    """Columns of the hidden states at a time."""
    warps: int
    stages: int
    """Tiles of the width that are on their way at a time; each takes (rows + tokens) x width of shared memory."""
    splits: int = 16
    """Parts of the vocabulary, so that a few rows fill a GPU. Fixed, so that a row's bytes do not depend on N."""
    descriptors: bool = False
    """Whether the tensor memory accelerator of compute capability 9.0 and newer loads the tiles."""
    flatten: bool = False
    """Whether the loop over the vocabulary loads ahead across its tiles. More registers; see `TILES`."""


TILES = {
    "pointers-64x64": Tiles(64, 64, 32, warps=4, stages=2),
    "pointers-128x128": Tiles(128, 128, 64, warps=8, stages=3),
    "pointers-128x256": Tiles(128, 256, 64, warps=8, stages=3),
    "tma-128x128": Tiles(128, 128, 64, warps=8, stages=3, descriptors=True),
    "tma-128x256": Tiles(128, 256, 64, warps=8, stages=4, descriptors=True),
    "tma-256x128": Tiles(256, 128, 64, warps=8, stages=4, descriptors=True),
    "tma-128x256-flat": Tiles(128, 256, 64, warps=8, stages=4, descriptors=True, flatten=True),
    "tma-256x128-flat": Tiles(256, 128, 64, warps=8, stages=4, descriptors=True, flatten=True),
}
"""Named for a benchmark to try; `default_tiles` chooses without one.

On Hopper 128 x 256 asks the least of the L2 cache, and 128 x 128 is small enough for two programs per multiprocessor,
one of which computes exponentials while the other multiplies. `-flat` loads across the tiles of the vocabulary, but
leans on the compiler more: in Triton's own form of that loop the accumulators are reset before their product is waited
for, and only a later pass moves the reset behind the wait (as it does in the machine code of 3.6.0 and 3.7.1). Warp
specialization is left out: both ignore it for Hopper.
"""


def default_tiles(weight: Tensor) -> Tiles:
    """The tiles for a head: a function of dtype, width and GPU, and of no measurement, so that bytes are repeatable."""
    if weight.dtype == torch.float32:
        return TILES["pointers-64x64"]
    is_hopper = weight.is_cuda and torch.cuda.get_device_capability(weight.device)[0] == 9
    return TILES["tma-128x256" if is_hopper and _takes_descriptors(weight) else "pointers-128x128"]


class TritonHead:
    """An output layer that gives the NLL of targets instead of logits."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, tiles: Tiles | None = None):
        """Takes the layer's parameters as they are; nothing is copied where they are contiguous.

        Args:
            weight: bfloat16, float16 or float32 [V, D], on a device that Triton runs on: CUDA of compute capability
                8.0 or newer, or any under TRITON_INTERPRET=1 (which multiplies bfloat16 wrongly).
            bias: [V], same dtype and device.
            tiles: default `default_tiles(weight)`.

        Raises:
            ConfigurationError: Triton is not there, the weight is where it cannot run or of another dtype, or the
                tiles need descriptors and the weight's rows are not aligned for them.
        """
        _check_device(weight.device)
        if weight.dtype not in _DTYPES:
            raise ConfigurationError(f"the Triton head takes bfloat16, float16 and float32, and not {weight.dtype}")
        self._weight = weight.detach().contiguous()
        self._bias = None if bias is None else bias.detach().contiguous()
        self.tiles = default_tiles(self._weight) if tiles is None else tiles
        if self.tiles.descriptors and not _takes_descriptors(self._weight):
            raise ConfigurationError(
                f"tiles with descriptors need rows of a multiple of {_DESCRIPTOR_ALIGNMENT} bytes at an address that "
                f"is one too, and the weight is {list(weight.shape)} {weight.dtype}: choose tiles without"
            )

    @torch.no_grad()
    def __call__(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """NLL of a target in each row.

        The same bytes in every run, and for a row whatever the other rows are.

        Args:
            hidden: [N, D], in the weight's dtype and on its device.
            targets: int64 [N], on the same device.

        Returns:
            Float32 [N] in nats, on the same device. Not finite where the logits are NaN or +inf, or the target's own
            is -inf; NaN where the target is not in [0, V).

        Raises:
            ValueError: shapes, dtypes or devices do not match the weight's.
        """
        self._check(hidden, targets)
        hidden = hidden.contiguous()
        if self.tiles.descriptors and not _takes_descriptors(hidden):
            hidden = hidden.clone()  # a view that starts inside another tensor
        partial = hidden.new_empty((3, self.tiles.splits, len(hidden)), dtype=torch.float32)
        if len(hidden):
            self._launch(hidden, targets.contiguous(), partial)
        nll = _combine(*partial)
        return nll.where((targets >= 0) & (targets < len(self._weight)), torch.nan)

    def _check(self, hidden: Tensor, targets: Tensor) -> None:
        weight = self._weight
        if hidden.ndim != 2 or hidden.shape[1] != weight.shape[1] or targets.shape != hidden.shape[:1]:
            raise ValueError(f"hidden {list(hidden.shape)}, targets {list(targets.shape)}, head {list(weight.shape)}")
        if (hidden.dtype, targets.dtype) != (weight.dtype, torch.int64):
            raise ValueError(f"hidden {hidden.dtype} and targets {targets.dtype}, head {weight.dtype}")
        if not hidden.device == targets.device == weight.device:
            raise ValueError(f"hidden on {hidden.device}, targets on {targets.device}, head on {weight.device}")

    def _launch(self, hidden: Tensor, targets: Tensor, partial: Tensor) -> None:
        """Runs the kernel. `partial` is float32 [3, splits, N], written."""
        from scorer.engine import triton_kernels  # noqa: PLC0415 - which imports Triton

        tiles, weight = self.tiles, self._weight
        row_tiles = math.ceil(len(hidden) / tiles.rows)
        with torch.cuda.device_of(weight):  # Triton launches on the current device
            triton_kernels.partial_nll[(row_tiles * tiles.splits,)](
                _operand(hidden, tiles.rows, tiles),
                _operand(weight, tiles.tokens, tiles),
                weight if self._bias is None else self._bias,
                targets,
                *partial,
                rows=len(hidden),
                vocabulary=len(weight),
                row_tiles=row_tiles,
                width=weight.shape[1],
                splits=tiles.splits,
                has_bias=self._bias is not None,
                uses_descriptors=tiles.descriptors,
                flatten=tiles.flatten,
                precision="ieee",
                tile_rows=tiles.rows,
                tile_tokens=tiles.tokens,
                tile_width=tiles.width,
                num_warps=tiles.warps,
                num_stages=tiles.stages,
            )


def _combine(references: Tensor, totals: Tensor, picks: Tensor) -> Tensor:
    """NLL from the parts of each split.

    In float64, of which there is little: where the target has nearly all probability, the logarithm of the sum and
    the target's logit cancel.

    Args:
        references: float32 [splits, N], exponents of 2.
        totals: float32 [splits, N], in units of 2^reference.
        picks: float32 [splits, N], the target's logit in one split and 0 in the others.

    Returns:
        Float32 [N] in nats.
    """
    largest = references.amax(0).double()
    total = (totals.double() * torch.exp2(references.double() - largest)).sum(0)
    return ((total.log2() + largest) * math.log(2) - picks.double().sum(0)).float()


def _operand(matrix: Tensor, rows: int, tiles: Tiles) -> Any:
    """A matrix as the kernel takes it: itself, or a descriptor with blocks of [rows, tiles.width]."""
    if not tiles.descriptors:
        return matrix
    from triton.tools.tensor_descriptor import TensorDescriptor  # type: ignore[import-untyped]  # noqa: PLC0415

    return TensorDescriptor.from_tensor(matrix, [rows, tiles.width])


def _takes_descriptors(matrix: Tensor) -> bool:
    row_bytes = matrix.shape[1] * matrix.element_size()
    return row_bytes % _DESCRIPTOR_ALIGNMENT == 0 and matrix.data_ptr() % _DESCRIPTOR_ALIGNMENT == 0


def _import_triton() -> Any:
    """Triton, where it is.

    Raises:
        ConfigurationError: it is not.
    """
    try:
        import triton  # type: ignore[import-untyped]  # noqa: PLC0415 - not everywhere, and slow to import
    except ImportError as error:
        raise ConfigurationError(
            f"the fused head needs Triton, which cannot be imported ({error}): install a CUDA build of torch, "
            "which comes with it, or score without the fused head"
        ) from error
    return triton


def _check_device(device: torch.device) -> None:
    """Checks that Triton runs where the model is.

    Raises:
        ConfigurationError: it does not.
    """
    if _import_triton().knobs.runtime.interpret:
        return
    if device.type != "cuda":
        raise ConfigurationError(
            f"the fused head runs on CUDA devices, and the model is on {device.type!r}: move it to one, "
            "or score without the fused head"
        )
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise ConfigurationError(
            f"the fused head needs CUDA compute capability 8.0 or newer, and {device} has {major}.{minor}: "
            "score without it"
        )
