"""Instructions for operators of torch that remember nothing: elementwise functions, reductions, norms, products."""

from typing import Any

import torch
from torch import Tensor

from bestiary.decoding.lowering import Handler, Lowering, Unsupported, collapsed, handles, pairs
from bestiary.decoding.program import AXES, BINARY, REDUCTIONS, SHARED_FROM, UNARY, Op, Place
from bestiary.decoding.trace import storage
from bestiary.ops.native import traced


def _unary(name: str) -> Handler:
    def lower(low: Lowering, result: Tensor, x: Tensor, **_: Any) -> None:
        if not low.dynamic(result):
            low.new(result)
        low.elementwise(Op.UNARY, result, [x], number=(UNARY.index(name),))

    return lower


_UNARY = {name: name for name in UNARY if name not in ("softplus", "log_sigmoid", "gelu", "gelu_tanh", "elu", "clamp")}
_UNARY |= dict.fromkeys(("clone", "contiguous", "detach", "alias", "_to_copy", "lift_fresh_copy"), "copy")
_UNARY |= {name + "_": name for name in ("exp", "neg", "sigmoid", "relu")}
for _name, _function in _UNARY.items():
    handles(_name)(_unary(_function))


def _affine(low: Lowering, result: Tensor, x: Tensor, factor: float, addend: float) -> None:
    low.elementwise(Op.UNARY, result, [x], number=(UNARY.index("affine"),), real=(factor, addend))


def _binary(name: str) -> Handler:
    def lower(low: Lowering, result: Tensor, x: Any, y: Any, alpha: float = 1.0) -> None:
        if result.dtype == torch.int64:
            return _count(low, result, x, name, alpha * y)
        if result.is_complex() and name == "mul":
            return _complex_product(low, result, x, y)
        if not (isinstance(x, Tensor) and low.dynamic(result)):
            low.new(result)
        if isinstance(x, Tensor) and isinstance(y, Tensor):
            low.elementwise(Op.BINARY, result, [x, y], number=(BINARY.index(name),), real=(float(alpha),))
            return
        if not isinstance(x, Tensor):
            raise Unsupported("a number before an operator")
        factor = y if name == "mul" else 1 / y if name == "div" else 1.0
        _affine(low, result, x, factor, {"add": alpha * y, "sub": -alpha * y}.get(name, 0.0))

    return lower


def _count(low: Lowering, result: Tensor, position: Tensor, name: str, more: Any) -> None:
    """Positions, a step later."""
    leaf = low.leaves.get(storage(position))
    if (
        name != "add"
        or isinstance(more, Tensor)
        or more != 1
        or leaf is None
        or low.targets.get(storage(result)) is not leaf
    ):
        raise Unsupported("whole numbers that depend on the input")
    low.check_old(leaf)
    leaf.kind = "positions"
    low.emit(Op.ADVANCE, position.shape, [], [position], number=(leaf.old, leaf.new))
    low.bind(result, leaf)
    low.instructions[-1].writes.add(leaf.old)


def _complex_product(low: Lowering, result: Tensor, x: Any, y: Any) -> None:
    """By real and imaginary parts; either factor may be real."""
    low.new(result)
    mul, add, sub = ((Op.BINARY, {"number": (BINARY.index(n),), "real": (1.0,)}) for n in ("mul", "add", "sub"))
    parts = [pairs(z).unbind(-1) if z.is_complex() else (z, None) for z in (x, y)]
    (a, b), (c, d) = parts
    first, second = (torch.empty(result.shape, dtype=torch.float32) for _ in range(2))
    for spare in (first, second):
        low.new(spare)
    for to, factors, join in zip(pairs(result).unbind(-1), (((a, c), (b, d)), ((a, d), (b, c))), (sub, add)):
        terms = [[p for p in pair if p is not None] for pair in factors]
        terms = [pair for pair in terms if len(pair) == 2]
        if len(terms) == 1:
            low.elementwise(mul[0], to, terms[0], **mul[1])
            continue
        for spare, pair in zip((first, second), terms):
            low.elementwise(mul[0], spare, pair, **mul[1])
        low.elementwise(join[0], to, [first, second], **join[1])


@handles("complex")
def _complex(low: Lowering, result: Tensor, real: Tensor, imaginary: Tensor) -> None:
    low.new(result)
    for to, part in zip(pairs(result).unbind(-1), (real, imaginary)):
        low.copy(part, to)


for _name in BINARY:
    handles(_name, _name + "_")(_binary(_name))


@handles("sum_angles")
def _sum_angles(low: Lowering, result: Tensor, start: Tensor, turns: Tensor) -> None:
    if turns.shape[1] != 1:
        raise Unsupported("several steps in one")
    low.new(result)
    low.elementwise(Op.BINARY, result[:, 0], [start, turns[:, 0]], number=(BINARY.index("turned"),))


@handles("rsub")
def _rsub(low: Lowering, result: Tensor, x: Tensor, y: float, alpha: float = 1.0) -> None:
    low.new(result)
    if isinstance(y, Tensor):
        low.elementwise(Op.BINARY, result, [y, x], number=(BINARY.index("sub"),), real=(float(alpha),))
    else:
        _affine(low, result, x, -alpha, y)


@handles("pow")
def _pow(low: Lowering, result: Tensor, x: Tensor, power: float) -> None:
    known = {2: "square", 0.5: "sqrt", -0.5: "rsqrt", -1: "reciprocal", 1: "copy"}
    if isinstance(power, Tensor) or power not in known:
        raise Unsupported(f"a power of {power}")
    low.new(result)
    low.elementwise(Op.UNARY, result, [x], number=(UNARY.index(known[power]),))


@handles("softplus")
def _softplus(low: Lowering, result: Tensor, x: Tensor, beta: float = 1.0, threshold: float = 20.0) -> None:
    if beta != 1:
        raise Unsupported("softplus of another slope")
    low.new(result)
    low.elementwise(Op.UNARY, result, [x], number=(UNARY.index("softplus"),))


@handles("log_sigmoid_forward")
def _log_sigmoid(low: Lowering, result: tuple[Tensor, Tensor], x: Tensor) -> None:
    low.new(result[0])
    low.elementwise(Op.UNARY, result[0], [x], number=(UNARY.index("log_sigmoid"),))


@handles("gelu")
def _gelu(low: Lowering, result: Tensor, x: Tensor, approximate: str = "none") -> None:
    low.new(result)
    name = "gelu" if approximate == "none" else "gelu_tanh"
    low.elementwise(Op.UNARY, result, [x], number=(UNARY.index(name),))


@handles("elu")
def _elu(low: Lowering, result: Tensor, x: Tensor, *scales: float) -> None:
    if any(scale != 1 for scale in scales):
        raise Unsupported("elu of other scales")
    low.new(result)
    low.elementwise(Op.UNARY, result, [x], number=(UNARY.index("elu"),))


@handles("clamp", "clamp_min")
def _clamp(low: Lowering, result: Tensor, x: Tensor, least: Any = None, most: Any = None, **given: Any) -> None:
    least, most = given.get("min", least), given.get("max", most)
    if isinstance(least, Tensor) or isinstance(most, Tensor):
        raise Unsupported("clamping to a tensor")
    low.new(result)
    limits = (float("-inf") if least is None else least, float("inf") if most is None else most)
    low.elementwise(Op.UNARY, result, [x], number=(UNARY.index("clamp"),), real=limits)


@handles("lerp")
def _lerp(low: Lowering, result: Tensor, start: Tensor, end: Tensor, weight: Any) -> None:
    low.new(result)
    weight = weight if isinstance(weight, Tensor) else torch.tensor(float(weight), dtype=torch.float32)
    low.elementwise(Op.LERP, result, [start, end, weight])


@handles("addcmul")
def _addcmul(low: Lowering, result: Tensor, x: Tensor, a: Tensor, b: Tensor, value: float = 1.0) -> None:
    low.new(result)
    low.elementwise(Op.BINARY, result, [a, b], number=(BINARY.index("mul"),))
    low.elementwise(Op.BINARY, result, [x, result], number=(BINARY.index("add"),), real=(float(value),))


@handles("logaddexp")
def _logaddexp(low: Lowering, result: Tensor, x: Tensor, y: Tensor) -> None:
    """x + softplus(y - x)."""
    low.new(result)
    low.elementwise(Op.BINARY, result, [y, x], number=(BINARY.index("sub"),), real=(1.0,))
    low.elementwise(Op.UNARY, result, [result], number=(UNARY.index("softplus"),))
    low.elementwise(Op.BINARY, result, [x, result], number=(BINARY.index("add"),), real=(1.0,))


@handles("glu")
def _glu(low: Lowering, result: Tensor, x: Tensor, dim: int = -1) -> None:
    value, gate = x.chunk(2, dim)
    low.new(result)
    low.elementwise(Op.UNARY, result, [gate], number=(UNARY.index("sigmoid"),))
    low.elementwise(Op.BINARY, result, [value, result], number=(BINARY.index("mul"),), real=(1.0,))


@handles("cat", "stack")
def _cat(low: Lowering, result: Tensor, parts: list[Tensor], dim: int = 0) -> None:
    low.new(result)
    if parts and parts[0].ndim < result.ndim:
        parts = [part.unsqueeze(dim) for part in parts]
    start = 0
    for part in parts:
        if part.numel():
            low.copy(part, result.narrow(dim, start, part.shape[dim]))
        start += part.shape[dim]


@handles("index")
def _index(low: Lowering, result: Tensor, x: Tensor, indices: list[Tensor | None]) -> None:
    """x[:, ..., i, :, ...] with constants i."""
    axes = [axis for axis, index in enumerate(indices) if index is not None]
    index = indices[axes[0]]
    if len(axes) != 1 or index is None or index.ndim != 1 or index.dtype != torch.int64 or low.dynamic(index):
        raise Unsupported("an index that is not a row of constants")
    low.new(result)
    index = (index % x.shape[axes[0]]).contiguous()
    low.alive.append(index)
    y, x = result.movedim(axes[0], -1), x.movedim(axes[0], -1)
    shape, strides = _loops(tuple(y.shape[:-1]), y.shape[-1], y)
    _, more = _loops(tuple(x.shape[:-1]), x.shape[-1], x)
    places = [low.place(y, strides[0]), low.place(x, more[0]), Place(-1, index.data_ptr(), (0,) * AXES)]
    low.emit(Op.GATHER, shape, [result], [x], places=places, shared=y.numel() >= SHARED_FROM)


@handles("constant_pad_nd")
def _pad(low: Lowering, result: Tensor, x: Tensor, sizes: list[int], value: float = 0.0) -> None:
    low.new(result)
    low.copy(torch.tensor(float(value), dtype=torch.float32), result)
    inside = result
    for axis, (before, size) in enumerate(zip(sizes[::2], reversed(x.shape))):
        if before < 0 or sizes[2 * axis + 1] < 0:
            raise Unsupported("padding that cuts")
        inside = inside.narrow(result.ndim - 1 - axis, before, size)
    low.copy(x, inside)


# reductions, norms, products


def _reduction(kind: str) -> Handler:
    def lower(low: Lowering, result: Tensor, x: Tensor, dims: Any = None, keepdim: bool = False, **_: Any) -> None:
        dims = [dims] if isinstance(dims, int) else list(dims or range(x.ndim))
        if [d % x.ndim for d in dims] != [x.ndim - 1]:
            raise Unsupported(f"a {kind} over axes {dims}")
        low.new(result)
        lines = result if keepdim else result.unsqueeze(-1)
        outer = tuple(x.shape[:-1])
        loops = collapsed((*outer, x.shape[-1]), [tuple(lines.expand(x.shape).stride()), tuple(x.stride())])
        if loops is None:
            raise Unsupported(f"a {kind} of too many axes")
        shape, strides = loops
        if x.shape[-1] != shape[-1]:
            shape, strides = _loops(outer, x.shape[-1], lines, x)
        places = [low.place(t, s) for t, s in zip((lines, x), strides)]
        low.emit(Op.REDUCE, shape, [result], [x], places=places, number=(REDUCTIONS.index(kind),))

    return lower


def _loops(outer: tuple[int, ...], inner: int, *tensors: Tensor) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """Loops whose last axis is the tensors' last."""
    if len(outer) > 3:
        raise Unsupported("too many axes")
    more = 3 - len(outer)
    strides = [(0,) * more + tuple(t.expand(*outer, inner).stride()) for t in tensors]
    return (1,) * more + outer + (inner,), strides


for _name, _kind in {"sum": "sum", "mean": "mean", "amax": "amax"}.items():
    handles(_name)(_reduction(_kind))


@handles("linalg_vector_norm")
def _length(
    low: Lowering, result: Tensor, x: Tensor, order: float = 2, dims: Any = None, keepdim: bool = False
) -> None:
    if order != 2:
        raise Unsupported(f"a norm of order {order}")
    _reduction("length")(low, result, x, dims, keepdim)


@handles("native_layer_norm")
def _layer_norm(
    low: Lowering, result: tuple[Tensor, ...], x: Tensor, shape: list[int], weight: Any, bias: Any, eps: float
) -> None:
    if len(shape) != 1:
        raise Unsupported("a layer norm over several axes")
    y = result[0]
    low.new(y)
    weight = torch.ones((), dtype=torch.float32) if weight is None else weight
    bias = torch.zeros((), dtype=torch.float32) if bias is None else bias
    loops, strides = _loops(tuple(x.shape[:-1]), x.shape[-1], y, x, weight, bias)
    places = [low.place(t, s) for t, s in zip((y, x, weight, bias), strides)]
    low.emit(Op.LAYER_NORM, loops, [y], [x, weight, bias], places=places, real=(eps,))


@handles("product")
def _packed(low: Lowering, result: Tensor, x: Tensor, number: int) -> None:
    low.new(result)
    low.product(result, x, traced.matrix(number))


@handles("mm")
def _mm(low: Lowering, result: Tensor, x: Tensor, weight: Tensor) -> None:
    low.new(result)
    if low.dynamic(weight):
        _batched(low, result[None], x[None], weight[None])
    else:
        low.product(result, x, low.memory.matrices.packed(weight.t()))


@handles("addmm")
def _addmm(low: Lowering, result: Tensor, bias: Tensor, x: Tensor, weight: Tensor, **scales: Any) -> None:
    if scales or low.dynamic(weight) or low.dynamic(bias) or bias.ndim != 1:
        raise Unsupported("a product with a sum that depends on the input")
    low.new(result)
    low.product(result, x, low.memory.matrices.packed(weight.t(), bias))


@handles("bmm")
def _bmm(low: Lowering, result: Tensor, a: Tensor, b: Tensor) -> None:
    low.new(result)
    _batched(low, result, a, b)


def _batched(low: Lowering, y: Tensor, a: Tensor, b: Tensor) -> None:
    shape = (y.shape[0], y.shape[1], y.shape[2], a.shape[2])
    low.memory.work += y.numel() * a.shape[2]
    low.emit(Op.BATCHED, shape, [y], [a, b], shared=y.numel() * a.shape[2] >= 1 << 15)
