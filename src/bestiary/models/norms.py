"""Norms of a model's stream, by name.

rms        w x / sqrt(mean(x^2) + eps)
rms_outer  w x / (sqrt(mean(x^2)) + eps)        Evo, and StripedHyena without its fused kernels
layer      w (x - mean(x)) / sqrt(var(x) + eps) + b
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bestiary.mixers.parts import RMSNorm


class OuterRMSNorm(nn.Module):
    """The RMS norm whose epsilon is added to the root."""

    def __init__(self, channels: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(channels)), eps

    def forward(self, x: Float[Tensor, "*batch channels"]) -> Float[Tensor, "*batch channels"]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        size = torch.linalg.vector_norm(wide, dim=-1, keepdim=True) * wide.shape[-1] ** -0.5
        y = wide / (size + self.eps)
        return (self.weight.to(wide.dtype) * y).to(x.dtype)


NORMS: dict[str, Callable[..., nn.Module]] = {"rms": RMSNorm, "layer": nn.LayerNorm, "rms_outer": OuterRMSNorm}


@runtime_checkable
class Normed(Protocol):
    """What a configuration says of its norms."""

    @property
    def d_model(self) -> int: ...
    @property
    def norm(self) -> str: ...
    @property
    def norm_eps(self) -> float: ...


def make_norm(config: Normed) -> nn.Module:
    """The norm that a configuration asks for."""
    return NORMS[config.norm](config.d_model, eps=config.norm_eps)
