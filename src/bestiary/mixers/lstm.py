"""Long short-term memory (Hochreiter & Schmidhuber 1997; forget gate by Gers et al. 2000), the historic reference.

    i, f, o = sigmoid(W x_t + U h_{t-1} + b) each,   g = tanh(W x_t + U h_{t-1} + b)
    c_t = f c_{t-1} + i g,   h_t = o tanh(c_t);   y_t = h_t

The recurrence is not linear: it has no parallel form.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from bestiary import ops, state
from bestiary.mixers import register
from bestiary.mixers.base import Mixer
from bestiary.mixers.parts import Linear


@state.register
class LSTMState(NamedTuple):
    """Hidden and cell state."""

    h: Float[Tensor, "batch d_model"]
    c: Float[Tensor, "batch d_model"]


@register("lstm")
class LSTM(Mixer):
    """One layer of LSTM cells, as in torch.nn.LSTM with one bias (gates in the order i, f, g, o).

    Args:
        d_model: width of input, output and state.
        forget_bias: of the forget gate to begin with; 1 remembers (Jozefowicz et al. 2015).
    """

    unpacked = ("recurrent",)

    def __init__(self, d_model: int, *, forget_bias: float = 1.0):
        super().__init__(d_model)
        self.forget_bias = forget_bias
        self.input = Linear(d_model, 4 * d_model)
        self.recurrent = Linear(d_model, 4 * d_model, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.input.reset_parameters()
        self.recurrent.reset_parameters()
        nn.init.zeros_(self.input.bias)
        self.input.bias[self.d_model : 2 * self.d_model] = self.forget_bias

    def initial_state(self, batch_size: int, *, device: Any = None, dtype: Any = None) -> LSTMState:
        place: dict[str, Any] = {"device": self.own_device(device), "dtype": self.own_dtype(dtype)}
        return LSTMState(*(torch.zeros(batch_size, self.d_model, **place) for _ in range(2)))

    def mixing_flops(self, context: int) -> float:
        return 4 * self.d_model

    def mix(
        self, x: Float[Tensor, "batch time d_model"], state: LSTMState, lengths: Int[Tensor, " batch"] | None
    ) -> tuple[Float[Tensor, "batch time d_model"], LSTMState]:
        h, c = state
        gates, outputs = self.input(x).to(h.dtype), []
        with ops.full_precision(x):
            weight = self.recurrent.weight.to(h.dtype)
            for t, gates_t in enumerate(gates.unbind(1)):
                i, f, g, o = (gates_t + F.linear(h, weight)).chunk(4, dim=-1)
                cell = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
                hidden = torch.sigmoid(o) * torch.tanh(cell)
                outputs.append(hidden)
                if lengths is not None:
                    real = (t < lengths)[:, None]
                    hidden, cell = torch.where(real, hidden, h), torch.where(real, cell, c)
                h, c = hidden, cell
        y = torch.stack(outputs, dim=1) if outputs else x
        return y.to(x.dtype), LSTMState(h, c)
