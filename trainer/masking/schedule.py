"""Alpha over training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from scorer.errors import ConfigurationError
from trainer.masking.law import check_alpha

AlphaScheduleType = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class AlphaSchedule:
    """Alpha as a function of the global batch, counted from 0 over the whole run."""

    start: float
    end: float | None = None
    """At the last global batch; None for a constant."""
    steps: int = 1
    """Global batches of the run."""
    shape: AlphaScheduleType = "constant"

    def __post_init__(self) -> None:
        """Checks both ends.

        Raises:
            ConfigurationError: Eq. (4) is not defined for one, or there is no way from one to the other.
        """
        check_alpha(self.start)
        if self.shape not in get_args(AlphaScheduleType):
            raise ConfigurationError(
                f"--alpha_schedule {self.shape}: expected one of {', '.join(get_args(AlphaScheduleType))}"
            )
        if self.shape == "constant":
            if self.end is not None:
                raise ConfigurationError(f"--alpha_end {self.end} needs --alpha_schedule linear or cosine")
            return
        if self.end is None:
            raise ConfigurationError(f"--alpha_schedule {self.shape} needs --alpha_end, alpha at the end of the run")
        if math.isinf(self.start) or math.isinf(check_alpha(self.end)):
            raise ConfigurationError(
                f"alpha from {self.start} to {self.end}: there is no way to or from inf; "
                "0.1 is as good as uniform (98 % of it for blocks of 512)"
            )

    def at(self, step: int) -> float:
        """Alpha of a global batch; the last one's for every step after it."""
        if self.end is None:
            return self.start
        share = min(step / max(self.steps - 1, 1), 1.0)
        if self.shape == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        return self.start + (self.end - self.start) * share
