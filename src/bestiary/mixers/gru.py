"""Gated recurrent unit (Cho et al. 2014, arXiv:1406.1078), the LSTM's simpler sibling.

    r, z = sigmoid(W x_t + U h_{t-1} + b) each
    n = tanh(W_n x_t + b_n + r (U_n h_{t-1} + c_n)),   h_t = (1 - z) n + z h_{t-1};   y_t = h_t

The recurrence is not linear: it has no parallel form.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from bestiary import ops, state
from bestiary.mixers import register
from bestiary.mixers.base import Mixer
from bestiary.mixers.parts import Linear


@state.register
class GRUState(NamedTuple):
    """The hidden state."""

    h: Float[Tensor, "batch d_model"]


@register("gru")
class GRU(Mixer):
    """One layer of GRU cells, as in torch.nn.GRU (gates in the order r, z, n).

    Args:
        d_model: width of input, output and state.
    """

    unpacked = ("recurrent",)

    def __init__(self, d_model: int):
        super().__init__(d_model)
        self.input = Linear(d_model, 3 * d_model)
        self.recurrent = Linear(d_model, 3 * d_model)

    def reset_parameters(self) -> None:
        self.input.reset_parameters()
        self.recurrent.reset_parameters()

    def initial_state(self, batch_size: int, *, device: Any = None, dtype: Any = None) -> GRUState:
        shape = (batch_size, self.d_model)
        return GRUState(torch.zeros(shape, device=self.own_device(device), dtype=self.own_dtype(dtype)))

    def mixing_flops(self, context: int) -> float:
        return 6 * self.d_model

    def mix(
        self, x: Float[Tensor, "batch time d_model"], state: GRUState, lengths: Int[Tensor, " batch"] | None
    ) -> tuple[Float[Tensor, "batch time d_model"], GRUState]:
        (h,) = state
        gates, outputs = self.input(x).to(h.dtype), []
        with ops.full_precision(x):
            weight, bias = self.recurrent.weight.to(h.dtype), self.recurrent.bias.to(h.dtype)
            for t, gates_t in enumerate(gates.unbind(1)):
                (xr, xz, xn), (hr, hz, hn) = gates_t.chunk(3, dim=-1), F.linear(h, weight, bias).chunk(3, dim=-1)
                new = torch.tanh(xn + torch.sigmoid(xr + hr) * hn)
                hidden = torch.lerp(new, h, torch.sigmoid(xz + hz))
                outputs.append(hidden)
                h = hidden if lengths is None else torch.where((t < lengths)[:, None], hidden, h)
        y = torch.stack(outputs, dim=1) if outputs else x
        return y.to(x.dtype), GRUState(h)
