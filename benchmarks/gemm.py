"""The best matrix product of this machine, through every product that torch has: what MFU is a share of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from scorer.engine.cores import side_by_side

Multiply = Callable[[], object]


@dataclass(frozen=True)
class Gemm:
    """[m, k] times [k, n], through one of torch's functions."""

    product: str
    m: int
    n: int
    k: int
    cores: int = 0
    """Each of which computes such a product by itself; 0: one product for all."""

    @property
    def flops(self) -> float:
        """Of one call."""
        return 2.0 * self.m * self.n * self.k * max(1, self.cores)

    def __str__(self) -> str:
        return f"{self.product}, {self.m} x {self.n} x {self.k}{', one a core' if self.cores else ''}"


SHAPES = {
    "cpu": ((2048, 2048, 2048), (4096, 4096, 4096), (4096, 2048, 512), (512, 50264, 512)),
    "cuda": ((8192, 8192, 8192), (16384, 8192, 8192), (16384, 16384, 16384)),
}
"""m, n and k. On a CPU the last two are like the body's and the head's of one chunk."""
TINY = ((256, 256, 256),)


def candidates(device: torch.device, dtype: torch.dtype, is_tiny: bool = False) -> Iterator[tuple[Gemm, Multiply]]:
    """Every shape through every product, over random operands; the packed one is of CPUs only."""
    for m, n, k in TINY if is_tiny else SHAPES[device.type]:
        rows, weight = (torch.randn(shape, device=device, dtype=dtype) for shape in ((m, k), (n, k)))
        yield Gemm("torch.mm", m, n, k), _mm(rows, weight)
        yield Gemm("functional.linear", m, n, k), _linear(rows, weight)
        if device.type == "cpu":
            packed, cores = _packed(rows, weight), torch.get_num_threads()
            yield Gemm("oneDNN, packed", m, n, k), packed
            if cores > 1:
                yield Gemm("oneDNN, packed", m, n, k, cores), _on_all_cores(packed, cores)


def _mm(rows: Tensor, weight: Tensor) -> Multiply:
    right = weight.t().contiguous()
    out = rows.new_empty(len(rows), len(weight))
    return lambda: torch.mm(rows, right, out=out)


def _linear(rows: Tensor, weight: Tensor) -> Multiply:
    return torch.inference_mode()(lambda: functional.linear(rows, weight))


def _on_all_cores(multiply: Multiply, cores: int) -> Multiply:
    return lambda: side_by_side(lambda _: multiply(), range(cores))


def _packed(rows: Tensor, weight: Tensor) -> Multiply:
    """With the weights in the layout that oneDNN likes best for so many rows; packing is not timed."""
    with torch.inference_mode():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, len(rows))

    @torch.inference_mode()
    def multiply() -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(rows, packed, None, "none", [], "")

    return multiply
