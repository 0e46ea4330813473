"""The short convolution by the compiled kernel (csrc/short_convolution.h), with gradients, as a torch operator."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from bestiary.ops.native.library import kernel, pointer, rows

MOST_TAPS = 16


class _Convolution(ctypes.Structure):
    _fields_ = (
        [(name, ctypes.c_int64) for name in ("batch", "time", "channels", "taps", "silu")]
        + [(name, ctypes.c_void_p) for name in ("x", "weight", "bias", "before")]
        + [(name, ctypes.c_int64) for name in ("x_batch", "x_time")]
        + [(name, ctypes.c_void_p) for name in ("lengths", "y", "after")]
    )


class _ConvolutionBack(ctypes.Structure):
    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("dy", "dafter")]
        + [(name, ctypes.c_int64) for name in ("dy_batch", "dy_time")]
        + [(name, ctypes.c_void_p) for name in ("dx", "dbefore", "dweight", "dbias")]
    )


torch.library.define(
    "bestiary::short_convolution",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor before, Tensor? lengths, bool silu) -> (Tensor, Tensor)",
)
torch.library.define(
    "bestiary::short_convolution_backward",
    "(Tensor dy, Tensor dafter, Tensor x, Tensor weight, Tensor? bias, Tensor before, Tensor? lengths, bool silu) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)


def short_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor, lengths: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    """(y, the last inputs) of fp32 tensors on the CPU; see bestiary.ops.short_convolution. y is zero at padding."""
    return torch.ops.bestiary.short_convolution(x, weight, bias, before, lengths, silu)


def _filled(
    x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor, lengths: Tensor | None, silu: bool
) -> tuple[_Convolution, list[Any]]:
    """The arguments as the kernel wants them, and the tensors that must stay alive while it runs."""
    x, weight, before = rows(x), weight.contiguous(), before.contiguous()
    bias = None if bias is None else bias.contiguous()
    lengths = None if lengths is None else lengths.to(torch.int64).contiguous()
    given = _Convolution(*x.shape, weight.shape[1], int(silu), *(pointer(t) for t in (x, weight, bias, before)))
    given.x_batch, given.x_time, given.lengths = x.stride(0), x.stride(1), pointer(lengths)
    return given, [x, weight, bias, before, lengths]


@torch.library.impl("bestiary::short_convolution", "CPU")
def _forward(x, weight, bias, before, lengths, silu):
    given, alive = _filled(x, weight, bias, before, lengths, silu)
    y, after = x.new_empty(x.shape), x.new_empty(before.shape)
    given.y, given.after = pointer(y), pointer(after)
    kernel("bestiary_convolution_forward")(ctypes.byref(given))
    del alive
    return y, after


@torch.library.impl("bestiary::short_convolution_backward", "CPU")
def _backward(dy, dafter, x, weight, bias, before, lengths, silu):
    given, alive = _filled(x, weight, bias, before, lengths, silu)
    dy, dafter, (batch, _, channels), taps = rows(dy), dafter.contiguous(), x.shape, weight.shape[1]
    dx, dbefore = x.new_empty(x.shape), x.new_empty(before.shape)
    dweight, dbias = x.new_empty(batch, taps, channels), x.new_empty(batch, channels)
    outputs = (pointer(t) for t in (dx, dbefore, dweight, dbias))
    back = _ConvolutionBack(pointer(dy), pointer(dafter), dy.stride(0), dy.stride(1), *outputs)
    kernel("bestiary_convolution_backward")(ctypes.byref(given), ctypes.byref(back))
    del alive
    return dx, dweight.sum(0).t().contiguous(), dbias.sum(0), dbefore


@torch.library.register_fake("bestiary::short_convolution")
def _(x, weight, bias, before, lengths, silu):
    return x.new_empty(x.shape), before.new_empty(before.shape)


@torch.library.register_fake("bestiary::short_convolution_backward")
def _(dy, dafter, x, weight, bias, before, lengths, silu):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), x.new_empty(x.shape[2]), before.new_empty(before.shape)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, bias, before, lengths, ctx.silu = inputs
    ctx.save_for_backward(x, weight, bias, before, lengths)


def _differentiate(ctx: Any, dy: Tensor, dafter: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, before, lengths = ctx.saved_tensors
    grads = torch.ops.bestiary.short_convolution_backward(dy, dafter, x, weight, bias, before, lengths, ctx.silu)
    dx, dweight, dbias, dbefore = grads
    return dx, dweight, None if bias is None else dbias, dbefore, None, None


torch.library.register_autograd("bestiary::short_convolution", _differentiate, setup_context=_setup)
