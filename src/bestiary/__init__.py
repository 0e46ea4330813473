"""Bestiary: language models beyond attention, every sequence mixer behind one contract, on a CPU first."""

from bestiary import channel_mixers, mixers, ops, state
from bestiary.errors import BestiaryError, UsageError
from bestiary.hub import load, save
from bestiary.models import (
    ClassifierConfig,
    EncoderConfig,
    ImageClassifier,
    ImageConfig,
    LanguageModel,
    MaskedLanguageModel,
    ModelConfig,
    SequenceClassifier,
)

__version__ = "0.1.0"
__all__ = [
    "BestiaryError",
    "ClassifierConfig",
    "EncoderConfig",
    "ImageClassifier",
    "ImageConfig",
    "LanguageModel",
    "MaskedLanguageModel",
    "ModelConfig",
    "SequenceClassifier",
    "UsageError",
    "channel_mixers",
    "load",
    "mixers",
    "ops",
    "save",
    "state",
]
