"""Softmax attention both ways (Vaswani et al. 2017, arXiv:1706.03762), as in BERT and ViT: the encoder's baseline.

q_t, k_t, v_t = W_q x_t, W_k x_t, W_v x_t           split over heads
o_t = sum_s softmax_s(q_t.k_s / sqrt(K)) v_s        over all real steps s of the row
y_t = W_o o_t + b

It knows no order: the model adds learned positions to its inputs, or rotary=true turns q and k.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from bestiary import ops, state
from bestiary.errors import UsageError
from bestiary.mixers import register
from bestiary.mixers.base import NonCausal, real_steps
from bestiary.mixers.parts import Linear, check_heads, check_rate, default_heads, gpt_init


@register("encoder_attention")
class EncoderAttention(NonCausal):
    """Multi-head attention in which every step sees every other; without a state.

    Args:
        d_model: width of input and output.
        n_heads: heads; by default of 64 channels (32 at small widths).
        rotary: whether positions are told by rotation.
        rotary_base: base of the rotation's wavelengths.
        bias: whether the projections have biases.
    """

    channel_mixer = "gelu_mlp"

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int | None = None,
        rotary: bool = False,
        rotary_base: float = 10000.0,
        bias: bool = True,
        residuals: int = 1,
    ):
        super().__init__(d_model)
        self.n_heads = default_heads(d_model) if n_heads is None else n_heads
        check_heads(self.n_heads, d_model=d_model)
        check_rate(rotary_base=rotary_base)
        self.head_dim, self.rotary, self.rotary_base = d_model // self.n_heads, rotary, rotary_base
        if rotary and self.head_dim % 2:
            raise UsageError(f"rotary positions need an even head dimension, not {self.head_dim}")
        self.residuals = residuals
        self.qkv, self.out = Linear(d_model, 3 * d_model, bias=bias), Linear(d_model, d_model, bias=bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        gpt_init(self.qkv, self.d_model)
        gpt_init(self.out, self.d_model, residuals=self.residuals)

    def mixing_flops(self, context: int) -> float:
        return 4.0 * self.d_model * context

    def mix(
        self, x: Float[Tensor, "batch time d_model"], state: state.Empty, lengths: Int[Tensor, " batch"] | None
    ) -> tuple[Float[Tensor, "batch time d_model"], state.Empty]:
        (batch, time), seen = x.shape[:2], None
        if not time:
            return torch.zeros_like(x), state
        q, k, v = (z.unflatten(-1, (self.n_heads, -1)) for z in self.qkv(x).chunk(3, dim=-1))
        if self.rotary:
            position = torch.arange(time, device=x.device).expand(batch, time)
            q, k = (ops.rotate(z, position, base=self.rotary_base) for z in (q, k))
        if lengths is not None:  # a row of padding alone sees itself: a softmax over nothing has no value
            seen = (real_steps(lengths, time) | (lengths == 0)[:, None])[:, None, None]
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return self.out(o.transpose(1, 2).flatten(-2)), state
