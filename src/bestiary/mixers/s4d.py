"""S4D, the diagonal state-space model (Gu et al. 2022, arXiv:2206.11893).

h_t = A_bar h_{t-1} + B_bar u_t                      a channel: N/2 complex numbers, one of each conjugate pair
s_t = 2 Re(C . h_t) + D u_t                          ops.diagonal_ssm
y = GLU(W gelu(s))

A = -exp(log_A_real) + i A_imag;  A_bar = exp(dt A), B_bar = (A_bar - 1) / A            zero-order hold, B = 1

With times between the steps (`context.intervals`), dt is multiplied by them: ops.irregular_diagonal_ssm.
"""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from bestiary import ops, state
from bestiary.errors import UsageError, unknown
from bestiary.mixers import register
from bestiary.mixers.base import Mixer
from bestiary.mixers.context import Context
from bestiary.mixers.parts import Linear, Remembered, no_weight_decay, slow_learners, time_gaps
from bestiary.ops import ssm


@state.register
class S4DState(NamedTuple):
    """h, as real and imaginary parts."""

    h: Float[Tensor, "batch channels half 2"]


class DiagonalSSM(nn.Module):
    """The parameters of one diagonal system a channel, and the recurrence; a part of S4D and of H3.

    Args:
        channels: number of systems.
        d_state: N, real size of each state; even.
        init: "lin", "inv" or "legs", the eigenvalues to begin with.
        rule: "zoh" or "bilinear", the discretisation.
        shared: neighbouring channels of the input that go through each system, each with a state of its own.
    """

    def __init__(self, channels: int, d_state: int, *, init: str = "lin", rule: str = "zoh", shared: int = 1):
        super().__init__()
        if d_state < 2 or d_state % 2:
            raise UsageError(f"d_state must be even and at least 2, not {d_state}")
        if init not in ("lin", "inv", "legs"):
            raise unknown("init of the eigenvalues", init, ("lin", "inv", "legs"))
        if rule not in ssm.RULES:
            raise unknown("discretisation", rule, ssm.RULES)
        half = d_state // 2
        self.init, self.rule, self.shared = init, rule, shared
        self.log_dt = nn.Parameter(torch.empty(channels))
        self.log_A_real, self.A_imag = (nn.Parameter(torch.empty(channels, half)) for _ in range(2))
        self.C = nn.Parameter(torch.empty(channels, half, 2))
        self.D = nn.Parameter(torch.empty(channels))
        slow_learners(self.log_dt, self.log_A_real, self.A_imag)
        no_weight_decay(self.D)
        self.discrete = Remembered()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        half = self.C.shape[1]
        legs, _, B, _ = ssm.legs_dplr(2 * half)
        A = {"lin": ssm.s4d_lin(half), "inv": ssm.s4d_inv(half), "legs": legs}[self.init]
        self.log_A_real.copy_((-A.real).log().expand_as(self.log_A_real))
        self.A_imag.copy_(A.imag.expand_as(self.A_imag))
        self.log_dt.uniform_(math.log(1e-3), math.log(1e-1))
        self.C.normal_(std=math.sqrt(0.5))  # a complex normal number of variance 1
        if self.init == "legs":  # its B is HiPPO's, not 1; only the product of B and C counts
            self.C.copy_(torch.view_as_real(torch.view_as_complex(self.C) * B.to(torch.complex64)))
        self.D.normal_()

    def continuous(
        self, dtype: torch.dtype
    ) -> tuple[Complex[Tensor, "channels half"], Complex[Tensor, "channels half"], Float[Tensor, " channels"]]:
        """(A, C, dt) of each system, computed in `dtype`; B is 1."""
        log_dt, real, imag, C = (x.to(dtype) for x in (self.log_dt, self.log_A_real, self.A_imag, self.C))
        return torch.complex(-real.exp(), imag), torch.view_as_complex(C), log_dt.exp()

    def system(
        self, dtype: torch.dtype
    ) -> tuple[Complex[Tensor, "channels half"], Complex[Tensor, "channels half"], Complex[Tensor, "channels half"]]:
        """(A_bar, B_bar, C) of each channel, computed in `dtype`."""
        A, C, dt = self.continuous(dtype)
        discretise = ssm.zoh if self.rule == "zoh" else ssm.bilinear
        A_bar, B_bar = discretise(A, torch.ones_like(A), dt[:, None])
        return self.spread(A_bar), self.spread(B_bar), self.spread(C)

    def spread(self, x: Float[Tensor, "systems *rest"] | Complex[Tensor, "systems *rest"]) -> Tensor:
        """What belongs to each system, for each of its channels."""
        return x.repeat_interleave(self.shared, dim=0)

    def initial_state(
        self, batch_size: int, *, dtype: torch.dtype, device: torch.device | str
    ) -> Float[Tensor, "batch channels half 2"]:
        systems, half, _ = self.C.shape
        return torch.zeros(batch_size, systems * self.shared, half, 2, dtype=dtype, device=device)

    def forward(
        self,
        u: Float[Tensor, "batch time channels"],
        state: Float[Tensor, "batch channels half 2"],
        lengths: Int[Tensor, " batch"] | None,
        gaps: Float[Tensor, "batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time channels"], Float[Tensor, "batch channels half 2"]]:
        D = self.spread(self.D)
        with ops.full_precision(u):
            if gaps is None:
                system = self.discrete.get(self.parameters(), lambda: self.system(state.dtype), state.dtype)
                return ops.diagonal_ssm(u, *system, D, state=state, lengths=lengths)
            A, C, dt = (self.spread(x) for x in self.continuous(state.dtype))
        return ops.irregular_diagonal_ssm(
            u, gaps, A, torch.ones_like(A), C, dt, D, rule=self.rule, state=state, lengths=lengths
        )

    def flops(self) -> float:
        """Forward FLOPs a step: a complex multiply-add, and the reading."""
        return self.shared * self.C.shape[0] * (12.0 * self.C.shape[1] + 2)


@register("s4d")
class S4D(Mixer):
    """One linear, time-invariant, diagonal system a channel, then a gated mixing of the channels.

    Args:
        d_model: width of input and output.
        d_state: N, real size of a channel's state.
        init: eigenvalues to begin with: "lin" (frequencies at equal distances), "inv" or "legs".
        rule: discretisation, "zoh" or "bilinear".
    """

    timed = True

    def __init__(self, d_model: int, *, d_state: int = 64, init: str = "lin", rule: str = "zoh"):
        super().__init__(d_model)
        self.ssm = DiagonalSSM(d_model, d_state, init=init, rule=rule)
        self.out = Linear(d_model, 2 * d_model)

    def reset_parameters(self) -> None:
        self.ssm.reset_parameters()
        self.out.reset_parameters()

    def initial_state(self, batch_size: int, *, device: Any = None, dtype: Any = None) -> S4DState:
        return S4DState(self.ssm.initial_state(batch_size, device=self.own_device(device), dtype=self.own_dtype(dtype)))

    def mixing_flops(self, context: int) -> float:
        return self.ssm.flops() + 3 * self.d_model

    def mix_in_context(
        self,
        x: Float[Tensor, "batch time d_model"],
        state: S4DState,
        lengths: Int[Tensor, " batch"] | None,
        context: Context,
    ) -> tuple[Float[Tensor, "batch time d_model"], S4DState]:
        y, h = self.ssm(x, state.h, lengths, time_gaps(context, x, lengths, state.h.dtype))
        return F.glu(self.out(F.gelu(y)), dim=-1), S4DState(h)
