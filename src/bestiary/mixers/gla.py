"""Gated linear attention (Yang et al. 2023, arXiv:2312.06635).

q_t, k_t, v_t = W_q x_t, W_k x_t, W_v x_t            split over heads
g_t = logsigmoid(W_2 W_1 x_t + b) / tau              log-decay of each key channel, low rank
S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T             the recurrence: ops.linear_attention
y_t = W_o (RMSNorm(S_t^T q_t / sqrt(K)) * silu(W_g x_t))
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from bestiary import ops, state
from bestiary.mixers import register
from bestiary.mixers.base import Mixer, keep_real
from bestiary.mixers.parts import Linear, RMSNorm, check_heads, check_rate, xavier_init


@state.register
class GLAState(NamedTuple):
    """What a head remembers: an associative memory from keys to values."""

    memory: Float[Tensor, "batch heads key_dim value_dim"]


@register("gla")
class GLA(Mixer):
    """Linear attention that learns, for each key channel and step, how much to forget.

    Args:
        d_model: width of input and output.
        n_heads: heads; must divide d_model and the key width.
        expand_k: key width over d_model.
        gate_rank: rank of the decay projection.
        tau: gate temperature; larger forgets more slowly.
    """

    def __init__(
        self, d_model: int, *, n_heads: int = 4, expand_k: float = 0.5, gate_rank: int = 16, tau: float = 16.0
    ):
        super().__init__(d_model)
        d_key = int(d_model * expand_k)
        check_heads(n_heads, d_model=d_model, key_width=d_key)
        check_rate(gate_rank=gate_rank, tau=tau)
        self.n_heads, self.d_key, self.tau = n_heads, d_key, tau
        self.key_dim, self.value_dim = d_key // n_heads, d_model // n_heads
        self.query, self.key = Linear(d_model, d_key, bias=False), Linear(d_model, d_key, bias=False)
        self.value, self.gate = Linear(d_model, d_model, bias=False), Linear(d_model, d_model, bias=False)
        self.decay_down, self.decay_up = Linear(d_model, gate_rank, bias=False), Linear(gate_rank, d_key)
        self.norm = RMSNorm(self.value_dim, eps=1e-5)
        self.out = Linear(d_model, d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for linear in (self.query, self.key, self.value, self.gate, self.decay_down, self.decay_up, self.out):
            xavier_init(linear)
        self.norm.reset_parameters()

    def initial_state(self, batch_size: int, *, device: Any = None, dtype: Any = None) -> GLAState:
        shape = (batch_size, self.n_heads, self.key_dim, self.value_dim)
        return GLAState(torch.zeros(shape, device=self.own_device(device), dtype=self.own_dtype(dtype)))

    def mixing_flops(self, context: int) -> float:
        return 5 * self.d_key * self.value_dim

    def mix(
        self, x: Float[Tensor, "batch time d_model"], state: GLAState, lengths: Int[Tensor, " batch"] | None
    ) -> tuple[Float[Tensor, "batch time d_model"], GLAState]:
        logits = self.decay_up(self.decay_down(x)).to(state.memory.dtype)
        log_decay = keep_real(F.logsigmoid(logits) / self.tau, lengths)
        q, k, v, log_decay = (
            z.unflatten(-1, (self.n_heads, -1)) for z in (self.query(x), self.key(x), self.value(x), log_decay)
        )
        o, memory = ops.linear_attention(q, k, v, log_decay, state=state.memory)
        return self.out(self.norm(o, self.gate(x).unflatten(-1, o.shape[-2:])).flatten(-2)), GLAState(memory)
