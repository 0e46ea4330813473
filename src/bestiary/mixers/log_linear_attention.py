"""Log-linear Mamba-2 (Guo et al. 2025, arXiv:2506.04761): Mamba-2 with a memory for each scale of the past.

z, [v, k, q], dt, w = W_in x                          v: heads of P channels; q, k: N channels, shared by the heads
v, k, q = silu(conv([v, k, q]))                       causal, depthwise, 4 taps
dt = softplus(dt + b),  g = -dt exp(A_log)            log-decay, one number a head
lambda = softplus(L * w)                              weights of the levels, of each head and step
o_t = sum_l lambda_t[l] (S_t^(l))^T q_t               ops.log_linear_attention, which writes k_t (dt_t v_t)^T
y = W_out RMSNorm((o + D v) * silu(z))

The step's past is cut into buckets of 2^l steps, one for each bit of its position that is 1 (a Fenwick tree).
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from bestiary import ops, state
from bestiary.mixers import register
from bestiary.mixers.base import Mixer
from bestiary.mixers.parts import (
    Linear,
    RMSNorm,
    ShortConvolution,
    check_rate,
    default_heads,
    dt_bias_init,
    no_weight_decay,
)


@state.register
class LogLinearState(NamedTuple):
    """The last inputs of the convolution, and a matrix a head and level."""

    history: Float[Tensor, "batch taps_minus_1 channels"]
    memory: ops.FenwickState


@register("log_linear_attention")
class LogLinearAttention(Mixer):
    """Between linear attention and attention: recent steps are remembered apart, old ones in ever larger groups.

    Args:
        d_model: width of input and output.
        d_state: N; the paper's 128, or d_model where that is less.
        expand: inner width over d_model; its heads are of 64 channels (32 at small widths).
        n_levels: levels, that of the current step included; scales beyond 2^(n_levels - 2) steps share the last.
        conv_kernel: taps of the convolution.
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int | None = None,
        expand: float = 2.0,
        n_levels: int = 15,
        conv_kernel: int = 4,
    ):
        super().__init__(d_model)
        self.d_inner, self.n_levels = round(expand * d_model / 32) * 32, n_levels
        self.d_state = min(128, d_model) if d_state is None else d_state
        check_rate(d_state=self.d_state, inner_width=self.d_inner, levels_beside_the_first=n_levels - 1)
        self.n_heads = default_heads(self.d_inner)
        self.widths = [self.d_inner, self.d_inner + 2 * self.d_state, self.n_heads, self.n_heads * n_levels]
        self.in_proj = Linear(d_model, sum(self.widths), bias=False)
        self.conv = ShortConvolution(self.widths[1], conv_kernel, bias=True, activation="silu")
        self.dt_bias, self.A_log, self.D = (nn.Parameter(torch.empty(self.n_heads)) for _ in range(3))
        self.L = nn.Parameter(torch.empty(self.n_heads, n_levels))
        self.norm = RMSNorm(self.d_inner, eps=1e-5)
        self.out_proj = Linear(self.d_inner, d_model, bias=False)
        no_weight_decay(self.dt_bias, self.A_log, self.D, self.L)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for part in (self.in_proj, self.conv, self.norm, self.out_proj):
            part.reset_parameters()
        dt_bias_init(self.dt_bias)
        self.A_log.copy_(torch.arange(1, self.n_heads + 1).log())
        nn.init.ones_(self.D)
        nn.init.ones_(self.L)

    def initial_state(self, batch_size: int, *, device: Any = None, dtype: Any = None) -> LogLinearState:
        place: dict[str, Any] = {"device": self.own_device(device), "dtype": self.own_dtype(dtype)}
        sizes = self.n_levels - 1, self.n_heads, self.d_state, self.d_inner // self.n_heads
        return LogLinearState(
            self.conv.initial_state(batch_size, **place), ops.empty_fenwick(batch_size, *sizes, **place)
        )

    def mixing_flops(self, context: int) -> float:
        occupied = 1 + min(self.n_levels - 1, max(1, context).bit_length() / 2)  # of a position's bits, half are 1
        return self.conv.flops() + 5 * self.d_state * self.d_inner * occupied + 3 * self.d_inner

    def mix(
        self, x: Float[Tensor, "batch time d_model"], state: LogLinearState, lengths: Int[Tensor, " batch"] | None
    ) -> tuple[Float[Tensor, "batch time d_model"], LogLinearState]:
        z, vkq, dt, w = self.in_proj(x).split(self.widths, dim=-1)
        vkq, history = self.conv(vkq, state.history, lengths)
        exact = state.memory.memory.dtype
        v, k, q = vkq.to(exact).split([self.d_inner, self.d_state, self.d_state], dim=-1)
        v = v.unflatten(-1, (self.n_heads, -1))
        k, q = (part[:, :, None].expand(-1, -1, self.n_heads, -1) for part in (k, q))
        dt = F.softplus(dt.to(exact) + self.dt_bias.to(exact))
        weights = F.softplus(self.L.to(exact) * w.to(exact).unflatten(-1, self.L.shape))
        log_decay, values = -dt * self.A_log.to(exact).exp(), v * dt[..., None]
        o, memory = ops.log_linear_attention(
            q, k, values, log_decay, weights, scale=1.0, state=state.memory, lengths=lengths
        )
        y = (o + self.D.to(exact)[:, None] * v).flatten(-2)
        return self.out_proj(self.norm(y, z, gate_first=True).to(x.dtype)), LogLinearState(history, memory)
