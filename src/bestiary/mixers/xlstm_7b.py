"""The mLSTM layer of xLSTM 7B (Beck et al. 2025, arXiv:2503.13427): xLSTM's matrix memory, stripped for speed.

q_t, k_t, v_t, o_t = W x_t                            q and k half as wide as v; no convolution, no up-projection
i_t, f_t = cap(W_i x_t + b_i), log sigmoid(cap(W_f x_t + b_f))      a number a head;  cap(z) = a tanh(z / a), a = 15
C_t = e^{f_t} C_{t-1} + e^{i_t} k_t v_t^T,  n_t = e^{f_t} n_{t-1} + e^{i_t} k_t        ops.mlstm
h_t = C_t^T q_t / max(|n_t . q_t|, 1),                q / sqrt(K) for q
y_t = W_out (LayerNorm(h_t) * sigmoid(o_t))           a norm a head

The published code adds 1e-6 to the divisor. It is a number a head, and the norm takes what a head is scaled by away.
"""

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from bestiary import ops
from bestiary.mixers import register
from bestiary.mixers.base import Mixer
from bestiary.mixers.parts import HeadNorm, Linear, check_heads, check_rate, small_init


@register("xlstm_7b")
class XLSTM7B(Mixer):
    """xLSTM's matrix memory as a plain layer, which a gated network follows; gates of bounded strength.

    Args:
        d_model: width of input and output.
        n_heads: heads; must divide the widths of keys and values (published: 4, and 8 at d_model = 4096).
        expand_k: width of queries and keys over d_model.
        expand_v: width of values over d_model.
        gate_cap: bound of the logits of input and forget gates; None for none.
        norm_eps: epsilon of the norm.
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int = 4,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        gate_cap: float | None = 15.0,
        norm_eps: float = 1e-6,
        n_layers: int = 1,
    ):
        super().__init__(d_model)
        d_key, d_value = round(expand_k * d_model), round(expand_v * d_model)
        check_heads(n_heads, key_width=d_key, value_width=d_value)
        check_rate(norm_eps=norm_eps, gate_cap=math.inf if gate_cap is None else gate_cap)
        self.n_heads, self.gate_cap, self.n_layers = n_heads, gate_cap, n_layers
        self.widths = [d_key, d_key, d_value, d_value]
        self.qkvo = Linear(d_model, sum(self.widths), bias=False)
        self.gates = Linear(d_model, 2 * n_heads)  # input, forget
        self.norm = HeadNorm(n_heads, d_value, eps=norm_eps)
        self.out = Linear(d_value, d_model, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        query, key, value, output = self.qkvo.weight.split(self.widths)
        for weight in (query, key, value):
            small_init(weight, self.d_model)
        nn.init.zeros_(output)  # half open
        nn.init.zeros_(self.gates.weight)
        self.gates.bias[: self.n_heads] = -10.0
        self.gates.bias[self.n_heads :] = torch.linspace(3, 6, self.n_heads)
        self.norm.reset_parameters()
        nn.init.normal_(self.out.weight, std=2 / self.n_layers / math.sqrt(self.d_model))

    def initial_state(self, batch_size: int, *, device: Any = None, dtype: Any = None) -> ops.MLSTMState:
        place: dict[str, Any] = {"device": self.own_device(device), "dtype": self.own_dtype(dtype)}
        key_dim, value_dim = (width // self.n_heads for width in self.widths[1:3])
        return ops.empty_mlstm(batch_size, self.n_heads, key_dim, value_dim, **place)

    def mixing_flops(self, context: int) -> float:
        return 5 * self.widths[1] * (self.widths[2] // self.n_heads + 1)

    def mix(
        self, x: Float[Tensor, "batch time d_model"], state: ops.MLSTMState, lengths: Int[Tensor, " batch"] | None
    ) -> tuple[Float[Tensor, "batch time d_model"], ops.MLSTMState]:
        *qkv, o = self.qkvo(x).split(self.widths, dim=-1)
        gates = self.gates(x).to(state.max.dtype)
        if self.gate_cap is not None:
            gates = self.gate_cap * torch.tanh(gates / self.gate_cap)
        log_input, forget = gates.chunk(2, dim=-1)
        q, k, v = (part.unflatten(-1, (self.n_heads, -1)) for part in qkv)
        h, state = ops.mlstm(q, k, v, log_input, F.logsigmoid(forget), state=state, lengths=lengths)
        return self.out(self.norm(h.flatten(-2)) * torch.sigmoid(o)), state
