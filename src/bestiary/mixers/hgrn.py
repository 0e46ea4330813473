"""HGRN, the hierarchically gated recurrent network, real-valued (Qin, Yang & Zhong 2023, arXiv:2311.04823).

f_t = gamma + (1 - gamma) sigmoid(W_f x_t)           forget gate, bounded from below; higher layers remember longer
h_t = f_t h_{t-1} + (1 - f_t) silu(W_i x_t)          ops.linear_recurrence
y_t = W_o (RMSNorm(h_t) * silu(W_g x_t))

The paper ties the bounds gamma of all L layers by a cumulative softmax over the depth, which begins at l/L in layer
l = 0 ... L-1. Here each layer learns its own, from the same beginning; the first layer's is 0 and stays there.

Norm and output gate are those of flash-linear-attention's real-valued HGRN, without biases. The paper's own layer is
complex, h_t = f_t e^{i theta} h_{t-1} + ..., and norms after the gate: LayerNorm(g * [Re h, Im h]).
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from bestiary import ops, state
from bestiary.errors import UsageError
from bestiary.mixers import register
from bestiary.mixers.base import Mixer
from bestiary.mixers.parts import Linear, RMSNorm, gpt_init, no_weight_decay


@state.register
class HGRNState(NamedTuple):
    """The hidden state."""

    h: Float[Tensor, "batch d_inner"]


@register("hgrn")
class HGRN(Mixer):
    """A gated linear RNN whose forget gates have a lower bound that rises with the depth.

    Args:
        d_model: width of input and output.
        expand: width of the state over d_model.
    """

    def __init__(self, d_model: int, *, expand: float = 1.0, layer_index: int = 0, n_layers: int = 1):
        super().__init__(d_model)
        self.d_inner, self.first_bound = round(expand * d_model), layer_index / n_layers
        if self.d_inner < 1:
            raise UsageError(f"expand must give at least one channel, not {expand}")
        self.input, self.forget, self.gate = (Linear(d_model, self.d_inner, bias=False) for _ in range(3))
        self.bound = nn.Parameter(torch.empty(self.d_inner)) if layer_index else None  # logit of gamma
        self.norm = RMSNorm(self.d_inner, eps=1e-5)
        self.out = Linear(self.d_inner, d_model, bias=False)
        if self.bound is not None:
            no_weight_decay(self.bound)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for linear in (self.input, self.forget, self.gate):
            gpt_init(linear, self.d_model)
        gpt_init(self.out, self.d_inner)
        self.norm.reset_parameters()
        if self.bound is not None:
            nn.init.constant_(self.bound, torch.logit(torch.tensor(self.first_bound)).item())

    def initial_state(self, batch_size: int, *, device: Any = None, dtype: Any = None) -> HGRNState:
        shape = (batch_size, self.d_inner)
        return HGRNState(torch.zeros(shape, device=self.own_device(device), dtype=self.own_dtype(dtype)))

    def mixing_flops(self, context: int) -> float:
        return 12 * self.d_inner

    def mix(
        self, x: Float[Tensor, "batch time d_model"], state: HGRNState, lengths: Int[Tensor, " batch"] | None
    ) -> tuple[Float[Tensor, "batch time d_model"], HGRNState]:
        logits = self.forget(x).to(state.h.dtype)
        forget, write = torch.sigmoid(logits), torch.sigmoid(-logits)  # 1 - f from itself: exact where f is near 1
        if self.bound is not None:
            bound = self.bound.to(state.h.dtype)
            write = torch.sigmoid(-bound) * write
            forget = torch.sigmoid(bound) + torch.sigmoid(-bound) * forget
        h, last = ops.linear_recurrence(forget, write * F.silu(self.input(x)), state=state.h, lengths=lengths)
        return self.out(self.norm(h).to(x.dtype) * F.silu(self.gate(x))), HGRNState(last)
