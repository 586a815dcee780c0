"""Per-token NLL of both directions of an ALM: the usual loops over a causal LM, and the scorer's engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from math import sqrt

import torch
from torch import Tensor
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from scorer.alm import BidirectionalALM
from scorer.engine import Engine, Settings
from scorer.engine.heads import HEADS
from scorer.scoring import score_nll

OURS = "ours"
LOGIT_SPREAD = 3.0
"""Standard deviation of the logits; with torch's random weights it would be 0.45, and every token equally likely."""
HEAD_WIDTH = 64
FIRST_ORDINARY_ID = 4

Nll = tuple[Tensor, Tensor]
"""Forward and backward, float32 [B, T] in nats, in the block's own order; NaN where there is no context."""
Score = Callable[[Tensor], Nll]
Direction = Callable[[Tensor], Tensor]
"""Ids [B, T] in reading order to NLL [B, T]."""


@dataclass(frozen=True)
class Shape:
    """A GPT-2, and the blocks that it reads; the paper's ALM by default."""

    layers: int = 6
    width: int = 512
    heads: int = 8
    vocabulary: int = 50265
    block_length: int = 512

    def body_flops(self) -> float:
        """Of one token in the layers' matrix products: 12 weights a layer and squared width, 2 FLOPs each."""
        return 24.0 * self.layers * self.width**2

    def attention_flops(self) -> float:
        """Of one token, averaged over a block: it sees half of the block, in two products."""
        return 2.0 * self.layers * self.block_length * self.width

    def head_flops(self) -> float:
        """Of one token's logits."""
        return 2.0 * self.width * self.vocabulary

    def flops(self) -> float:
        """Of one token and direction."""
        return self.body_flops() + self.attention_flops() + self.head_flops()

    def config(self) -> GPT2Config:
        """Output embeddings of their own: random tied ones would be sure that the token just read comes again."""
        return GPT2Config(
            vocab_size=self.vocabulary,
            n_positions=self.block_length,
            n_embd=self.width,
            n_layer=self.layers,
            n_head=self.heads,
            bos_token_id=0,
            eos_token_id=2,
            tie_word_embeddings=False,
        )


@dataclass(frozen=True)
class Case:
    """A model, and where and how it computes."""

    shape: Shape
    device: torch.device
    dtype: torch.dtype

    @property
    def is_gpu(self) -> bool:
        """Whether a GPU does the work."""
        return self.device.type == "cuda"


TINY = Shape(layers=2, width=64, heads=2, vocabulary=2000, block_length=64)
"""For trying the benchmark itself."""


def build_model(shape: Shape, seed: int) -> PreTrainedModel:
    """Random weights, float32 on the CPU; the head's such that logits have LOGIT_SPREAD."""
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(shape.config())
    with torch.no_grad():  # the last layer norm gives rows of length sqrt(width)
        model.lm_head.weight.normal_(0.0, LOGIT_SPREAD / sqrt(shape.width))
    return model.eval().requires_grad_(False)


def build_alm(case: Case) -> BidirectionalALM:
    """The same weights for every device and dtype."""
    models = (build_model(case.shape, seed) for seed in (1, 2))
    return BidirectionalALM(*models).to(case.device, case.dtype)


def make_blocks(case: Case, blocks: int) -> Tensor:
    """Random ordinary ids, int64 [B, T]."""
    shape = case.shape
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(FIRST_ORDINARY_ID, shape.vocabulary, (blocks, shape.block_length), generator=generator)
    return ids.to(case.device)


# --- The usual loops


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Float32 NLL [B, T] of logits [B, T, V], as Hugging Face's own loss has it, not reduced."""
    rows = logits.flatten(0, 1).float()
    return functional.cross_entropy(rows, targets.flatten(), reduction="none").view_as(targets)


def log_softmax(logits: Tensor, targets: Tensor) -> Tensor:
    """Float32 NLL [B, T] of logits [B, T, V], as evaluation harnesses have it."""
    return -functional.log_softmax(logits, dim=-1, dtype=torch.float32).gather(2, targets[..., None]).squeeze(2)


def usual_nll(model: PreTrainedModel, loss: Callable[[Tensor, Tensor], Tensor], ids: Tensor) -> Tensor:
    """NLL [B, T] of one direction from all logits at once.

    The last position's logits are computed in vain: to leave them out would copy all the others.
    """
    logits = model(input_ids=ids, use_cache=False).logits
    nll = loss(logits, functional.pad(ids[:, 1:], (0, 1)))
    return functional.pad(nll[:, :-1].float(), (1, 0), value=torch.nan)


@dataclass(frozen=True)
class Usual:
    """A usual loop."""

    loss: Callable[[Tensor, Tensor], Tensor]
    is_compiled: bool = False

    def direction(self, model: PreTrainedModel, compile_mode: str) -> Direction:
        """One direction; what is compiled is compiled at the first call, for its shape alone."""

        def score(ids: Tensor) -> Tensor:
            return usual_nll(model, self.loss, ids)

        return torch.compile(score, dynamic=False, mode=compile_mode) if self.is_compiled else score


USUAL = {
    "usual, cross_entropy": Usual(cross_entropy),
    "usual, log_softmax": Usual(log_softmax),
    "usual, cross_entropy, compiled": Usual(cross_entropy, is_compiled=True),
    "usual, log_softmax, compiled": Usual(log_softmax, is_compiled=True),
}


PLAIN_USUAL = "usual, log_softmax"
"""The one that is asked where one is enough."""


@torch.inference_mode()
def in_both_directions(forward: Direction, backward: Direction, ids: Tensor) -> Nll:
    """The backward model reads each block reversed, and its scores are flipped back."""
    return forward(ids), backward(ids.flip(1)).flip(1)


def make_side(name: str, alm: BidirectionalALM, compile_mode: str = "default") -> Score:
    """One of the sides by its name: OURS or one of USUAL."""
    if name == OURS:
        return partial(score_nll, alm)
    directions = [USUAL[name].direction(model, compile_mode) for model in (alm.left_to_right, alm.right_to_left)]
    return partial(in_both_directions, *directions)


# --- Variants of the engine


@torch.inference_mode()
def on_two_streams(forward: Direction, backward: Direction, streams: Sequence[torch.cuda.Stream], ids: Tensor) -> Nll:
    """Each direction on a stream of its own, so that one fills what the other leaves idle."""
    here = torch.cuda.current_stream()
    results = []
    for direction, stream, flips in zip((forward, backward), streams, (False, True), strict=True):
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            nll = direction(ids.flip(1)).flip(1) if flips else direction(ids)
        nll.record_stream(here)
        results.append(nll)
    for stream in streams:
        here.wait_stream(stream)
    return results[0], results[1]


def make_engines(alm: BidirectionalALM, settings: Settings) -> list[Engine]:
    """One a direction, left to right first."""
    return [Engine(model, settings) for model in (alm.left_to_right, alm.right_to_left)]


def with_head(engine: Engine, model: PreTrainedModel, head: str) -> Engine:
    """The same engine with another head: its body is prepared, and compiled if so, but once."""
    other = copy(engine)
    projection = model.get_output_embeddings()
    other.head = HEADS[head](projection.weight, projection.bias)
    other.settings = replace(engine.settings, head=head)
    return other


def make_variant(alm: BidirectionalALM, engines: Sequence[Engine], head: str, has_two_streams: bool = False) -> Score:
    """Engines of both directions with a head, without score_nll's look at the result."""
    models = (alm.left_to_right, alm.right_to_left)
    directions = [with_head(engine, model, head) for engine, model in zip(engines, models, strict=True)]
    if has_two_streams:
        return partial(on_two_streams, *directions, [torch.cuda.Stream() for _ in directions])
    return partial(in_both_directions, *directions)


def usable_heads(case: Case) -> list[str]:
    """Those of the engine's heads that this device can do."""
    weight = torch.zeros(256, case.shape.width, device=case.device, dtype=case.dtype)
    usable = []
    for name, make in HEADS.items():
        with suppress(Exception):  # the part on heads names it; nothing else is to fail for it
            make(weight, None)
            usable.append(name)
    return usable
