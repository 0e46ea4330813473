"""The RMS norm with weight and gate by the compiled kernel (csrc/norm.h), with gradients, as a torch operator."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from bestiary.errors import UsageError
from bestiary.ops.native.library import buffer, check_shapes, kernel, only_once, pointer, rows


class _Norm(ctypes.Structure):
    _fields_ = (
        [(name, ctypes.c_int64) for name in ("rows", "channels", "groups", "first")]
        + [(name, ctypes.c_void_p) for name in ("x", "weight", "gate")]
        + [(name, ctypes.c_int64) for name in ("x_row", "gate_row")]
        + [(name, ctypes.c_void_p) for name in ("y", "scales")]
        + [("eps", ctypes.c_double)]
    )


class _NormBack(ctypes.Structure):
    _fields_ = (
        [("dy", ctypes.c_void_p)]
        + [("dy_row", ctypes.c_int64)]
        + [(name, ctypes.c_void_p) for name in ("dx", "dgate", "dweight")]
    )


torch.library.define(
    "bestiary::rms_norm", "(Tensor x, Tensor? weight, Tensor? gate, float eps, bool gate_first) -> (Tensor, Tensor)"
)
torch.library.define(
    "bestiary::rms_norm_backward",
    "(Tensor dy, Tensor x, Tensor? weight, Tensor? gate, Tensor scales, float eps, bool gate_first) "
    "-> (Tensor, Tensor, Tensor)",
)


def rms_norm(x: Tensor, weight: Tensor | None, gate: Tensor | None, eps: float, gate_first: bool) -> Tensor:
    """y of fp32 tensors on the CPU; see bestiary.ops.rms_norm. The weight is (groups, channels)."""
    flat = [t if t is None else t.reshape(-1, x.shape[-1]) for t in (x, gate)]
    y, _ = torch.ops.bestiary.rms_norm(flat[0], weight, flat[1], eps, gate_first)
    return y.reshape(x.shape)


def _filled(
    x: Tensor, weight: Tensor | None, gate: Tensor | None, eps: float, first: bool
) -> tuple[_Norm, list[Tensor | None]]:
    """The arguments as the kernel wants them, and the tensors that must stay alive while it runs."""
    many, channels = x.shape
    groups = 1 if weight is None else weight.shape[0]
    check_shapes("rms_norm", ("gate", gate, (many, channels)), ("weight", weight, (groups, channels)))
    if groups < 1 or many % groups:
        raise UsageError(f"rms_norm: {many} rows do not take {groups} rows of a weight in turn")
    x, gate = rows(x), None if gate is None else rows(gate)
    weight = None if weight is None else weight.contiguous()
    given = _Norm(many, channels, groups, int(first), *(pointer(t) for t in (x, weight, gate)))
    given.x_row, given.gate_row, given.eps = x.stride(0), 0 if gate is None else gate.stride(0), eps
    return given, [x, weight, gate]


@torch.library.impl("bestiary::rms_norm", "CPU")
def _forward(x, weight, gate, eps, gate_first):
    given, alive = _filled(x, weight, gate, eps, gate_first)
    y, scales = buffer(*x.shape), buffer(x.shape[0])
    given.y, given.scales = pointer(y), pointer(scales)
    kernel("bestiary_norm_forward")(ctypes.byref(given))
    del alive
    return y, scales


@torch.library.impl("bestiary::rms_norm_backward", "CPU")
def _backward(dy, x, weight, gate, scales, eps, gate_first):
    given, alive = _filled(x, weight, gate, eps, gate_first)
    given.scales, dy = pointer(scales), rows(dy)
    parts = kernel("bestiary_norm_parts")(given.rows, given.groups)
    dx, dgate = buffer(*x.shape), buffer(*((0,) if gate is None else x.shape))
    dweight = buffer(*((0,) if weight is None else (parts, *weight.shape)))
    back = _NormBack(pointer(dy), dy.stride(0), *(pointer(t) for t in (dx, dgate, dweight)))
    kernel("bestiary_norm_backward")(ctypes.byref(given), ctypes.byref(back))
    del alive
    return dx, dweight if weight is None else dweight.sum(0), dgate


@torch.library.register_fake("bestiary::rms_norm")
def _(x, weight, gate, eps, gate_first):
    return x.new_empty(x.shape), x.new_empty(x.shape[0])


@torch.library.register_fake("bestiary::rms_norm_backward")
def _(dy, x, weight, gate, scales, eps, gate_first):
    return x.new_empty(x.shape), *(x.new_empty(0 if t is None else t.shape) for t in (weight, gate))


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, gate, ctx.eps, ctx.gate_first = inputs
    ctx.save_for_backward(x, weight, gate, output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, gate, scales = ctx.saved_tensors
    grads = torch.ops.bestiary.rms_norm_backward(dy, x, weight, gate, scales, ctx.eps, ctx.gate_first)
    return *(g if t is not None else None for g, t in zip(grads, (x, weight, gate))), None, None


torch.library.register_autograd("bestiary::rms_norm", _differentiate, setup_context=_setup)
only_once("bestiary::rms_norm_backward")
