"""`python -m trainer.pretrain`: hardness shards to a masked LM, with masks drawn from Eq. (4) at load time."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import AutoModelForMaskedLM

from scorer.console import run_command
from trainer import runs
from trainer.evaluation import MaskedLmTrainer
from trainer.masking import HardnessCollator, check_alpha
from trainer.models import ModelArguments, build_model
from trainer.reader import open_corpus
from trainer.runs import RecipeArguments

logger = logging.getLogger(__name__)


@dataclass
class ShardArguments:
    """What to train on, and how to mask it."""

    shards: list[str] = field(metadata={"help": "folders of hardness shards"})
    validation_shards: list[str] | None = field(
        default=None, metadata={"help": "folders to evaluate on; default: the last blocks of each of --shards"}
    )
    alpha: float = field(
        default=0.001, metadata={"help": "Eq. (4): 0 masks by hardness alone, inf uniformly; the paper uses 0.001"}
    )

    def __post_init__(self) -> None:
        """Checks alpha."""
        check_alpha(self.alpha)


@dataclass
class MlmRecipe(RecipeArguments):
    """The paper's recipe for further pretraining: 6 epochs, 10 % warm-up, lr 1e-6, batch 2,560, Adam."""

    num_train_epochs: float = field(default=6.0, metadata={"help": "times that the blocks are read"})
    learning_rate: float = field(default=1e-6, metadata={"help": "peak, after warm-up"})


def main(arguments: Sequence[str]) -> int:
    """Runs the command."""
    data, model_arguments, recipe = runs.parse(arguments, "trainer.pretrain", ShardArguments, ModelArguments, MlmRecipe)
    corpus, groups, held_out = open_corpus(data.shards, data.validation_shards, perplexities=True)
    collator = HardnessCollator(corpus.vocabulary, data.alpha, recipe.seed)
    tokenizer = runs.load_corpus_tokenizer(corpus, model_arguments.tokenizer_name)
    stream = runs.plan_stream(recipe, corpus, groups)
    logger.info("alpha = %s: %d steps of %d blocks", data.alpha, recipe.max_steps, recipe.global_batch_size)
    runs.seed_everything(recipe)
    model = build_model(AutoModelForMaskedLM, model_arguments, corpus.vocabulary, tokenizer, {})
    trainer = MaskedLmTrainer(
        evaluations={"uniform": math.inf, "hardness": 0.0, "own": data.alpha},
        vocabulary=corpus.vocabulary,
        model=model,
        args=recipe,
        train_dataset=stream,
        eval_dataset=held_out,
        data_collator=collator,
        processing_class=tokenizer,
    )
    results = runs.train(trainer, runs.identify(corpus, groups, recipe, model, alpha=str(data.alpha)))
    logger.info(
        "held-out blocks: loss %.4f on the fixed uniform mask, %.4f on masks of alpha = %s (accuracy %.1f %%)",
        results["eval_uniform_loss"],
        results["eval_own_loss"],
        data.alpha,
        100 * results["eval_own_accuracy"],
    )
    return 0


if __name__ == "__main__":
    run_command(main)
