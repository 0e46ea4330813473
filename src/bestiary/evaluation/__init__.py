"""Measuring what models can do."""

from bestiary.evaluation.classification import accuracy, classification_score, matthews
from bestiary.evaluation.masked import MaskedScore, masked_score
from bestiary.evaluation.perplexity import Perplexity, perplexity

__all__ = [
    "MaskedScore",
    "Perplexity",
    "accuracy",
    "classification_score",
    "masked_score",
    "matthews",
    "perplexity",
]
