"""Gated DeltaNet (Yang, Kautz & Hatamizadeh 2024, arXiv:2412.06464): the delta rule with Mamba-2's decay.

q_t, k_t, v_t = silu(conv(W x))_t                     short convolutions; q, k scaled to unit length; split over heads
beta_t = sigmoid(W_beta x_t)                          how far what the key recalls is replaced
g_t = -exp(A_log) softplus(W_a x_t + dt_bias)         log-decay, one number a head
S_t = (I - beta_t k_t k_t^T) exp(g_t) S_{t-1} + beta_t k_t v_t^T        the recurrence: ops.delta_rule
y_t = W_o (RMSNorm(S_t^T q_t / sqrt(K)) * silu(W_g x_t))
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from bestiary import ops, state
from bestiary.mixers import register
from bestiary.mixers.base import Mixer, keep_real
from bestiary.mixers.parts import (
    RMSNorm,
    ShortConvolution,
    check_heads,
    default_heads,
    dt_bias_init,
    no_weight_decay,
    unit,
    xavier_init,
)


@state.register
class GatedDeltaNetState(NamedTuple):
    """The last inputs of the convolutions, and an associative memory a head."""

    history: Float[Tensor, "batch taps_minus_1 channels"]
    memory: Float[Tensor, "batch heads key_dim value_dim"]


@register("gated_delta_net")
class GatedDeltaNet(Mixer):
    """The delta rule that can also forget at once; the recurrent half of many hybrids.

    Args:
        d_model: width of input and output.
        n_heads: heads; by default one for each 64 channels of d_model (32 at small widths).
        expand_k, expand_v: key and value width over d_model.
        conv_kernel: taps of the convolutions on q, k and v.
        negative: let beta reach 2, so that the state's eigenvalues reach -1 (arXiv:2411.12537).
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int | None = None,
        expand_k: float = 0.75,
        expand_v: float = 1.5,
        conv_kernel: int = 4,
        negative: bool = False,
    ):
        super().__init__(d_model)
        self.n_heads = default_heads(d_model) if n_heads is None else n_heads
        self.d_key, self.d_value, self.negative = int(expand_k * d_model), int(expand_v * d_model), negative
        check_heads(self.n_heads, key_width=self.d_key, value_width=self.d_value)
        self.widths = [self.d_key, self.d_key, self.d_value]
        self.qkv = nn.Linear(d_model, sum(self.widths), bias=False)
        self.conv = ShortConvolution(sum(self.widths), conv_kernel, activation="silu")
        self.beta, self.decay = (nn.Linear(d_model, self.n_heads, bias=False) for _ in range(2))
        self.A_log = nn.Parameter(torch.empty(self.n_heads))
        self.dt_bias = nn.Parameter(torch.empty(self.n_heads))
        self.gate = nn.Linear(d_model, self.d_value, bias=False)
        self.norm = RMSNorm(self.d_value // self.n_heads, eps=1e-5)
        self.out = nn.Linear(self.d_value, d_model, bias=False)
        no_weight_decay(self.A_log, self.dt_bias)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for part in self.qkv.weight.split(self.widths):
            nn.init.xavier_uniform_(part, gain=2**-2.5)  # each of q, k, v as a map of its own
        for linear in (self.beta, self.decay, self.gate, self.out):
            xavier_init(linear)
        self.A_log.uniform_(0, 16).clamp_(min=1e-4).log_()
        dt_bias_init(self.dt_bias)
        self.conv.reset_parameters()
        self.norm.reset_parameters()

    def initial_state(self, batch_size: int, *, device: Any = None, dtype: Any = None) -> GatedDeltaNetState:
        place: dict[str, Any] = {"device": self.own_device(device), "dtype": self.own_dtype(dtype)}
        shape = (batch_size, self.n_heads, self.d_key // self.n_heads, self.d_value // self.n_heads)
        return GatedDeltaNetState(self.conv.initial_state(batch_size, **place), torch.zeros(shape, **place))

    def mixing_flops(self, context: int) -> float:
        return self.conv.flops() + 9 * self.d_key * self.d_value // self.n_heads

    def mix(
        self, x: Float[Tensor, "batch time d_model"], state: GatedDeltaNetState, lengths: Int[Tensor, " batch"] | None
    ) -> tuple[Float[Tensor, "batch time d_model"], GatedDeltaNetState]:
        qkv, history = self.conv(self.qkv(x), state.history, lengths)
        q, k, v = (z.unflatten(-1, (self.n_heads, -1)) for z in qkv.split(self.widths, dim=-1))
        exact = state.memory.dtype
        beta = torch.sigmoid(self.beta(x)) * (2 if self.negative else 1)
        log_decay = -self.A_log.to(exact).exp() * F.softplus(self.decay(x).to(exact) + self.dt_bias.to(exact))
        beta, log_decay = keep_real(beta, lengths), keep_real(log_decay, lengths)  # padding leaves the memory alone
        q, k = (unit(z.to(exact)) for z in (q, k))
        o, memory = ops.delta_rule(q, k, v, beta, log_decay, state=state.memory)
        return self.out(self.norm(o).flatten(-2) * F.silu(self.gate(x))), GatedDeltaNetState(history, memory)
