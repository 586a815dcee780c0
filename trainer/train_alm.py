"""`python -m trainer.train_alm`: block shards to a bidirectional auto-regressive LM."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, EvalPrediction, PreTrainedTokenizerBase

from scorer import files
from scorer.alm import READING_DIRECTION, Direction, require_causal
from scorer.console import run_command
from scorer.vocabulary import Vocabulary
from trainer import runs
from trainer.batches import Batch, Feature
from trainer.evaluation import nll_and_correctness
from trainer.masking import IGNORED_LABEL
from trainer.models import ModelArguments, build_model
from trainer.reader import HeldOutBlocks, RowGroup, ShardCorpus, open_corpus
from trainer.runs import RecipeArguments
from trainer.stream_trainer import StreamTrainer

logger = logging.getLogger(__name__)

DEFAULT_MODEL_TYPE = "gpt2"
PAPER_ALM = {"n_layer": 6, "n_embd": 512, "n_head": 8, "n_positions": 512}
"""Each direction; GPT-2's dropout is 0.1 by default, as the paper's."""


@dataclass
class AlmArguments:
    """What is an ALM's own."""

    blocks: list[str] = field(metadata={"help": "folders of block shards (or hardness shards)"})
    validation_blocks: list[str] | None = field(
        default=None, metadata={"help": "folders to evaluate on; default: the last blocks of each of --blocks"}
    )
    direction: Literal["forward", "backward", "both"] = field(
        default="both", metadata={"help": "which direction to train"}
    )


@dataclass
class AlmRecipe(RecipeArguments):
    """The paper's recipe for the ALM: 2 epochs, lr 5e-4, batch 2,560, Adam. Warm-up is ours; the paper names none."""

    num_train_epochs: float = field(default=2.0, metadata={"help": "times that the blocks are read"})
    learning_rate: float = field(default=5e-4, metadata={"help": "peak, after warm-up"})


class CausalCollator:
    """Batches for one direction: the backward model reads each block reversed.

    Every token is learned, separators too; evaluation counts ordinary tokens only, since the frame's end is trivial.
    """

    def __init__(self, direction: Direction):
        """Fixes the direction."""
        self._reverse = direction == "backward"

    def __call__(self, features: Sequence[Feature]) -> dict[str, Tensor]:
        """`input_ids` and `labels`, int64 [B, T], in reading order; the model shifts the labels itself."""
        batch = features if isinstance(features, Batch) else Batch.of(features)
        ids = torch.from_numpy(batch.input_ids.astype(np.int64))
        if self._reverse:
            ids = ids.flip(1)
        return {"input_ids": ids, "labels": ids.clone()}


class AlmTrainer(StreamTrainer):
    """Trainer that evaluates by token: exp of the mean NLL, and next-token accuracy, over ordinary tokens."""

    def __init__(self, vocabulary: Vocabulary, **settings: Any):
        """Takes Trainer's settings, and the vocabulary that says which tokens are ordinary."""
        self._is_special = vocabulary.special_mask()
        super().__init__(compute_metrics=self._metrics, preprocess_logits_for_metrics=next_token_scores, **settings)

    def _metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        targets = prediction.label_ids[:, 1:]
        is_ordinary = (targets != IGNORED_LABEL) & ~self._is_special[np.maximum(targets, 0)]
        scores: npt.NDArray[np.float32] = prediction.predictions[is_ordinary]
        nll, accuracy = scores.astype(np.float64).mean(axis=0)
        return {"perplexity": math.exp(nll), "accuracy": float(accuracy)}


def next_token_scores(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """`nll_and_correctness` of each next token: float32 [B, T-1, 2]."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    return nll_and_correctness(logits[:, :-1], labels[:, 1:])


def main(arguments: Sequence[str]) -> int:
    """Runs the command."""
    alm, model, recipe = runs.parse(arguments, "trainer.train_alm", AlmArguments, ModelArguments, AlmRecipe)
    if not (model.model_name_or_path or model.config_name or model.model_type):
        model.model_type = DEFAULT_MODEL_TYPE
    corpus, groups, held_out = open_corpus(alm.blocks, alm.validation_blocks, perplexities=False)
    tokenizer = runs.load_corpus_tokenizer(corpus, model.tokenizer_name)
    if recipe.should_save:
        files.put_folder(recipe.output_url, tokenizer.save_pretrained)
    directions: list[Direction] = ["forward", "backward"] if alm.direction == "both" else [alm.direction]
    for direction in directions:
        train_direction(direction, model, recipe.below(direction), tokenizer, corpus, groups, held_out)
    return 0


def train_direction(  # noqa: PLR0917 - one call, and each argument is a thing of its own
    direction: Direction,
    model_arguments: ModelArguments,
    recipe: RecipeArguments,
    tokenizer: PreTrainedTokenizerBase,
    corpus: ShardCorpus,
    groups: list[RowGroup],
    held_out: HeldOutBlocks,
) -> None:
    """Trains and evaluates one direction into `recipe.output_dir`."""
    stream = runs.plan_stream(recipe, corpus, groups)
    logger.info("training the %s ALM: %d steps of %d blocks", direction, recipe.max_steps, recipe.global_batch_size)
    runs.seed_everything(recipe)
    model = build_model(
        AutoModelForCausalLM, model_arguments, corpus.vocabulary, tokenizer, _fresh_defaults(model_arguments)
    )
    require_causal(model, direction)
    model.config.reading_direction = READING_DIRECTION[direction]
    trainer = AlmTrainer(
        corpus.vocabulary,
        model=model,
        args=recipe,
        stream=stream,
        eval_dataset=held_out,
        data_collator=CausalCollator(direction),
    )
    results = runs.train(trainer, runs.identify(corpus, groups, recipe, model, direction=direction))
    logger.info(
        "%s ALM, held-out blocks: perplexity %.2f, next-token accuracy %.1f %%",
        direction,
        results["eval_perplexity"],
        100 * results["eval_accuracy"],
    )


def _fresh_defaults(arguments: ModelArguments) -> Mapping[str, Any]:
    return PAPER_ALM if arguments.model_type == DEFAULT_MODEL_TYPE else {}


if __name__ == "__main__":
    run_command(runs.leaving_the_group(main))
