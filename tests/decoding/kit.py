"""Models and tolerances for tests of decoding."""

import torch
from torch import Tensor

from bestiary import LanguageModel, ModelConfig


def make(layout: str, width: int = 64, **options: object) -> LanguageModel:
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(layout, width, 50, **options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def close(found: Tensor, expected: Tensor) -> bool:
    size = expected.abs().max().item() if expected.numel() else 0.0
    return found.shape == expected.shape and (found - expected).abs().le(2e-5 * size + 1e-30).all().item()
