"""Masked-LM training, and evaluation on fixed masks.

The loss on each alpha's own masks measures the masks as much as the model. So every model is also held to one fixed
uniform mask, and to the masks of pure hardness. Evaluation masks come from seed 0 and epoch 0, whatever the run's
seed: they are the same for all runs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import EvalPrediction

from scorer.shards import BLOCK_LENGTH
from scorer.vocabulary import Vocabulary
from trainer.head import on_masked_positions
from trainer.masking import IGNORED_LABEL, HardnessCollator, Masking
from trainer.stream_trainer import StreamTrainer

EVALUATION_SEED = 0


class MaskedLmTrainer(StreamTrainer):
    """Trains at masked positions only, and evaluates the same blocks under several masks."""

    def __init__(self, collator: HardnessCollator, vocabulary: Vocabulary, **settings: Any):
        """Takes Trainer's settings.

        Args:
            collator: makes the run's batches; the run's own evaluation has its masking, and its alpha of the moment.
            vocabulary: of the shards.
            **settings: StreamTrainer's.
        """
        self.data_collator: Any
        settings["model"] = on_masked_positions(settings["model"])
        super().__init__(
            data_collator=collator,
            compute_metrics=_metrics,
            preprocess_logits_for_metrics=nll_and_correctness,
            **settings,
        )
        # The loss is divided by the labels of the whole global batch, over its micro-batches and processes.
        self.model_accepts_loss_kwargs = True
        self._vocabulary = vocabulary
        self._schedule = collator.schedule
        self._masking = collator.masking

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluates under uniform masks, those of hardness alone (alpha = 0), and the run's own.

        Returns:
            For NAME of `uniform`, `hardness` and `own` `eval_NAME_loss` (nats a masked token), `eval_NAME_perplexity`
            (its exp), `eval_NAME_accuracy` and `eval_NAME_mask_rate` (masked tokens over all positions of the blocks);
            `eval_mask_rate` is the run's own.
        """
        own_alpha = self._schedule.at(max(self.state.global_step - 1, 0))
        masks = {
            "uniform": (Masking("random"), math.inf),
            "hardness": (Masking(), 0.0),
            "own": (self._masking, own_alpha),
        }
        training_collator = self.data_collator
        metrics: dict[str, float] = {}
        try:
            for name, (masking, alpha) in masks.items():
                self.data_collator = HardnessCollator(self._vocabulary, alpha, EVALUATION_SEED, masking, True)
                self._eval_dataloaders: dict[str, Any] = {}  # kept with persistent workers, with the collator they had
                metrics |= super().evaluate(eval_dataset, ignore_keys, f"{metric_key_prefix}_{name}")
            if own_rate := metrics.get(f"{metric_key_prefix}_own_mask_rate"):
                metrics[f"{metric_key_prefix}_mask_rate"] = own_rate
        finally:
            self.data_collator = training_collator
        return metrics

    def evaluation_loop(self, *arguments: Any, **settings: Any) -> Any:
        """Trainer's, with the loss over all masked tokens; Trainer's own is a mean over batches."""
        output = super().evaluation_loop(*arguments, **settings)
        for name in [name for name in output.metrics if name.endswith("_nll")]:
            output.metrics[f"{name.removesuffix('_nll')}_loss"] = output.metrics.pop(name)
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs, with alpha where it changes."""
        if "loss" in logs and self._schedule.end is not None:
            logs["alpha"] = self._schedule.at(max(self.state.global_step - 1, 0))
        super().log(logs, start_time)


def nll_and_correctness(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """Float32 [B, M, 2]: the NLL in nats of each label [B, M], and 1 where it was the most likely token.

    Takes the place of [B, M, vocabulary] logits before Trainer gathers them over the evaluation set.
    """
    logits = (logits[0] if isinstance(logits, tuple) else logits).float()
    nll = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    return torch.stack([nll, (logits.argmax(-1) == labels).float()], dim=-1)


def _metrics(prediction: EvalPrediction) -> dict[str, float]:
    is_masked = prediction.label_ids != IGNORED_LABEL
    nll, accuracy = prediction.predictions[is_masked].astype(float).mean(axis=0)
    return {
        "nll": float(nll),
        "perplexity": math.exp(nll),
        "accuracy": float(accuracy),
        "mask_rate": float(is_masked.sum() / (len(is_masked) * BLOCK_LENGTH)),
    }
