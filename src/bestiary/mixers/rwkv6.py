"""RWKV-6 "Finch", its time mixing (Peng et al. 2024, arXiv:2404.05892): RWKV-5 whose decay and shift see the data.

shift(m) = x_t + (x_{t-1} - x_t) m
m_w, m_k, m_v, m_r, m_g = maa + tanh(W_1 shift(maa_x)) W_2         low rank, five at once: how far each is shifted
r_t, k_t, v_t, g_t = W_r shift(m_r), W_k shift(m_k), W_v shift(m_v), silu(W_g shift(m_g))
w_t = -exp(time_decay + tanh(shift(m_w) W_3) W_4)                  log-decay, per channel and step, low rank
S_t = diag(exp(w_t)) S_{t-1} + k_t v_t^T                           the recurrence: ops.linear_attention with a bonus u
o_t = (S_{t-1} + diag(u) k_t v_t^T)^T r_t
y_t = W_o (GroupNorm(o_t) g_t)
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from bestiary import ops
from bestiary.mixers import register
from bestiary.mixers.base import keep_real
from bestiary.mixers.parts import Linear, check_rate, no_weight_decay, token_shift
from bestiary.mixers.rwkv import GN_EPS, LowRank, RWKVHeads, RWKVState, bonus_init, decay_init


@register("rwkv6")
class RWKV6(RWKVHeads):
    """Linear attention with a decay a channel and step, and a bonus for the current step.

    Args:
        d_model: width of input and output.
        head_size: channels a head; 64, or 32 where d_model is below 256 or no multiple of 64.
        mix_rank: rank of the shifts; 32, 64 from a width of 4096 on, and less below 512.
        decay_rank: rank of the decays; twice that.
        train_state: whether the memory before the first step is a parameter instead of zero.
        gn_eps: epsilon of the norm a head.
    """

    channel_mixer = "rwkv6_channel_mix"

    def __init__(
        self,
        d_model: int,
        *,
        head_size: int | None = None,
        mix_rank: int | None = None,
        decay_rank: int | None = None,
        train_state: bool = False,
        gn_eps: float = GN_EPS,
        layer_index: int = 0,
        n_layers: int = 1,
    ):
        super().__init__(d_model, head_size, gn_eps, train_state, layer_index, n_layers)
        usual = 64 if d_model >= 4096 else min(32, max(8, d_model // 16))
        self.mix_rank = usual if mix_rank is None else mix_rank
        decay_rank = 2 * usual if decay_rank is None else decay_rank
        check_rate(mix_rank=self.mix_rank, decay_rank=decay_rank)
        self.maa_x, self.maa = (
            nn.Parameter(torch.empty(d_model)),
            nn.Parameter(torch.empty(5, d_model)),
        )  # w, k, v, r, g
        self.mix_down = Linear(d_model, 5 * self.mix_rank, bias=False)
        self.mix_up = nn.Parameter(torch.empty(5, self.mix_rank, d_model))
        self.time_decay = nn.Parameter(torch.empty(d_model))
        self.decay = LowRank(d_model, decay_rank, torch.tanh)
        self.bonus = nn.Parameter(torch.empty(self.n_heads, self.head_size))
        self.gate = Linear(d_model, d_model, bias=False)
        no_weight_decay(self.maa, *self.mix_down.parameters(), self.mix_up, self.bonus)
        self.time_decay._lr_scale = 2.0  # type: ignore[attr-defined]
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        share = torch.arange(self.d_model) / self.d_model
        usual, half = share**self.shallow, share ** (0.5 * self.shallow)
        self.maa_x.copy_(1 - usual)
        self.maa.copy_(1 - torch.stack([usual, usual, usual + 0.3 * self.deep, half, half]))
        decay_init(self.time_decay, self.deep)
        bonus_init(self.bonus, self.deep)
        for down, up in ((self.mix_down.weight, self.mix_up), (self.decay.down.weight, self.decay.up.weight)):
            nn.init.zeros_(down)
            nn.init.uniform_(up, -0.01, 0.01)
        for linear, gain in ((self.receptance, 1.0), (self.key, 0.1), (self.value, 1.0), (self.gate, 0.1)):
            nn.init.orthogonal_(linear.weight, gain=gain)

    def mixing_flops(self, context: int) -> float:
        return (5 * self.head_size + 10 * self.mix_rank + 40) * self.d_model

    def mix(
        self, x: Float[Tensor, "batch time d_model"], state: RWKVState, lengths: Int[Tensor, " batch"] | None
    ) -> tuple[Float[Tensor, "batch time d_model"], RWKVState]:
        before, last = token_shift(x, state.x, lengths)
        exact = state.memory.dtype
        inner = torch.tanh(self.mix_down(torch.lerp(x, before, self.maa_x.to(x.dtype)))).unflatten(-1, (5, -1))
        shift = self.maa[:, None, None] + torch.einsum("btfr,frd->fbtd", inner, self.mix_up)
        xw, xk, xv, xr, xg = torch.lerp(x, before, shift.to(x.dtype))
        r, k, v = (
            self.heads(linear(shifted)).to(exact)
            for linear, shifted in ((self.receptance, xr), (self.key, xk), (self.value, xv))
        )
        log_decay = -(self.time_decay.to(exact) + self.decay(xw).to(exact)).exp()
        k, log_decay = keep_real(k, lengths), keep_real(self.heads(log_decay), lengths)
        o, memory = ops.linear_attention(r, k, v, log_decay, bonus=self.bonus, scale=1.0, state=state.memory)
        y = self.ln_x(o.flatten(-2)) * F.silu(self.gate(xg))
        return self.output(y.to(x.dtype)), RWKVState(last, memory)
