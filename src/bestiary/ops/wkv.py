"""RWKV-4's WKV operator (Peng et al. 2023, arXiv:2305.13048): attention without queries, as a quotient of linear RNNs.

    wkv_t = (sum_{j<t} e^{(t-1-j) w + k_j} v_j + e^{u + k_t} v_t) / (sum_{j<t} e^{(t-1-j) w + k_j} + e^{u + k_t})

per channel, with a log-decay w < 0 and a bonus u for the current step. Keys are exponents, so numerator and denominator
are kept relative to e^max, a reference that follows the largest exponent; what counts is num e^max and den e^max.
References are whole numbers: differences between them are then exact, and nothing drifts over many steps.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bestiary import state as states
from bestiary.ops import dispatch
from bestiary.ops.linear_recurrence import scan
from bestiary.ops.native.wkv import wkv as kernel

dispatch.has_kernel("wkv")

SMALLEST = -1e38
"""The reference exponent of an empty past: finite, since -inf - -inf is NaN."""


@states.register
class WKVState(NamedTuple):
    """Numerator and denominator over the past, in units of e^max."""

    num: Float[Tensor, "batch channels"]
    den: Float[Tensor, "batch channels"]
    max: Float[Tensor, "batch channels"]


def wkv(
    k: Float[Tensor, "batch time channels"],
    v: Float[Tensor, "batch time channels"],
    w: Float[Tensor, " channels"],
    u: Float[Tensor, " channels"],
    *,
    state: WKVState | None = None,
    lengths: Int[Tensor, " batch"] | None = None,
) -> tuple[Float[Tensor, "batch time channels"], WKVState]:
    """Weighted mean of the values so far; returns (wkv, state), wkv in v's dtype.

    Args:
        w: log-decay of each channel, at most 0 (-exp(time_decay) in RWKV's parameters).
        u: bonus of the current step (time_first).
        state: the past, fp32 or wider; None for none.
        lengths: real steps of each row of a right-padded batch; only these enter the state, and y elsewhere means
            nothing.
    """
    if state is None:
        state = empty_wkv(k.shape[0], k.shape[2], dtype=dispatch.wide(k.dtype, v.dtype), device=k.device)
    dtype = state.num.dtype
    if dispatch.compiled("wkv", *state):
        y, after = kernel(tuple(x.to(dtype) for x in (k, v, w, u)), state, lengths)
        return y.to(v.dtype), WKVState(*after)
    with dispatch.full_precision(k):
        wide = (x.to(dtype) for x in (k, v, w, u))
        y, state = dispatch.choose("wkv", time=k.shape[1], like=v)(*wide, state, lengths)
        return y.to(v.dtype), state


def empty_wkv(
    batch: int, channels: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> WKVState:
    """The state before the first step."""
    num, den = (torch.zeros(batch, channels, dtype=dtype, device=device) for _ in range(2))
    return WKVState(num, den, torch.full_like(num, SMALLEST))


@dispatch.form("wkv", "reference")
def recurrent(
    k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: WKVState, lengths: Tensor | None
) -> tuple[Tensor, WKVState]:
    """Step through time. References are constants to gradients: the results do not depend on them."""
    outputs = []
    for t, (k_t, v_t) in enumerate(zip(k.unbind(1), v.unbind(1))):
        num, den, reference = state
        highest = torch.maximum(reference, u + k_t).detach().ceil()
        past, now = (reference - highest).exp(), (k_t - highest + u).exp()
        outputs.append((past * num + now * v_t) / (past * den + now))
        # den follows the decay where a whole number cannot: w = -0.1 would leave the reference where it is
        highest = torch.maximum(reference + w + den.log(), k_t).detach().ceil()
        past, now = (reference - highest + w).exp(), (k_t - highest).exp()
        after = WKVState(past * num + now * v_t, past * den + now, highest)
        if lengths is not None:
            real = (t < lengths)[:, None]
            after = WKVState(*(torch.where(real, a, b) for a, b in zip(after, state)))
        state = after
    return (torch.stack(outputs, dim=1) if outputs else torch.zeros_like(v)), state


@dispatch.form("wkv", "torch", own_backward=True)
def scanned(
    k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: WKVState, lengths: Tensor | None
) -> tuple[Tensor, WKVState]:
    """All exponentials at once; what is left to step through is one multiply-add, h_t = d_t h_{t-1} + b_t."""
    with torch.no_grad():  # max_t = max(max_{t-1} + w, k_t), for all t: a running maximum of k_t - t w
        drift = torch.arange(1, k.shape[1] + 1, dtype=k.dtype, device=k.device)[:, None] * w
        highest = torch.cat([state.max[:, None], k - drift], dim=1).cummax(dim=1).values[:, 1:] + drift
        # that difference may be off by rounding; a reference must not be below an exponent by much
        highest = torch.maximum(highest, k).ceil()
    reference = torch.cat([state.max[:, None], highest], dim=1)
    decay = (reference[:, :-1] - highest + w).exp()
    write = (k - highest).exp()
    sums = scan(
        torch.cat([decay, decay], dim=-1),
        torch.cat([write * v, write], dim=-1),
        torch.cat([state.num, state.den], dim=-1),
    )
    num, den = sums.chunk(2, dim=-1)
    top = torch.maximum(reference[:, :-1], u + k).detach().ceil()
    past, now = (reference[:, :-1] - top).exp(), (k - top + u).exp()
    y = (past * num[:, :-1] + now * v) / (past * den[:, :-1] + now)
    end = torch.full_like(state.num[:, 0], k.shape[1], dtype=torch.int64) if lengths is None else lengths
    rows = torch.arange(len(end), device=k.device)
    return y, WKVState(num[rows, end], den[rows, end], reference[rows, end])
