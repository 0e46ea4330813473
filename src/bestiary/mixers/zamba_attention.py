"""Zamba's attention (Glorioso et al. 2024, arXiv:2405.16712), which looks at the model's input embeddings as well.

q_t, k_t, v_t = W [x_t, RMSNorm(e_t)]                e: the embeddings that the model began with; 2 d_model channels
o_t = sum_s softmax_s(q_t.k_s / sqrt(K/2)) v_s       heads of K = 2 d_model / n_heads channels: ops.attention
y_t = W_o o_t                                        back to d_model

In Zamba such a layer returns every few Mamba layers with the same weights; the layout says so:
"(mamba*5 zamba_attention{share=a})*4". The paper norms [x_t, e_t] as one; here the block has normed x_t already.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bestiary.mixers import register
from bestiary.mixers.attention import Attention
from bestiary.mixers.base import keep_real
from bestiary.mixers.context import Context


@register("zamba_attention")
class ZambaAttention(Attention):
    """Attention over the stream and the input embeddings side by side; outside a model, x stands for both.

    Args:
        d_model: width of input and output.
        n_heads: heads of queries; by default of 128 channels (64 at small widths).
        n_kv_heads: heads of keys and values, a divisor of n_heads; as many as n_heads by default.
        head_dim: channels of a head; by default 2 d_model over n_heads.
        window: steps that each step sees, itself included; None for all of the past.
        rotary: whether positions are told by rotation, as in Zamba2; the first Zamba does without.
        rotary_base, rotary_dims, rotary_stretch: of the rotation, as attention's.
        qkv_bias, out_bias: whether q, k and v, and the output, have biases.
        qk_norm, norm_eps, gate: as attention's.
    """

    channel_mixer = "geglu"
    streams = 2

    def mix_in_context(self, x: Tensor, state: Any, lengths: Tensor | None, context: Context) -> tuple[Tensor, Any]:
        e = x if context.embeddings is None else keep_real(context.embeddings, lengths)
        e = F.rms_norm(e, e.shape[-1:], eps=1e-5).to(x.dtype)  # a learned scale would be W's
        return self.mix(torch.cat([x, e], dim=-1), state, lengths)
