"""Linear attention with the feature map elu + 1 (Katharopoulos et al. 2020, arXiv:2006.16236).

q_t, k_t, v_t = phi(W_q x_t), phi(W_k x_t), W_v x_t          phi = elu + 1, split over heads
S_t = S_{t-1} + k_t v_t^T,  z_t = z_{t-1} + k_t              ops.linear_attention without decay
y_t = W_o (S_t^T q_t / (z_t.q_t + eps))
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from bestiary import ops, state
from bestiary.mixers import register
from bestiary.mixers.base import Mixer, keep_real
from bestiary.mixers.parts import Linear, check_heads, default_heads


@state.register
class LinearAttentionState(NamedTuple):
    """Sums over the past: k v^T, and k itself in the last column."""

    memory: Float[Tensor, "batch heads key_dim value_dim_plus_1"]


@register("linear_attention")
class LinearAttention(Mixer):
    """Attention whose kernel factorises, so that the past fits into a matrix; it never forgets.

    Args:
        d_model: width of input and output.
        n_heads: heads; by default of 64 channels (32 at small widths).
        eps: added to the normaliser.
    """

    def __init__(self, d_model: int, *, n_heads: int | None = None, eps: float = 1e-6):
        super().__init__(d_model)
        self.n_heads = default_heads(d_model) if n_heads is None else n_heads
        check_heads(self.n_heads, d_model=d_model)
        self.head_dim, self.eps = d_model // self.n_heads, eps
        self.qkv = Linear(d_model, 3 * d_model, bias=False)
        self.out = Linear(d_model, d_model, bias=False)

    def reset_parameters(self) -> None:
        self.qkv.reset_parameters()
        self.out.reset_parameters()

    def initial_state(self, batch_size: int, *, device: Any = None, dtype: Any = None) -> LinearAttentionState:
        shape = (batch_size, self.n_heads, self.head_dim, self.head_dim + 1)
        return LinearAttentionState(torch.zeros(shape, device=self.own_device(device), dtype=self.own_dtype(dtype)))

    def mixing_flops(self, context: int) -> float:
        return 4 * self.d_model * (self.head_dim + 1)

    def mix(
        self, x: Float[Tensor, "batch time d_model"], state: LinearAttentionState, lengths: Int[Tensor, " batch"] | None
    ) -> tuple[Float[Tensor, "batch time d_model"], LinearAttentionState]:
        q, k, v = (z.unflatten(-1, (self.n_heads, -1)) for z in self.qkv(x).chunk(3, dim=-1))
        q, k = F.elu(q) + 1, keep_real(F.elu(k) + 1, lengths)  # phi(0) = 1: padding would count
        o, memory = ops.linear_attention(q, k, v, scale=1.0, normalise=True, eps=self.eps, state=state.memory)
        return self.out(o.flatten(-2)), LinearAttentionState(memory)
