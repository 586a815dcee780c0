"""The flags that say how a run masks: the trainer's, and replay's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from scorer import files
from scorer.errors import ConfigurationError
from trainer.masking.law import PERPLEXITY, check_alpha
from trainer.masking.ngrams import Ngrams
from trainer.masking.schedule import AlphaSchedule, AlphaScheduleType
from trainer.masking.strategies import STRATEGIES, Masking
from trainer.masking.words import Words

DEFAULT_ALPHA = 0.001


@dataclass
class MaskingArguments:
    """How positions are chosen."""

    masking_strategy: str = field(
        default="hardness", metadata={"help": "what is masked together, and how it is chosen", "choices": [*STRATEGIES]}
    )
    alpha: float | None = field(
        default=None,
        metadata={"help": "Eq. (4): 0 masks by hardness alone, inf uniformly; default 0.001, the paper's"},
    )
    relative_alpha: bool = field(
        default=False,
        metadata={"help": "alpha in shares of 1/n, n a block's eligible positions: the same for any block length"},
    )
    alpha_schedule: AlphaScheduleType = field(
        default="constant", metadata={"help": "the way from --alpha to --alpha_end over the run"}
    )
    alpha_end: float | None = field(default=None, metadata={"help": "alpha at the end of a schedule"})
    hardness: str = field(
        default="arithmetic",
        metadata={"help": "Eq. (3): the mean of both perplexities, or one of them", "choices": [*PERPLEXITY]},
    )
    pmi_ngrams: str | None = field(
        default=None, metadata={"help": "n-grams for strategy pmi: a file with one a line, in lower case"}
    )

    def __post_init__(self) -> None:
        """Refuses what the strategy would ignore.

        Raises:
            ConfigurationError: it takes no alpha, hardness or n-grams, or they are not there.
        """
        if self.masking_strategy not in STRATEGIES:
            raise ConfigurationError(
                f"--masking_strategy {self.masking_strategy!r}: expected one of {', '.join(STRATEGIES)}"
            )
        strategy = STRATEGIES[self.masking_strategy]
        flags: dict[str, tuple[Any, bool]] = {
            "--alpha": (self.alpha is not None, strategy.alpha),
            "--relative_alpha": (self.relative_alpha, strategy.alpha),
            "--alpha_schedule": (self.alpha_schedule != "constant", strategy.alpha),
            "--alpha_end": (self.alpha_end is not None, strategy.alpha),
            "--hardness": (self.hardness != "arithmetic", strategy.hardness),
            "--pmi_ngrams": (self.pmi_ngrams is not None, strategy.ngrams),
        }
        if ignored := [flag for flag, (is_set, is_taken) in flags.items() if is_set and not is_taken]:
            takers = [name for name, entry in STRATEGIES.items() if entry.alpha]
            raise ConfigurationError(
                f"--masking_strategy {self.masking_strategy} takes no {', '.join(ignored)}: leave it out, "
                f"or choose another strategy (alpha is taken by {' and '.join(takers)})"
            )
        if strategy.ngrams and self.pmi_ngrams is None:
            raise ConfigurationError(
                f"--masking_strategy {self.masking_strategy} needs --pmi_ngrams FILE: n-grams in lower case, one a line"
            )
        if self.alpha is not None:
            check_alpha(self.alpha)
        self.schedule(steps=1)

    def schedule(self, steps: int) -> AlphaSchedule:
        """Alpha over so many global batches."""
        alpha = DEFAULT_ALPHA if self.alpha is None else self.alpha
        return AlphaSchedule(alpha, self.alpha_end, steps, self.alpha_schedule)

    @property
    def needs_tokenizer(self) -> bool:
        """Whether the strategy has to know words."""
        return STRATEGIES[self.masking_strategy].words

    def masking(self, tokenizer: PreTrainedTokenizerBase | None) -> Masking:
        """The strategy with what it needs of the tokenizer.

        Raises:
            ConfigurationError: the tokenizer has no words, or the n-gram list is missing, malformed or of another one.
        """
        words = ngrams = None
        if self.needs_tokenizer and tokenizer is not None:
            words = Words.of(tokenizer)
            ngrams = None if self.pmi_ngrams is None else Ngrams.read(self.pmi_ngrams, tokenizer, words)
        return Masking(self.masking_strategy, self.hardness, self.relative_alpha, words, ngrams)

    def title(self) -> str:
        """The strategy in a few words, as in 'hardness, alpha = 0.001'."""
        if not STRATEGIES[self.masking_strategy].alpha:
            return self.masking_strategy
        schedule = self.schedule(steps=1)
        end = "" if schedule.end is None else f" to {schedule.end} ({schedule.shape})"
        return f"{self.masking_strategy}, alpha = {schedule.start}{end}{' over n' if self.relative_alpha else ''}"

    def identity(self) -> dict[str, Any]:
        """What two runs must share to be masked alike; without it a checkpoint is of another run."""
        takes_alpha = STRATEGIES[self.masking_strategy].alpha
        alpha = self.schedule(steps=1).start
        return {
            "masking_strategy": self.masking_strategy,
            "alpha": str(float(alpha)) if takes_alpha else None,
            "alpha_end": None if self.alpha_end is None else str(float(self.alpha_end)),
            "alpha_schedule": self.alpha_schedule,
            "relative_alpha": self.relative_alpha,
            "hardness": self.hardness,
            "pmi_ngrams": None if self.pmi_ngrams is None else files.sha256(self.pmi_ngrams)[0],
        }
