"""How torch compiles here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch._inductor.config
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Tensor])


def compiled(function: Function) -> Function:
    """Compiles for each shape that comes.

    No kernel is chosen by timing, which would change the bytes of shards by chance.
    """
    options: dict[str, str | int | bool | Callable[..., Any]] = {}
    if hasattr(torch._inductor.config, "deterministic"):
        options["deterministic"] = True
    return cast("Function", torch.compile(function, dynamic=False, options=options))
