"""Multi-scale retention (Sun et al. 2023, RetNet, arXiv:2307.08621).

q_t, k_t, v_t = W_q x_t, W_k x_t, W_v x_t            split over heads; rotation by position turns q and k
S_t = gamma_h S_{t-1} + k_t v_t^T                    gamma_h = 1 - 2^(-5-h), h = 0 ... H-1: ops.linear_attention
y_t = W_o (RMSNorm(S_t^T q_t / sqrt(K)) * silu(W_g x_t))
"""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bestiary import ops, state
from bestiary.mixers import register
from bestiary.mixers.base import Mixer, keep_real
from bestiary.mixers.parts import Linear, RMSNorm, check_heads, check_rate, default_heads, xavier_init


@state.register
class RetNetState(NamedTuple):
    """A fading memory a head, and how many steps were seen (for the rotation)."""

    memory: Float[Tensor, "batch heads key_dim value_dim"]
    position: Int[Tensor, " batch"]


@register("retnet")
class RetNet(Mixer):
    """Retention: linear attention whose heads forget at fixed, different rates.

    Args:
        d_model: width of input and output.
        n_heads: heads; by default of 64 key channels (32 at small widths; the paper's have 256).
        expand_v: value width over d_model.
        rotary_base: base of the rotation's wavelengths.
    """

    def __init__(
        self, d_model: int, *, n_heads: int | None = None, expand_v: float = 2.0, rotary_base: float = 10000.0
    ):
        super().__init__(d_model)
        self.n_heads = default_heads(d_model) if n_heads is None else n_heads
        check_rate(rotary_base=rotary_base)
        d_value = int(d_model * expand_v)
        check_heads(self.n_heads, d_model=d_model, value_width=d_value)
        self.d_value, self.rotary_base = d_value, rotary_base
        self.key_dim, self.value_dim = d_model // self.n_heads, d_value // self.n_heads
        self.qkv = Linear(d_model, 2 * d_model + d_value, bias=False)
        self.gate = Linear(d_model, d_value, bias=False)
        self.norm = RMSNorm(self.value_dim, eps=1e-6, elementwise_affine=False)
        self.out = Linear(d_value, d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for part in self.qkv.weight.split([self.d_model, self.d_model, self.d_value]):
            nn.init.xavier_uniform_(part, gain=2**-2.5)  # each of q, k, v as a map of its own
        xavier_init(self.gate)
        xavier_init(self.out, gain=0.5)

    def log_decay(self, like: Tensor) -> Float[Tensor, " heads"]:
        """log(1 - 2^(-5-h)) of each head."""
        gamma = [math.log1p(-(2.0 ** (-5 - h))) for h in range(self.n_heads)]
        return torch.tensor(gamma, dtype=like.dtype, device=like.device)

    def initial_state(self, batch_size: int, *, device: Any = None, dtype: Any = None) -> RetNetState:
        device = self.own_device(device)
        shape = (batch_size, self.n_heads, self.key_dim, self.value_dim)
        memory = torch.zeros(shape, device=device, dtype=self.own_dtype(dtype))
        return RetNetState(memory, torch.zeros(batch_size, dtype=torch.int64, device=device))

    def mixing_flops(self, context: int) -> float:
        return 5 * self.d_model * self.value_dim

    def mix(
        self, x: Float[Tensor, "batch time d_model"], state: RetNetState, lengths: Int[Tensor, " batch"] | None
    ) -> tuple[Float[Tensor, "batch time d_model"], RetNetState]:
        q, k, v = self.qkv(x).split([self.d_model, self.d_model, self.d_value], dim=-1)
        q, k, v = (z.unflatten(-1, (self.n_heads, -1)) for z in (q, k, v))
        position = ops.positions(state.position, x.shape[1])
        q, k = (ops.rotate(z, position, base=self.rotary_base) for z in (q, k))
        log_decay = self.log_decay(state.memory)
        if lengths is not None:  # padding does not fade the memory either
            log_decay = keep_real(log_decay.expand(*x.shape[:2], -1), lengths)
        o, memory = ops.linear_attention(q, k, v, log_decay, state=state.memory)
        y = self.out(self.norm(o, self.gate(x).unflatten(-1, o.shape[-2:])).flatten(-2))
        return y, RetNetState(memory, state.position + (x.shape[1] if lengths is None else lengths))
