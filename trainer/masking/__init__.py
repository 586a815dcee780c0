"""Hardness masking: which positions of a block are masked (Eq. 3, Eq. 4, and the strategies it is compared with).

Everything is a function of a batch of rows; randomness is an argument (see trainer.noise).

    law         Eq. (3), Eq. (4)                     what each position weighs
    words, ngrams                                    what is masked together
    selection   races and budgets                    from weights to M positions
    strategies  one function each, one table
    schedule    alpha over training
    corruption  80 % <mask>, 10 % random, 10 % as is
    collator    all of it, for a DataLoader
"""

from trainer.masking.collator import IGNORED_LABEL, HardnessCollator, MaskedBatch, corrupt, draw
from trainer.masking.corruption import MaskingVocabulary
from trainer.masking.law import MASK_RATE, PERPLEXITY, budget, check_alpha, hardness, probabilities
from trainer.masking.ngrams import Ngrams
from trainer.masking.schedule import AlphaSchedule
from trainer.masking.strategies import STRATEGIES, Masking, ScoredBlocks
from trainer.masking.words import Words

__all__ = [
    "IGNORED_LABEL",
    "MASK_RATE",
    "PERPLEXITY",
    "STRATEGIES",
    "AlphaSchedule",
    "HardnessCollator",
    "MaskedBatch",
    "Masking",
    "MaskingVocabulary",
    "Ngrams",
    "ScoredBlocks",
    "Words",
    "budget",
    "check_alpha",
    "corrupt",
    "draw",
    "hardness",
    "probabilities",
]
