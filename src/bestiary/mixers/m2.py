"""The sequence mixer of M2-BERT (Monarch Mixer, Fu et al. 2023, arXiv:2310.12109): a gated convolution, both ways.

x1, x2, v = split(conv_3(W_in u + b_in))             a short causal filter of 3 taps with bias
y = x2 (K * (x1 v) + beta (x1 v))                    K: k at lags 0, 1, ..., r at lags -1, -2, ...
y = y + K_2 * u + beta_2 u                           an ungated convolution of the input, in place of a residual path
out = W_out y + b_out                                ops.bidirectional_convolution

k and r are Hyena's implicit filters, two networks with the same sine frequencies. Monarch matrices are here as the FFT,
which is a product of them; learned ones were not released. Released layers have neither norm nor residual around this.
"""

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bestiary import ops, state
from bestiary.errors import UsageError
from bestiary.mixers import register
from bestiary.mixers.base import NonCausal, check_lengths, keep_real
from bestiary.mixers.context import Context
from bestiary.mixers.hyena import ImplicitFilter
from bestiary.mixers.parts import Linear, ShortConvolution, gpt_init, no_weight_decay, slow_learners
from bestiary.ops.dispatch import wide


class TwoSidedConvolution(nn.Module):
    """A long convolution with implicit filters for the past and for the future, and a skip.

    Args:
        channels: number of channels.
        l_max: lags of either filter.
        network: `order`, `bands`, `frequency` and `trained_features` of the filters (see ImplicitFilter), whose decay
            goes down to zero.
    """

    def __init__(self, channels: int, l_max: int, **network: Any):
        super().__init__()
        self.ahead = ImplicitFilter(channels, l_max, shift=0.0, **network)
        self.back = ImplicitFilter(channels, l_max, shift=0.0, **network)
        self.back.frequency, self.back.features = self.ahead.frequency, self.ahead.features  # one for both
        slow_learners(*self.ahead.features.parameters(), max_lr=1e-5)
        self.beta = nn.Parameter(torch.empty(channels))
        no_weight_decay(self.beta)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.ahead.reset_parameters()
        self.back.reset_parameters()
        nn.init.normal_(self.beta)

    def forward(self, x: Float[Tensor, "batch time channels"]) -> Float[Tensor, "batch time channels"]:
        """x is zero past each row's length."""
        dtype = wide(x.dtype, self.beta.dtype)
        with ops.full_precision(x):
            k, r = (implicit.known(implicit.l_max, dtype) for implicit in (self.ahead, self.back))
        return ops.bidirectional_convolution(x, k, r, self.beta)


@register("m2")
class M2(NonCausal):
    """A gated long convolution that sees the past and the future, each row within its own length.

    Args:
        d_model: width of input and output.
        l_max: lags of the filters, either way; what is farther away is not seen.
        filter_order: width of the filters' networks; the published 128 at widths from 512, at least 16.
        filter_bands: sine and cosine features of the lag.
        frequency: of the networks' sine activations, to begin with.
        trained_features: whether the lag's features are parameters (l_max, 2 filter_bands + 1), as in released weights.
        conv_kernel: taps of the short filter.
        residual_long_conv: whether the input also goes through an ungated convolution.
        input_norm: whether a LayerNorm stands before all of it, as in the checkpoints that were tuned on GLUE.
        released_padding: as the released code, read `lengths` nowhere: what the padding holds reaches every output.
    """

    channel_mixer = "m2_mlp"

    def __init__(
        self,
        d_model: int,
        *,
        l_max: int = 2048,
        filter_order: int | None = None,
        filter_bands: int = 2,
        frequency: float = 10.0,
        trained_features: bool = False,
        conv_kernel: int = 3,
        residual_long_conv: bool = True,
        input_norm: bool = False,
        released_padding: bool = False,
    ):
        super().__init__(d_model)
        self.l_max, self.released_padding = l_max, released_padding
        network = {
            "order": default_order(d_model, filter_order),
            "bands": filter_bands,
            "frequency": frequency,
            "trained_features": trained_features,
        }
        self.norm = nn.LayerNorm(d_model) if input_norm else None
        self.in_proj = Linear(d_model, 3 * d_model)
        self.conv = ShortConvolution(3 * d_model, conv_kernel, bias=True)
        self.long = TwoSidedConvolution(d_model, l_max, **network)
        self.residual = TwoSidedConvolution(d_model, l_max, **network) if residual_long_conv else None
        self.out_proj = Linear(d_model, d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        gpt_init(self.in_proj, self.d_model)
        gpt_init(self.out_proj, self.d_model)
        for part in (self.norm, self.conv, self.long, self.residual):
            if part is not None:
                part.reset_parameters()

    def mixing_flops(self, context: int) -> float:
        convolution = 10 * math.log2(max(2, min(context, self.l_max))) + 3
        return self.conv.flops() + self.d_model * (2 + convolution * (1 if self.residual is None else 2))

    def forward(
        self,
        x: Float[Tensor, "batch time d_model"],
        state: Any = None,
        *,
        lengths: Int[Tensor, " batch"] | None = None,
        cu_seqlens: Int[Tensor, " bounds"] | None = None,
        context: Context | None = None,
    ) -> tuple[Float[Tensor, "batch time d_model"], Any]:
        """As every mixer's, unless `released_padding`: then padding is input like any other, and has outputs."""
        if self.released_padding and cu_seqlens is not None:
            raise UsageError("released_padding=True mixes padding in, and packed documents have none: give lengths")
        if self.released_padding and lengths is not None:
            check_lengths(lengths, x)
            lengths = None
        return super().forward(x, state, lengths=lengths, cu_seqlens=cu_seqlens, context=context)

    def mix(
        self, x: Float[Tensor, "batch time d_model"], state: state.Empty, lengths: Int[Tensor, " batch"] | None
    ) -> tuple[Float[Tensor, "batch time d_model"], state.Empty]:
        u = x if self.norm is None else self.norm(x)
        z, _ = self.conv(self.in_proj(u), None, lengths)
        x1, x2, v = z.chunk(3, dim=-1)
        y = x2 * self.long(keep_real(x1 * v, lengths))
        if self.residual is not None:
            y = y + self.residual(keep_real(u, lengths))
        return self.out_proj(y), state


def default_order(d_model: int, order: int | None) -> int:
    """Width of a filter's network: the published 128 at widths from 512, less at small ones, or what is given."""
    return min(128, max(16, d_model // 4)) if order is None else order
