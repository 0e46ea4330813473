"""Bestiary: language models beyond attention, every sequence mixer behind one contract, on a CPU first."""

from bestiary import channel_mixers, mixers, ops, state
from bestiary.errors import BestiaryError, UsageError
from bestiary.hub import load, save
from bestiary.models import LanguageModel, ModelConfig

__version__ = "0.1.0"
__all__ = [
    "BestiaryError",
    "LanguageModel",
    "ModelConfig",
    "UsageError",
    "channel_mixers",
    "load",
    "mixers",
    "ops",
    "save",
    "state",
]
