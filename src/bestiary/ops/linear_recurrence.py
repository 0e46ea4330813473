"""The diagonal linear recurrence, each channel by itself: the core of gated linear RNNs and of LRU and S5.

    h_t = a_t h_{t-1} + b_t                    a_t, b_t, h_t real or complex

HGRN (arXiv:2311.04823), RG-LRU (2402.19427), minGRU and minLSTM (2410.01201) differ in how a and b follow from their
input. LRU (2303.06349) and S5 (2208.04933) have a constant complex a. WKV (wkv.py) is a quotient of two of these.
"""

import math
from typing import Any

import torch
from jaxtyping import Int, Num
from torch import Tensor
from torch.autograd.function import once_differentiable

from bestiary.errors import UsageError
from bestiary.ops import dispatch
from bestiary.ops.native.linear_recurrence import linear_recurrence as kernel

dispatch.has_kernel("linear_recurrence")


def linear_recurrence(
    decay: Num[Tensor, "batch time *channels"],
    write: Num[Tensor, "batch time *channels"],
    *,
    state: Num[Tensor, "batch *channels"] | None = None,
    lengths: Int[Tensor, " batch"] | None = None,
) -> tuple[Num[Tensor, "batch time *channels"], Num[Tensor, "batch *channels"]]:
    """All h of a segment, and the last one; returns (h, state), both in the state's dtype (complex64 or fp32 at least).

    Args:
        decay: a, the factor itself, not its logarithm; both inputs of one kind, real or complex.
        write: b.
        state: h before this segment; None for zeros.
        lengths: real steps of each row of a right-padded batch; padding leaves h as it is, and h there means nothing.
    """
    if decay.shape != write.shape or decay.is_complex() != write.is_complex():
        raise UsageError(
            f"decay and write must be of one shape and kind, not {tuple(decay.shape)} {decay.dtype} and "
            f"{tuple(write.shape)} {write.dtype}"
        )
    if state is None:
        dtype = torch.promote_types(dispatch.wide(decay.real.dtype, write.real.dtype), write.dtype)
        state = torch.zeros(write.shape[0], *write.shape[2:], dtype=dtype, device=write.device)
    complexity = "the kernel computes with real numbers" if state.is_complex() else None
    if dispatch.compiled("linear_recurrence", state, why_not=complexity):
        return kernel(decay.to(state.dtype), write.to(state.dtype), state, lengths)
    with dispatch.full_precision(write):
        decay, write = decay.to(state.dtype), write.to(state.dtype)
        if lengths is not None:
            real = torch.arange(write.shape[1], device=write.device) < lengths[:, None]
            real = real.reshape(*real.shape, *[1] * (write.ndim - 2))
            decay, write = torch.where(real, decay, 1), torch.where(real, write, 0)
        return dispatch.choose("linear_recurrence", time=write.shape[1])(decay, write, state)


@dispatch.form("linear_recurrence", "reference")
def recurrent(decay: Tensor, write: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Step through time, as the equation reads."""
    found = []
    for decay_t, write_t in zip(decay.unbind(1), write.unbind(1)):
        state = decay_t * state + write_t
        found.append(state)
    return (torch.stack(found, dim=1) if found else torch.zeros_like(write)), state


@dispatch.form("linear_recurrence", "torch", own_backward=True)
def scanned(decay: Tensor, write: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The same steps in place, with a backward pass that runs the recurrence in reverse."""
    (batch, time), channels = write.shape[:2], math.prod(write.shape[2:])
    decay, flat = (x.reshape(batch, time, channels) for x in (decay, write))
    h = scan(decay, flat, state.reshape(batch, channels))
    return h[:, 1:].reshape(write.shape), h[:, -1].reshape(state.shape)


def scan(
    decay: Num[Tensor, "batch time channels"],
    write: Num[Tensor, "batch time channels"],
    start: Num[Tensor, "batch channels"],
) -> Num[Tensor, "batch time_plus_1 channels"]:
    """h_0 = start, h_1, ..., h_T."""
    return _Scan.apply(decay, write, start)


class _Scan(torch.autograd.Function):
    """Inside, time comes first: each step is contiguous."""

    @staticmethod
    def forward(ctx: Any, decay: Tensor, write: Tensor, start: Tensor) -> Tensor:
        decay, write = decay.transpose(0, 1), write.transpose(0, 1).contiguous()
        decay = decay if 0 in decay.stride() else decay.contiguous()  # one that is the same at all steps stays small
        h = torch.cat([start[None], write])
        for before, after, decay_t in zip(h.unbind(), h.unbind()[1:], decay.unbind()):
            after.addcmul_(decay_t, before)
        ctx.save_for_backward(decay, h)
        return h.transpose(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        decay, h = ctx.saved_tensors
        once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in decay.stride())
        decay = decay[once].conj().resolve_conj().expand_as(decay)
        flow = grad.transpose(0, 1).clone(memory_format=torch.contiguous_format)  # becomes the gradient of h_t
        for t in reversed(range(len(decay))):
            flow[t].addcmul_(decay[t], flow[t + 1])
        write = flow[1:]
        return (write * h[:-1].conj()).transpose(0, 1), write.transpose(0, 1), flow[0]
