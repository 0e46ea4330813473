"""S4, the structured state-space model (Gu, Goel & Re 2021, arXiv:2111.00396): diagonal plus low rank.

    x'(t) = A x(t) + B u(t),  A = diag(L) - P P^*        HiPPO-LegS to begin with: a memory of all the past
    A_bar = (I - dt A/2)^-1 (I + dt A/2),  B_bar = (I - dt A/2)^-1 dt B            bilinear rule
    h_t = A_bar h_{t-1} + B_bar u_t,  s_t = C h_t + D u_t                          ops.dense_ssm
    y = GLU(W gelu(s))

The stored C is the system's own readout (not the C~ of a kernel cut at some length), so that lags are unlimited.
With times between the steps (`context.intervals`), dt is multiplied by them: ops.irregular_dplr_ssm.
"""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from bestiary import ops, state
from bestiary.errors import UsageError
from bestiary.mixers import register
from bestiary.mixers.base import Mixer
from bestiary.mixers.context import Context
from bestiary.mixers.parts import Linear, Remembered, no_weight_decay, slow_learners, time_gaps
from bestiary.ops import ssm


@state.register
class S4State(NamedTuple):
    """h: N real numbers a channel."""

    h: Float[Tensor, "batch channels d_state"]


@register("s4")
class S4(Mixer):
    """One linear, time-invariant system a channel that begins as an optimal memory, then a gated mixing of channels.

    Args:
        d_model: width of input and output.
        d_state: N, size of a channel's state; even.
    """

    timed = True

    def __init__(self, d_model: int, *, d_state: int = 64):
        super().__init__(d_model)
        if d_state < 2 or d_state % 2:
            raise UsageError(f"d_state must be even and at least 2, not {d_state}")
        self.d_state = d_state
        self.log_dt = nn.Parameter(torch.empty(d_model))
        self.log_A_real, self.A_imag = (nn.Parameter(torch.empty(d_model, d_state // 2)) for _ in range(2))
        self.P, self.B, self.C = (nn.Parameter(torch.empty(d_model, d_state // 2, 2)) for _ in range(3))
        self.D = nn.Parameter(torch.empty(d_model))
        self.out = Linear(d_model, 2 * d_model)
        slow_learners(self.log_dt, self.log_A_real, self.A_imag, self.P, self.B)
        no_weight_decay(self.D)
        self.discrete = Remembered()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        L, P, B, _ = ssm.legs_dplr(self.d_state)
        self.log_A_real.copy_((-L.real).log().expand_as(self.log_A_real))
        self.A_imag.copy_(L.imag.expand_as(self.A_imag))
        self.P.copy_(torch.view_as_real(P).expand_as(self.P))
        self.B.copy_(torch.view_as_real(B).expand_as(self.B))
        self.C.normal_(std=math.sqrt(0.5))  # a complex normal number of variance 1
        self.log_dt.uniform_(math.log(1e-3), math.log(1e-1))
        self.D.normal_()
        self.out.reset_parameters()

    def system(
        self, dtype: torch.dtype
    ) -> tuple[Float[Tensor, "channels n n"], Float[Tensor, "channels n"], Float[Tensor, "channels n"]]:
        """(A_bar, B_bar, C) as real matrices, computed in `dtype`."""
        L, P, B, C, dt = self.continuous(dtype)
        A, b, c = ssm.real_dplr(L, P, P, B, C)
        return *ssm.bilinear_dense(A, b, dt), c

    def continuous(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """(L, P, B, C, dt), computed in `dtype`."""
        P, B, C = (torch.view_as_complex(x.to(dtype)) for x in (self.P, self.B, self.C))
        L = torch.complex(-self.log_A_real.to(dtype).exp(), self.A_imag.to(dtype))
        return L, P, B, C, self.log_dt.to(dtype).exp()

    def initial_state(self, batch_size: int, *, device: Any = None, dtype: Any = None) -> S4State:
        shape = (batch_size, self.d_model, self.d_state)
        return S4State(torch.zeros(shape, device=self.own_device(device), dtype=self.own_dtype(dtype)))

    def mixing_flops(self, context: int) -> float:
        return self.d_model * (6 * self.d_state + 5)  # diagonal plus low rank, as the paper counts

    def mix_in_context(
        self,
        x: Float[Tensor, "batch time d_model"],
        state: S4State,
        lengths: Int[Tensor, " batch"] | None,
        context: Context,
    ) -> tuple[Float[Tensor, "batch time d_model"], S4State]:
        exact, gaps = state.h.dtype, time_gaps(context, x, lengths, state.h.dtype)
        if gaps is None:
            with ops.full_precision(x):
                system = self.discrete.get(self.parameters(), lambda: self.system(exact), exact)
            y, h = ops.dense_ssm(x, *system, self.D, state=state.h, lengths=lengths)
        else:
            with ops.full_precision(x):
                L, P, B, C, dt = self.continuous(exact)
            y, h = ops.irregular_dplr_ssm(x, gaps, L, P, B, C, dt, self.D, state=state.h, lengths=lengths)
        return F.glu(self.out(F.gelu(y)), dim=-1), S4State(h)
