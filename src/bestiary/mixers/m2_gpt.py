"""A causal Monarch Mixer, M2-GPT (Fu et al. 2023, arXiv:2310.12109): our reconstruction.

The authors published neither code nor weights of M2-GPT. This is M2-BERT's layer (see m2.py) with its convolutions cut
to the past, as the paper describes it, and nothing here can load or claim to reproduce their models.

x1, x2, v = split(conv_3(W_in u + b_in))
y = x2 (k * (x1 v) + beta (x1 v))                    Hyena's gated convolution: ops.long_convolution
y = y + k_2 * u + beta_2 u                           an ungated convolution of the input
out = W_out y + b_out

Monarch matrices act along both axes. Along the sequence as the DFT, M_0^-1 (M_1 k . M_2 u) with all M the DFT of twice
the length: padding with zeros makes it causal (ops.monarch_tools.polynomial_product), and an FFT computes it. Along the
width in the channel mixer, whose matrices are learned and have no order in time to respect.
"""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bestiary import ops, state
from bestiary.mixers import register
from bestiary.mixers.hyena import Hyena, HyenaState, ImplicitFilter
from bestiary.mixers.m2 import default_order
from bestiary.mixers.parts import no_weight_decay


@state.register
class M2GPTState(NamedTuple):
    """The past of the gated convolution, and that of the ungated one (empty where there is none)."""

    gated: HyenaState
    residual: ops.ConvolutionState | state.Empty


class CausalConvolution(nn.Module):
    """A long convolution with an implicit filter, and a skip.

    Args:
        channels: number of channels.
        l_max: lags of the filter.
        network: `order`, `bands` and `frequency` of the filter (see ImplicitFilter), whose decay goes down to zero.
    """

    def __init__(self, channels: int, l_max: int, **network: Any):
        super().__init__()
        self.filter = ImplicitFilter(channels, l_max, shift=0.0, **network)
        self.beta = nn.Parameter(torch.empty(channels))
        no_weight_decay(self.beta, *self.filter.parameters())
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.filter.reset_parameters()
        nn.init.normal_(self.beta)

    def forward(
        self,
        x: Float[Tensor, "batch time channels"],
        past: ops.ConvolutionState,
        lengths: Int[Tensor, " batch"] | None,
    ) -> tuple[Float[Tensor, "batch time channels"], ops.ConvolutionState]:
        with ops.full_precision(x):
            kernel = self.filter.known(self.filter.l_max, past.inputs.dtype)
        return ops.long_convolution(x, kernel, self.beta, state=past, lengths=lengths)


@register("m2_gpt")
class M2GPT(Hyena):
    """A gated and an ungated long convolution; decoding is exact, as Hyena's, in twice its state.

    Args:
        d_model: width of input and output.
        residual_long_conv: whether the input also goes through an ungated convolution.
        l_max: lags of the filters; the longest context that they see.
        filter_order: width of the filters' networks; 128 at widths from 512, at least 16.
        filter_bands: sine and cosine features of the lag.
        frequency: of the networks' sine activations, to begin with.
        conv_kernel: taps of the short filter.
    """

    channel_mixer = "monarch_mlp"

    def __init__(
        self,
        d_model: int,
        *,
        residual_long_conv: bool = True,
        l_max: int = 2048,
        filter_order: int | None = None,
        filter_bands: int = 2,
        frequency: float = 10.0,
        conv_kernel: int = 3,
        residuals: int = 1,
    ):
        order = default_order(d_model, filter_order)
        super().__init__(
            d_model,
            l_max=l_max,
            filter_order=order,
            filter_bands=filter_bands,
            frequency=frequency,
            shift=0.0,
            conv_kernel=conv_kernel,
            residuals=residuals,
        )
        network = {"order": order, "bands": filter_bands, "frequency": frequency}
        self.residual = CausalConvolution(d_model, l_max, **network) if residual_long_conv else None

    def reset_parameters(self) -> None:
        super().reset_parameters()
        residual = getattr(self, "residual", None)  # not there yet while Hyena is built
        if residual is not None:
            residual.reset_parameters()

    def initial_state(self, batch_size: int, *, device: Any = None, dtype: Any = None) -> M2GPTState:  # type: ignore[override]
        gated = super().initial_state(batch_size, device=device, dtype=dtype)
        place: dict[str, Any] = {"device": gated.history.device, "dtype": gated.history.dtype}
        if self.residual is None:
            return M2GPTState(gated, state.Empty())
        return M2GPTState(gated, ops.empty_past(batch_size, self.d_model, **place))

    def state_nbytes(self, time: int) -> int:
        residual = 0 if self.residual is None else ops.past_nbytes(self.d_model, self.l_max, time)
        return super().state_nbytes(time) + residual

    def mixing_flops(self, context: int) -> float:
        convolution = 10 * math.log2(max(2, min(context, self.l_max))) + 3
        return super().mixing_flops(context) + (0 if self.residual is None else self.d_model * convolution)

    def mix(  # type: ignore[override]
        self, x: Float[Tensor, "batch time d_model"], state: M2GPTState, lengths: Int[Tensor, " batch"] | None
    ) -> tuple[Float[Tensor, "batch time d_model"], M2GPTState]:
        y, gated = self.gated(x, state.gated, lengths)
        past = state.residual
        if self.residual is not None:
            r, past = self.residual(x, past, lengths)
            y = y + r
        return self.out_proj(y), M2GPTState(gated, past)
