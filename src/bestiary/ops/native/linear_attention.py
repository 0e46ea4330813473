"""Linear attention by the compiled kernel (csrc/linear_attention.h), with gradients, as a torch operator."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from bestiary.errors import UsageError
from bestiary.ops.native.library import buffer, check_shapes, kernel, only_once, pointer, rows

_INTEGERS = ("batch", "time", "heads", "groups", "keys", "values", "decay", "ones")
_STRIDED = ("q", "k", "v", "g")
_AXES = ("batch", "time", "head")


class _Attention(ctypes.Structure):
    _fields_ = (
        [(name, ctypes.c_int64) for name in _INTEGERS]
        + [(name, ctypes.c_void_p) for name in (*_STRIDED, "bonus")]
        + [(f"{name}_{axis}", ctypes.c_int64) for name in _STRIDED for axis in _AXES]
        + [(name, ctypes.c_void_p) for name in ("before", "o", "after", "starts", "norms")]
        + [(name, ctypes.c_float) for name in ("scale", "eps")]
    )


class _AttentionBack(ctypes.Structure):
    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("dy", "o", "dafter")]
        + [(f"dy_{axis}", ctypes.c_int64) for axis in _AXES]
        + [(name, ctypes.c_void_p) for name in ("dq", "dk", "dv", "dg", "dbonus", "dbefore")]
    )


torch.library.define(
    "bestiary::linear_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? bonus, Tensor before, float scale, bool normalise, float eps, "
    "bool save) -> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "bestiary::linear_attention_backward",
    "(Tensor dy, Tensor dafter, Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? bonus, Tensor starts, Tensor norms, "
    "Tensor? o, float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def linear_attention(
    inputs: tuple[Tensor | None, ...], before: Tensor, scale: float, normalise: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """(o, state after) of fp32 tensors on the CPU; see bestiary.ops.linear_attention.

    Args:
        inputs: q, k, v, the log-decay and the bonus; None for what is not there. A log-decay for each head has three
            dimensions, one for each key channel four.
    """
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*inputs, before))
    o, after, _, _ = torch.ops.bestiary.linear_attention(*inputs, before, scale, normalise, eps, save)
    return o, after


def _filled(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, bonus: Tensor | None, scale: float, ones: bool
) -> tuple[_Attention, list[Any]]:
    """The arguments as the kernel wants them, and the tensors that must stay alive while it runs."""
    batch, time, heads, values = v.shape
    keys, whole = (batch, time, q.shape[2], q.shape[3]), (batch, time, heads, q.shape[3])
    check_shapes("linear_attention", ("q", q, keys), ("k", k, keys), ("bonus", bonus, (heads, q.shape[3])))
    check_shapes("linear_attention", ("log_decay", g, whole if g is not None and g.ndim == 4 else whole[:3]))
    if q.shape[2] < 1 or heads % q.shape[2]:
        raise UsageError(f"linear_attention: {q.shape[2]} heads of keys must serve equally many of {heads} heads")
    q, k, v = rows(q), rows(k), rows(v)
    decay = 0 if g is None else g.ndim - 2
    g = rows(g) if g is not None and decay == 2 else g
    bonus = None if bonus is None else bonus.contiguous()
    call = _Attention(batch, time, heads, q.shape[2], q.shape[3], values, decay, ones)
    for name, tensor in zip(_STRIDED, (q, k, v, g)):
        if tensor is not None:
            setattr(call, name, pointer(tensor))
            for axis, stride in zip(_AXES, tensor.stride()):
                setattr(call, f"{name}_{axis}", stride)
    call.bonus, call.scale = pointer(bonus), scale
    return call, [q, k, v, g, bonus]


def _saved(v: Tensor, before: Tensor, save: bool) -> int:
    """How many numbers the memories before each chunk are."""
    return kernel("bestiary_linear_attention_starts")(*v.shape[:3], *before.shape[2:]) if save else 0


@torch.library.impl("bestiary::linear_attention", "CPU")
def _forward(q, k, v, g, bonus, before, scale, normalise, eps, save):
    before = before.contiguous()
    call, alive = _filled(q, k, v, g, bonus, scale, normalise)
    check_shapes("linear_attention", ("state", before, (v.shape[0], v.shape[2], q.shape[3], v.shape[3] + normalise)))
    o, after = buffer(*v.shape), buffer(*before.shape)
    starts, norms = buffer(_saved(v, before, save)), buffer(*(v.shape[:3] if normalise else (0,)))
    call.before, call.o, call.after, call.norms = (pointer(x) for x in (before, o, after, norms))
    call.starts, call.eps = pointer(starts) if save else None, eps
    kernel("bestiary_linear_attention_forward")(ctypes.byref(call))
    del alive
    return o, after, starts, norms


@torch.library.impl("bestiary::linear_attention_backward", "CPU")
def _backward(dy, dafter, q, k, v, g, bonus, starts, norms, o, scale):
    dy, dafter = rows(dy), dafter.contiguous()
    call, alive = _filled(q, k, v, g, bonus, scale, o is not None)
    call.starts, call.norms = pointer(starts), pointer(norms)
    parts = kernel("bestiary_linear_attention_parts")(call.heads, call.groups)
    dq, dk = (buffer(parts, *q.shape) for _ in range(2))
    dv, dg = buffer(*v.shape), buffer(*((0,) if g is None else g.shape))
    dbonus, dbefore = buffer(*((0,) if bonus is None else (call.batch, *bonus.shape))), buffer(*dafter.shape)
    outputs = [pointer(x) for x in (dq, dk, dv, dg, dbonus, dbefore)]
    back = _AttentionBack(pointer(dy), pointer(o), pointer(dafter), *dy.stride()[:3], *outputs)
    kernel("bestiary_linear_attention_backward")(ctypes.byref(call), ctypes.byref(back))
    del alive
    dq, dk = (x.squeeze(0) if parts == 1 else x.sum(0) for x in (dq, dk))
    return dq, dk, dv, dg, dbonus if bonus is None else dbonus.sum(0), dbefore


@torch.library.register_fake("bestiary::linear_attention")
def _(q, k, v, g, bonus, before, scale, normalise, eps, save):
    starts, norms = v.new_empty(_saved(v, before, save)), v.new_empty(v.shape[:3] if normalise else 0)
    return v.new_empty(v.shape), before.new_empty(before.shape), starts, norms


@torch.library.register_fake("bestiary::linear_attention_backward")
def _(dy, dafter, q, k, v, g, bonus, starts, norms, o, scale):
    shapes = [0 if x is None else x.shape for x in (q, k, v, g, bonus, dafter)]
    return tuple(v.new_empty(shape) for shape in shapes)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, g, bonus, _before, ctx.scale, normalise, _eps, _save = inputs
    o, _after, starts, norms = output
    ctx.save_for_backward(q, k, v, g, bonus, starts, norms, o if normalise else None)
    ctx.mark_non_differentiable(starts, norms)


def _differentiate(ctx: Any, dy: Tensor, dafter: Tensor, _starts: Tensor, _norms: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    found = torch.ops.bestiary.linear_attention_backward(dy, dafter, *tensors, ctx.scale)
    *grads, dbefore = (grad if x is not None else None for grad, x in zip(found, (*tensors[:5], dafter)))
    return *grads, dbefore, None, None, None, None


torch.library.register_autograd("bestiary::linear_attention", _differentiate, setup_context=_setup)
only_once("bestiary::linear_attention_backward")
