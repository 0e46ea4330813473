"""Griffin's recurrent block, around the real-gated linear recurrent unit (De et al. 2024, arXiv:2402.19427).

u_t = conv_4(W_u x + b_u)_t                          causal, depthwise, with a bias
r_t, i_t = sigmoid(W_r u_t + b_r), sigmoid(W_i u_t + b_i)          block-diagonal: a block a head
a_t = exp(-c softplus(Lambda) r_t),  c = 8
h_t = a_t h_{t-1} + sqrt(1 - a_t^2) i_t u_t          the RG-LRU: ops.linear_recurrence
y_t = W_o (gelu(W_g x_t + b_g) * h_t) + b_o          gelu by its tanh form

The paper scales the first input as all others. The published RecurrentGemma models leave it as it is (factor 1):
`unscaled_start`. Lambda is drawn as the paper says, a^c uniform; their code draws a^2 uniform on (0.9^2, 0.999^2).
"""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from bestiary import ops, state
from bestiary.mixers import register
from bestiary.mixers.base import Mixer
from bestiary.mixers.parts import Linear, ShortConvolution, check_heads, default_heads, no_weight_decay

C = 8.0


@state.register
class RGLRUState(NamedTuple):
    """The last inputs of the convolution, the hidden state, and how many steps it has seen."""

    history: Float[Tensor, "batch taps_minus_1 lru_width"]
    h: Float[Tensor, "batch lru_width"]
    position: Int[Tensor, " batch"]


class BlockDiagonal(nn.Module):
    """An affine map within each head, drawn with variance 1 / fan-in."""

    def __init__(self, width: int, n_heads: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_heads, width // n_heads, width // n_heads))  # head, in, out
        self.bias = nn.Parameter(torch.empty(width))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)
        nn.init.zeros_(self.bias)

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        heads = x.unflatten(-1, (self.weight.shape[0], -1))
        return torch.einsum("...hi,hij->...hj", heads, self.weight).flatten(-2) + self.bias


@register("rg_lru")
class RGLRU(Mixer):
    """A gated linear RNN behind a short convolution; Griffin alternates two with one local attention.

    Args:
        d_model: width of input and output.
        lru_width: width of the recurrence; about 4/3 d_model by default, a multiple of 32.
        n_heads: blocks of the gates; by default of 64 channels (32 at small widths).
        conv_kernel: taps of the convolution.
        unscaled_start: leave the first input of a sequence unscaled, as the RecurrentGemma models do.
    """

    channel_mixer = "geglu"

    def __init__(
        self,
        d_model: int,
        *,
        lru_width: int | None = None,
        n_heads: int | None = None,
        conv_kernel: int = 4,
        unscaled_start: bool = False,
        n_layers: int = 1,
    ):
        super().__init__(d_model)
        self.lru_width = 32 * round(d_model / 24) if lru_width is None else lru_width
        n_heads = default_heads(self.lru_width) if n_heads is None else n_heads
        check_heads(n_heads, lru_width=self.lru_width)
        self.unscaled_start, self.n_layers = unscaled_start, n_layers
        self.input, self.gate = (Linear(d_model, self.lru_width) for _ in range(2))
        self.conv = ShortConvolution(self.lru_width, conv_kernel, bias=True)
        self.recurrence_gate, self.input_gate = (BlockDiagonal(self.lru_width, n_heads) for _ in range(2))
        self.Lambda = nn.Parameter(torch.empty(self.lru_width))
        self.out = Linear(self.lru_width, d_model)
        no_weight_decay(self.Lambda)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for linear, variance in ((self.input, 1.0), (self.gate, 1.0), (self.out, 2 / self.n_layers)):
            nn.init.normal_(linear.weight, std=math.sqrt(variance / linear.in_features))
            nn.init.zeros_(linear.bias)
        nn.init.normal_(self.conv.weight, std=math.sqrt(0.01 / self.conv.weight.shape[1]))
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]
        self.recurrence_gate.reset_parameters()
        self.input_gate.reset_parameters()
        slowest = -torch.empty_like(self.Lambda, dtype=torch.float64).uniform_(0.9, 0.999).log() / C
        self.Lambda.copy_(torch.log(torch.expm1(slowest)))  # softplus(Lambda) = -log(a^c) / c

    def initial_state(self, batch_size: int, *, device: Any = None, dtype: Any = None) -> RGLRUState:
        place: dict[str, Any] = {"device": self.own_device(device), "dtype": self.own_dtype(dtype)}
        h = torch.zeros(batch_size, self.lru_width, **place)
        position = torch.zeros(batch_size, dtype=torch.int64, device=place["device"])
        return RGLRUState(self.conv.initial_state(batch_size, **place), h, position)

    def mixing_flops(self, context: int) -> float:
        gates = 2 * (self.recurrence_gate.weight.numel() + self.input_gate.weight.numel())
        return self.conv.flops() + gates + 16 * self.lru_width

    def mix(
        self, x: Float[Tensor, "batch time d_model"], state: RGLRUState, lengths: Int[Tensor, " batch"] | None
    ) -> tuple[Float[Tensor, "batch time d_model"], RGLRUState]:
        u, history = self.conv(self.input(x), state.history, lengths)
        exact = state.h.dtype
        r, i = (torch.sigmoid(gate(u).to(exact)) for gate in (self.recurrence_gate, self.input_gate))
        log_a = -C * F.softplus(self.Lambda.to(exact)) * r
        # where a rounds to 1, the root's slope is infinite; the floor makes it 0 there and changes nothing elsewhere
        scale = (-torch.expm1(2 * log_a)).clamp(min=torch.finfo(exact).tiny).sqrt()
        if self.unscaled_start:
            scale = torch.where(ops.positions(state.position, x.shape[1])[..., None] == 0, 1, scale)
        h, last = ops.linear_recurrence(log_a.exp(), scale * i * u, state=state.h, lengths=lengths)
        position = state.position + (x.shape[1] if lengths is None else lengths)
        gate = F.gelu(self.gate(x), approximate="tanh")
        return self.out(gate * h.to(gate.dtype)), RGLRUState(history, last, position)
