"""Bestiary: language models beyond attention, every sequence mixer behind one contract, on a CPU first."""

from bestiary import channel_mixers, mixers, ops, state
from bestiary.errors import BestiaryError, UsageError

__version__ = "0.1.0"
__all__ = ["BestiaryError", "UsageError", "channel_mixers", "mixers", "ops", "state"]
