"""The selective scan by the compiled kernel (csrc/selective_scan.h), with gradients, as a torch operator."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from bestiary.ops.native.library import buffer, check_shapes, kernel, only_once, pointer, row_ends, rows

_INTEGERS = ("batch", "time", "channels", "states", "softplus")
_INPUTS = ("u", "dt", "A", "B", "C", "D", "bias", "z", "gaps")
_STRIDES = [f"{name}_{axis}" for name in ("u", "dt", "z", "b", "c") for axis in ("batch", "time")]


class _Scan(ctypes.Structure):
    _fields_ = (
        [(name, ctypes.c_int64) for name in _INTEGERS]
        + [(name, ctypes.c_void_p) for name in _INPUTS]
        + [(name, ctypes.c_int64) for name in _STRIDES]
        + [(name, ctypes.c_void_p) for name in ("lengths", "before", "y", "after", "starts")]
    )


class _ScanBack(ctypes.Structure):
    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("dy", "dafter")]
        + [(name, ctypes.c_int64) for name in ("dy_batch", "dy_time")]
        + [(name, ctypes.c_void_p) for name in ("du", "ddt", "dz", "dB", "dC", "dA", "dD", "dbias", "dbefore")]
    )


torch.library.define(
    "bestiary::selective_scan",
    "(Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? bias, Tensor? z, Tensor? gaps, "
    "Tensor? lengths, Tensor before, bool softplus, bool save) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "bestiary::selective_scan_backward",
    "(Tensor dy, Tensor dafter, Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? bias, Tensor? z, "
    "Tensor? gaps, Tensor? lengths, Tensor starts, bool softplus) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def selective_scan(
    parts: tuple[Tensor, ...],
    options: tuple[Tensor | None, ...],
    lengths: Tensor | None,
    before: Tensor,
    softplus: bool,
) -> tuple[Tensor, Tensor]:
    """(y, state after) of fp32 tensors on the CPU; see bestiary.ops.selective_scan. y is zero at padding.

    Args:
        parts: u, dt, A, B, C.
        options: D, the bias of dt, z, and the intervals; None for what is not there.
    """
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*parts, *options, before))
    y, after, _ = torch.ops.bestiary.selective_scan(*parts, *options, lengths, before, softplus, save)
    return y, after


def _filled(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *rest: Any) -> tuple[_Scan, list[Any]]:
    """The arguments as the kernel wants them, and the tensors that must stay alive while it runs."""
    D, bias, z, gaps, lengths, softplus = rest
    (batch, time, channels), states = u.shape, A.shape[-1]
    parts, whole = (batch, time, states), (batch, time, channels)
    named = (("dt", dt, whole), ("A", A, (channels, states)), ("B", B, parts), ("C", C, parts), ("z", z, whole))
    check_shapes("selective_scan", *named, ("D", D, (channels,)), ("dt_bias", bias, (channels,)))
    check_shapes("selective_scan", ("intervals", gaps, (batch, time)))
    u, dt, B, C = (rows(x) for x in (u, dt, B, C))
    A = A.contiguous()
    D, bias, gaps = (None if x is None else x.contiguous() for x in (D, bias, gaps))
    z = None if z is None else rows(z)
    lengths = row_ends("selective_scan", lengths, batch, time)
    scan = _Scan(*whole, states, int(softplus))
    for name, tensor in zip(_INPUTS, (u, dt, A, B, C, D, bias, z, gaps)):
        setattr(scan, name, pointer(tensor))
    for name, tensor in zip(("u", "dt", "z", "b", "c"), (u, dt, z, B, C)):
        if tensor is not None:
            setattr(scan, f"{name}_batch", tensor.stride(0))
            setattr(scan, f"{name}_time", tensor.stride(1))
    scan.lengths = pointer(lengths)
    return scan, [u, dt, A, B, C, D, bias, z, gaps, lengths]


@torch.library.impl("bestiary::selective_scan", "CPU")
def _forward(u, dt, A, B, C, D, bias, z, gaps, lengths, before, softplus, save):
    before = before.contiguous()
    scan, alive = _filled(u, dt, A, B, C, D, bias, z, gaps, lengths, softplus)
    sizes = (scan.batch, scan.time, scan.channels, scan.states)
    check_shapes("selective_scan", ("state", before, (scan.batch, scan.channels, scan.states)))
    y, after = buffer(*sizes[:3]), buffer(*before.shape)
    starts = buffer(kernel("bestiary_scan_starts")(*sizes) if save else 0)
    scan.before, scan.y, scan.after = pointer(before), pointer(y), pointer(after)
    scan.starts = pointer(starts) if save else None
    kernel("bestiary_scan_forward")(ctypes.byref(scan))
    del alive
    return y, after, starts


@torch.library.impl("bestiary::selective_scan_backward", "CPU")
def _backward(dy, dafter, u, dt, A, B, C, D, bias, z, gaps, lengths, starts, softplus):
    dy, dafter = rows(dy), dafter.contiguous()
    scan, alive = _filled(u, dt, A, B, C, D, bias, z, gaps, lengths, softplus)
    batch, time, channels, states = scan.batch, scan.time, scan.channels, scan.states
    scan.starts = pointer(starts)
    du, ddt, dz = (buffer(batch, time, n) for n in (channels, channels, 0 if z is None else channels))
    dB, dC = (buffer(kernel("bestiary_scan_groups")(channels), batch, time, states) for _ in range(2))
    dA, dbefore = (buffer(batch, channels, states) for _ in range(2))
    dD, dbias = (buffer(batch, channels) for _ in range(2))
    outputs = [pointer(x) for x in (du, ddt, dz, dB, dC, dA, dD, dbias, dbefore)]
    back = _ScanBack(pointer(dy), pointer(dafter), dy.stride(0), dy.stride(1), *outputs)
    kernel("bestiary_scan_backward")(ctypes.byref(scan), ctypes.byref(back))
    del alive
    return du, ddt, dA.sum(0), dB.sum(0), dC.sum(0), dD.sum(0), dbias.sum(0), dz, dbefore


@torch.library.register_fake("bestiary::selective_scan")
def _(u, dt, A, B, C, D, bias, z, gaps, lengths, before, softplus, save):
    starts = kernel("bestiary_scan_starts")(*u.shape, A.shape[1]) if save else 0
    return u.new_empty(u.shape), torch.empty_like(before), u.new_empty(starts)


@torch.library.register_fake("bestiary::selective_scan_backward")
def _(dy, dafter, u, dt, A, B, C, D, bias, z, gaps, lengths, starts, softplus):
    whole, channels = u.new_empty(u.shape), u.shape[2]
    dz = u.new_empty(*u.shape[:2], 0 if z is None else channels)
    like = [u.new_empty(x.shape) for x in (u, A, B, C)]
    return whole, *like, u.new_empty(channels), u.new_empty(channels), dz, u.new_empty(dafter.shape)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, _before, softplus, _save = inputs
    ctx.softplus = softplus
    ctx.save_for_backward(*tensors, output[2])
    ctx.mark_non_differentiable(output[2])


def _differentiate(ctx: Any, dy: Tensor, dafter: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, starts = ctx.saved_tensors
    grads = torch.ops.bestiary.selective_scan_backward(dy, dafter, *tensors, starts, ctx.softplus)
    du, ddt, dA, dB, dC, dD, dbias, dz, dbefore = grads
    optional = [grad if x is not None else None for grad, x in zip((dD, dbias, dz), tensors[5:8])]
    return du, ddt, dA, dB, dC, *optional, None, None, dbefore, None, None


torch.library.register_autograd("bestiary::selective_scan", _differentiate, setup_context=_setup)
only_once("bestiary::selective_scan_backward")
