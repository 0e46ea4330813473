"""Causal depthwise convolution with a short filter, shared by most mixers.

    y_t[c] = sum_{j<K} w[c, K-1-j] x_{t-j}[c] + b[c]          (the last tap weighs the current step, as in nn.Conv1d)

The state is the last K-1 inputs of each row; a row shorter than that draws on the older ones.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from bestiary.errors import UsageError
from bestiary.ops import dispatch
from bestiary.ops.fft_convolution import convolve
from bestiary.ops.native.short_convolution import MOST_TAPS
from bestiary.ops.native.short_convolution import short_convolution as kernel

dispatch.has_kernel("short_convolution")
MANY_TAPS = 16


def short_convolution(
    x: Float[Tensor, "batch time channels"],
    weight: Float[Tensor, "channels taps"],
    bias: Float[Tensor, " channels"] | None = None,
    *,
    activation: str | None = None,
    state: Float[Tensor, "batch history channels"] | None = None,
    lengths: Int[Tensor, " batch"] | None = None,
) -> tuple[Float[Tensor, "batch time channels"], Float[Tensor, "batch history channels"]]:
    """Convolve each channel with its own causal filter; returns (y, state) with y in x's dtype.

    Args:
        activation: None or "silu", applied to the result.
        state: the K-1 inputs before this segment, oldest first; None for zeros.
        lengths: real steps of each row of a right-padded batch; only these enter the returned state.
    """
    if activation not in (None, "silu"):
        raise UsageError(f"activation must be None or 'silu', not {activation!r}")
    if state is None:
        history = (x.shape[0], weight.shape[1] - 1, x.shape[2])
        state = torch.zeros(history, dtype=dispatch.wide(x.dtype), device=x.device)
    few = weight.shape[1] <= MOST_TAPS
    if dispatch.compiled("short_convolution", state, why_not=None if few else f"more than {MOST_TAPS} taps"):
        bias = None if bias is None else bias.to(state.dtype)
        inputs = (x.to(state.dtype), weight.to(state.dtype), bias, state)
        y, state = kernel(*inputs, lengths, activation == "silu")
        return y.to(x.dtype), state
    with dispatch.full_precision(x):
        wide = x.to(state.dtype)
        y = dispatch.choose("short_convolution", time=x.shape[1], like=x)(wide, weight.to(state.dtype), state)
        if bias is not None:
            y = y + bias.to(state.dtype)
        y = F.silu(y) if activation == "silu" else y
        return y.to(x.dtype), last_inputs(state, wide, lengths)


@dispatch.form("short_convolution", "reference")
def recurrent(x: Tensor, weight: Tensor, state: Tensor) -> Tensor:
    """Step through time, a window of K inputs at once."""
    window, outputs = state, []
    for x_t in x.unbind(1):
        window = torch.cat([window, x_t[:, None]], dim=1)
        outputs.append(torch.einsum("bkc,ck->bc", window, weight))
        window = window[:, 1:]
    return torch.stack(outputs, dim=1) if outputs else torch.zeros_like(x)


@dispatch.form("short_convolution", "torch")
def shifted(x: Tensor, weight: Tensor, state: Tensor) -> Tensor:
    """A sum of K shifted copies: channels stay contiguous, which beats nn.Conv1d on CPUs. Many taps go by FFT."""
    time, taps = x.shape[1], weight.shape[1]
    inputs = torch.cat([state, x], dim=1)
    if taps > MANY_TAPS and time:
        return convolve(inputs, weight.flip(1), taps - 1)
    y = inputs[:, :time] * weight[:, 0]
    for k in range(1, taps):
        y = torch.addcmul(y, inputs[:, k : k + time], weight[:, k])
    return y


def last_inputs(
    history: Float[Tensor, "batch kept *rest"],
    x: Float[Tensor, "batch time *rest"],
    lengths: Int[Tensor, " batch"] | None = None,
) -> Float[Tensor, "batch kept *rest"]:
    """The last `kept` real inputs of each row after a segment, oldest first, in the dtype of `history`."""
    kept, time = history.shape[1], x.shape[1]
    joined = torch.cat([history, x.to(history.dtype)], dim=1)
    if lengths is None:
        return joined[:, time:]
    index = lengths[:, None] + torch.arange(kept, device=x.device)
    return joined[torch.arange(x.shape[0], device=x.device)[:, None], index]
