"""Instructions for what remembers: a step of each of our compiled ops, of attention, and positions."""

from typing import Any

import torch
from torch import Tensor

from bestiary.decoding.lowering import Leaf, Lowering, Unsupported, handles
from bestiary.decoding.program import BINARY, NOWHERE, SHARED_FROM, Op, Place
from bestiary.decoding.trace import storage


def _one_step(*tensors: Tensor | None) -> None:
    if any(x is not None and x.shape[1] != 1 for x in tensors):
        raise Unsupported("several steps in one")


def _target(low: Lowering, after: Tensor, before: Tensor, kind: str = "plain") -> Leaf:
    """The leaf whose old numbers are `before` and whose new ones `after` are: kinds of layout need both to be whole."""
    leaf, new = low.leaves.get(storage(before)), low.targets.get(storage(after))
    if leaf is None or leaf is not new or leaf.kind not in ("plain", kind):
        raise Unsupported("a memory that is not a state as it is")
    leaf.kind = kind
    return leaf


@handles("short_convolution")
def _convolution(
    low: Lowering, result: Any, x: Tensor, weight: Tensor, bias: Any, before: Tensor, lengths: Any, silu: bool
) -> None:
    _one_step(x)
    if lengths is not None:
        raise Unsupported("lengths")
    y, after = result
    low.new(y)
    low.new_memory(after)
    taps = low.constant(weight.t())
    numbers = (weight.shape[1], int(silu), int(bias is not None))
    bias = None if bias is None else low.constant(bias)
    shape = (x.shape[0], x.shape[2])
    low.emit(
        Op.CONVOLUTION, shape, [y[:, 0], after], [x[:, 0], taps, before, bias], number=numbers,
        shared=x[:, 0].numel() * weight.shape[1] >= SHARED_FROM,
    )  # fmt: skip


@handles("selective_scan")
def _scan(
    low: Lowering, result: Any, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Any, bias: Any, z: Any,
    gaps: Any, lengths: Any, before: Tensor, softplus: bool, save: bool,
) -> None:  # fmt: skip
    _one_step(u)
    if gaps is not None or lengths is not None:
        raise Unsupported("intervals or lengths")
    y, after, _ = result
    low.new(y)
    leaf = _target(low, after, before, "turned")
    low.bind(after, leaf)
    (rows, _, channels), states = u.shape, A.shape[1]
    turned = (states * channels, channels, 1, 0)  # both old and new: state by state
    A, (D, bias) = low.constant(A.t()), (None if x is None else low.constant(x) for x in (D, bias))
    now = [x[:, 0] for x in (u, dt)] + [A] + [x[:, 0] for x in (B, C)]
    rest = [D, bias, None if z is None else z[:, 0]]
    places = [low.place(y[:, 0]), low.place(after, turned), *(low.place(x) for x in now), low.place(before, turned)]
    places += [NOWHERE if x is None else low.place(x) for x in rest]
    numbers = (int(softplus), *(int(x is not None) for x in rest))
    low.memory.work += 8 * after.numel()
    low.emit(
        Op.SCAN, (rows, channels, states), [y, after], [*now, before, *rest], places=places, number=numbers,
        shared=after.numel() >= SHARED_FROM,
    )  # fmt: skip


@handles("linear_attention")
def _linear(
    low: Lowering, result: Any, q: Tensor, k: Tensor, v: Tensor, g: Any, bonus: Any, before: Tensor, scale: float,
    normalise: bool, eps: float, save: bool,
) -> None:  # fmt: skip
    _one_step(q, v)
    o, after = result[:2]
    low.new(o)
    low.new_memory(after)
    rows, _, heads, values = v.shape
    low.memory.scratch_for(2 * (-(-q.shape[3] // 32) * 32))
    low.memory.work += 4 * after.numel()
    numbers = (q.shape[2], 0 if g is None else g.ndim - 2, int(bonus is not None), int(normalise))
    parts = [None if x is None else x[:, 0] for x in (q, k, _dense(v), g)]
    low.emit(
        Op.LINEAR, (rows, heads, q.shape[3], values), [o[:, 0], after], [*parts, bonus, before], number=numbers,
        real=(scale, eps), shared=after.numel() >= SHARED_FROM,
    )  # fmt: skip


@handles("delta_rule")
def _delta(
    low: Lowering, result: Any, q: Tensor, k: Tensor, v: Tensor, beta: Any, g: Any, a: Any, b: Any, before: Tensor,
    scale: float, save: bool,
) -> None:  # fmt: skip
    o, after = result[:2]
    low.new(o)
    rows, time, heads, values = v.shape
    low.memory.scratch_for(2 * (-(-q.shape[3] // 32) * 32))
    low.memory.work += 8 * after.numel() * time
    numbers = (0 if g is None else g.ndim - 2, int(beta is not None), int(a is not None))
    low.new_memory(after)
    for t in range(time):  # several writes a step: all but the first read what they write over
        parts = [None if x is None else x[:, t] for x in (q, k, _dense(v), beta, g, a, b)]
        low.emit(
            Op.DELTA, (rows, heads, q.shape[3], values), [o[:, t], after], [*parts, after if t else before],
            number=numbers, real=(scale, 0.0), shared=after.numel() >= SHARED_FROM,
        )  # fmt: skip


def _dense(x: Tensor) -> Tensor:
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise Unsupported("values that are spread")
    return x


@handles("linear_recurrence")
def _recurrence(low: Lowering, result: Any, a: Tensor, b: Tensor, before: Tensor, lengths: Any) -> None:
    _one_step(a)
    if lengths is not None:
        raise Unsupported("lengths")
    h, after = result
    low.new(h)
    low.elementwise(Op.BINARY, h[:, 0], [a[:, 0], before], number=(BINARY.index("mul"),), real=(1.0,))
    low.elementwise(Op.BINARY, h[:, 0], [h[:, 0], b[:, 0]], number=(BINARY.index("add"),), real=(1.0,))
    low.new(after)
    low.copy(h[:, 0], after)


@handles("wkv")
def _wkv(low: Lowering, result: Any, k: Tensor, v: Tensor, w: Tensor, u: Tensor, *rest: Any) -> None:
    num, den, most, lengths = rest[:4]
    _one_step(k)
    if lengths is not None:
        raise Unsupported("lengths")
    y, *after = result[:4]
    low.new(y)
    for x in after:
        low.new_memory(x)
    parts = [_dense(k)[:, 0], _dense(v)[:, 0], low.constant(w), low.constant(u), num, den, most]
    low.memory.work += 40 * num.numel()
    low.emit(Op.WKV, (k.shape[0], k.shape[2]), [y[:, 0], *after], parts, shared=k.numel() >= 512)


@handles("attend")
def _attend(
    low: Lowering, result: Any, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, position: Tensor,
    window: int, scale: float,
) -> None:  # fmt: skip
    _one_step(q)
    o, *after = result
    kind = "plain" if window else "cache"
    cached = [_target(low, after[0], keys, kind)]
    if storage(values) == storage(keys):  # values are the keys' first channels, and what writes the keys writes them
        if window or values.storage_offset() != keys.storage_offset():
            raise Unsupported("values that are some other part of the keys")
        after[1] = after[0][..., : values.shape[-1]]
        cached *= 2
    else:
        cached.append(_target(low, after[1], values, kind))
    counted = _target(low, after[2], position, "positions")
    low.check_old(counted)
    low.new(o)
    for new, leaf in zip(after, (*cached, counted)):
        low.bind(new, leaf)
    rows, _, heads, key_dim = q.shape
    groups, value_dim = k.shape[2], v.shape[3]
    for leaf in cached:
        leaf.counter, leaf.caches = None if window else counted, cached
    if cached[0].slots < 0:
        cached[0].slots = low.memory.region()
    places = [low.place(o[:, 0])]
    for new, leaf in zip(after[:2], cached):
        places.append(Place(leaf.old if kind == "cache" else leaf.new, 0, (0, *new.stride()[1:])))
    places += [low.place(x[:, 0]) for x in (q, k, v)]
    places += [Place(leaf.old, 0, (0, *old.stride()[1:])) for old, leaf in zip((keys, values), cached)]
    numbers = (groups, window, counted.old, cached[0].slots)
    low.memory.scratch_for(64 + 2 * (-(-max(key_dim, value_dim) // 32) * 32))
    low.memory.work += 64 * 2 * heads * (key_dim + value_dim) * rows
    low.emit(
        Op.ATTEND, (rows, heads, key_dim, value_dim), [o, *after[:2]], [q, k, v, keys, values, position], places=places,
        number=numbers, real=(scale,), shared=True,
    )  # fmt: skip
    low.emit(Op.ADVANCE, (rows,), [after[2]], [position], places=[], number=(counted.old, counted.new))


@handles("log_linear")
def _log_linear(
    low: Lowering, result: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, weights: Tensor, before: Tensor,
    position: Tensor, scale: float,
) -> None:  # fmt: skip
    _one_step(q)
    o, after, counted = result
    leaf, counter = _target(low, after, before), _target(low, counted, position, "positions")
    low.new(o)
    low.bind(after, leaf)
    low.bind(counted, counter)
    rows, levels, heads, keys, values = before.shape
    now = [x[:, 0] for x in (q, k, _dense(v), g, weights)]
    memories = [Place(region, 0, before.contiguous().stride()[:4]) for region in (leaf.new, leaf.old)]
    places = [low.place(o[:, 0]), memories[0], *(low.place(x) for x in now), memories[1]]
    low.memory.scratch_for(-(-values // 32) * 32)
    low.memory.work += 2 * before.numel()
    low.emit(
        Op.FENWICK, (rows, heads, keys, values), [o, after], [*now, before, position], places=places,
        number=(levels, counter.old), real=(scale,), shared=rows * heads * keys * values >= SHARED_FROM,
    )  # fmt: skip
    low.emit(Op.ADVANCE, (rows,), [counted], [position], places=[], number=(counter.old, counter.new))


@handles("turn")
def _turn(low: Lowering, result: Tensor, x: Tensor, position: Tensor, base: float, dims: int, stretch: float) -> None:
    _one_step(x)
    leaf = low.leaves.get(storage(position))
    if leaf is None or leaf.kind not in ("plain", "positions"):
        raise Unsupported("positions that are not a state's")
    low.check_old(leaf)
    leaf.kind = "positions"
    low.new(result)
    speed = base ** -(torch.arange(0, dims, 2, dtype=torch.float64) / max(dims, 1)) / stretch
    low.alive.append(speed)
    places = [low.place(result[:, 0]), low.place(x[:, 0]), Place(-1, speed.data_ptr(), (0,) * 4)]
    rows, _, heads, channels = x.shape
    low.emit(Op.ROTATE, (rows, heads, channels), [result], [x, position], places=places, number=(dims, leaf.old))
