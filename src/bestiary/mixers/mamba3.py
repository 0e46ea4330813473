"""Mamba-3, single input and output (Lahoti et al. 2026, arXiv:2603.15569): Mamba-2 with a complex, second-order state.

z, x, B, C, dt, a, trap, theta = W_in u               no short convolution; x: heads of P channels
dt = softplus(dt + dt_bias),  A = -heavy(a),  lambda = sigmoid(trap)       each a number a head and step
phi_t = phi_{t-1} + pi tanh(theta_t) dt_t             angles, by which pairs of channels of B and C turn
k, q = R(phi) (rms(B) + b_B),  R(phi) (rms(C) + b_C)
h_t = alpha_t (h_{t-1} + (1 - lambda_t) dt_t k_{t-1} x_{t-1}^T) + lambda_t dt_t k_t x_t^T,   alpha_t = exp(dt_t A_t)
y = W_out ((h_t^T q_t + D x_t) * silu(z_t))           heavy(a) = 1 + a where a >= 0, else 1 / (1 - a)

The trapezoidal rule writes a token twice, at its own step and at the next. So h_t = m_t + lambda_t dt_t k_t x_t^T,
where m, all but the newest write, is a linear attention over the tokens before: step t takes in k_{t-1} x_{t-1}^T with
the weight alpha_t (lambda_{t-1} dt_{t-1} + (1 - lambda_t) dt_t), and nobody looks ahead. What is remembered is m, and
the newest write beside it, as key, value and weight.
"""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from bestiary import ops, state
from bestiary.errors import UsageError, unknown
from bestiary.mixers import register
from bestiary.mixers.base import Mixer, keep_real
from bestiary.mixers.context import Context
from bestiary.mixers.parts import Linear, RMSNorm, dt_bias_init, expanded_heads, no_weight_decay, time_gaps, token_shift
from bestiary.ops.short_convolution import last_inputs


@state.register
class Mamba3State(NamedTuple):
    """The angles, modulo 2 pi; m; the last step's key, turned, its value, and the weight of its own write."""

    angle: Float[Tensor, "batch heads angles"]
    memory: Float[Tensor, "batch heads d_state head_dim"]
    key: Float[Tensor, "batch heads d_state"]
    value: Float[Tensor, "batch heads head_dim"]
    weight: Float[Tensor, "batch heads"]


@register("mamba3")
class Mamba3(Mixer):
    """Tracks states that Mamba-2 cannot (parity, arithmetic): its memory turns as well as fades.

    Args:
        d_model: width of input and output.
        expand: inner width over d_model; rounded to whole heads.
        d_state: N; the paper's 128, or d_model where that is less.
        head_dim: P; 64, or 32 where the inner width is below 256 or no multiple of 64.
        n_groups: groups of heads that share B and C but for their biases.
        rope_fraction: share of B's and C's channels that turn (published: 0.5 and 1).
        decay: how A follows from the input: "heavy_tail", or "softplus" as in the first release.
    """

    timed = True

    def __init__(
        self,
        d_model: int,
        *,
        expand: float = 2.0,
        d_state: int | None = None,
        head_dim: int | None = None,
        n_groups: int = 1,
        rope_fraction: float = 0.5,
        decay: str = "heavy_tail",
        residuals: int = 1,
    ):
        super().__init__(d_model)
        self.d_state, self.head_dim, self.n_heads = expanded_heads(
            d_model, d_state=d_state, expand=expand, head_dim=head_dim, n_groups=n_groups
        )
        self.n_angles = int(self.d_state * rope_fraction) // 2
        if not 0 < rope_fraction <= 1 or not self.n_angles:
            raise UsageError(
                f"rope_fraction={rope_fraction} of d_state={self.d_state} must be in (0, 1] and give a pair of channels"
            )
        if decay not in ("heavy_tail", "softplus"):
            raise unknown("decay", decay, ("heavy_tail", "softplus"))
        self.n_groups, self.decay, self.residuals = n_groups, decay, residuals
        self.d_inner = self.n_heads * self.head_dim
        self.widths = [self.d_inner] * 2 + [n_groups * self.d_state] * 2 + [self.n_heads] * 3 + [self.n_angles]
        self.in_proj = Linear(d_model, sum(self.widths), bias=False)
        self.dt_bias, self.D = (nn.Parameter(torch.empty(self.n_heads)) for _ in range(2))
        self.B_bias, self.C_bias = (nn.Parameter(torch.empty(self.n_heads, self.d_state)) for _ in range(2))
        self.B_norm, self.C_norm = (RMSNorm(self.d_state, eps=1e-5) for _ in range(2))
        self.out_proj = Linear(self.d_inner, d_model, bias=False)
        no_weight_decay(self.dt_bias, self.D, self.B_bias, self.C_bias)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for part in (self.in_proj, self.B_norm, self.C_norm, self.out_proj):
            part.reset_parameters()
        self.out_proj.weight.div_(math.sqrt(self.residuals))
        dt_bias_init(self.dt_bias)
        for ones in (self.D, self.B_bias, self.C_bias):
            nn.init.ones_(ones)

    def initial_state(self, batch_size: int, *, device: Any = None, dtype: Any = None) -> Mamba3State:
        place: dict[str, Any] = {"device": self.own_device(device), "dtype": self.own_dtype(dtype)}
        shapes = [(self.n_angles,), (self.d_state, self.head_dim), (self.d_state,), (self.head_dim,), ()]
        return Mamba3State(*(torch.zeros(batch_size, self.n_heads, *shape, **place) for shape in shapes))

    def mixing_flops(self, context: int) -> float:
        directions = self.n_heads * (4 * self.d_state + 12 * self.n_angles)
        return 5 * self.d_state * self.d_inner + directions + 7 * self.d_inner

    def mix_in_context(
        self,
        x: Float[Tensor, "batch time d_model"],
        state: Mamba3State,
        lengths: Int[Tensor, " batch"] | None,
        context: Context,
    ) -> tuple[Float[Tensor, "batch time d_model"], Mamba3State]:
        gaps = time_gaps(context, x, lengths, state.memory.dtype)
        parts = (part.to(state.memory.dtype) for part in self.in_proj(x).split(self.widths, dim=-1))
        z, v, B, C, dt, a, trap, theta = parts
        dt = F.softplus(dt + self.dt_bias.to(dt.dtype))
        dt = keep_real(dt if gaps is None else dt * gaps[..., None], lengths)  # padding takes no time
        log_decay = dt * -self.rate(a).clamp(min=1e-4)
        now, late = dt * torch.sigmoid(trap), dt * torch.sigmoid(-trap)  # what is written at once, and a step late
        turns = math.pi * torch.tanh(theta)[:, :, None] * dt[..., None]
        angle = ops.sum_angles(state.angle, turns)
        k, q = self.directed(B, self.B_norm, self.B_bias, angle), self.directed(C, self.C_norm, self.C_bias, angle)
        v = v.unflatten(-1, (self.n_heads, -1))
        last_k, key = token_shift(k, state.key, lengths)
        last_v, value = token_shift(v, state.value, lengths)
        last_now, weight = token_shift(now, state.weight, lengths)
        taken = keep_real(log_decay.exp() * (last_now + late), lengths)
        o, m = ops.linear_attention(q, last_k, taken[..., None] * last_v, log_decay, scale=1.0, state=state.memory)
        y = o + (now * (q * k).sum(-1) + self.D.to(now.dtype))[..., None] * v
        end = Mamba3State(last_inputs(state.angle[:, None], angle, lengths)[:, 0], m, key, value, weight)
        return self.out_proj((y.flatten(-2) * F.silu(z)).to(x.dtype)), end

    def rate(self, a: Float[Tensor, "*batch heads"]) -> Float[Tensor, "*batch heads"]:
        """-A, positive, from the input."""
        return F.softplus(a) if self.decay == "softplus" else F.relu(a) + 1 / (1 - a.clamp(max=0))

    def directed(
        self, x: Tensor, norm: nn.Module, bias: Tensor, angle: Float[Tensor, "batch time heads angles"]
    ) -> Float[Tensor, "batch time heads d_state"]:
        """B or C of every head: normed, shifted by the head's bias, turned."""
        x = norm(x.unflatten(-1, (self.n_groups, -1))).repeat_interleave(self.n_heads // self.n_groups, dim=2)
        return ops.rotate_pairs(x + bias.to(x.dtype), angle)
