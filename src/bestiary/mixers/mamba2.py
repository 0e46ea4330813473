"""Mamba-2, state-space duality (Dao & Gu 2024, arXiv:2405.21060): Mamba with one decay a head, so a linear attention.

z, x, B, C, dt = W_in u                               x: heads of P channels; B, C: N channels, one for a group of heads
x, B, C = silu(conv([x, B, C]))                       causal, depthwise, 4 taps
dt = softplus(dt + b),  A = -exp(A_log)               one number a head
h_t = exp(dt_t A) h_{t-1} + B_t (dt_t x_t)^T          ops.linear_attention with q = C, k = B, v = dt x
y = W_out RMSNorm((h_t^T C_t + D x_t) * silu(z_t))
"""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from bestiary import ops, state
from bestiary.mixers import register
from bestiary.mixers.base import Mixer, keep_real
from bestiary.mixers.context import Context
from bestiary.mixers.parts import Linear, ShortConvolution, dt_bias_init, expanded_heads, no_weight_decay, time_gaps


@state.register
class Mamba2State(NamedTuple):
    """The last inputs of the convolution, and h: a matrix a head."""

    history: Float[Tensor, "batch taps_minus_1 channels"]
    h: Float[Tensor, "batch heads d_state head_dim"]


@register("mamba2")
class Mamba2(Mixer):
    """A block of its own, as Mamba is; its state is larger and its scan made of matrix products.

    Args:
        d_model: width of input and output.
        d_state: N; the paper's 128, or d_model where that is less.
        expand: inner width over d_model; rounded to whole heads.
        head_dim: P; 64, or 32 where the inner width is below 256 or no multiple of 64.
        n_groups: groups of heads that share B and C.
        conv_kernel: taps of the convolution.
    """

    channel_mixer = None
    timed = True

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int | None = None,
        expand: float = 2.0,
        head_dim: int | None = None,
        n_groups: int = 1,
        conv_kernel: int = 4,
        residuals: int = 1,
    ):
        super().__init__(d_model)
        self.d_state, head_dim, self.n_heads = expanded_heads(
            d_model, d_state=d_state, expand=expand, head_dim=head_dim, n_groups=n_groups
        )
        self.head_dim, self.n_groups, self.residuals = head_dim, n_groups, residuals
        self.d_inner = self.n_heads * head_dim
        self.widths = [self.d_inner, self.d_inner + 2 * n_groups * self.d_state, self.n_heads]
        self.in_proj = Linear(d_model, sum(self.widths), bias=False)
        self.conv = ShortConvolution(self.widths[1], conv_kernel, bias=True, activation="silu")
        self.dt_bias = nn.Parameter(torch.empty(self.n_heads))
        self.A_log = nn.Parameter(torch.empty(self.n_heads))
        self.D = nn.Parameter(torch.empty(self.n_heads))
        self.norm_weight = nn.Parameter(torch.empty(self.d_inner))
        self.out_proj = Linear(self.d_inner, d_model, bias=False)
        no_weight_decay(self.dt_bias, self.A_log, self.D, self.norm_weight)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for part in (self.in_proj, self.conv, self.out_proj):
            part.reset_parameters()
        self.out_proj.weight.div_(math.sqrt(self.residuals))
        dt_bias_init(self.dt_bias)
        self.A_log.uniform_(1, 16).log_()
        nn.init.ones_(self.D)
        nn.init.ones_(self.norm_weight)

    def initial_state(self, batch_size: int, *, device: Any = None, dtype: Any = None) -> Mamba2State:
        place: dict[str, Any] = {"device": self.own_device(device), "dtype": self.own_dtype(dtype)}
        h = torch.zeros(batch_size, self.n_heads, self.d_state, self.head_dim, **place)
        return Mamba2State(self.conv.initial_state(batch_size, **place), h)

    def mixing_flops(self, context: int) -> float:
        return self.conv.flops() + 5 * self.d_state * self.d_inner + 3 * self.d_inner

    def mix_in_context(
        self,
        x: Float[Tensor, "batch time d_model"],
        state: Mamba2State,
        lengths: Int[Tensor, " batch"] | None,
        context: Context,
    ) -> tuple[Float[Tensor, "batch time d_model"], Mamba2State]:
        gaps = time_gaps(context, x, lengths, state.h.dtype)
        z, xBC, dt = self.in_proj(x).split(self.widths, dim=-1)
        xBC, history = self.conv(xBC, state.history, lengths)
        x, B, C = xBC.split([self.d_inner, *[self.n_groups * self.d_state] * 2], dim=-1)
        exact = state.h.dtype
        dt = keep_real(F.softplus(dt.to(exact) + self.dt_bias.to(exact)), lengths)  # padding takes no time
        dt = dt if gaps is None else dt * gaps[..., None]
        log_decay = -dt * self.A_log.to(exact).exp()
        heads = x.unflatten(-1, (self.n_heads, -1)).to(exact)
        B, C = (part.unflatten(-1, (self.n_groups, -1)) for part in (B, C))
        y, h = ops.linear_attention(C, B, heads * dt[..., None], log_decay, scale=1.0, state=state.h)
        y = (y + self.D.to(exact)[:, None] * heads).flatten(-2)
        y, z = (part.unflatten(-1, (self.n_groups, -1)) for part in (y, z))
        weight = self.norm_weight.unflatten(0, (self.n_groups, -1))
        y = ops.rms_norm(y, weight, eps=1e-5, gate=z, gate_first=True).flatten(-2)
        return self.out_proj(y.to(xBC.dtype)), Mamba2State(history, h)
