"""StripedHyena's operator: a gated convolution whose filter is a recurrence (Poli et al. 2023; Evo has it too).

    x2, x1, v = split(conv_3(W_in u + b_in))             a short filter of 3 taps; split within each head
    s_t = lambda s_{t-1} + x1_t v_t                      d_state complex numbers a channel: ops.diagonal_ssm
    y_t = W_out (x2_t (Re(R . s_t) + D x1_t v_t)) + b_out

As a convolution, h_t = Re sum_n R_n lambda_n^t: poles lambda and residues R, the modal form of Laughing Hyena
(arXiv:2310.18780). Nothing keeps published poles inside the unit circle; here there are two parametrisations,

    modal     lambda = exp(-exp(log_decay) + i angle)    |lambda| < 1, whatever training does (arXiv:2303.06349)
    raw       lambda = poles                             as in published checkpoints: unstable ones are representable

of equally many numbers. Both begin as the published training code does: dt is log-uniform in 0.001 ... 0.1, a number a
channel, lambda_n = exp(dt (-1/2 + i pi n)), R_n = 2 C_n dt / (1 - dt (-1/2 + i pi n) / 2), C complex normal; D is
normal, as in Hyena.
"""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn

from bestiary import ops, state
from bestiary.errors import UsageError, unknown
from bestiary.mixers import register
from bestiary.mixers.base import Mixer, keep_real
from bestiary.mixers.parts import (
    FullPrecision,
    Linear,
    Remembered,
    ShortConvolution,
    check_heads,
    default_heads,
    gpt_init,
    no_weight_decay,
)
from bestiary.ops import ssm


@state.register
class StripedHyenaState(NamedTuple):
    """The last inputs of the short filter, and what the filter between the gates remembers of its own."""

    history: Float[Tensor, "batch taps_minus_1 channels"]
    past: Float[Tensor, "batch *remembered"]


class GatedFilter(FullPrecision):
    """A filter of each channel, to stand between two gates: what StripedHyena's operators differ in.

    Its parameters stay in fp32 at least, also in a model that is turned to half precision: a pole of 0.999 is none of
    0.996 or 1.
    """

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        raise NotImplementedError

    def initial_state(
        self, batch_size: int, *, dtype: torch.dtype, device: torch.device | str
    ) -> Float[Tensor, "batch *remembered"]:
        """The state before the first step."""
        raise NotImplementedError

    def forward(
        self,
        u: Float[Tensor, "batch time channels"],
        past: Float[Tensor, "batch *remembered"],
        lengths: Int[Tensor, " batch"] | None,
    ) -> tuple[Float[Tensor, "batch time channels"], Float[Tensor, "batch *remembered"]]:
        raise NotImplementedError

    def taps(self, lags: int, dtype: torch.dtype) -> Float[Tensor, "channels lags"]:
        """The first `lags` taps of the filter, its skip left out."""
        raise NotImplementedError

    def flops(self, context: int) -> float:
        """Forward FLOPs a step."""
        raise NotImplementedError


class GatedOperator(Mixer):
    """Projections to x2, x1, v with a short filter, and `filter` between the gates x1 and x2.

    Args:
        d_model: width of input and output.
        filter: the filter between the gates.
        n_heads: neighbouring channels of a head come as its x2, its x1 and its v, one head after the other.
        conv_kernel: taps of the short filter.
        bias: whether the projections to x2, x1, v and the short filter have biases.
    """

    def __init__(
        self, d_model: int, filter: GatedFilter, *, n_heads: int, conv_kernel: int, bias: bool, residuals: int
    ):
        super().__init__(d_model)
        check_heads(n_heads, d_model=d_model)
        self.n_heads, self.residuals = n_heads, residuals
        self.in_proj = Linear(d_model, 3 * d_model, bias=bias)
        self.conv = ShortConvolution(3 * d_model, conv_kernel, bias=bias)
        self.filter = filter
        self.out_proj = Linear(d_model, d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        gpt_init(self.in_proj, self.d_model)
        gpt_init(self.out_proj, self.d_model, residuals=self.residuals)
        for part in (self.conv, self.filter):
            part.reset_parameters()

    def initial_state(self, batch_size: int, *, device: Any = None, dtype: Any = None) -> StripedHyenaState:
        parts = (self.conv, self.filter)
        place: dict[str, Any] = {"device": self.own_device(device), "dtype": self.own_dtype(dtype)}
        return StripedHyenaState(*(part.initial_state(batch_size, **place) for part in parts))

    def mixing_flops(self, context: int) -> float:
        return self.conv.flops() + self.filter.flops(context) + 2 * self.d_model

    def mix(
        self, x: Float[Tensor, "batch time d_model"], state: StripedHyenaState, lengths: Int[Tensor, " batch"] | None
    ) -> tuple[Float[Tensor, "batch time d_model"], StripedHyenaState]:
        z, history = self.conv(self.in_proj(x), state.history, lengths)
        x2, x1, v = (part.flatten(-2) for part in z.unflatten(-1, (self.n_heads, 3, -1)).unbind(-2))
        y, past = self.filter(keep_real(x1 * v, lengths), state.past, lengths)
        return self.out_proj(x2 * y), StripedHyenaState(history, past)


class ModalFilter(GatedFilter):
    """h_t = Re sum_n R_n lambda_n^t, and the skip D.

    Args:
        channels: number of filters.
        d_state: complex poles of each.
        parametrisation: "modal" or "raw"; see above.
    """

    def __init__(self, channels: int, d_state: int, *, parametrisation: str = "modal"):
        super().__init__()
        if d_state < 1:
            raise UsageError(f"d_state must be at least 1, not {d_state}")
        if parametrisation not in ("modal", "raw"):
            raise unknown("parametrisation", parametrisation, ("modal", "raw"))
        wide = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.parametrisation = parametrisation
        if parametrisation == "raw":
            self.poles = nn.Parameter(torch.empty(channels, d_state, 2, dtype=wide))
        else:
            self.log_decay, self.angle = (nn.Parameter(torch.empty(channels, d_state, dtype=wide)) for _ in range(2))
        self.residues = nn.Parameter(torch.empty(channels, d_state, 2, dtype=wide))
        self.D = nn.Parameter(torch.empty(channels, dtype=wide))
        no_weight_decay(*self.parameters())
        self.remembered = Remembered()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        channels, d_state, _ = self.residues.shape
        place: dict[str, Any] = {"dtype": torch.float64, "device": self.D.device}
        dt = torch.empty(channels, 1, **place).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        A = torch.complex(torch.full((d_state,), -0.5, **place), math.pi * torch.arange(d_state, **place))
        C = torch.view_as_complex(torch.randn(channels, d_state, 2, **place) * math.sqrt(0.5))
        self._set((dt * A).exp(), 2 * C * dt / (1 - dt * A / 2))
        nn.init.normal_(self.D)

    def system(
        self, dtype: torch.dtype
    ) -> tuple[Complex[Tensor, "channels d_state"], Complex[Tensor, "channels d_state"]]:
        """(poles, residues), computed in `dtype`."""
        residues = torch.view_as_complex(self.residues.to(dtype))
        if self.parametrisation == "raw":
            return torch.view_as_complex(self.poles.to(dtype)), residues
        return torch.complex(-self.log_decay.to(dtype).exp(), self.angle.to(dtype)).exp(), residues

    @torch.no_grad()
    def load_modes(self, poles: Tensor, residues: Tensor) -> None:
        """Take poles and residues, complex or as published: (channels, d_state, 1, 2), real and imaginary parts.

        Raises:
            UsageError: the shapes are others, or poles lie on or beyond the unit circle, where only
                parametrisation="raw" (which takes all as they are, to the last bit) can hold them.
        """
        found = []
        for name, given in (("poles", poles), ("residues", residues)):
            pairs = torch.view_as_real(given) if given.is_complex() else given
            if pairs.numel() != self.residues.numel() or pairs.shape[:2] != self.residues.shape[:2]:
                raise UsageError(f"{name} are {tuple(given.shape)}, not pairs for {tuple(self.residues.shape)}")
            found.append(torch.view_as_complex(pairs.reshape(self.residues.shape).double().contiguous()))
        size = found[0].abs()
        if self.parametrisation == "modal" and not (size < 1).all():
            raise UsageError(
                f"{int((~(size < 1)).sum())} of {size.numel()} poles lie on or beyond the unit circle, the largest at "
                f"{float(size.max()):.6g}: parametrisation=modal keeps them inside; build with parametrisation=raw"
            )
        self._set(found[0], found[1])

    def _set(self, poles: Tensor, residues: Tensor) -> None:
        self.residues.copy_(torch.view_as_real(residues))
        if self.parametrisation == "raw":
            self.poles.copy_(torch.view_as_real(poles))
        else:
            self.log_decay.copy_((-poles.abs().clamp(min=1e-30).log()).log())  # a pole of 0 has no logarithm
            self.angle.copy_(poles.angle())

    def initial_state(
        self, batch_size: int, *, dtype: torch.dtype, device: torch.device | str
    ) -> Float[Tensor, "batch channels d_state 2"]:
        return torch.zeros(batch_size, *self.residues.shape, dtype=dtype, device=device)

    def forward(
        self,
        u: Float[Tensor, "batch time channels"],
        past: Float[Tensor, "batch channels d_state 2"],
        lengths: Int[Tensor, " batch"] | None,
    ) -> tuple[Float[Tensor, "batch time channels"], Float[Tensor, "batch channels d_state 2"]]:
        with ops.full_precision(u):
            poles, residues = self.remembered.get(self.parameters(), lambda: self.system(past.dtype), past.dtype)
        one = torch.ones_like(poles)
        return ops.diagonal_ssm(u, poles, one, residues / 2, self.D, state=past, lengths=lengths)  # it reads 2 Re

    def taps(self, lags: int, dtype: torch.dtype) -> Float[Tensor, "channels lags"]:
        poles, residues = self.system(dtype)
        return ssm.vandermonde_kernel(poles, torch.ones_like(poles), residues / 2, lags)

    def flops(self, context: int) -> float:
        return 6.0 * self.residues.numel() + 2 * len(self.D)


@register("striped_hyena")
class StripedHyena(GatedOperator):
    """Hyena with a filter that is a recurrence of a few complex poles a channel: constant state, exact decoding.

    Args:
        d_model: width of input and output.
        d_state: complex poles of each channel; StripedHyena-7B has 2, Evo-1 has 8.
        n_heads: heads, within which the projections are split; only the order of the weights depends on it. By
            default of 64 channels (32 at small widths).
        conv_kernel: taps of the short filter.
        parametrisation: "modal" keeps all poles inside the unit circle; "raw" has them as published checkpoints do.
    """

    filter: ModalFilter

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 2,
        n_heads: int | None = None,
        conv_kernel: int = 3,
        parametrisation: str = "modal",
        residuals: int = 1,
    ):
        filter = ModalFilter(d_model, d_state, parametrisation=parametrisation)
        heads = default_heads(d_model) if n_heads is None else n_heads
        super().__init__(d_model, filter, n_heads=heads, conv_kernel=conv_kernel, bias=True, residuals=residuals)
