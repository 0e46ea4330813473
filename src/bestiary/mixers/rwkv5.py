"""RWKV-5 "Eagle", its time mixing (Peng et al. 2024, arXiv:2404.05892): RWKV-4 with a matrix a head.

mix(m) = m x_t + (1 - m) x_{t-1}                     token shift, m a channel's own
r_t, k_t, v_t, g_t = W_r mix(mix_r), W_k mix(mix_k), W_v mix(mix_v), silu(W_g mix(mix_g))
S_t = diag(exp(w)) S_{t-1} + k_t v_t^T               the recurrence: ops.linear_attention with a bonus u
o_t = (S_{t-1} + diag(u) k_t v_t^T)^T r_t
y_t = W_o (GroupNorm(o_t) g_t),   w = -exp(time_decay), u = bonus, a channel's own

RWKV-5.1 came before: no gate g, and one decay w and one bonus u = exp(time_first) a head.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from bestiary import ops
from bestiary.errors import UsageError
from bestiary.mixers import register
from bestiary.mixers.base import keep_real
from bestiary.mixers.parts import Linear, no_weight_decay, orthogonal_init, token_shift
from bestiary.mixers.rwkv import GN_EPS, RWKVHeads, RWKVState, bonus_init, decay_init


@register("rwkv5")
class RWKV5(RWKVHeads):
    """Linear attention with fixed decays and a bonus for the current step.

    Args:
        d_model: width of input and output.
        version: 5.2, or 5.1.
        head_size: channels a head; 64, or 32 where d_model is below 256 or no multiple of 64.
        gn_eps: epsilon of the norm a head; some converted files want 1e-5.
        train_state: whether the memory before the first step is a parameter instead of zero.
    """

    channel_mixer = "rwkv5_channel_mix"

    def __init__(
        self,
        d_model: int,
        *,
        version: float | str = 5.2,
        head_size: int | None = None,
        gn_eps: float = GN_EPS,
        train_state: bool = False,
        layer_index: int = 0,
        n_layers: int = 1,
    ):
        super().__init__(d_model, head_size, gn_eps, train_state, layer_index, n_layers)
        if str(version) not in ("5.1", "5.2"):
            raise UsageError(f"version must be 5.1 or 5.2, not {version!r}")
        self.by_head = str(version) == "5.1"
        self.mix_k, self.mix_v, self.mix_r = (nn.Parameter(torch.empty(d_model)) for _ in range(3))
        if self.by_head:
            self.time_decay, self.time_first = (nn.Parameter(torch.empty(self.n_heads)) for _ in range(2))
            self.time_first._lr_scale = 3.0  # type: ignore[attr-defined]
        else:
            shape = (self.n_heads, self.head_size)
            self.time_decay, self.bonus = (nn.Parameter(torch.empty(shape)) for _ in range(2))
            self.mix_g, self.gate = nn.Parameter(torch.empty(d_model)), Linear(d_model, d_model, bias=False)
            no_weight_decay(self.time_decay, self.bonus)
        self.time_decay._lr_scale = 2.0  # type: ignore[attr-defined]
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        share = torch.arange(self.d_model) / self.d_model
        self.mix_k.copy_(share**self.shallow)
        self.mix_v.copy_(share**self.shallow + 0.3 * self.deep)
        self.mix_r.copy_(share ** (0.5 * self.shallow))
        decay_init(self.time_decay, self.deep)
        if self.by_head:
            nn.init.constant_(self.time_first, -3.0)
        else:
            bonus_init(self.bonus, self.deep)
            self.mix_g.copy_(self.mix_r)
            orthogonal_init(self.gate)
        for linear in (self.receptance, self.key, self.value):
            orthogonal_init(linear)

    def mixing_flops(self, context: int) -> float:
        return (5 * self.head_size + 25) * self.d_model

    def rates(self, dtype: torch.dtype) -> tuple[Float[Tensor, "heads head_size"], Float[Tensor, "heads head_size"]]:
        """Log-decay and bonus of each channel."""
        log_decay = -self.time_decay.to(dtype).exp()
        if not self.by_head:
            return log_decay, self.bonus.to(dtype)
        return tuple(z[:, None].expand(-1, self.head_size) for z in (log_decay, self.time_first.to(dtype).exp()))  # type: ignore[return-value]

    def mix(
        self, x: Float[Tensor, "batch time d_model"], state: RWKVState, lengths: Int[Tensor, " batch"] | None
    ) -> tuple[Float[Tensor, "batch time d_model"], RWKVState]:
        before, last = token_shift(x, state.x, lengths)
        exact = state.memory.dtype
        r, k, v = (
            self.heads(linear(torch.lerp(before, x, mix.to(x.dtype)))).to(exact)
            for linear, mix in ((self.receptance, self.mix_r), (self.key, self.mix_k), (self.value, self.mix_v))
        )
        log_decay, bonus = self.rates(exact)
        k, log_decay = keep_real(k, lengths), keep_real(log_decay.expand_as(k), lengths)
        o, memory = ops.linear_attention(r, k, v, log_decay, bonus=bonus, scale=1.0, state=state.memory)
        y = self.ln_x(o.flatten(-2))
        if not self.by_head:
            y = y * F.silu(self.gate(torch.lerp(before, x, self.mix_g.to(x.dtype))))
        return self.output(y.to(x.dtype)), RWKVState(last, memory)
