"""DeltaNet (Schlag et al. 2021, arXiv:2102.11174; Yang et al. 2024, arXiv:2406.06484).

q_t, k_t, v_t = silu(conv(W x))_t                     short convolutions; q, k scaled to unit length; split over heads
beta_t = sigmoid(W_beta x_t)                          how far what the key recalls is replaced
S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T        the recurrence: ops.delta_rule
y_t = W_o RMSNorm(S_t^T q_t / sqrt(K))
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bestiary import ops, state
from bestiary.mixers import register
from bestiary.mixers.base import Mixer, keep_real
from bestiary.mixers.parts import RMSNorm, ShortConvolution, check_heads, default_heads, unit, xavier_init


@state.register
class DeltaNetState(NamedTuple):
    """The last inputs of the convolutions, and an associative memory a head."""

    history: Float[Tensor, "batch taps_minus_1 channels"]
    memory: Float[Tensor, "batch heads key_dim value_dim"]


@register("delta_net")
class DeltaNet(Mixer):
    """Linear attention that replaces what it stored under a key, in place of adding to it.

    Args:
        d_model: width of input and output.
        n_heads: heads; by default of 64 channels (32 at small widths).
        conv_kernel: taps of the convolutions on q, k and v.
        negative: let beta reach 2, so that the state's eigenvalues reach -1 (arXiv:2411.12537).
    """

    def __init__(self, d_model: int, *, n_heads: int | None = None, conv_kernel: int = 4, negative: bool = False):
        super().__init__(d_model)
        self.n_heads = default_heads(d_model) if n_heads is None else n_heads
        check_heads(self.n_heads, d_model=d_model)
        self.head_dim, self.negative = d_model // self.n_heads, negative
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.conv = ShortConvolution(3 * d_model, conv_kernel, activation="silu")
        self.beta = nn.Linear(d_model, self.n_heads, bias=False)
        self.norm = RMSNorm(self.head_dim, eps=1e-5)
        self.out = nn.Linear(d_model, d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for part in self.qkv.weight.chunk(3):
            nn.init.xavier_uniform_(part, gain=2**-2.5)  # each of q, k, v as a map of its own
        xavier_init(self.beta)
        xavier_init(self.out)
        self.conv.reset_parameters()
        self.norm.reset_parameters()

    def initial_state(self, batch_size: int, *, device: Any = None, dtype: Any = None) -> DeltaNetState:
        place: dict[str, Any] = {"device": self.own_device(device), "dtype": self.own_dtype(dtype)}
        memory = torch.zeros(batch_size, self.n_heads, self.head_dim, self.head_dim, **place)
        return DeltaNetState(self.conv.initial_state(batch_size, **place), memory)

    def mixing_flops(self, context: int) -> float:
        return self.conv.flops() + 8 * self.d_model * self.head_dim

    def mix(
        self, x: Float[Tensor, "batch time d_model"], state: DeltaNetState, lengths: Int[Tensor, " batch"] | None
    ) -> tuple[Float[Tensor, "batch time d_model"], DeltaNetState]:
        qkv, history = self.conv(self.qkv(x), state.history, lengths)
        q, k, v = (z.unflatten(-1, (self.n_heads, -1)) for z in qkv.chunk(3, dim=-1))
        beta = torch.sigmoid(self.beta(x)) * (2 if self.negative else 1)
        beta = keep_real(beta, lengths)  # padding replaces nothing
        q, k = (unit(z.to(state.memory.dtype)) for z in (q, k))
        o, memory = ops.delta_rule(q, k, v, beta, state=state.memory)
        return self.out(self.norm(o).flatten(-2)), DeltaNetState(history, memory)
