"""Softmax attention (Vaswani et al. 2017, arXiv:1706.03762), the baseline: its state grows with the sequence.

q_t, k_t, v_t = W_q x_t, W_k x_t, W_v x_t           split over heads; rotary positions turn q and k
o_t = sum_s softmax_s(q_t.k_s / sqrt(K)) v_s        over s <= t, or the last `window` steps: ops.attention
y_t = W_o o_t
"""

from typing import Any, ClassVar

from jaxtyping import Float, Int
from torch import Tensor, nn

from bestiary import ops
from bestiary.errors import UsageError
from bestiary.mixers import register
from bestiary.mixers.base import Mixer
from bestiary.mixers.parts import check_heads, check_rate, default_heads, gpt_init


@register("attention")
class Attention(Mixer):
    """Multi-head attention with a KV cache as its state, or with the last window-1 steps.

    Args:
        d_model: width of input and output.
        n_heads: heads of queries; by default of 64 channels (32 at small widths).
        n_kv_heads: heads of keys and values, a divisor of n_heads; as many as n_heads by default.
        window: steps that each step sees, itself included; None for all of the past.
        rotary: whether positions are told by rotation; without, only the causal order tells them.
        rotary_base: base of the rotation's wavelengths.
        qkv_bias: whether q, k and v have biases.
        out_bias: whether the output has one.
    """

    attends = True
    cached_activations = ("keys", "values")

    streams: ClassVar[int] = 1
    """How many vectors of d_model, side by side, queries, keys and values are made from (see zamba_attention.py)."""

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int | None = None,
        n_kv_heads: int | None = None,
        window: int | None = None,
        rotary: bool = True,
        rotary_base: float = 10000.0,
        qkv_bias: bool = False,
        out_bias: bool = False,
        residuals: int = 1,
    ):
        super().__init__(d_model)
        self.n_heads = default_heads(d_model) if n_heads is None else n_heads
        check_heads(self.n_heads, d_model=d_model)
        self.n_kv_heads = self.n_heads if n_kv_heads is None else n_kv_heads
        if self.n_kv_heads < 1 or self.n_heads % self.n_kv_heads:
            raise UsageError(f"n_kv_heads={self.n_kv_heads} must divide n_heads={self.n_heads}")
        if window is not None and window < 1:
            raise UsageError(f"window must be at least 1, not {window}")
        check_rate(rotary_base=rotary_base)
        self.d_in = self.streams * d_model
        self.head_dim, self.window = self.d_in // self.n_heads, window
        self.rotary, self.rotary_base = rotary, rotary_base
        if rotary and self.head_dim % 2:
            raise UsageError(f"rotary positions need an even head dimension, not {self.head_dim}")
        self.residuals = residuals
        self.qkv = nn.Linear(self.d_in, self.d_in + 2 * self.n_kv_heads * self.head_dim, bias=qkv_bias)
        self.out = nn.Linear(self.d_in, d_model, bias=out_bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        gpt_init(self.qkv, self.d_in)
        gpt_init(self.out, self.d_in, residuals=self.residuals)

    def initial_state(self, batch_size: int, *, device: Any = None, dtype: Any = None) -> ops.KVCache:
        return ops.empty_cache(
            batch_size,
            self.n_kv_heads,
            self.head_dim,
            self.head_dim,
            window=self.window,
            dtype=self.out.weight.dtype if dtype is None else dtype,
            device=self.own_device(device),
        )

    def state_nbytes(self, time: int) -> int:
        slots = time if self.window is None else self.window - 1
        return slots * 2 * self.n_kv_heads * self.head_dim * 4 + 8

    def mixing_flops(self, context: int) -> float:
        seen = (context + 1) / 2 if self.window is None or self.window > context else float(self.window)
        return 4 * self.d_in * seen

    def mix(
        self, x: Float[Tensor, "batch time d_in"], state: ops.KVCache, lengths: Int[Tensor, " batch"] | None
    ) -> tuple[Float[Tensor, "batch time d_model"], ops.KVCache]:
        width = self.n_kv_heads * self.head_dim
        q, k, v = (z.unflatten(-1, (-1, self.head_dim)) for z in self.qkv(x).split([self.d_in, width, width], -1))
        if self.rotary:
            position = ops.positions(state.position, x.shape[1])
            q, k = (ops.rotate(z, position, base=self.rotary_base) for z in (q, k))
        scale = (self.d_model // self.n_heads) ** -0.5
        o, state = ops.attention(q, k, v, window=self.window, scale=scale, state=state, lengths=lengths)
        return self.out(o.flatten(-2)), state
