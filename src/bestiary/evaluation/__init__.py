"""Measuring what models can do."""

from bestiary.evaluation.perplexity import Perplexity, perplexity

__all__ = ["Perplexity", "perplexity"]
