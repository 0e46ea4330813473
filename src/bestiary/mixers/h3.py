"""H3, Hungry Hungry Hippos (Fu, Dao et al. 2022, arXiv:2212.14052).

q, k, v = W_q u + b_q, W_k u + b_k, W_v u + b_v
k' = SSM_shift(k) + D_k k                            a shift register of N steps, read by C: a filter of N taps
s = SSM_diag(k' v^T)                                 per head an outer product, each entry a diagonal system with skip D
y = W_o (q s) + b_o                                  ops.short_convolution, ops.diagonal_ssm

With times between the steps (`context.intervals`), the diagonal systems follow them; the shift register counts steps.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bestiary import ops, state
from bestiary.errors import UsageError
from bestiary.mixers import register
from bestiary.mixers.base import Mixer, keep_real
from bestiary.mixers.context import Context
from bestiary.mixers.parts import Linear, gpt_init, no_weight_decay, time_gaps
from bestiary.mixers.s4d import DiagonalSSM


@state.register
class H3State(NamedTuple):
    """The shift register, and h of the diagonal systems as real and imaginary parts."""

    history: Float[Tensor, "batch taps_minus_1 channels"]
    h: Float[Tensor, "batch systems half 2"]


@register("h3")
class H3(Mixer):
    """Two state-space models with multiplications between: the one compares with earlier tokens, the other remembers.

    Args:
        d_model: width of input and output.
        d_state: N, size of both systems' states.
        head_dim: channels of a head, whose head_dim squared products share a system (the published models have 1).
    """

    timed = True

    def __init__(self, d_model: int, *, d_state: int = 64, head_dim: int = 1, residuals: int = 1):
        super().__init__(d_model)
        if head_dim < 1 or d_model % head_dim:
            raise UsageError(f"head_dim={head_dim} must divide d_model={d_model}")
        self.head_dim, self.n_heads, self.residuals = head_dim, d_model // head_dim, residuals
        self.qkv = Linear(d_model, 3 * d_model)
        self.shift = nn.Parameter(torch.empty(d_model, d_state))  # lag 0 last, as in every short convolution
        self.shift_D = nn.Parameter(torch.empty(d_model))
        self.ssm = DiagonalSSM(self.n_heads, d_state, init="lin", rule="bilinear", shared=head_dim**2)
        self.out = Linear(d_model, d_model)
        no_weight_decay(self.shift_D)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        gpt_init(self.qkv, self.d_model)
        gpt_init(self.out, self.d_model, residuals=self.residuals)
        bound = self.shift.shape[1] ** -0.5
        nn.init.uniform_(self.shift, -bound, bound)
        nn.init.normal_(self.shift_D)
        self.ssm.reset_parameters()

    def initial_state(self, batch_size: int, *, device: Any = None, dtype: Any = None) -> H3State:
        place: dict[str, Any] = {"device": self.own_device(device), "dtype": self.own_dtype(dtype)}
        history = torch.zeros(batch_size, self.shift.shape[1] - 1, self.d_model, **place)
        return H3State(history, self.ssm.initial_state(batch_size, **place))

    def mixing_flops(self, context: int) -> float:
        return 2 * self.shift.numel() + self.ssm.flops() + self.d_model * (4 + 4 * self.head_dim)

    def mix_in_context(
        self,
        x: Float[Tensor, "batch time d_model"],
        state: H3State,
        lengths: Int[Tensor, " batch"] | None,
        context: Context,
    ) -> tuple[Float[Tensor, "batch time d_model"], H3State]:
        gaps = time_gaps(context, x, lengths, state.h.dtype)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        k = keep_real(k, lengths)
        shifted, history = ops.short_convolution(k, self.shift, state=state.history, lengths=lengths)
        shifted = shifted + self.shift_D * k
        q, k, v = (z.unflatten(-1, (self.n_heads, self.head_dim)) for z in (q, shifted, v))
        kv = keep_real((k[..., :, None] * v[..., None, :]).flatten(-3), lengths)
        s, h = self.ssm(kv, state.h, lengths, gaps)
        s = s.unflatten(-1, (self.n_heads, self.head_dim, self.head_dim))
        y = torch.einsum("bthi,bthij->bthj", q.to(s.dtype), s).flatten(-2)
        return self.out(y.to(self.out.weight.dtype)), H3State(history, h)
