"""Softmax attention (Vaswani et al. 2017, arXiv:1706.03762), the baseline: its state grows with the sequence.

q_t, k_t, v_t = W_q x_t, W_k x_t, W_v x_t           split over heads; rotary positions turn q and k
o_t = sum_s softmax_s(q_t.k_s / sqrt(K)) v_s        over s <= t, or the last `window` steps: ops.attention
y_t = W_o o_t

By option as in later models: RMS norms of q and k (Henry et al. 2020, arXiv:2010.04245; LFM2, Qwen3), and a gate
sigmoid(W_g x_t) on o_t (Qwen3-Next; arXiv:2505.06708).
"""

from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bestiary import ops
from bestiary.errors import UsageError
from bestiary.mixers import register
from bestiary.mixers.base import Mixer
from bestiary.mixers.parts import Linear, RMSNorm, check_heads, check_rate, default_heads, gpt_init


@register("attention")
class Attention(Mixer):
    """Multi-head attention with a KV cache as its state, or with the last window-1 steps.

    Args:
        d_model: width of input and output.
        n_heads: heads of queries; by default of 64 channels (32 at small widths).
        n_kv_heads: heads of keys and values, a divisor of n_heads; as many as n_heads by default.
        head_dim: channels of a head; by default the width over n_heads.
        window: steps that each step sees, itself included; None for all of the past.
        rotary: whether positions are told by rotation; without, only the causal order tells them.
        rotary_base: base of the rotation's wavelengths.
        rotary_dims: channels of each head that turn, the first ones; all by default.
        rotary_stretch: what positions are divided by, so that a model sees further than it was trained for.
        qkv_bias: whether q, k and v have biases.
        out_bias: whether the output has one.
        qk_norm: whether q and k go through an RMS norm with a weight a channel of a head, before they turn.
        norm_eps: its epsilon.
        gate: whether the output of each head is gated by the input.
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
        head_dim: int | None = None,
        window: int | None = None,
        rotary: bool = True,
        rotary_base: float = 10000.0,
        rotary_dims: int | None = None,
        rotary_stretch: float = 1.0,
        qkv_bias: bool = False,
        out_bias: bool = False,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        gate: bool = False,
        residuals: int = 1,
    ):
        super().__init__(d_model)
        self.n_heads = default_heads(d_model) if n_heads is None else n_heads
        self.d_in = self.streams * d_model
        if head_dim is None:
            check_heads(self.n_heads, d_model=d_model)
            head_dim = self.d_in // self.n_heads
        self.n_kv_heads = self.n_heads if n_kv_heads is None else n_kv_heads
        if self.n_kv_heads < 1 or self.n_heads < 1 or self.n_heads % self.n_kv_heads or head_dim < 1:
            raise UsageError(
                f"n_kv_heads={self.n_kv_heads} must divide n_heads={self.n_heads}, and head_dim={head_dim} be positive"
            )
        if window is not None and window < 1:
            raise UsageError(f"window must be at least 1, not {window}")
        check_rate(rotary_base=rotary_base, rotary_stretch=rotary_stretch)
        self.head_dim, self.window = head_dim, window
        self.rotary, self.rotary_base, self.rotary_stretch = rotary, rotary_base, rotary_stretch
        self.rotary_dims = head_dim if rotary_dims is None else rotary_dims
        if rotary and (self.rotary_dims % 2 or not 0 < self.rotary_dims <= head_dim):
            raise UsageError(
                f"rotary positions need an even number of a head's {head_dim} channels, not {self.rotary_dims}"
            )
        self.residuals, self.d_inner = residuals, self.n_heads * head_dim
        self.qkv = Linear(self.d_in, self.d_inner + 2 * self.n_kv_heads * head_dim, bias=qkv_bias)
        self.q_norm, self.k_norm = (RMSNorm(head_dim, eps=norm_eps) if qk_norm else None for _ in range(2))
        self.gate = Linear(self.d_in, self.d_inner, bias=qkv_bias) if gate else None
        self.out = Linear(self.d_inner, d_model, bias=out_bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        gpt_init(self.qkv, self.d_in)
        if self.gate is not None:
            gpt_init(self.gate, self.d_in)
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                norm.reset_parameters()
        gpt_init(self.out, self.d_inner, residuals=self.residuals)

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
        return 4 * self.d_inner * seen

    def mix(
        self, x: Float[Tensor, "batch time d_in"], state: ops.KVCache, lengths: Int[Tensor, " batch"] | None
    ) -> tuple[Float[Tensor, "batch time d_model"], ops.KVCache]:
        widths = [self.d_inner, *[self.n_kv_heads * self.head_dim] * 2]
        q, k, v = (z.unflatten(-1, (-1, self.head_dim)) for z in self.qkv(x).split(widths, -1))
        q, k = (z if norm is None else norm(z) for norm, z in ((self.q_norm, q), (self.k_norm, k)))
        if self.rotary:
            position = ops.positions(state.position, x.shape[1])
            turn: dict[str, Any] = {"base": self.rotary_base, "dims": self.rotary_dims, "stretch": self.rotary_stretch}
            q, k = (ops.rotate(z, position, **turn) for z in (q, k))
        scale = (self.head_dim / self.streams) ** -0.5
        o, state = ops.attention(q, k, v, window=self.window, scale=scale, state=state, lengths=lengths)
        o = o.flatten(-2)
        return self.out(o if self.gate is None else o * torch.sigmoid(self.gate(x))), state
