"""minGRU and minLSTM (Feng et al. 2024, arXiv:2410.01201): the cells without their state in the gates, hence linear.

min_gru     h_t = (1 - z) h_{t-1} + z v_t,                     z = sigmoid(W_z x_t + b_z)
min_lstm    h_t = (f h_{t-1} + i v_t) / (f + i),               f, i = sigmoid(W_f x_t + b_f), sigmoid(W_i x_t + b_i)
both        v_t = W_v x_t + b_v;   y_t = W_o h_t               ops.linear_recurrence

To compute in log-space, the paper makes v positive: g(v) = v + 1/2 where v >= 0, else sigmoid(v) (`positive`). That is
not needed here: the gates lie in (0, 1) and sum to one, so that the recurrence is stable as it stands. h_0 is 0; the
authors' code may learn it, and W_o has a bias there.
"""

from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from bestiary import ops, state
from bestiary.errors import UsageError
from bestiary.mixers import register
from bestiary.mixers.base import Mixer
from bestiary.mixers.parts import Linear, no_weight_decay


@state.register
class MinRNNState(NamedTuple):
    """The hidden state."""

    h: Float[Tensor, "batch d_inner"]


class MinRNN(Mixer):
    """What both have in common: the widths, the state, and a recurrence between two gates that sum to one."""

    n_gates: ClassVar[int]

    def __init__(self, d_model: int, *, expand: float = 2.0, positive: bool = False):
        super().__init__(d_model)
        self.d_inner, self.positive = round(expand * d_model), positive
        if self.d_inner < 1:
            raise UsageError(f"expand must give at least one channel, not {expand}")
        self.input = Linear(d_model, (1 + self.n_gates) * self.d_inner)
        self.out = Linear(self.d_inner, d_model, bias=False)
        no_weight_decay(self.input.bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.input.reset_parameters()
        self.out.reset_parameters()

    def initial_state(self, batch_size: int, *, device: Any = None, dtype: Any = None) -> MinRNNState:
        shape = (batch_size, self.d_inner)
        return MinRNNState(torch.zeros(shape, device=self.own_device(device), dtype=self.own_dtype(dtype)))

    def mixing_flops(self, context: int) -> float:
        return (5 + 3 * self.n_gates) * self.d_inner

    def balance(self, gates: Float[Tensor, "batch time gates"]) -> Float[Tensor, "batch time d_inner"]:
        """The logit of what is written; its negative is that of what is kept."""
        raise NotImplementedError

    def mix(
        self, x: Float[Tensor, "batch time d_model"], state: MinRNNState, lengths: Int[Tensor, " batch"] | None
    ) -> tuple[Float[Tensor, "batch time d_model"], MinRNNState]:
        v, gates = self.input(x).to(state.h.dtype).split([self.d_inner, self.n_gates * self.d_inner], dim=-1)
        logit = self.balance(gates)
        if self.positive:
            v = torch.where(v >= 0, v + 0.5, torch.sigmoid(v))
        h, last = ops.linear_recurrence(torch.sigmoid(-logit), torch.sigmoid(logit) * v, state=state.h, lengths=lengths)
        return self.out(h.to(x.dtype)), MinRNNState(last)


@register("min_gru")
class MinGRU(MinRNN):
    """A GRU whose gate sees the input alone: a linear recurrence with one gate.

    Args:
        d_model: width of input and output.
        expand: width of the state over d_model.
        positive: pass what is written through g, as the published log-space code does.
    """

    n_gates = 1

    def balance(self, gates: Float[Tensor, "batch time gates"]) -> Float[Tensor, "batch time d_inner"]:
        return gates


@register("min_lstm")
class MinLSTM(MinRNN):
    """An LSTM whose gates see the input alone and are scaled to sum to one.

    Args:
        d_model: width of input and output.
        expand: width of the state over d_model.
        positive: pass what is written through g, as the published log-space code does.
    """

    n_gates = 2

    def balance(self, gates: Float[Tensor, "batch time gates"]) -> Float[Tensor, "batch time d_inner"]:
        forget, write = gates.chunk(2, dim=-1)
        return F.logsigmoid(write) - F.logsigmoid(forget)  # i / (f + i) = sigmoid(log i - log f), also where both are 0
