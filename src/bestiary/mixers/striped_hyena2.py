"""StripedHyena 2's three operators (Ku et al. 2025, arXiv:2503.01868; the model is Evo 2): filters of three reaches.

    x2, x1, v = split(conv_3(W_in u))                    no biases; split channel by channel
    y = W_out (x2 (h * (x1 v) + D x1 v)) + b_out

    hyena_se    h_t, t < 7: taps, shared by groups of channels; no D               short, explicit
    hyena_mr    h_t, t < 128: taps times exp(-alpha t), shared by groups           medium, regularised
    hyena_li    h_t = sum_n R_n exp(log_pole_n t), log_pole < 0 real               long, implicit: a recurrence

ops.short_convolution for the explicit filters (by FFT above 16 taps), ops.real_ssm for the long one.

They begin as the published training code does: short taps uniform; medium ones normal, of deviation 1e-5 / sqrt(taps),
so that D and the gates speak first; log_pole = -exp(-1) gamma, gamma uniform in 0.01 ... 0.1, R normal, of deviation
0.1 / sqrt(d_state). D is normal, as in Hyena.
"""

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bestiary import ops
from bestiary.errors import UsageError
from bestiary.mixers import register
from bestiary.mixers.parts import Remembered, check_rate, no_weight_decay
from bestiary.mixers.striped_hyena import GatedFilter, GatedOperator
from bestiary.ops import ssm
from bestiary.ops.short_convolution import MANY_TAPS


class ExplicitFilter(GatedFilter):
    """Taps, one filter for each group of neighbouring channels.

    Args:
        channels: of the input.
        taps: length of the filters.
        group_size: channels that share a filter.
        decay: exponent of the fastest decay at the last tap, the slowest group's being 10^-4 of it and the others even
            between them on a logarithmic scale; None for taps as they are, without a skip D.
    """

    def __init__(self, channels: int, taps: int, group_size: int, *, decay: float | None):
        super().__init__()
        if taps < 1:
            raise UsageError(f"filter_length must be at least 1, not {taps}")
        if group_size < 1 or channels % group_size:
            raise UsageError(f"group_size={group_size} must divide d_model={channels}")
        self.group_size, self.decay = group_size, decay
        wide = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.weight = nn.Parameter(torch.empty(channels // group_size, taps, dtype=wide))  # lag 0 last, as everywhere
        self.D = None if decay is None else nn.Parameter(torch.empty(channels, dtype=wide))
        if self.D is not None:
            no_weight_decay(self.D)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.D is None:
            nn.init.uniform_(self.weight, -(3**-0.5), 3**-0.5)  # the bound of the 3 taps before, also published for 7
        else:
            nn.init.normal_(self.weight, std=1e-5 * self.weight.shape[1] ** -0.5)
            nn.init.normal_(self.D)

    def kernel(self, dtype: torch.dtype) -> Float[Tensor, "channels taps"]:
        """The taps of each channel, lag 0 last, computed in `dtype`."""
        groups, taps = self.weight.shape
        kernel = self.weight.to(dtype)
        if self.decay:
            place: dict[str, Any] = {"dtype": dtype, "device": kernel.device}
            alpha = torch.logspace(-4, 0, groups, **place)[:, None] * self.decay
            lag = torch.arange(taps - 1, -1, -1, **place) / max(1, taps - 1)
            kernel = kernel * torch.exp(-alpha * lag)
        return kernel.repeat_interleave(self.group_size, dim=0)

    def initial_state(
        self, batch_size: int, *, dtype: torch.dtype, device: torch.device | str
    ) -> Float[Tensor, "batch taps_minus_1 channels"]:
        groups, taps = self.weight.shape
        return torch.zeros(batch_size, taps - 1, groups * self.group_size, dtype=dtype, device=device)

    def forward(
        self,
        u: Float[Tensor, "batch time channels"],
        past: Float[Tensor, "batch taps_minus_1 channels"],
        lengths: Int[Tensor, " batch"] | None,
    ) -> tuple[Float[Tensor, "batch time channels"], Float[Tensor, "batch taps_minus_1 channels"]]:
        with ops.full_precision(u):
            wide, kernel = u.to(past.dtype), self.kernel(past.dtype)
            y, past = ops.short_convolution(wide, kernel, state=past, lengths=lengths)
            y = y if self.D is None else torch.addcmul(y, wide, self.D.to(y.dtype))
        return y.to(u.dtype), past

    def taps(self, lags: int, dtype: torch.dtype) -> Float[Tensor, "channels lags"]:
        kernel = self.kernel(dtype).flip(1)[:, :lags]
        return nn.functional.pad(kernel, (0, lags - kernel.shape[1]))

    def flops(self, context: int) -> float:
        groups, taps = self.weight.shape
        channels = groups * self.group_size
        return channels * (2.0 * taps if taps <= MANY_TAPS else 10 * math.log2(taps + context))


class RealModalFilter(GatedFilter):
    """h_t = sum_n R_n exp(log_pole_n t), log_pole_n = -exp(log_decay_n), and the skip D.

    Args:
        channels: number of filters.
        d_state: real poles of each.
    """

    def __init__(self, channels: int, d_state: int):
        super().__init__()
        if d_state < 1:
            raise UsageError(f"d_state must be at least 1, not {d_state}")
        wide = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.log_decay, self.residues = (nn.Parameter(torch.empty(channels, d_state, dtype=wide)) for _ in range(2))
        self.D = nn.Parameter(torch.empty(channels, dtype=wide))
        no_weight_decay(*self.parameters())
        self.remembered = Remembered()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.log_decay.uniform_(0.01, 0.1).log_().sub_(1)
        nn.init.normal_(self.residues, std=0.1 * self.residues.shape[1] ** -0.5)
        nn.init.normal_(self.D)

    @torch.no_grad()
    def load_modes(self, log_poles: Tensor, residues: Tensor) -> None:
        """Take log-poles and residues as published: (channels, d_state, 1) and (channels, d_state).

        Raises:
            UsageError: the shapes are others, or log-poles are not below 0.
        """
        if log_poles.numel() != self.log_decay.numel() or residues.shape != self.residues.shape:
            raise UsageError(
                f"log_poles are {tuple(log_poles.shape)} and residues {tuple(residues.shape)}, not "
                f"{tuple(self.residues.shape)}"
            )
        if not (log_poles < 0).all():
            raise UsageError(f"log_poles must be below 0, for a filter that decays; the largest is {log_poles.max():g}")
        self.log_decay.copy_((-log_poles.double()).log().reshape(self.log_decay.shape))
        self.residues.copy_(residues)

    def initial_state(
        self, batch_size: int, *, dtype: torch.dtype, device: torch.device | str
    ) -> Float[Tensor, "batch channels d_state"]:
        return torch.zeros(batch_size, *self.residues.shape, dtype=dtype, device=device)

    def poles(self, dtype: torch.dtype) -> Float[Tensor, "channels d_state"]:
        """The poles, between 0 and 1."""
        return (-self.log_decay.to(dtype).exp()).exp()

    def forward(
        self,
        u: Float[Tensor, "batch time channels"],
        past: Float[Tensor, "batch channels d_state"],
        lengths: Int[Tensor, " batch"] | None,
    ) -> tuple[Float[Tensor, "batch time channels"], Float[Tensor, "batch channels d_state"]]:
        with ops.full_precision(u):
            poles = self.remembered.get([self.log_decay], lambda: self.poles(past.dtype), past.dtype)
        return ops.real_ssm(u, poles, torch.ones_like(poles), self.residues, self.D, state=past, lengths=lengths)

    def taps(self, lags: int, dtype: torch.dtype) -> Float[Tensor, "channels lags"]:
        return torch.einsum("cn,cnl->cl", self.residues.to(dtype), ssm.powers(self.poles(dtype), lags))

    def flops(self, context: int) -> float:
        return 4.0 * self.residues.numel() + 2 * len(self.D)


class StripedHyena2(GatedOperator):
    """What the three share: no biases before the gates, and each channel's x2, x1 and v side by side."""

    def __init__(self, d_model: int, filter: GatedFilter, *, n_heads: int | None, conv_kernel: int, residuals: int):
        heads = d_model if n_heads is None else n_heads
        super().__init__(d_model, filter, n_heads=heads, conv_kernel=conv_kernel, bias=False, residuals=residuals)


@register("hyena_se")
class HyenaSE(StripedHyena2):
    """Short explicit filters between two gates: local patterns, cheaply.

    Args:
        d_model: width of input and output.
        filter_length: taps of the filters.
        group_size: neighbouring channels that share a filter; must divide d_model.
        n_heads: heads, within which the projections are split; one a channel by default, as published.
        conv_kernel: taps of the short filter before the gates.
    """

    def __init__(
        self,
        d_model: int,
        *,
        filter_length: int = 7,
        group_size: int = 16,
        n_heads: int | None = None,
        conv_kernel: int = 3,
        residuals: int = 1,
    ):
        filter = ExplicitFilter(d_model, filter_length, group_size, decay=None)
        super().__init__(d_model, filter, n_heads=n_heads, conv_kernel=conv_kernel, residuals=residuals)


@register("hyena_mr")
class HyenaMR(StripedHyena2):
    """Explicit filters of medium length between two gates, with decays that differ from group to group.

    Args:
        d_model: width of input and output.
        filter_length: taps of the filters.
        group_size: neighbouring channels that share a filter; must divide d_model.
        decay: exponent of the fastest group at the last tap; 0 for none (published weights hold the product).
        n_heads: heads, within which the projections are split; one a channel by default, as published.
        conv_kernel: taps of the short filter before the gates.
    """

    def __init__(
        self,
        d_model: int,
        *,
        filter_length: int = 128,
        group_size: int = 16,
        decay: float = 1.5625,
        n_heads: int | None = None,
        conv_kernel: int = 3,
        residuals: int = 1,
    ):
        if decay:
            check_rate(decay=decay)
        filter = ExplicitFilter(d_model, filter_length, group_size, decay=decay)
        super().__init__(d_model, filter, n_heads=n_heads, conv_kernel=conv_kernel, residuals=residuals)


@register("hyena_li")
class HyenaLI(StripedHyena2):
    """A long filter of real decays, one recurrence a channel, between two gates.

    Args:
        d_model: width of input and output.
        d_state: real poles of each channel.
        n_heads: heads, within which the projections are split; one a channel by default, as published.
        conv_kernel: taps of the short filter before the gates.
    """

    filter: RealModalFilter

    def __init__(
        self, d_model: int, *, d_state: int = 16, n_heads: int | None = None, conv_kernel: int = 3, residuals: int = 1
    ):
        filter = RealModalFilter(d_model, d_state)
        super().__init__(d_model, filter, n_heads=n_heads, conv_kernel=conv_kernel, residuals=residuals)
