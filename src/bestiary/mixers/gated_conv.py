"""The gated short convolution of LFM2 (Liquid AI 2025, arXiv:2511.23404): all that most layers of that hybrid remember.

B_t, C_t, u_t = W_in x_t
y_t = W_out (C_t * conv_3(B * u)_t)                  causal, depthwise, no activation: ops.short_convolution

A gate before the filter and one after, as in H3 and Hyena; `based_conv` has one after it alone, and a silu.
"""

from typing import Any, NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from bestiary import state
from bestiary.mixers import register
from bestiary.mixers.base import Mixer
from bestiary.mixers.parts import Linear, ShortConvolution, gpt_init


@state.register
class GatedConvState(NamedTuple):
    """The last inputs of the convolution."""

    history: Float[Tensor, "batch taps_minus_1 d_model"]


@register("gated_conv")
class GatedConv(Mixer):
    """A short convolution between two gates; it sees a few steps back and no further.

    Args:
        d_model: width of input, output and convolution.
        conv_kernel: taps of the convolution.
        bias: whether the projections and the convolution have biases.
    """

    def __init__(self, d_model: int, *, conv_kernel: int = 3, bias: bool = False, residuals: int = 1):
        super().__init__(d_model)
        self.residuals = residuals
        self.in_proj = Linear(d_model, 3 * d_model, bias=bias)
        self.conv = ShortConvolution(d_model, conv_kernel, bias=bias)
        self.out_proj = Linear(d_model, d_model, bias=bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        gpt_init(self.in_proj, self.d_model)
        gpt_init(self.out_proj, self.d_model, residuals=self.residuals)
        self.conv.reset_parameters()

    def initial_state(self, batch_size: int, *, device: Any = None, dtype: Any = None) -> GatedConvState:
        place: dict[str, Any] = {"device": self.own_device(device), "dtype": self.own_dtype(dtype)}
        return GatedConvState(self.conv.initial_state(batch_size, **place))

    def mixing_flops(self, context: int) -> float:
        return self.conv.flops() + 2 * self.d_model

    def mix(
        self, x: Float[Tensor, "batch time d_model"], state: GatedConvState, lengths: Int[Tensor, " batch"] | None
    ) -> tuple[Float[Tensor, "batch time d_model"], GatedConvState]:
        B, C, u = self.in_proj(x).chunk(3, dim=-1)
        u, history = self.conv(B * u, state.history, lengths)
        return self.out_proj(C * u), GatedConvState(history)
