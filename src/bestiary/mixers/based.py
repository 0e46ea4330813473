"""Based (Arora et al. 2024, arXiv:2402.18668): linear attention with a Taylor feature map, among short convolutions.

    q_t, k_t, v_t = phi(W_q x_t), phi(W_k x_t), W_v x_t          q, k of few channels (f = 16) a head
    phi(q).phi(k) = 1 + s + s^2 / 2,  s = q.k / sqrt(f)          the second-order Taylor series of exp(s), positive
    y_t = W_o (S_t^T q_t / (z_t.q_t + eps))                      ops.linear_attention without decay, normalised

The products q_i q_j are kept once for i <= j: 153 features in place of 273, the same function.

The other layers of a Based model are attention over a window of 64 or 128 steps back (attention{window=65} or 129) and,
the most of them, gated short convolutions (`based_conv`):

    u_t, g_t = W_u x_t, W_g x_t;    y_t = W_o (silu(conv_3(u)_t) * g_t)
"""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bestiary import ops, state
from bestiary.errors import UsageError
from bestiary.mixers import register
from bestiary.mixers.base import Mixer, keep_real
from bestiary.mixers.parts import Linear, ShortConvolution, check_heads, default_heads, gpt_init


@state.register
class BasedState(NamedTuple):
    """Sums over the past: phi(k) v^T, and phi(k) itself in the last column."""

    memory: Float[Tensor, "batch heads features value_dim_plus_1"]


@register("based")
class Based(Mixer):
    """Linear attention whose features approximate the softmax.

    Args:
        d_model: width of input and output.
        n_heads: heads; by default of 64 value channels (32 at small widths).
        feature_dim: channels f of queries and keys; the state holds 1 + f + f (f + 1) / 2 features a head.
        eps: added to the normaliser.
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int | None = None,
        feature_dim: int = 16,
        eps: float = 1e-12,
        residuals: int = 1,
    ):
        super().__init__(d_model)
        self.n_heads = default_heads(d_model) if n_heads is None else n_heads
        check_heads(self.n_heads, d_model=d_model)
        if feature_dim < 1:
            raise UsageError(f"feature_dim must be at least 1, not {feature_dim}")
        self.feature_dim, self.eps, self.residuals = feature_dim, eps, residuals
        self.value_dim = d_model // self.n_heads
        self.features = 1 + feature_dim + feature_dim * (feature_dim + 1) // 2
        self.qk = Linear(d_model, 2 * self.n_heads * feature_dim, bias=False)
        self.value = Linear(d_model, d_model, bias=False)
        self.out = Linear(d_model, d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        gpt_init(self.qk, self.d_model)
        gpt_init(self.value, self.d_model)
        gpt_init(self.out, self.d_model, residuals=self.residuals)

    def initial_state(self, batch_size: int, *, device: Any = None, dtype: Any = None) -> BasedState:
        shape = (batch_size, self.n_heads, self.features, self.value_dim + 1)
        return BasedState(torch.zeros(shape, device=self.own_device(device), dtype=self.own_dtype(dtype)))

    def mixing_flops(self, context: int) -> float:
        return self.n_heads * self.features * (4 * (self.value_dim + 1) + 4)

    def mix(
        self, x: Float[Tensor, "batch time d_model"], state: BasedState, lengths: Int[Tensor, " batch"] | None
    ) -> tuple[Float[Tensor, "batch time d_model"], BasedState]:
        q, k = (taylor(z.unflatten(-1, (self.n_heads, -1))) for z in self.qk(x).chunk(2, dim=-1))
        v = self.value(x).unflatten(-1, (self.n_heads, -1))
        k = keep_real(k, lengths)  # phi(0) is not 0: padding would count
        o, memory = ops.linear_attention(q, k, v, scale=1.0, normalise=True, eps=self.eps, state=state.memory)
        return self.out(o.flatten(-2)), BasedState(memory)


def taylor(x: Float[Tensor, "*batch f"]) -> Float[Tensor, "*batch features"]:
    """Features whose products are 1 + s + s^2 / 2, with s = x.y / sqrt(f)."""
    f = x.shape[-1]
    i, j = torch.triu_indices(f, f, device=x.device)
    weight = torch.where(i == j, x.new_tensor(math.sqrt(0.5 / f)), x.new_tensor(math.sqrt(1.0 / f)))
    return torch.cat([torch.ones_like(x[..., :1]), x * f**-0.25, x[..., i] * x[..., j] * weight], dim=-1)


@state.register
class BasedConvState(NamedTuple):
    """The last inputs of the convolution."""

    history: Float[Tensor, "batch taps_minus_1 channels"]


@register("based_conv")
class BasedConv(Mixer):
    """A gated short convolution; it sees a few steps back and no further.

    Args:
        d_model: width of input and output.
        expand: inner width over d_model.
        conv_kernel: taps of the convolution.
    """

    def __init__(self, d_model: int, *, expand: float = 2.0, conv_kernel: int = 3, residuals: int = 1):
        super().__init__(d_model)
        self.d_inner, self.residuals = round(expand * d_model), residuals
        if self.d_inner < 1:
            raise UsageError(f"expand must give at least one channel, not {expand}")
        self.up = Linear(d_model, 2 * self.d_inner)
        self.conv = ShortConvolution(self.d_inner, conv_kernel, activation="silu")
        self.out = Linear(self.d_inner, d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.conv.reset_parameters()
        gpt_init(self.up, self.d_model)
        gpt_init(self.out, self.d_model, residuals=self.residuals)

    def initial_state(self, batch_size: int, *, device: Any = None, dtype: Any = None) -> BasedConvState:
        return BasedConvState(
            self.conv.initial_state(batch_size, device=self.own_device(device), dtype=self.own_dtype(dtype))
        )

    def mixing_flops(self, context: int) -> float:
        return self.conv.flops() + 2 * self.d_inner

    def mix(
        self, x: Float[Tensor, "batch time d_model"], state: BasedConvState, lengths: Int[Tensor, " batch"] | None
    ) -> tuple[Float[Tensor, "batch time d_model"], BasedConvState]:
        u, gate = self.up(x).chunk(2, dim=-1)
        u, history = self.conv(u, state.history, lengths)
        return self.out(u * gate), BasedConvState(history)
