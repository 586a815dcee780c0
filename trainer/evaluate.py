"""`python -m trainer.evaluate`: one masked LM on held-out blocks, under the masks of several alphas."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import AutoModelForMaskedLM

from scorer.console import run_command
from trainer import runs
from trainer.evaluation import MaskedLmTrainer
from trainer.masking import check_alpha
from trainer.models import ModelArguments, build_model
from trainer.reader import open_corpus
from trainer.runs import RecipeArguments


@dataclass
class EvaluationArguments:
    """What to evaluate on."""

    shards: list[str] = field(default_factory=list, metadata={"help": "folders of hardness shards that it trained on"})
    validation_shards: list[str] | None = field(
        default=None, metadata={"help": "folders to evaluate on; default: the last blocks of each of --shards"}
    )
    alphas: list[float] = field(
        default_factory=lambda: [float("inf"), 0.0], metadata={"help": "masks to evaluate under, one after the other"}
    )

    def __post_init__(self) -> None:
        """Checks the alphas."""
        for alpha in self.alphas:
            check_alpha(alpha)


def main(arguments: Sequence[str]) -> int:
    """Runs the command; prints the metrics as JSON."""
    data, model_arguments, recipe = runs.parse(
        arguments, "trainer.evaluate", EvaluationArguments, ModelArguments, RecipeArguments
    )
    corpus, _, held_out = open_corpus(data.shards, data.validation_shards, perplexities=True)
    tokenizer = runs.load_corpus_tokenizer(corpus, model_arguments.tokenizer_name)
    trainer = MaskedLmTrainer(
        evaluations={f"alpha_{alpha:g}": alpha for alpha in data.alphas},
        vocabulary=corpus.vocabulary,
        model=build_model(AutoModelForMaskedLM, model_arguments, corpus.vocabulary, tokenizer, {}),
        args=recipe,
        eval_dataset=held_out,
    )
    metrics = trainer.evaluate()
    trainer.save_metrics("eval", metrics, combined=False)
    print(json.dumps(metrics, indent=2, sort_keys=True))
    return 0


if __name__ == "__main__":
    run_command(main)
