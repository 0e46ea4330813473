"""Models made of mixers: configurations, the layout grammar, language models, encoders, generation and costs."""

from bestiary.models.config import ModelConfig
from bestiary.models.encoder import (
    ClassifierConfig,
    EncoderConfig,
    ImageClassifier,
    ImageConfig,
    MaskedLanguageModel,
    SequenceClassifier,
)
from bestiary.models.language_model import LanguageModel

__all__ = [
    "ClassifierConfig",
    "EncoderConfig",
    "ImageClassifier",
    "ImageConfig",
    "LanguageModel",
    "MaskedLanguageModel",
    "ModelConfig",
    "SequenceClassifier",
]
