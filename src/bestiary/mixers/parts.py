"""What several mixers share beside an op: a short convolution with its weights, head counts, initialisations."""

import ctypes
import math
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from bestiary import ops
from bestiary.errors import UsageError, unknown
from bestiary.mixers.base import keep_real, numbers_at_hand
from bestiary.mixers.context import Context
from bestiary.ops.short_convolution import last_inputs

T = TypeVar("T")


class Linear(nn.Linear):
    """nn.Linear by `ops.linear`."""

    def forward(self, x: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        return ops.linear(x, self.weight, self.bias)


class ShortConvolution(nn.Module):
    """`ops.short_convolution` with weights of its own, drawn as nn.Conv1d draws a depthwise convolution's.

    Args:
        channels: number of channels, each with its own filter.
        taps: length of the filters.
        bias: whether a bias is added.
        activation: None or "silu", applied to the result.
    """

    def __init__(self, channels: int, taps: int, *, bias: bool = False, activation: str | None = None):
        super().__init__()
        if taps < 1:
            raise UsageError(f"conv_kernel must be at least 1, not {taps}")
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(channels, taps))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def initial_state(
        self, batch_size: int, *, dtype: torch.dtype, device: torch.device | str
    ) -> Float[Tensor, "batch history channels"]:
        """No inputs yet: zeros."""
        return torch.zeros(batch_size, self.weight.shape[1] - 1, self.weight.shape[0], dtype=dtype, device=device)

    def forward(
        self,
        x: Float[Tensor, "batch time channels"],
        state: Float[Tensor, "batch history channels"] | None,
        lengths: Int[Tensor, " batch"] | None = None,
    ) -> tuple[Float[Tensor, "batch time channels"], Float[Tensor, "batch history channels"]]:
        return ops.short_convolution(
            x, self.weight, self.bias, activation=self.activation, state=state, lengths=lengths
        )

    def flops(self) -> float:
        """Forward FLOPs a step."""
        return 2.0 * self.weight.numel()


class FullPrecision(nn.Module):
    """A module whose parameters stay in fp32 at least, also in a model that is turned to half precision."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def wide(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype in (torch.bfloat16, torch.float16) else moved

        return super()._apply(wide, recurse)


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm by `ops.rms_norm`: in fp32 at least, whatever autocast hands it, and gated where a gate is given."""

    def forward(self, x: Tensor, gate: Tensor | None = None, *, gate_first: bool = False) -> Tensor:
        eps = torch.finfo(torch.float32).eps if self.eps is None else self.eps
        return ops.rms_norm(x, self.weight, eps=eps, gate=gate, gate_first=gate_first)


class HeadNorm(nn.Module):
    """Group normalisation with a group a head: each head's channels shifted and scaled to mean 0 and variance 1.

    It computes in fp32 at least, and weighs each channel; a bias is added where asked.
    """

    def __init__(self, n_heads: int, channels: int, *, eps: float = 1e-5, bias: bool = False):
        super().__init__()
        self.n_heads, self.eps = n_heads, eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Float[Tensor, "*batch channels"]) -> Float[Tensor, "*batch channels"]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (self.n_heads, -1))
        y = F.layer_norm(wide, wide.shape[-1:], eps=self.eps).flatten(-2) * self.weight.to(wide.dtype)
        return (y if self.bias is None else y + self.bias.to(y.dtype)).to(x.dtype)


class HeadwiseLinear(nn.Module):
    """A block-diagonal linear map without bias: each block of channels by itself; weight (blocks, out, in).

    Args:
        channels: width of the input.
        blocks: number of blocks.
        outputs: width of the output over that of the input.
        d_model: width of the stream, which sets the size of the initial weights (`small_init`).
    """

    def __init__(self, channels: int, blocks: int, *, d_model: int, outputs: int = 1):
        super().__init__()
        self.d_model = d_model
        self.weight = nn.Parameter(torch.empty(blocks, outputs * channels // blocks, channels // blocks))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        small_init(self.weight, self.d_model)

    def forward(self, x: Float[Tensor, "*batch channels"]) -> Float[Tensor, "*batch out_channels"]:
        blocks = x.unflatten(-1, (self.weight.shape[0], -1))
        return torch.einsum("...bi,boi->...bo", blocks, self.weight.to(x.dtype)).flatten(-2)

    def flops(self) -> float:
        """Forward FLOPs a step."""
        return 2.0 * self.weight.numel()


class ForgetGate:
    """xLSTM's forget gate: "sigmoid", or "exponential", which may also amplify."""

    def __init__(self, kind: str):
        if kind not in ("sigmoid", "exponential"):
            raise unknown("forget gate", kind, ("sigmoid", "exponential"))
        self.sigmoid = kind == "sigmoid"

    def log(self, logits: Tensor) -> Tensor:
        """The gate's logarithm."""
        return F.logsigmoid(logits) if self.sigmoid else logits

    def bias(self, logits: Tensor) -> Tensor:
        """The bias with which a gate of either kind begins as the sigmoid of these logits."""
        return logits if self.sigmoid else F.logsigmoid(logits)


def token_shift(
    x: Float[Tensor, "batch time *rest"],
    before: Float[Tensor, "batch *rest"],
    lengths: Int[Tensor, " batch"] | None,
) -> tuple[Float[Tensor, "batch time *rest"], Float[Tensor, "batch *rest"]]:
    """(the previous input of each step, the last real input of each row), `before` being the one before the segment."""
    shifted = torch.cat([before[:, None].to(x.dtype), x], dim=1)[:, :-1]
    return shifted, last_inputs(before[:, None], x, lengths)[:, 0]


def default_heads(d_model: int) -> int:
    """Heads of 64 channels, as is usual, or of 32 at small or odd widths."""
    return d_model // 64 if d_model >= 256 and d_model % 64 == 0 else d_model // 32


def check_heads(n_heads: int, **widths: int) -> None:
    """One clear error for a number of heads that does not divide these widths."""
    for name, width in widths.items():
        if n_heads < 1 or width < 1 or width % n_heads:
            raise UsageError(f"n_heads={n_heads} must divide {name}={width}")


def expanded_heads(
    d_model: int, *, d_state: int | None, expand: float, head_dim: int | None, n_groups: int
) -> tuple[int, int, int]:
    """(d_state, head_dim, n_heads) of Mamba-2 and 3, the published 128 and 64 where the width allows; checked."""
    d_state, wanted = min(128, d_model) if d_state is None else d_state, round(expand * d_model)
    if head_dim is None:
        head_dim = 64 if wanted >= 256 and wanted % 64 == 0 else 32
    n_heads = max(1, round(wanted / head_dim)) if head_dim > 0 else 0
    if min(d_state, head_dim, n_groups, wanted) < 1 or n_heads % n_groups:
        raise UsageError(
            f"d_state={d_state}, head_dim={head_dim} and expand={expand} must be positive, and "
            f"n_groups={n_groups} must divide the {n_heads} heads"
        )
    return d_state, head_dim, n_heads


def time_gaps(
    context: Context, x: Float[Tensor, "batch time d_model"], lengths: Int[Tensor, " batch"] | None, dtype: torch.dtype
) -> Float[Tensor, "batch time"] | None:
    """The time that passes before each step of x, where the caller said so; padding takes none."""
    gaps = context.intervals
    if gaps is None:
        return None
    if gaps.shape != x.shape[:2]:
        raise UsageError(f"intervals must be of shape {tuple(x.shape[:2])}, one a step, not {tuple(gaps.shape)}")
    gaps = keep_real(gaps.to(dtype), lengths)
    if numbers_at_hand(gaps) and not gaps.min() >= 0:
        raise UsageError("intervals must be at least 0: time does not run backwards")
    return gaps


def check_rate(**rates: float) -> dict[str, float]:
    """One clear error for options that must be positive."""
    for name, value in rates.items():
        if not value > 0:
            raise UsageError(f"{name} must be positive, not {value}")
    return rates


def gpt_init(linear: nn.Linear | nn.Embedding, d_model: int, *, residuals: int = 1) -> None:
    """GPT-2's normal distribution: 0.02 at its width 768, scaled by 1/sqrt(width) to others.

    Args:
        residuals: how many layers write into the residual path; a map that does so is divided by their root.
    """
    nn.init.normal_(linear.weight, std=0.02 * math.sqrt(768 / d_model / residuals))
    if isinstance(linear, nn.Linear) and linear.bias is not None:
        nn.init.zeros_(linear.bias)


def xavier_init(linear: nn.Linear, *, gain: float = 2**-2.5) -> None:
    """The uniform initialisation of RetNet's authors, kept by GLA and the delta-rule layers."""
    nn.init.xavier_uniform_(linear.weight, gain=gain)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


def small_init(weight: Tensor, d_model: int) -> None:
    """xLSTM's for what reads the stream: normal, variance 2 / (5 d_model) (Nguyen & Salazar 2019, arXiv:1910.05895)."""
    nn.init.normal_(weight, std=math.sqrt(2 / (5 * d_model)))


def orthogonal_init(linear: nn.Linear) -> None:
    """RWKV's: orthogonal, scaled up where the map widens."""
    n_out, n_in = linear.weight.shape
    nn.init.orthogonal_(linear.weight, gain=math.sqrt(max(1.0, n_out / n_in)))


@torch.no_grad()
def dt_bias_init(bias: Tensor, *, dt_min: float = 1e-3, dt_max: float = 1e-1, dt_floor: float = 1e-4) -> None:
    """Mamba's: softplus(bias) is log-uniform between dt_min and dt_max."""
    dt = torch.rand_like(bias, dtype=torch.float32) * (math.log(dt_max) - math.log(dt_min)) + math.log(dt_min)
    dt = dt.exp().clamp(min=dt_floor)
    bias.copy_(dt + torch.log(-torch.expm1(-dt)))


def no_weight_decay(*parameters: nn.Parameter) -> None:
    """Mark parameters that an optimiser must not pull towards zero."""
    for parameter in parameters:
        parameter._no_weight_decay = True  # type: ignore[attr-defined]


def slow_learners(*parameters: nn.Parameter, max_lr: float = 1e-3) -> None:
    """Mark parameters whose learning rate is capped and which do not decay (S4's A, B and dt)."""
    for parameter in parameters:
        parameter._max_lr = max_lr  # type: ignore[attr-defined]
    no_weight_decay(*parameters)


class Remembered(nn.Module):
    """A function of parameters that is computed anew only when they have changed; with gradients, always.

    Decoding asks for the same filter at every step: computing it costs more than the step. Torch counts the changes of
    a parameter, but not those through `.data`: these are seen in a few of its numbers, on a CPU, and `train()` and
    `eval()` forget everything.
    """

    def __init__(self) -> None:
        super().__init__()
        self.forget()

    def forget(self) -> None:
        """Compute anew at the next call."""
        self.key: Any = None
        self.value: Any = None
        self.held: list[Tensor] = []
        self.seen: list[bytes] = []

    def train(self, mode: bool = True) -> "Remembered":
        self.forget()
        return super().train(mode)

    def get(self, parameters: Iterable[Tensor], compute: Callable[[], T], *also: Any) -> T:
        """`compute()`, or what it gave for the same parameters and the same further arguments."""
        if torch.compiler.is_compiling():
            return compute()
        parameters = list(parameters)
        if torch.is_grad_enabled() or any(p.is_inference() for p in parameters):  # the latter do not count changes
            self.forget()
            return compute()
        key = (*((p.data_ptr(), p._version, p.dtype, p.device) for p in parameters), also)
        seen = [_sample(p) for p in parameters]
        if key != self.key or seen != self.seen:
            # held: no other parameter can stand at their addresses as long as these are compared
            self.value, self.held = compute(), [p.detach() for p in parameters]
            self.key, self.seen = key, seen
        return self.value

    def __deepcopy__(self, memo: Any) -> "Remembered":
        return Remembered()

    def __reduce__(self) -> Any:
        return Remembered, ()


_SAMPLE = 32  # bytes at the start, in the middle and at the end of a parameter


def _sample(parameter: Tensor) -> bytes:
    """Some of a parameter's numbers, read in less time than any operation of torch takes."""
    size = parameter.nbytes
    plain = type(parameter) in (Tensor, nn.Parameter) and parameter.device.type == "cpu" and parameter.is_contiguous()
    if not plain or not size:
        return b""
    address, length = parameter.data_ptr(), min(size, _SAMPLE)
    return b"".join(ctypes.string_at(address + at, length) for at in (0, (size - length) // 2, size - length))


def unit(x: Float[Tensor, "*batch channels"], eps: float = 1e-6) -> Float[Tensor, "*batch channels"]:
    """Vectors of length one along the last dimension; zero stays zero."""
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + eps)
