"""RWKV-7 "Goose", its time mixing (Peng et al. 2025, arXiv:2503.14456): a delta rule with a vector of rates.

shift(m) = x_t + (x_{t-1} - x_t) m                   token shift, m a channel's own
r_t, k_t, v_t = W_r shift(x_r), W_k shift(x_k), W_v shift(x_v)
w_t = -exp(-1/2) sigmoid(w_0 + tanh(shift(x_w) W_1) W_2)           log-decay, per channel; no more than 0.61 a step
a_t = sigmoid(a_0 + shift(x_a) A_1 A_2)              rates: how far what the key recalls is replaced
g_t = sigmoid(shift(x_g) G_1) G_2
v_t <- v_t + (v1_t - v_t) sigmoid(v_0 + shift(x_v) V_1 V_2)        v1: the values of the first layer of this kind
kappa_t = k_t k_k / |k_t k_k|,   k_t <- k_t (1 + (a_t - 1) k_a)    the key that erases, and the one that writes
S_t = (diag(exp(w_t)) - (kappa_t a_t) kappa_t^T) S_{t-1} + k_t v_t^T                      the recurrence: ops.dplr
y_t = W_o ((GroupNorm(S_t^T r_t) + (r_t k_t r_k) v_t) g_t)
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from bestiary import ops
from bestiary.mixers import Context, register
from bestiary.mixers.base import keep_real
from bestiary.mixers.parts import check_rate, no_weight_decay, token_shift
from bestiary.mixers.rwkv import GN_EPS, LowRank, RWKVHeads, RWKVState, rise


@register("rwkv7")
class RWKV7(RWKVHeads):
    """The delta rule with a decay and a rate a channel; layers share the values of the first (see mixers.context).

    Args:
        d_model: width of input and output.
        head_size: channels a head; 64, or 32 where d_model is below 256 or no multiple of 64.
        decay_rank, rate_rank, value_rank, gate_rank: ranks of w, a, v and g; about 2.5, 2.5, 1.7 and 5 sqrt(d_model).
        gn_eps: epsilon of the norm a head.
        train_state: whether the memory before the first step is a parameter instead of zero.
    """

    channel_mixer = "rwkv7_channel_mix"

    def __init__(
        self,
        d_model: int,
        *,
        head_size: int | None = None,
        decay_rank: int | None = None,
        rate_rank: int | None = None,
        value_rank: int | None = None,
        gate_rank: int | None = None,
        gn_eps: float = GN_EPS,
        train_state: bool = False,
        layer_index: int = 0,
        n_layers: int = 1,
    ):
        super().__init__(d_model, head_size, gn_eps, train_state, layer_index, n_layers)
        self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g = (
            nn.Parameter(torch.empty(d_model)) for _ in range(6)
        )
        self.w0, self.a0, self.k_k, self.k_a = (nn.Parameter(torch.empty(d_model)) for _ in range(4))
        self.r_k = nn.Parameter(torch.empty(self.n_heads, self.head_size))
        decay_rank, rate_rank, value_rank, gate_rank = (
            usual_rank(d_model, factor) if rank is None else rank
            for rank, factor in ((decay_rank, 2.5), (rate_rank, 2.5), (value_rank, 1.7), (gate_rank, 5.0))
        )
        check_rate(decay_rank=decay_rank, rate_rank=rate_rank, value_rank=value_rank, gate_rank=gate_rank)
        self.w_low = LowRank(d_model, decay_rank, torch.tanh)
        self.a_low = LowRank(d_model, rate_rank)
        self.g_low = LowRank(d_model, gate_rank, torch.sigmoid)
        if layer_index:  # the first layer's values are its own
            self.v0, self.v_low = nn.Parameter(torch.empty(d_model)), LowRank(d_model, value_rank)
        no_weight_decay(self.r_k)
        self.w0._lr_scale = 2.0  # type: ignore[attr-defined]
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        share, rising = torch.arange(self.d_model) / self.d_model, rise(self.d_model)
        zigzag = 2 * rise(self.head_size).repeat(self.n_heads) - 1
        zigzag = zigzag * zigzag.abs()
        for mix, power in zip(
            (self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g), (0.2, 0.9, 0.7, 0.7, 0.9, 0.2)
        ):
            mix.copy_(1 - share ** (power * self.shallow))
        self.w0.copy_(-5.5 + 6 * rising ** (1 + self.deep**0.3) + 2.5 * zigzag)
        self.a0.copy_(-0.19 + 0.3 * zigzag + 0.4 * (rising - 0.5))
        self.k_k.copy_(0.71 - 0.1 * (rising - 0.5))
        nn.init.constant_(self.k_a, 1.02)
        nn.init.constant_(self.r_k, -0.04)
        if self.layer_index:
            self.v0.copy_(0.73 - 0.4 * (rising - 0.5))
        for low in (part for part in self.children() if isinstance(part, LowRank)):
            nn.init.zeros_(low.down.weight)
            nn.init.orthogonal_(low.up.weight, gain=0.1)
        for linear, bound in ((self.receptance, 0.5), (self.key, 0.05), (self.value, 0.5)):
            nn.init.uniform_(linear.weight, -bound * self.d_model**-0.5, bound * self.d_model**-0.5)

    def mixing_flops(self, context: int) -> float:
        return (9 * self.head_size + 60) * self.d_model

    def mix_in_context(
        self,
        x: Float[Tensor, "batch time d_model"],
        state: RWKVState,
        lengths: Int[Tensor, " batch"] | None,
        context: Context,
    ) -> tuple[Float[Tensor, "batch time d_model"], RWKVState]:
        before, last = token_shift(x, state.x, lengths)
        exact = state.memory.dtype
        xr, xw, xk, xv, xa, xg = (
            torch.lerp(x, before, mix.to(x.dtype))
            for mix in (self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g)
        )
        r, k, v = self.receptance(xr).to(exact), self.key(xk).to(exact), self.value(xv).to(exact)
        log_decay = -math.exp(-0.5) * torch.sigmoid(self.w0.to(exact) + self.w_low(xw).to(exact))
        a = torch.sigmoid(self.a0.to(exact) + self.a_low(xa).to(exact))
        if context.v_first is None:
            context.v_first = v
        if self.layer_index:  # in a hybrid this may be the first layer of its kind: then v stays v
            v = torch.lerp(v, context.v_first, torch.sigmoid(self.v0.to(exact) + self.v_low(xv).to(exact)))
        kappa = F.normalize(self.heads(k * self.k_k.to(exact)), dim=-1, eps=1e-12)
        k = k * (1 + (a - 1) * self.k_a.to(exact))
        k, kappa, log_decay = (keep_real(z, lengths) for z in (self.heads(k), kappa, self.heads(log_decay)))
        r, v, a = self.heads(r), self.heads(v), self.heads(a)
        o, memory = ops.dplr(r, log_decay, k, v, -kappa, kappa * a, state=state.memory)
        bonus = (r * k * self.r_k.to(exact)).sum(-1, keepdim=True)
        y = (self.ln_x(o.flatten(-2)) + (bonus * v).flatten(-2)) * self.g_low(xg)
        return self.output(y.to(x.dtype)), RWKVState(last, memory)


def usual_rank(d_model: int, factor: float) -> int:
    """The published factor * sqrt(d_model), in multiples of 32; of 8 below a width of 512."""
    unit = 32 if d_model >= 512 else 8
    return max(unit, round(factor * math.sqrt(d_model) / unit) * unit)
