"""xLSTM's mLSTM block (Beck et al. 2024, arXiv:2405.04517): linear attention with exponential input gates.

u_t, z_t = W_up x_t                                   each expand d_model wide
c_t = silu(conv(u))_t                                 causal, depthwise, 4 taps
q_t, k_t, v_t = W_q c_t, W_k c_t, W_v u_t             block-diagonal, in blocks of 4; split over heads
i_t, f_t = W_i [q, k, v]_t + b_i, log sigmoid(W_f [q, k, v]_t + b_f)        a number a head
C_t = e^{f_t} C_{t-1} + e^{i_t} k_t v_t^T,  n_t = e^{f_t} n_{t-1} + e^{i_t} k_t        ops.mlstm
h_t = C_t^T q_t / max(|n_t . q_t|, 1),                q / sqrt(K) for q
y_t = W_down ((GroupNorm(h_t) + skip * c_t) * silu(z_t))
"""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from bestiary import ops, state
from bestiary.errors import UsageError
from bestiary.mixers import register
from bestiary.mixers.base import Mixer
from bestiary.mixers.parts import (
    ForgetGate,
    HeadNorm,
    HeadwiseLinear,
    Linear,
    ShortConvolution,
    check_heads,
    no_weight_decay,
    small_init,
)


@state.register
class MLSTMMixerState(NamedTuple):
    """The last inputs of the convolution, and the memories with their normalisers."""

    history: Float[Tensor, "batch taps_minus_1 channels"]
    memory: ops.MLSTMState


@register("mlstm")
class MLSTM(Mixer):
    """A block of its own, as Mamba is: a matrix memory that a single strong write may take over.

    Args:
        d_model: width of input and output.
        n_heads: heads; must divide the inner width.
        expand: inner width over d_model.
        block: width of the blocks of the maps to q, k and v.
        conv_kernel: taps of the convolution.
        forget: "sigmoid" or "exponential", the forget gate; both begin alike.
    """

    channel_mixer = None

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int = 4,
        expand: float = 2.0,
        block: int = 4,
        conv_kernel: int = 4,
        forget: str = "sigmoid",
        n_layers: int = 1,
    ):
        super().__init__(d_model)
        self.n_heads, self.d_inner, self.n_layers = n_heads, round(expand * d_model), n_layers
        self.forget = ForgetGate(forget)
        check_heads(n_heads, inner_width=self.d_inner)
        if block < 1 or self.d_inner % block:
            raise UsageError(f"block={block} must divide the inner width {self.d_inner}")
        self.up = Linear(d_model, 2 * self.d_inner, bias=False)
        self.conv = ShortConvolution(self.d_inner, conv_kernel, bias=True, activation="silu")
        self.query, self.key, self.value = (
            HeadwiseLinear(self.d_inner, self.d_inner // block, d_model=d_model) for _ in range(3)
        )
        self.input_gate, self.forget_gate = (Linear(3 * self.d_inner, n_heads) for _ in range(2))
        self.norm = HeadNorm(n_heads, self.d_inner)
        self.skip = nn.Parameter(torch.empty(self.d_inner))
        self.down = Linear(self.d_inner, d_model, bias=False)
        no_weight_decay(self.skip)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        small_init(self.up.weight, self.d_model)
        nn.init.normal_(self.down.weight, std=2 / self.n_layers / math.sqrt(self.d_model))
        for part in (self.query, self.key, self.value, self.conv, self.norm):
            part.reset_parameters()
        nn.init.ones_(self.skip)
        nn.init.zeros_(self.input_gate.weight)
        nn.init.zeros_(self.forget_gate.weight)
        nn.init.normal_(self.input_gate.bias, std=0.1)
        self.forget_gate.bias.copy_(self.forget.bias(torch.linspace(3, 6, self.n_heads)))

    def initial_state(self, batch_size: int, *, device: Any = None, dtype: Any = None) -> MLSTMMixerState:
        place: dict[str, Any] = {"device": self.own_device(device), "dtype": self.own_dtype(dtype)}
        head_dim = self.d_inner // self.n_heads
        memory = ops.empty_mlstm(batch_size, self.n_heads, head_dim, head_dim, **place)
        return MLSTMMixerState(self.conv.initial_state(batch_size, **place), memory)

    def mixing_flops(self, context: int) -> float:
        maps = sum(part.flops() for part in (self.conv, self.query, self.key, self.value))
        return maps + 5 * self.d_inner * (self.d_inner // self.n_heads + 1)

    def mix(
        self, x: Float[Tensor, "batch time d_model"], state: MLSTMMixerState, lengths: Int[Tensor, " batch"] | None
    ) -> tuple[Float[Tensor, "batch time d_model"], MLSTMMixerState]:
        u, z = self.up(x).chunk(2, dim=-1)
        c, history = self.conv(u, state.history, lengths)
        qkv = [self.query(c), self.key(c), self.value(u)]
        exact, together = state.memory.max.dtype, torch.cat(qkv, dim=-1)
        log_input, forget = self.input_gate(together).to(exact), self.forget_gate(together).to(exact)
        q, k, v = (part.unflatten(-1, (self.n_heads, -1)) for part in qkv)
        h, memory = ops.mlstm(q, k, v, log_input, self.forget.log(forget), state=state.memory, lengths=lengths)
        h = self.norm(h.flatten(-2)) + self.skip.to(c.dtype) * c
        return self.down(h * F.silu(z)), MLSTMMixerState(history, memory)
