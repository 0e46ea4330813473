"""Hyena, order 2 (Poli et al. 2023, arXiv:2302.10866): long convolutions with implicit filters, and gates.

    x0, x1, v = split(conv_3(W_in u + b_in))             a short filter of 3 taps with bias
    v = h * (x1 v) + beta (x1 v)                         h: a filter as long as the sequence: ops.long_convolution
    y = W_out (x0 v) + b_out

The filter is a function of the lag t (in units of l_max), h_t = MLP(features(t)) (exp(-|delta| t) + shift), with sines
as activations and a decay delta of each channel's own; it does not depend on how long a segment is.
"""

import itertools
import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bestiary import ops, state
from bestiary.errors import UsageError
from bestiary.mixers import register
from bestiary.mixers.base import Mixer, keep_real
from bestiary.mixers.parts import FullPrecision, Linear, Remembered, ShortConvolution, gpt_init, no_weight_decay


@state.register
class HyenaState(NamedTuple):
    """The last inputs of the short filter, and the past of the long one."""

    history: Float[Tensor, "batch taps_minus_1 channels"]
    past: ops.ConvolutionState


class LagFeatures(FullPrecision):
    """What a filter's network knows of lag t: t / (l_max - 1), cos(2 pi f t / l_max) and -sin of it, in each band f.

    Args:
        l_max: number of lags.
        bands: number of frequencies f, even from 1e-4 to bands - 1.
        trained: whether the features are parameters that begin so, as in published checkpoints.
    """

    def __init__(self, l_max: int, bands: int, *, trained: bool = False):
        super().__init__()
        self.l_max, self.bands = l_max, bands
        wide = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.weight = nn.Parameter(torch.empty(l_max, 2 * bands + 1, dtype=wide)) if trained else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.weight is not None:
            self.weight.copy_(self.exact(self.l_max, dtype=torch.float64, device="cpu"))

    def exact(self, lags: int, **place: Any) -> Float[Tensor, "lags features"]:
        """The features as they begin."""
        t = torch.arange(lags, **place)[:, None]
        angle = 2 * math.pi / self.l_max * t * torch.linspace(1e-4, self.bands - 1, self.bands, **place)
        return torch.cat([t / max(1, self.l_max - 1), angle.cos(), -angle.sin()], dim=-1)

    def forward(self, lags: int, **place: Any) -> Float[Tensor, "lags features"]:
        """The features of the first `lags` lags."""
        return self.exact(lags, **place) if self.weight is None else self.weight[:lags].to(**place)


class ImplicitFilter(nn.Module):
    """A filter of `channels` channels and up to l_max lags, given by a small network of the lag.

    Args:
        order: width of the network.
        bands: sine and cosine features of the lag.
        frequency: to begin with, of the sine activations; trained.
        shift: added to the decay, which then ends above zero.
        modulation: whether there is a decay at all.
        trained_features: whether the features of the lag are parameters, too.
    """

    def __init__(
        self,
        channels: int,
        l_max: int,
        *,
        order: int,
        bands: int,
        frequency: float,
        shift: float = 0.05,
        modulation: bool = True,
        trained_features: bool = False,
    ):
        super().__init__()
        if min(l_max, order, bands) < 1:
            raise UsageError(f"l_max={l_max}, filter_order={order} and filter_bands={bands} must be at least 1")
        self.channels, self.l_max, self.bands, self.start = channels, l_max, bands, frequency
        self.shift, self.modulation = shift, modulation
        self.features = LagFeatures(l_max, bands, trained=trained_features)
        widths = [2 * bands + 1, order, order, order]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.last = nn.Linear(order, channels, bias=False)
        self.frequency = nn.Parameter(torch.empty(order))
        for linear in (*self.layers, self.last):
            linear.is_filter = True  # works on lags, not on tokens
        no_weight_decay(self.frequency, *self.features.parameters())
        self.remembered = Remembered()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for linear in (*self.layers, self.last):
            nn.init.normal_(linear.weight, std=0.02)  # the language models' initialisation reaches the filters, too
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        nn.init.constant_(self.frequency, self.start)
        self.features.reset_parameters()

    def forward(self, lags: int, dtype: torch.dtype) -> Float[Tensor, "channels lags"]:
        """The first `lags` taps, at most l_max, computed in `dtype`."""
        return self.known(lags, dtype).taps

    def known(self, lags: int, dtype: torch.dtype) -> ops.Filter:
        """The same with its transforms: without gradients, all is kept as long as the parameters are as they were."""
        lags, keeps = min(lags, self.l_max), not torch.is_grad_enabled()
        return self.remembered.get(
            self.parameters(), lambda: ops.Filter(self.taps(lags, dtype), keeps=keeps), lags, dtype
        )

    def taps(self, lags: int, dtype: torch.dtype) -> Float[Tensor, "channels lags"]:
        place: dict[str, Any] = {"dtype": dtype, "device": self.frequency.device}
        x = self.features(lags, **place)
        *hidden, last = (
            (parameter.to(dtype) for parameter in linear.parameters()) for linear in (*self.layers, self.last)
        )
        for weights in hidden:
            x = torch.sin(self.frequency.to(dtype) * nn.functional.linear(x, *weights))
        h = nn.functional.linear(x, *last)
        if not self.modulation:
            return h.T
        t = torch.arange(lags, **place)[:, None] / max(1, self.l_max - 1)
        decay = torch.linspace(math.log(0.01) / 1.5, math.log(0.01) / 0.3, self.channels, **place)
        return (h * ((t * decay).exp() + self.shift)).T


@register("hyena")
class Hyena(Mixer):
    """A gated long convolution; decoding is the exact online convolution, in a state of at most 2 P inputs, P >= l_max.

    Args:
        d_model: width of input and output.
        l_max: lags of the filter; the longest context that it sees.
        filter_order: width of the filter's network; the published 64 at widths from 512, at least 16.
        filter_bands: sine and cosine features of the lag.
        frequency: of the network's sine activations, to begin with.
        shift: added to the filter's decay, which then ends above zero; 0 in the published language models.
        modulation: whether the filter has a decay; the published weights of 153M parameters have none.
        trained_features: whether the lag's features are parameters (l_max, 2 filter_bands + 1), as in those weights.
        conv_kernel: taps of the short filter.
    """

    def __init__(
        self,
        d_model: int,
        *,
        l_max: int = 2048,
        filter_order: int | None = None,
        filter_bands: int = 16,
        frequency: float = 14.0,
        shift: float = 0.05,
        modulation: bool = True,
        trained_features: bool = False,
        conv_kernel: int = 3,
        residuals: int = 1,
    ):
        super().__init__(d_model)
        self.l_max, self.residuals = l_max, residuals
        order = min(64, max(16, d_model // 8)) if filter_order is None else filter_order
        self.in_proj = Linear(d_model, 3 * d_model)
        self.conv = ShortConvolution(3 * d_model, conv_kernel, bias=True)
        self.filter = ImplicitFilter(
            d_model,
            l_max,
            order=order,
            bands=filter_bands,
            frequency=frequency,
            shift=shift,
            modulation=modulation,
            trained_features=trained_features,
        )
        self.beta = nn.Parameter(torch.empty(d_model))
        self.out_proj = Linear(d_model, d_model)
        no_weight_decay(self.beta, *self.filter.parameters())
        self.reset_parameters()

    def reset_parameters(self) -> None:
        gpt_init(self.in_proj, self.d_model)
        gpt_init(self.out_proj, self.d_model, residuals=self.residuals)
        self.conv.reset_parameters()
        self.filter.reset_parameters()
        nn.init.normal_(self.beta)

    def initial_state(self, batch_size: int, *, device: Any = None, dtype: Any = None) -> HyenaState:
        place: dict[str, Any] = {"device": self.own_device(device), "dtype": self.own_dtype(dtype)}
        return HyenaState(
            self.conv.initial_state(batch_size, **place), ops.empty_past(batch_size, self.d_model, **place)
        )

    def state_nbytes(self, time: int) -> int:
        history = self.conv.initial_state(1, dtype=torch.float32, device="meta")
        return state.nbytes((history,)) + ops.past_nbytes(self.d_model, self.l_max, time)

    def mixing_flops(self, context: int) -> float:
        reach = max(2, min(context, self.l_max))
        return self.conv.flops() + self.d_model * (10 * math.log2(reach) + 4)

    def mix(
        self, x: Float[Tensor, "batch time d_model"], state: HyenaState, lengths: Int[Tensor, " batch"] | None
    ) -> tuple[Float[Tensor, "batch time d_model"], HyenaState]:
        y, state = self.gated(x, state, lengths)
        return self.out_proj(y), state

    def gated(
        self, x: Float[Tensor, "batch time d_model"], state: HyenaState, lengths: Int[Tensor, " batch"] | None
    ) -> tuple[Float[Tensor, "batch time d_model"], HyenaState]:
        """The gated long convolution, before the last projection."""
        x, history = self.conv(self.in_proj(x), state.history, lengths)
        x0, x1, v = x.chunk(3, dim=-1)
        v = keep_real(x1 * v, lengths)
        with ops.full_precision(x):
            kernel = self.filter.known(self.l_max, state.past.inputs.dtype)
        v, past = ops.long_convolution(v, kernel, self.beta, state=state.past, lengths=lengths)
        return x0 * v, HyenaState(history, past)
