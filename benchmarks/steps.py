"""Forward and backward of a RoBERTa, plain and with its head at masked positions only: models, batches, one step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel, RobertaConfig, RobertaForMaskedLM

from benchmarks.interleaved import Sample, timed
from trainer.head import on_masked_positions
from trainer.masking import IGNORED_LABEL, budget

BLOCK_LENGTH = 512
MASKED = budget(BLOCK_LENGTH)
FIRST_ORDINARY_ID = 4


@dataclass(frozen=True)
class Size:
    """A RoBERTa."""

    layers: int
    hidden: int
    heads: int
    vocabulary: int
    least_ratio: float
    """Plain over ours, in time on a CPU, must be so much."""
    aimed_mfu: float
    """On a GPU."""

    def config(self) -> RobertaConfig:
        """The paper's architecture, dropout 0.1."""
        return RobertaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=4 * self.hidden,
            max_position_embeddings=BLOCK_LENGTH + 2,
            type_vocab_size=1,
        )

    def flops(self) -> float:
        """Model FLOPs of one token, forward and backward, averaged over a block; see benchmarks.train_step."""
        encoder = self.layers * 12 * self.hidden**2
        head = (self.hidden**2 + self.hidden * self.vocabulary) * MASKED / BLOCK_LENGTH
        return 6 * (encoder + head) + 12 * self.layers * BLOCK_LENGTH * self.hidden


SIZES = {
    "tiny": Size(2, 64, 2, 2000, 1.0, 0.0),
    "base": Size(12, 768, 12, 50265, 1.3, 0.50),
    "large": Size(24, 1024, 16, 50265, 1.0, 0.55),
}


@dataclass(frozen=True)
class Variant:
    """A way to compute the same step."""

    at_positions: bool
    is_compiled: bool = False
    has_mask: bool = False
    """Whether it is given an attention mask of ones, as the peer's collator makes it."""


VARIANTS = {
    "plain": Variant(at_positions=False),
    "plain, mask of ones": Variant(at_positions=False, has_mask=True),
    "plain, compiled": Variant(at_positions=False, is_compiled=True),
    "ours": Variant(at_positions=True),
    "ours, compiled": Variant(at_positions=True, is_compiled=True),
}


@dataclass(frozen=True)
class Setting:
    """How steps are run."""

    device: torch.device
    is_bf16: bool
    compile_mode: str
    steps: int
    """Forward and backward passes a turn."""

    @property
    def is_gpu(self) -> bool:
        """Whether a GPU does the work."""
        return self.device.type == "cuda"

    def autocast(self) -> AbstractContextManager[Any]:
        """bf16 where it is wanted; weights stay float32."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.is_bf16 else nullcontext()

    def timed(self, function: Callable[[], object]) -> Sample:
        """Runs a function; on a GPU, seconds are between device events before and after."""
        return timed(function, self.device)


class Steps:
    """Forward and backward of one variant, over a few batches in turn."""

    def __init__(
        self, variant: Variant, model: PreTrainedModel, batches: Sequence[dict[str, Tensor]], setting: Setting
    ):
        """Prepares batches; what is compiled is compiled at the first step."""
        self._model = model
        self._function: Callable[..., Any] = model
        if variant.is_compiled:
            self._function = torch.compile(model, dynamic=False, mode=setting.compile_mode)
        self._batches = [as_taken(batch, variant) for batch in batches]
        self._setting = setting
        self._count = 0

    def step(self) -> Tensor:
        """The loss of the next batch, in nats; its gradients are added to what is there."""
        batch = self._batches[self._count % len(self._batches)]
        self._count += 1
        with self._setting.autocast():
            loss: Tensor = self._function(**batch).loss
        torch.autograd.backward(loss)
        return loss

    def turn(self) -> Sample:
        """A turn's steps, from no gradients on."""
        self._model.zero_grad(set_to_none=True)
        return self._setting.timed(lambda: [self.step() for _ in range(self._setting.steps)])

    def whole(self, optimizer: torch.optim.Optimizer, count: int) -> Sample:
        """A step of the optimizer with what comes before it: so many forward and backward passes."""

        def run() -> None:
            optimizer.zero_grad(set_to_none=True)
            for _ in range(count):
                self.step()
            step_optimizer(self._model, optimizer)

        return self._setting.timed(run)


def build(size: Size, device: torch.device, dtype: torch.dtype = torch.float32) -> dict[bool, PreTrainedModel]:
    """Plain (False) and ours (True), of the same weights."""
    torch.manual_seed(0)
    plain, ours = RobertaForMaskedLM(size.config()), RobertaForMaskedLM(size.config())
    ours.load_state_dict(plain.state_dict())
    models = {False: plain, True: on_masked_positions(ours)}
    return {at_positions: model.to(device, dtype).train() for at_positions, model in models.items()}


def make_batch(size: Size, blocks: int, device: torch.device, seed: int) -> dict[str, Tensor]:
    """Random ids [B, T], M positions [B, M] of each row, ascending, and the ids there."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(FIRST_ORDINARY_ID, size.vocabulary, (blocks, BLOCK_LENGTH), generator=generator)
    order = torch.rand(blocks, BLOCK_LENGTH, generator=generator).argsort(dim=1)
    positions = order[:, :MASKED].sort(dim=1).values
    batch = {"input_ids": ids, "masked_positions": positions, "labels": ids.gather(1, positions)}
    return {name: values.to(device) for name, values in batch.items()}


def as_taken(batch: dict[str, Tensor], variant: Variant) -> dict[str, Tensor]:
    """A batch in the form that a variant takes."""
    if variant.at_positions:
        taken = dict(batch)
    else:
        labels = torch.full_like(batch["input_ids"], IGNORED_LABEL)
        labels.scatter_(1, batch["masked_positions"], batch["labels"])
        taken = {"input_ids": batch["input_ids"], "labels": labels}
    return taken | ({"attention_mask": torch.ones_like(batch["input_ids"])} if variant.has_mask else {})


def count_flops(model: PreTrainedModel, batch: dict[str, Tensor]) -> float:
    """FLOPs of a token in the matrix products that a forward and backward does; attention's unfused, to be seen."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        torch.autograd.backward(model(**batch).loss)
    return float(counter.get_total_flops() / batch["input_ids"].numel())


def step_optimizer(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    """As Trainer has it, with its clipping; gradients stay for the next turn to drop."""
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
