"""RWKV-4's operator by the compiled kernel (csrc/wkv.h), with gradients, as a torch operator."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from bestiary.ops.native.library import buffer, check_shapes, kernel, only_once, pointer, row_ends, rows


class _Wkv(ctypes.Structure):
    _fields_ = (
        [(name, ctypes.c_int64) for name in ("batch", "time", "channels")]
        + [(name, ctypes.c_void_p) for name in ("k", "v", "w", "u", "num", "den", "max")]
        + [(name, ctypes.c_int64) for name in ("k_batch", "k_time", "v_batch", "v_time")]
        + [(name, ctypes.c_void_p) for name in ("lengths", "y", "new_num", "new_den", "new_max", "starts")]
    )


class _WkvBack(ctypes.Structure):
    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("dy", "dnew_num", "dnew_den", "dnew_max")]
        + [(name, ctypes.c_int64) for name in ("dy_batch", "dy_time")]
        + [(name, ctypes.c_void_p) for name in ("dk", "dv", "dw", "du", "dnum", "dden", "dmax")]
    )


torch.library.define(
    "bestiary::wkv",
    "(Tensor k, Tensor v, Tensor w, Tensor u, Tensor num, Tensor den, Tensor max, Tensor? lengths, bool save) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "bestiary::wkv_backward",
    "(Tensor dy, Tensor dnew_num, Tensor dnew_den, Tensor dnew_max, Tensor k, Tensor v, Tensor w, Tensor u, "
    "Tensor? lengths, Tensor starts) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def wkv(
    inputs: tuple[Tensor, ...], state: tuple[Tensor, ...], lengths: Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(y, state after) of fp32 tensors on the CPU; see bestiary.ops.wkv. y is zero at padding.

    Args:
        inputs: k, v, w, u.
        state: numerator, denominator and the exponent of their unit; what that is after a segment is the kernel's.
    """
    save = torch.is_grad_enabled() and any(x.requires_grad for x in (*inputs, *state))
    y, *after, _ = torch.ops.bestiary.wkv(*inputs, *state, lengths, save)
    return y, tuple(after)


def _filled(k: Tensor, v: Tensor, w: Tensor, u: Tensor, lengths: Tensor | None) -> tuple[_Wkv, list[Any]]:
    """The arguments as the kernel wants them, and the tensors that must stay alive while it runs."""
    named = (("v", v, tuple(k.shape)), ("w", w, (k.shape[2],)), ("u", u, (k.shape[2],)))
    check_shapes("wkv", *named)
    k, v, w, u = rows(k), rows(v), w.contiguous(), u.contiguous()
    lengths = row_ends("wkv", lengths, *k.shape[:2])
    given = _Wkv(*k.shape, *(pointer(x) for x in (k, v, w, u)))
    given.k_batch, given.k_time, given.v_batch, given.v_time = k.stride(0), k.stride(1), v.stride(0), v.stride(1)
    given.lengths = pointer(lengths)
    return given, [k, v, w, u, lengths]


def _starts(k: Tensor, save: bool) -> tuple[Any, ...]:
    """Shape of the states before each chunk; of none where they are not to be saved."""
    batch, time, channels = k.shape
    steps = kernel("bestiary_wkv_chunk")()
    return (batch, (time + steps - 1) // steps, 3, channels) if save else (0,)


@torch.library.impl("bestiary::wkv", "CPU")
def _forward(k, v, w, u, num, den, max, lengths, save):
    given, alive = _filled(k, v, w, u, lengths)
    edge = (k.shape[0], k.shape[2])
    check_shapes("wkv", *((name, x, edge) for name, x in (("num", num), ("den", den), ("max", max))))
    before = [x.contiguous() for x in (num, den, max)]
    given.num, given.den, given.max = (pointer(x) for x in before)
    y, starts = buffer(*k.shape), buffer(*_starts(k, save))
    after = [buffer(*edge) for _ in range(3)]
    given.y, (given.new_num, given.new_den, given.new_max) = pointer(y), (pointer(x) for x in after)
    given.starts = pointer(starts) if save else None
    kernel("bestiary_wkv_forward")(ctypes.byref(given))
    del alive
    return y, *after, starts


@torch.library.impl("bestiary::wkv_backward", "CPU")
def _backward(dy, dnew_num, dnew_den, dnew_max, k, v, w, u, lengths, starts):
    given, alive = _filled(k, v, w, u, lengths)
    dy, dafter = rows(dy), [x.contiguous() for x in (dnew_num, dnew_den, dnew_max)]
    given.starts = pointer(starts)
    dk, dv = (buffer(*k.shape) for _ in range(2))
    dw, du, *dbefore = (buffer(*dnew_num.shape) for _ in range(5))
    outputs = (pointer(x) for x in (dk, dv, dw, du, *dbefore))
    back = _WkvBack(pointer(dy), *(pointer(x) for x in dafter), dy.stride(0), dy.stride(1), *outputs)
    kernel("bestiary_wkv_backward")(ctypes.byref(given), ctypes.byref(back))
    del alive
    return dk, dv, dw.sum(0), du.sum(0), *dbefore


@torch.library.register_fake("bestiary::wkv")
def _(k, v, w, u, num, den, max, lengths, save):
    after = [num.new_empty(num.shape) for _ in range(3)]
    return k.new_empty(k.shape), *after, k.new_empty(_starts(k, save))


@torch.library.register_fake("bestiary::wkv_backward")
def _(dy, dnew_num, dnew_den, dnew_max, k, v, w, u, lengths, starts):
    dk, dv, dw, du = (x.new_empty(x.shape) for x in (k, v, w, u))
    return dk, dv, dw, du, *(dnew_num.new_empty(dnew_num.shape) for _ in range(3))


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    k, v, w, u, _num, _den, _max, lengths, _save = inputs
    ctx.save_for_backward(k, v, w, u, lengths, output[-1])
    ctx.mark_non_differentiable(output[-1])


def _differentiate(ctx: Any, dy: Tensor, *rest: Tensor) -> tuple[Tensor | None, ...]:
    *dafter, _ = rest
    return *torch.ops.bestiary.wkv_backward(dy, *dafter, *ctx.saved_tensors), None, None


torch.library.register_autograd("bestiary::wkv", _differentiate, setup_context=_setup)
only_once("bestiary::wkv_backward")
