"""The delta rule and its general form by the compiled kernel (csrc/delta_rule.h), with gradients: a torch operator."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from bestiary.ops.native.library import buffer, check_shapes, kernel, only_once, pointer, rows

_SIZES = ("batch", "time", "heads", "keys", "values")
_INPUTS = ("q", "k", "v", "beta", "g", "a", "b")


class _Strides(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "time", "head")]


class _Delta(ctypes.Structure):
    _fields_ = (
        [(name, ctypes.c_int64) for name in (*_SIZES, "gates")]
        + [("scale", ctypes.c_double)]
        + [(name, ctypes.c_void_p) for name in _INPUTS]
        + [(f"at_{name}", _Strides) for name in _INPUTS]
        + [(name, ctypes.c_void_p) for name in ("before", "o", "after", "starts")]
    )


class _DeltaBack(ctypes.Structure):
    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("dout", "dafter")]
        + [("at_dout", _Strides)]
        + [(name, ctypes.c_void_p) for name in ("dq", "dk", "da", "db", "dg", "dbeta", "dv", "dbefore")]
    )


torch.library.define(
    "bestiary::delta_rule",
    "(Tensor q, Tensor k, Tensor v, Tensor? beta, Tensor? g, Tensor? a, Tensor? b, Tensor before, float scale, "
    "bool save) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "bestiary::delta_rule_backward",
    "(Tensor dout, Tensor dafter, Tensor q, Tensor k, Tensor v, Tensor? beta, Tensor? g, Tensor? a, Tensor? b, "
    "Tensor starts, float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, before: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """(o, state after) of fp32 tensors on the CPU; g as (batch, time, heads), with key channels, or None."""
    return _run((q, k, v, beta, g, None, None), before, scale)


def dplr(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """(o, state after) of fp32 tensors on the CPU."""
    return _run((r, k, v, None, w, a, b), before, 1.0)


def _run(parts: tuple[Tensor | None, ...], before: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*parts, before))
    o, after, _ = torch.ops.bestiary.delta_rule(*parts, before, scale, save)
    return o, after


def _filled(parts: tuple[Tensor | None, ...], scale: float) -> tuple[_Delta, list[Tensor | None]]:
    """The arguments as the kernel wants them, and the tensors that must stay alive while it runs."""
    q, k, v, beta, g, a, b = parts
    assert q is not None and v is not None
    keys, values = tuple(q.shape), (*q.shape[:3], v.shape[-1])
    check_shapes(
        "delta_rule", ("k", k, keys), ("v", v, values), ("beta", beta, keys[:3]), ("a", a, keys), ("b", b, keys)
    )
    check_shapes("delta_rule", ("log_decay", g, keys if g is not None and g.ndim == 4 else keys[:3]))
    alive = [x if x is None or x.ndim < 4 else rows(x) for x in parts]
    delta = _Delta(*q.shape, v.shape[3], 0 if g is None else g.ndim - 2, scale)
    for name, tensor in zip(_INPUTS, alive):
        if tensor is not None:
            setattr(delta, name, pointer(tensor))
            setattr(delta, f"at_{name}", _Strides(*tensor.stride()[:3]))
    return delta, alive


def _starts(q: Tensor, v: Tensor) -> tuple[Any, ...]:
    """The shape of the memories that are saved: one before each chunk, its value channels in whole vectors."""
    batch, time, heads, keys = q.shape
    lanes, steps = kernel("bestiary_lanes")(), kernel("bestiary_delta_steps")(keys, v.shape[3])
    return batch, heads, (time + steps - 1) // steps, keys, (v.shape[3] + lanes - 1) // lanes * lanes


@torch.library.impl("bestiary::delta_rule", "CPU")
def _forward(q, k, v, beta, g, a, b, before, scale, save):
    before = before.contiguous()
    delta, alive = _filled((q, k, v, beta, g, a, b), scale)
    check_shapes("delta_rule", ("state", before, (q.shape[0], q.shape[2], q.shape[3], v.shape[3])))
    o, after = buffer(*v.shape), buffer(*before.shape)
    starts = buffer(*(_starts(q, v) if save else (0,)))
    delta.before, delta.o, delta.after = pointer(before), pointer(o), pointer(after)
    delta.starts = pointer(starts) if save else None
    kernel("bestiary_delta_forward")(ctypes.byref(delta))
    del alive
    return o, after, starts


@torch.library.impl("bestiary::delta_rule_backward", "CPU")
def _backward(dout, dafter, q, k, v, beta, g, a, b, starts, scale):
    dout, dafter = rows(dout), dafter.contiguous()
    delta, alive = _filled((q, k, v, beta, g, a, b), scale)
    delta.starts = pointer(starts)
    panels = kernel("bestiary_delta_panels")(v.shape[3])
    parts = [None if x is None else buffer(panels, *x.shape) for x in (q, k, a, b, g, beta)]
    dv, dbefore = buffer(*v.shape), buffer(*dafter.shape)
    outputs = [pointer(x) for x in (*parts, dv, dbefore)]
    back = _DeltaBack(pointer(dout), pointer(dafter), _Strides(*dout.stride()[:3]), *outputs)
    kernel("bestiary_delta_backward")(ctypes.byref(delta), ctypes.byref(back))
    del alive
    dq, dk, da, db, dg, dbeta = (buffer(0) if x is None else x.squeeze(0) if panels == 1 else x.sum(0) for x in parts)
    return dq, dk, dv, dbeta, dg, da, db, dbefore


@torch.library.register_fake("bestiary::delta_rule")
def _(q, k, v, beta, g, a, b, before, scale, save):
    starts = v.new_empty(_starts(q, v) if save else 0)
    return v.new_empty(v.shape), before.new_empty(before.shape), starts


@torch.library.register_fake("bestiary::delta_rule_backward")
def _(dout, dafter, q, k, v, beta, g, a, b, starts, scale):
    grads = [v.new_empty(0 if x is None else x.shape) for x in (q, k, v, beta, g, a, b)]
    return *grads, dafter.new_empty(dafter.shape)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, _before, scale, _save = inputs
    ctx.scale = scale
    ctx.save_for_backward(*tensors, output[2])
    ctx.mark_non_differentiable(output[2])


def _differentiate(ctx: Any, dout: Tensor, dafter: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, starts = ctx.saved_tensors
    *grads, dbefore = torch.ops.bestiary.delta_rule_backward(dout, dafter, *tensors, starts, ctx.scale)
    return *(grad if x is not None else None for grad, x in zip(grads, tensors)), dbefore, None, None


torch.library.register_autograd("bestiary::delta_rule", _differentiate, setup_context=_setup)
only_once("bestiary::delta_rule_backward")
