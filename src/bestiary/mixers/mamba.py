"""Mamba, the selective state-space model S6 (Gu & Dao 2023, arXiv:2312.00752).

x, z = W_in u                                         d_inner = expand * d_model channels each
x = silu(conv(x))                                     causal, depthwise, 4 taps
dt, B, C = W_x x;   dt = softplus(W_dt dt + b)        the parts that depend on the input
h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t              A = -exp(A_log), diagonal: ops.selective_scan
y = W_out ((C_t.h_t + D x_t) * silu(z_t))

FalconMamba (arXiv:2410.05355) takes dt, B and C of unit mean square: `norm_dt_bc`. Jamba (arXiv:2403.19887) gives these
norms weights.
"""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bestiary import ops, state
from bestiary.errors import UsageError, unknown
from bestiary.mixers import register
from bestiary.mixers.base import Mixer
from bestiary.mixers.context import Context
from bestiary.mixers.parts import Linear, RMSNorm, ShortConvolution, dt_bias_init, no_weight_decay, time_gaps
from bestiary.ops import ssm

RULES = ("euler", *ssm.RULES)


@state.register
class MambaState(NamedTuple):
    """The last inputs of the convolution, and h: d_state numbers a channel."""

    history: Float[Tensor, "batch taps_minus_1 channels"]
    h: Float[Tensor, "batch channels d_state"]


@register("mamba")
class Mamba(Mixer):
    """A block of its own: it expands, convolves, scans and gates, and needs no channel mixer.

    Args:
        d_model: width of input and output.
        d_state: N, numbers of state a channel.
        expand: inner width over d_model.
        conv_kernel: taps of the convolution.
        dt_rank: rank of the step size's projection; d_model / 16 by default, rounded up.
        norm_dt_bc: RMS norms of B, C and dt (before its rise): false, true (FalconMamba), or "weighted" (Jamba).
        norm_eps: their epsilon.
        discretisation: "euler" as published (exp(dt A) and dt B), "zoh" (zero-order hold, exact) or "bilinear".
    """

    channel_mixer = None
    timed = True

    unpacked = ("dt_proj",)

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 16,
        expand: float = 2.0,
        conv_kernel: int = 4,
        dt_rank: int | None = None,
        norm_dt_bc: bool | str = False,
        norm_eps: float = 1e-6,
        discretisation: str = "euler",
        residuals: int = 1,
    ):
        super().__init__(d_model)
        self.d_inner, self.d_state, self.residuals = round(expand * d_model), d_state, residuals
        self.dt_rank = math.ceil(d_model / 16) if dt_rank is None else dt_rank
        if min(self.d_inner, d_state, self.dt_rank) < 1:
            raise UsageError(
                f"expand={expand}, d_state={d_state} and dt_rank={dt_rank} must give at least one channel each"
            )
        if norm_dt_bc not in (False, True, "weighted"):
            raise unknown("norm_dt_bc", str(norm_dt_bc), ("false", "true", "weighted"))
        if discretisation not in RULES:
            raise unknown("discretisation", str(discretisation), RULES)
        self.discretisation, self.widths = discretisation, [self.dt_rank, d_state, d_state]
        self.in_proj = Linear(d_model, 2 * self.d_inner, bias=False)
        self.conv = ShortConvolution(self.d_inner, conv_kernel, bias=True, activation="silu")
        self.x_proj = Linear(self.d_inner, sum(self.widths), bias=False)
        self.norms = nn.ModuleList()
        if norm_dt_bc:
            weighted = norm_dt_bc == "weighted"
            self.norms.extend(RMSNorm(n, eps=norm_eps, elementwise_affine=weighted) for n in self.widths)
        self.dt_proj = Linear(self.dt_rank, self.d_inner)
        self.A_log = nn.Parameter(torch.empty(self.d_inner, d_state))
        self.D = nn.Parameter(torch.empty(self.d_inner))
        self.out_proj = Linear(self.d_inner, d_model, bias=False)
        no_weight_decay(self.A_log, self.D, self.dt_proj.bias)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for part in (self.in_proj, self.conv, self.x_proj, *self.norms, self.out_proj):
            part.reset_parameters()
        self.out_proj.weight.div_(math.sqrt(self.residuals))
        bound = self.dt_rank**-0.5
        nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        dt_bias_init(self.dt_proj.bias)
        self.A_log.copy_(torch.arange(1, self.d_state + 1).log().expand_as(self.A_log))  # S4D-real
        nn.init.ones_(self.D)

    def initial_state(self, batch_size: int, *, device: Any = None, dtype: Any = None) -> MambaState:
        place: dict[str, Any] = {"device": self.own_device(device), "dtype": self.own_dtype(dtype)}
        h = torch.zeros(batch_size, self.d_inner, self.d_state, **place)
        return MambaState(self.conv.initial_state(batch_size, **place), h)

    def mixing_flops(self, context: int) -> float:
        return self.conv.flops() + 9 * self.d_inner * self.d_state + 3 * self.d_inner

    def mix_in_context(
        self,
        x: Float[Tensor, "batch time d_model"],
        state: MambaState,
        lengths: Int[Tensor, " batch"] | None,
        context: Context,
    ) -> tuple[Float[Tensor, "batch time d_model"], MambaState]:
        gaps = time_gaps(context, x, lengths, state.h.dtype)
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x, history = self.conv(x, state.history, lengths)
        parts = self.x_proj(x).split(self.widths, dim=-1)
        dt, B, C = (norm(part) for norm, part in zip(self.norms, parts)) if self.norms else parts
        dt = ops.linear(dt, self.dt_proj.weight)  # the bias is added in the precision of the state
        A = -self.A_log.to(state.h.dtype).exp()
        options: dict[str, Any] = {"dt_softplus": True, "discretisation": self.discretisation, "intervals": gaps}
        y, h = ops.selective_scan(
            x, dt, A, B, C, self.D, z=z, dt_bias=self.dt_proj.bias, state=state.h, lengths=lengths, **options
        )
        return self.out_proj(y), MambaState(history, h)
