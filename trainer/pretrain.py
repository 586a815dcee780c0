"""`python -m trainer.pretrain`: hardness shards to a masked LM, with masks drawn from Eq. (4) at load time."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import AutoModelForMaskedLM

from scorer.console import run_command
from trainer import runs
from trainer.evaluation import MaskedLmTrainer
from trainer.masking import HardnessCollator, MaskingVocabulary
from trainer.masking.arguments import MaskingArguments
from trainer.models import ModelArguments, build_model
from trainer.reader import open_corpus
from trainer.runs import RecipeArguments

logger = logging.getLogger(__name__)


@dataclass
class ShardArguments:
    """What to train on."""

    shards: list[str] = field(metadata={"help": "folders of hardness shards"})
    validation_shards: list[str] | None = field(
        default=None, metadata={"help": "folders to evaluate on; default: the last blocks of each of --shards"}
    )


@dataclass
class MlmRecipe(RecipeArguments):
    """The paper's recipe for further pretraining: 6 epochs, 10 % warm-up, lr 1e-6, batch 2,560, Adam."""

    num_train_epochs: float = field(default=6.0, metadata={"help": "times that the blocks are read"})
    learning_rate: float = field(default=1e-6, metadata={"help": "peak, after warm-up"})


ARGUMENTS = (ShardArguments, MaskingArguments, ModelArguments, MlmRecipe)


def parse(arguments: Sequence[str]) -> tuple[ShardArguments, MaskingArguments, ModelArguments, MlmRecipe]:
    """Parses the command's flags.

    Raises:
        ConfigurationError: a value is refused. An unknown flag ends with the usage.
    """
    data, masks, model, recipe = runs.parse(arguments, "trainer.pretrain", *ARGUMENTS)
    return data, masks, model, recipe


def main(arguments: Sequence[str]) -> int:
    """Runs the command."""
    data, masks, model_arguments, recipe = parse(arguments)
    corpus, groups, held_out = open_corpus(data.shards, data.validation_shards, perplexities=True)
    MaskingVocabulary.of(corpus.vocabulary)  # refuses a corpus without a mask token before anything is loaded
    tokenizer = runs.load_corpus_tokenizer(corpus, model_arguments.tokenizer_name)
    stream = runs.plan_stream(recipe, corpus, groups)
    schedule, masking = masks.schedule(recipe.max_steps), masks.masking(tokenizer)
    collator = HardnessCollator(corpus.vocabulary, schedule, recipe.seed, masking, at_positions=True)
    logger.info("%s: %d steps of %d blocks", masks.title(), recipe.max_steps, recipe.global_batch_size)
    runs.seed_everything(recipe)
    model = build_model(AutoModelForMaskedLM, model_arguments, corpus.vocabulary, tokenizer, {})
    run = runs.identify(corpus, groups, recipe, model, **masks.identity())
    trainer = MaskedLmTrainer(
        collator,
        corpus.vocabulary,
        model=model,
        args=recipe,
        stream=stream,
        eval_dataset=held_out,
        processing_class=tokenizer,
    )
    results = runs.train(trainer, run)
    logger.info(
        "held-out blocks: loss %.4f on the fixed uniform mask, %.4f on masks of the run's own (accuracy %.1f %%)",
        results["eval_uniform_loss"],
        results["eval_own_loss"],
        100 * results["eval_own_accuracy"],
    )
    return 0


if __name__ == "__main__":
    run_command(runs.leaving_the_group(main))
