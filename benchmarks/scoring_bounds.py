"""What the scorer promises of its speed, memory and precision, and whether it was kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Figures:
    """What bounds are about; None where it was not measured."""

    speedup: float | None
    """The best usual loop's time over ours."""
    mfu: float | None
    """Of ours."""
    memory_share: float | None
    """Our memory beyond the model, over the best usual loop's."""
    error_ratio: float | None
    """Our largest error, over the usual loop's."""
    head_speedup: float | None
    """The time of the fastest peer's head over our fastest's."""


@dataclass(frozen=True)
class Bound:
    """A figure against its limit."""

    part: str
    """Of the benchmark, which measures it."""
    what: str
    value: float | None
    limit: float
    is_least: bool = True
    """Whether the value must be at least the limit; else at most."""
    aim: float | None = None

    def is_kept(self) -> bool:
        """Whether it was measured and lies on the right side."""
        if self.value is None:
            return False
        return self.value >= self.limit if self.is_least else self.value <= self.limit

    def __str__(self) -> str:
        words = f"{self.what}: {'not measured' if self.value is None else f'{self.value:.3g}'}"
        words += f"; at {'least' if self.is_least else 'most'} {self.limit:g}: {'pass' if self.is_kept() else 'FAIL'}"
        if self.aim is not None and self.value is not None:
            words += f"; aim {self.aim:g}: {'reached' if self.value >= self.aim else 'not reached'}"
        return words


def bounds_for(device_type: str, dtype: str, figures: Figures) -> Sequence[Bound]:
    """Of float32 on a CPU and of bfloat16 on a GPU; of others nothing is promised."""
    if (device_type, dtype) == ("cpu", "float32"):
        usual = "the best usual loop's"
        return (
            Bound("sides", f"{usual} time over ours", figures.speedup, 1.5),
            Bound("sides", "ours, share of the best matrix product", figures.mfu, 0.75),
            Bound("memory", f"our memory beyond the model over {usual}", figures.memory_share, 0.1, is_least=False),
            Bound("precision", f"our largest error over {usual}", figures.error_ratio, 2.0, is_least=False),
        )
    if (device_type, dtype) == ("cuda", "bfloat16"):
        return (
            Bound("sides", "ours, share of the best matrix product", figures.mfu, 0.55, aim=0.70),
            Bound("sides", "the best compiled usual loop's time over ours", figures.speedup, 2.0),
            Bound("heads", "the time of Liger's and CCE's fastest head over ours", figures.head_speedup, 1.0),
        )
    return ()


def share(value: float | None, of: float | None) -> float | None:
    """One figure over another, where both are known."""
    return None if value is None or not of else value / of
