"""The diagonal linear recurrence by the compiled kernel (csrc/linear_recurrence.h), as a torch operator."""

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from bestiary.ops.native.library import buffer, check_shapes, kernel, only_once, pointer, row_ends, rows


class _Recurrence(ctypes.Structure):
    _fields_ = (
        [(name, ctypes.c_int64) for name in ("batch", "time", "channels")]
        + [(name, ctypes.c_void_p) for name in ("a", "b", "before")]
        + [(name, ctypes.c_int64) for name in ("a_batch", "a_time", "b_batch", "b_time")]
        + [(name, ctypes.c_void_p) for name in ("lengths", "h", "after")]
    )


class _RecurrenceBack(ctypes.Structure):
    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("dh", "dafter")]
        + [(name, ctypes.c_int64) for name in ("dh_batch", "dh_time")]
        + [(name, ctypes.c_void_p) for name in ("da", "db", "dbefore")]
    )


torch.library.define(
    "bestiary::linear_recurrence", "(Tensor a, Tensor b, Tensor before, Tensor? lengths) -> (Tensor, Tensor)"
)
torch.library.define(
    "bestiary::linear_recurrence_backward",
    "(Tensor dh, Tensor dafter, Tensor a, Tensor b, Tensor before, Tensor? lengths, Tensor h) "
    "-> (Tensor, Tensor, Tensor)",
)


def linear_recurrence(a: Tensor, b: Tensor, before: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """(h, the last h) of real fp32 tensors on the CPU; see bestiary.ops.linear_recurrence. h is zero at padding."""
    if b.ndim == 3:
        return torch.ops.bestiary.linear_recurrence(a, b, before, lengths)
    channels = math.prod(b.shape[2:])
    flat = [x.reshape(*x.shape[:2], channels) for x in (a, b)]
    h, after = torch.ops.bestiary.linear_recurrence(*flat, before.reshape(len(b), channels), lengths)
    return h.reshape(b.shape), after.reshape(before.shape)


def _filled(a: Tensor, b: Tensor, before: Tensor, lengths: Tensor | None) -> tuple[_Recurrence, list[Any]]:
    """The arguments as the kernel wants them, and the tensors that must stay alive while it runs."""
    check_shapes("linear_recurrence", ("decay", a, tuple(b.shape)), ("state", before, (b.shape[0], b.shape[2])))
    a, b, before = rows(a), rows(b), before.contiguous()
    lengths = row_ends("linear_recurrence", lengths, *b.shape[:2])
    strides = (a.stride(0), a.stride(1), b.stride(0), b.stride(1))
    given = _Recurrence(*b.shape, pointer(a), pointer(b), pointer(before), *strides, pointer(lengths))
    return given, [a, b, before, lengths]


@torch.library.impl("bestiary::linear_recurrence", "CPU")
def _forward(a, b, before, lengths):
    given, alive = _filled(a, b, before, lengths)
    h, after = buffer(*b.shape), buffer(*before.shape)
    given.h, given.after = pointer(h), pointer(after)
    kernel("bestiary_recurrence_forward")(ctypes.byref(given))
    del alive
    return h, after


@torch.library.impl("bestiary::linear_recurrence_backward", "CPU")
def _backward(dh, dafter, a, b, before, lengths, h):
    given, alive = _filled(a, b, before, lengths)
    given.h, dh, dafter = pointer(h), rows(dh), dafter.contiguous()
    da, db, dbefore = (buffer(*x.shape) for x in (h, h, before))
    outputs = (pointer(x) for x in (da, db, dbefore))
    back = _RecurrenceBack(pointer(dh), pointer(dafter), dh.stride(0), dh.stride(1), *outputs)
    kernel("bestiary_recurrence_backward")(ctypes.byref(given), ctypes.byref(back))
    del alive
    return da, db, dbefore


@torch.library.register_fake("bestiary::linear_recurrence")
def _(a, b, before, lengths):
    return b.new_empty(b.shape), before.new_empty(before.shape)


@torch.library.register_fake("bestiary::linear_recurrence_backward")
def _(dh, dafter, a, b, before, lengths, h):
    return h.new_empty(h.shape), h.new_empty(h.shape), before.new_empty(before.shape)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs, output[0])


def _differentiate(ctx: Any, dh: Tensor, dafter: Tensor) -> tuple[Tensor | None, ...]:
    return *torch.ops.bestiary.linear_recurrence_backward(dh, dafter, *ctx.saved_tensors), None


torch.library.register_autograd("bestiary::linear_recurrence", _differentiate, setup_context=_setup)
only_once("bestiary::linear_recurrence_backward")
