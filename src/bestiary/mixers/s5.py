"""S5, the simplified state-space layer (Smith, Warrington & Linderman 2022, arXiv:2208.04933).

h_t = A_bar h_{t-1} + B_bar u_t                       one diagonal system for all channels: P/2 complex numbers
s_t = 2 Re(C h_t) + D u_t                             ops.mimo_ssm; B and C are dense and complex
y = g * sigmoid(W g),   g = gelu(s)

A_bar = exp(dt A), B_bar = (A_bar - 1) / A B          zero-order hold, dt a number a state
A = -exp(log_A_real) + i A_imag                       HiPPO-N to begin with (S4's, without the low rank), in blocks

With times between the steps (`context.intervals`), dt is multiplied by them.
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
class S5State(NamedTuple):
    """h, as real and imaginary parts."""

    h: Float[Tensor, "batch half 2"]


@register("s5")
class S5(Mixer):
    """S4D with one system that all channels write and read, in place of one a channel.

    Args:
        d_model: width of input and output.
        d_state: P, real size of the state; d_model by default.
        blocks: HiPPO systems that the state is made of at first; one for each 32 numbers by default.
        rule: discretisation, "zoh" or "bilinear".
    """

    timed = True

    def __init__(self, d_model: int, *, d_state: int | None = None, blocks: int | None = None, rule: str = "zoh"):
        super().__init__(d_model)
        self.d_state = d_model if d_state is None else d_state
        self.blocks = max(1, self.d_state // 32) if blocks is None else blocks
        if min(self.d_state, self.blocks) < 1 or self.d_state % (2 * self.blocks):
            raise UsageError(f"d_state={self.d_state} must be made of blocks={self.blocks} of an even size")
        if rule not in ssm.RULES:
            raise unknown("discretisation", rule, ssm.RULES)
        self.rule, half = rule, self.d_state // 2
        self.log_dt, self.log_A_real, self.A_imag = (nn.Parameter(torch.empty(half)) for _ in range(3))
        self.B, self.C = nn.Parameter(torch.empty(half, d_model, 2)), nn.Parameter(torch.empty(d_model, half, 2))
        self.D = nn.Parameter(torch.empty(d_model))
        self.gate = Linear(d_model, d_model)
        self.discrete = Remembered()
        slow_learners(self.log_dt, self.log_A_real, self.A_imag, self.B)
        no_weight_decay(self.D)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        size = self.d_state // self.blocks
        A, _, _, basis = ssm.legs_dplr(size)
        basis = basis[:, : size // 2]
        self.log_A_real.copy_((-A.real).log().repeat(self.blocks))
        self.A_imag.copy_(A.imag.repeat(self.blocks))
        self.log_dt.uniform_(math.log(1e-3), math.log(1e-1))
        B = _lecun(self.blocks, size, self.d_model, fan_in=self.d_state).to(basis.dtype)
        self.B.copy_(torch.view_as_real((basis.mH @ B).flatten(0, 1)))
        C = torch.view_as_complex(_lecun(self.d_model, self.blocks, size, 2, fan_in=self.d_state))
        self.C.copy_(torch.view_as_real((C @ basis).flatten(1)))
        self.D.normal_()
        self.gate.reset_parameters()

    def continuous(
        self, dtype: torch.dtype
    ) -> tuple[
        Complex[Tensor, " half"],
        Float[Tensor, " half"],
        Complex[Tensor, "half d_model"],
        Complex[Tensor, "d_model half"],
    ]:
        """(dt A, dt, B, 2 C), computed in `dtype`."""
        log_dt, real, imag = (x.to(dtype) for x in (self.log_dt, self.log_A_real, self.A_imag))
        B, C = (torch.view_as_complex(x.to(dtype)) for x in (self.B, self.C))
        dt = log_dt.exp()
        return dt * torch.complex(-real.exp(), imag), dt, B, 2 * C

    def system(
        self, dtype: torch.dtype
    ) -> tuple[Complex[Tensor, " half"], Complex[Tensor, "half d_model"], Complex[Tensor, "d_model half"]]:
        """(A_bar, B_bar, 2 C), computed in `dtype`."""
        x, dt, B, C = self.continuous(dtype)
        A_bar, gain = ssm.RULES[self.rule](x)
        return A_bar, (dt * gain)[:, None] * B, C

    def initial_state(self, batch_size: int, *, device: Any = None, dtype: Any = None) -> S5State:
        shape = (batch_size, self.d_state // 2, 2)
        return S5State(torch.zeros(shape, device=self.own_device(device), dtype=self.own_dtype(dtype)))

    def mixing_flops(self, context: int) -> float:
        return self.d_state // 2 * (8 * self.d_model + 8) + 4 * self.d_model

    def mix_in_context(
        self,
        x: Float[Tensor, "batch time d_model"],
        state: S5State,
        lengths: Int[Tensor, " batch"] | None,
        context: Context,
    ) -> tuple[Float[Tensor, "batch time d_model"], S5State]:
        exact, gaps = state.h.dtype, time_gaps(context, x, lengths, state.h.dtype)
        gain = None
        with ops.full_precision(x):
            if gaps is None:
                A_bar, B, C = self.discrete.get(self.parameters(), lambda: self.system(exact), exact)
            else:
                step, dt, B, C = self.continuous(exact)
                A_bar, gain = ssm.RULES[self.rule](gaps[..., None] * step)
                gain = gaps[..., None] * dt * gain
        y, h = ops.mimo_ssm(x, A_bar, B, C, self.D, gain=gain, state=state.h, lengths=lengths)
        g = F.gelu(y)
        return g * torch.sigmoid(self.gate(g)), S5State(h)


def _lecun(*shape: int, fan_in: int) -> Tensor:
    """LeCun's normal distribution of variance 1 / fan_in, cut at two deviations; float64."""
    std = fan_in**-0.5 / 0.8796256610342398  # which the cut makes smaller
    return nn.init.trunc_normal_(torch.empty(shape, dtype=torch.float64), std=std, a=-2 * std, b=2 * std)
