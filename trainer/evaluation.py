"""Masked-LM evaluation on fixed masks.

The loss on each alpha's own masks measures the masks as much as the model. So every model is also held to one fixed
uniform mask, and to the masks of pure hardness. Evaluation masks come from seed 0 and epoch 0, whatever the run's
seed: they are the same for all runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import EvalPrediction, Trainer

from scorer.vocabulary import Vocabulary
from trainer.masking import IGNORED_LABEL, HardnessCollator

EVALUATION_SEED = 0


class MaskedLmTrainer(Trainer):
    """Trainer that evaluates the same blocks once for each of several alphas."""

    def __init__(self, evaluations: Mapping[str, float], vocabulary: Vocabulary, **settings: Any):
        """Takes Trainer's settings.

        Args:
            evaluations: alpha of each evaluation, by the name that goes into its metrics.
            vocabulary: of the shards.
            **settings: Trainer's own.
        """
        self.data_collator: Any
        super().__init__(compute_metrics=_metrics, preprocess_logits_for_metrics=_most_likely, **settings)
        # RoBERTa's forward takes any keyword, from which Trainer concludes that its loss is divided by the items of
        # the global batch. It is a mean over its own micro-batch, and has to be divided by the accumulation.
        self.model_accepts_loss_kwargs = False
        self._collators = {
            name: HardnessCollator(vocabulary, alpha, EVALUATION_SEED) for name, alpha in evaluations.items()
        }

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluates under each alpha's masks.

        Returns:
            For each name `eval_NAME_loss` (nats a masked token), `eval_NAME_accuracy` and `eval_NAME_mask_rate` (of
            all positions of a block); `eval_mask_rate` is that of the last name.
        """
        training_collator = self.data_collator
        metrics: dict[str, float] = {}
        try:
            for name, collator in self._collators.items():
                self.data_collator = collator
                self._eval_dataloaders: dict[str, Any] = {}  # kept with persistent workers, with the collator they had
                metrics |= super().evaluate(eval_dataset, ignore_keys, f"{metric_key_prefix}_{name}")
            if own_rate := metrics.get(f"{metric_key_prefix}_{name}_mask_rate"):
                metrics[f"{metric_key_prefix}_mask_rate"] = own_rate
        finally:
            self.data_collator = training_collator
        return metrics


def _most_likely(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """int64 [B, T] in place of [B, T, vocabulary] logits, before Trainer gathers them over the evaluation set."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def _metrics(prediction: EvalPrediction) -> dict[str, float]:
    is_masked = prediction.label_ids != IGNORED_LABEL
    is_right = prediction.predictions[is_masked] == prediction.label_ids[is_masked]
    return {"accuracy": float(is_right.mean()), "mask_rate": float(is_masked.mean())}
