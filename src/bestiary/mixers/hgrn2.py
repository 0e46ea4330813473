"""HGRN2 (Qin et al. 2024, arXiv:2404.07904): a gated linear RNN, its state widened by an outer product.

f_t = lower + (1 - lower) sigmoid(W_f x_t)            forget gate of each key channel; lower rises with depth
S_t = diag(f_t) S_{t-1} + (1 - f_t) v_t^T             v_t = W_v x_t; ops.linear_attention, its key tied to its gate
y_t = W_o RMSNorm(S_t^T q_t / sqrt(K))                q_t = silu(W_q x_t), HGRN's output gate

The lower bounds keep what deep layers forget in a step small. As published, they are running sums over the layers of a
softmax, which begins even: lower = layer_index / n_layers. Here each layer learns its own, a sigmoid that begins there;
they need not stay in order. The first layer has none.

This is flash-linear-attention's layer. The authors' own has biases, sigmoid(W_q x_t) for q, silu(W_v x_t) for v and a
LayerNorm.
"""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from bestiary import ops, state
from bestiary.mixers import register
from bestiary.mixers.base import Mixer, keep_real
from bestiary.mixers.parts import Linear, RMSNorm, check_heads, default_heads, no_weight_decay, xavier_init


@state.register
class HGRN2State(NamedTuple):
    """A matrix a head: what each channel of the gates has kept of the values."""

    memory: Float[Tensor, "batch heads key_dim value_dim"]


@register("hgrn2")
class HGRN2(Mixer):
    """Linear attention that writes as much as it forgets.

    Args:
        d_model: width of input and output.
        n_heads: heads; each widens the state by d_model / n_heads. By default of 64 channels (32 at small widths).
    """

    def __init__(self, d_model: int, *, n_heads: int | None = None, layer_index: int = 0, n_layers: int = 1):
        super().__init__(d_model)
        self.n_heads = default_heads(d_model) if n_heads is None else n_heads
        check_heads(self.n_heads, d_model=d_model)
        self.head_dim, self.depth = d_model // self.n_heads, layer_index / n_layers
        self.query, self.forget, self.value, self.out = (Linear(d_model, d_model, bias=False) for _ in range(4))
        self.lower = nn.Parameter(torch.empty(d_model)) if layer_index else None
        self.norm = RMSNorm(d_model, eps=1e-5)
        if self.lower is not None:
            no_weight_decay(self.lower)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for linear in (self.query, self.forget, self.value, self.out):
            xavier_init(linear)
        if self.lower is not None:
            nn.init.constant_(self.lower, math.log(self.depth / (1 - self.depth)))
        self.norm.reset_parameters()

    def initial_state(self, batch_size: int, *, device: Any = None, dtype: Any = None) -> HGRN2State:
        shape = (batch_size, self.n_heads, self.head_dim, self.head_dim)
        return HGRN2State(torch.zeros(shape, device=self.own_device(device), dtype=self.own_dtype(dtype)))

    def mixing_flops(self, context: int) -> float:
        return 5 * self.d_model * self.head_dim

    def mix(
        self, x: Float[Tensor, "batch time d_model"], state: HGRN2State, lengths: Int[Tensor, " batch"] | None
    ) -> tuple[Float[Tensor, "batch time d_model"], HGRN2State]:
        logits = self.forget(x).to(state.memory.dtype)
        log_forget, log_write = F.logsigmoid(logits), F.logsigmoid(-logits)
        if self.lower is not None:
            lower = self.lower.to(logits.dtype)
            log_forget = torch.logaddexp(F.logsigmoid(lower), F.logsigmoid(-lower) + log_forget)
            log_write = F.logsigmoid(-lower) + log_write
        g, k = keep_real(log_forget, lengths), keep_real(log_write.exp(), lengths)  # padding neither forgets nor writes
        heads = (z.unflatten(-1, (self.n_heads, -1)) for z in (F.silu(self.query(x)), k, self.value(x), g))
        o, memory = ops.linear_attention(*heads, state=state.memory)
        return self.out(self.norm(o.flatten(-2))), HGRN2State(memory)
