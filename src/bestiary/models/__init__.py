"""Models made of mixers: configuration, the layout grammar, the language model, generation and costs."""

from bestiary.models.config import ModelConfig
from bestiary.models.language_model import LanguageModel

__all__ = ["LanguageModel", "ModelConfig"]
