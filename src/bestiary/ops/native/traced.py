"""Operators that stand for what a trace cannot look into: growing caches, positions, packed matrices, wide numbers.

While a model's step is traced (see bestiary.decoding), `attend`, `turn`, `sum_angles`, `log_linear` and `product` take
the place of the Python that computes the same; each is one instruction of the program that follows. At other times
nothing here runs.
"""

import contextlib
import contextvars
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_tracing: contextvars.ContextVar[bool] = contextvars.ContextVar("tracing", default=False)
_matrices: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()

torch.library.define(
    "bestiary::attend",
    "(Tensor q, Tensor k, Tensor v, Tensor keys, Tensor values, Tensor position, int window, float scale) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define("bestiary::turn", "(Tensor x, Tensor position, float base, int dims, float stretch) -> Tensor")
torch.library.define("bestiary::sum_angles", "(Tensor start, Tensor turns) -> Tensor")
torch.library.define(
    "bestiary::log_linear",
    "(Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor weights, Tensor memory, Tensor position, float scale) "
    "-> (Tensor, Tensor, Tensor)",
)
torch.library.define("bestiary::product", "(Tensor x, int matrix) -> Tensor")


@contextlib.contextmanager
def tracing(on: bool = True) -> Iterator[None]:
    """Within it, the operators take the place of what they stand for; or, inside them, do not."""
    token = _tracing.set(on)
    try:
        yield
    finally:
        _tracing.reset(token)


def active() -> bool:
    """Whether a step is being traced."""
    return not torch.compiler.is_compiling() and _tracing.get()


def matrix(number: int) -> Any:
    """The packed matrix that an operator's argument stands for."""
    return _matrices[number]


def product(x: Tensor, packed: Any) -> Tensor:
    """x W^T + b, by an operator that names the matrix."""
    _matrices[id(packed)] = packed
    return torch.ops.bestiary.product(x, id(packed))


@torch.library.impl("bestiary::product", "CPU")
def _product(x, number):
    with tracing(False):
        return _matrices[number].multiply(x)


@torch.library.impl("bestiary::turn", "CPU")
def _turn(x, position, base, dims, stretch):
    from bestiary.ops.rotary import rotate

    with tracing(False):
        return rotate(x, position, base=base, dims=dims, stretch=stretch)


@torch.library.impl("bestiary::sum_angles", "CPU")
def _sum_angles(start, turns):
    from bestiary.ops.rotary import sum_angles

    with tracing(False):
        return sum_angles(start, turns)


@torch.library.impl("bestiary::log_linear", "CPU")
def _log_linear(q, k, v, log_decay, weights, memory, position, scale):
    from bestiary.ops.log_linear_attention import FenwickState, log_linear_attention

    with tracing(False):
        past = FenwickState(memory, position)
        o, after = log_linear_attention(q, k, v, log_decay, weights, scale=scale, state=past)
    return o, *after


@torch.library.impl("bestiary::attend", "CPU")
def _attend(q, k, v, keys, values, position, window, scale):
    from bestiary.ops.attention import KVCache, attention

    with tracing(False):
        o, after = attention(q, k, v, window=window or None, scale=scale, state=KVCache(keys, values, position))
    return o, *(x.clone() for x in after)


@torch.library.register_fake("bestiary::product")
def _(x, number):
    return x.new_empty(*x.shape[:-1], _matrices[number].shape[0])


@torch.library.register_fake("bestiary::turn")
def _(x, position, base, dims, stretch):
    return torch.empty_like(x)


@torch.library.register_fake("bestiary::sum_angles")
def _(start, turns):
    return start.new_empty(turns.shape)


@torch.library.register_fake("bestiary::log_linear")
def _(q, k, v, log_decay, weights, memory, position, scale):
    return torch.empty_like(v), torch.empty_like(memory), torch.empty_like(position)


@torch.library.register_fake("bestiary::attend")
def _(q, k, v, keys, values, position, window, scale):
    slots = keys.shape[1] if window else keys.shape[1] + 1
    caches = (x.new_empty(x.shape[0], slots, *x.shape[2:]) for x in (keys, values))
    return v.new_empty(*q.shape[:3], v.shape[3]), *caches, torch.empty_like(position)
