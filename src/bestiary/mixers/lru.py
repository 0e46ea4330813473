"""LRU, the linear recurrent unit (Orvieto et al. 2023, arXiv:2303.06349).

lambda = exp(-exp(nu_log) + i exp(theta_log))         complex, on a ring in the unit disk to begin with
h_t = lambda h_{t-1} + gamma (B u_t)                  gamma = exp(gamma_log), sqrt(1 - |lambda|^2) to begin with
s_t = Re(C h_t) + D u_t                               ops.mimo_ssm; B and C are dense and complex
y = GLU(W gelu(s))
"""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from bestiary import ops, state
from bestiary.errors import UsageError
from bestiary.mixers import register
from bestiary.mixers.base import Mixer
from bestiary.mixers.context import Context
from bestiary.mixers.parts import Linear, Remembered, no_weight_decay, slow_learners


@state.register
class LRUState(NamedTuple):
    """h, as real and imaginary parts."""

    h: Float[Tensor, "batch d_state 2"]


@register("lru")
class LRU(Mixer):
    """A plain diagonal linear recurrence, no system in continuous time behind it; all is in its initialisation.

    Args:
        d_model: width of input and output.
        d_state: N, complex numbers of state; d_model by default.
        r_min, r_max: radii of the ring that the eigenvalues begin on (nearer to 1: a longer memory).
        max_phase: largest angle of an eigenvalue to begin with, in radians.
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int | None = None,
        r_min: float = 0.0,
        r_max: float = 1.0,
        max_phase: float = 6.28,
    ):
        super().__init__(d_model)
        n = self.d_state = d_model if d_state is None else d_state
        if n < 1 or not 0 <= r_min < r_max <= 1 or not 0 < max_phase <= 2 * math.pi:
            raise UsageError(
                f"lru wants d_state >= 1, 0 <= r_min < r_max <= 1 and 0 < max_phase <= 2 pi, "
                f"not d_state={n}, r_min={r_min}, r_max={r_max}, max_phase={max_phase}"
            )
        self.r_min, self.r_max, self.max_phase = r_min, r_max, max_phase
        self.nu_log, self.theta_log, self.gamma_log = (nn.Parameter(torch.empty(n)) for _ in range(3))
        self.B, self.C = nn.Parameter(torch.empty(n, d_model, 2)), nn.Parameter(torch.empty(d_model, n, 2))
        self.D = nn.Parameter(torch.empty(d_model))
        self.out = Linear(d_model, 2 * d_model)
        self.discrete = Remembered()
        slow_learners(self.nu_log, self.theta_log, self.gamma_log)
        no_weight_decay(self.D)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        area, turn = (torch.rand(self.d_state, dtype=torch.float64).clamp(1e-6, 1 - 1e-6) for _ in range(2))
        square = area * (self.r_max**2 - self.r_min**2) + self.r_min**2  # even on the ring
        self.nu_log.copy_((-0.5 * square.log()).log())
        self.theta_log.copy_((self.max_phase * turn).log())
        self.gamma_log.copy_(0.5 * torch.log1p(-square))
        self.B.normal_(std=(2 * self.d_model) ** -0.5)
        self.C.normal_(std=self.d_state**-0.5)
        self.D.normal_()
        self.out.reset_parameters()

    def system(
        self, dtype: torch.dtype
    ) -> tuple[Complex[Tensor, " d_state"], Complex[Tensor, "d_state d_model"], Complex[Tensor, "d_model d_state"]]:
        """(lambda, gamma B, C), computed in `dtype`."""
        nu, theta, gamma, B, C = (x.to(dtype) for x in (self.nu_log, self.theta_log, self.gamma_log, self.B, self.C))
        decay = torch.complex(-nu.exp(), theta.exp()).exp()
        return decay, torch.view_as_complex(gamma.exp()[:, None, None] * B), torch.view_as_complex(C)

    def initial_state(self, batch_size: int, *, device: Any = None, dtype: Any = None) -> LRUState:
        shape = (batch_size, self.d_state, 2)
        return LRUState(torch.zeros(shape, device=self.own_device(device), dtype=self.own_dtype(dtype)))

    def mixing_flops(self, context: int) -> float:
        return self.d_state * (8 * self.d_model + 8) + 5 * self.d_model

    def mix_in_context(
        self,
        x: Float[Tensor, "batch time d_model"],
        state: LRUState,
        lengths: Int[Tensor, " batch"] | None,
        context: Context,
    ) -> tuple[Float[Tensor, "batch time d_model"], LRUState]:
        if context.intervals is not None:
            raise UsageError("lru has no step size, so it cannot follow intervals between the steps; s5 can")
        exact = state.h.dtype
        with ops.full_precision(x):
            system = self.discrete.get(self.parameters(), lambda: self.system(exact), exact)
        y, h = ops.mimo_ssm(x, *system, self.D, state=state.h, lengths=lengths)
        return F.glu(self.out(F.gelu(y)), dim=-1), LRUState(h)
