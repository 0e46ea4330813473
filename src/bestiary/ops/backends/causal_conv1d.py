"""causal-conv1d's short convolution: 2 to 4 taps, channels last in memory, seen as (batch, channels, time)."""

from typing import Any

import torch
from torch import Tensor

from bestiary.ops.backends.backend import Backend, Library

TAPS = (2, 3, 4)
MULTIPLE = 8

LIBRARY = Library("causal_conv1d", "causal-conv1d", (1, 4))


# short_convolution: (x, weight, state); the op adds bias and activation


def _not_short(dtype: torch.dtype, x: Tensor, weight: Tensor, state: Tensor) -> str | None:
    if weight.shape[1] not in TAPS:
        return f"it has {TAPS[0]} to {TAPS[-1]} taps, not {weight.shape[1]}"
    return f"it wants a multiple of {MULTIPLE} channels" if x.shape[2] % MULTIPLE else None


def _short(function: Any, dtype: torch.dtype, x: Tensor, weight: Tensor, state: Tensor) -> Tensor:
    inputs, before = (z.to(dtype).contiguous().mT for z in (x, state))
    y = function(x=inputs, weight=weight.contiguous(), initial_states=before).mT
    if y.requires_grad:
        y.register_hook(torch.Tensor.contiguous)  # its backward pass wants the gradient's channels last in memory
    return y.to(x.dtype)


BACKENDS = {
    "short_convolution": (
        Backend(LIBRARY, "causal_conv1d.causal_conv1d_interface.causal_conv1d_fn", _not_short, _short),
    ),
}
