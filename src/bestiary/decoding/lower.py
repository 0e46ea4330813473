"""A traced step as instructions: constants are computed once, views cost nothing, the rest is one instruction each.

Every operator of torch that may appear has a function here, registered by name. What has none is `Unsupported`: the
layer then runs as it is.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from bestiary.decoding.program import (
    BINARY,
    NOWHERE,
    REDUCTIONS,
    SHARED_FROM,
    UNARY,
    WORKSPACE,
    Instruction,
    Op,
    Place,
    collapsed,
    strides_of,
)
from bestiary.errors import UsageError
from bestiary.ops.native import traced
from bestiary.ops.native.matvec import PackedMatrix

Handler = Callable[..., None]
_handlers: dict[str, Handler] = {}


class Unsupported(Exception):
    """A step that cannot be made into instructions; the message says why."""


def handles(*names: str) -> Callable[[Handler], Handler]:
    """Decorator: the function that makes instructions for operators of these names: (lowering, result, *arguments)."""

    def add(function: Handler) -> Handler:
        for name in names:
            _handlers[name] = function
        return function

    return add


class Memory:
    """Room in the workspace and the numbers of regions, over a whole program."""

    def __init__(self) -> None:
        self.used, self.most, self.regions = 0, 0, WORKSPACE + 1
        self.scratch, self.work = 64, 0.0
        self.alive: list[Any] = []

    def room(self, count: int) -> int:
        """So many numbers of the workspace, at the start of a cache line."""
        start = self.used
        self.used += -(-count // 16) * 16
        self.most = max(self.most, self.used)
        return start

    def region(self) -> int:
        self.regions += 1
        return self.regions - 1

    def scratch_for(self, count: int) -> None:
        self.scratch = max(self.scratch, count)


class Leaf:
    """One tensor of a state: the regions of its old and its new numbers, and how they lie.

    `kind` is "plain"; "turned", the last two axes the other way round; "cache", which grows along its second axis; or
    "positions", whole numbers.
    """

    def __init__(self, tensor: Tensor, memory: Memory):
        self.shape, self.dtype, self.kind = tuple(tensor.shape), tensor.dtype, "plain"
        self.old, self.new, self.slots = memory.region(), memory.region(), -1
        self.counter: Leaf | None = None  # of a cache: the positions
        self.written, self.written_by = False, -1

    def ready(
        self, tensor: Tensor, layer: int, write: bool, position: Callable[["Leaf"], Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(old numbers, where the new ones go, the new state's tensor).

        Args:
            layer: for messages.
            write: whether the old ones may be written over.
            position: the tensor of another leaf of this state.
        """
        shape = self.shape if self.counter is None else (self.shape[0], tensor.shape[1], *self.shape[2:])
        if tensor.shape != shape:
            raise UsageError(f"layer {layer}: a tensor of its state must be of shape {shape}, not {tuple(tensor.shape)}")
        if tensor.dtype != self.dtype or tensor.device.type != "cpu" or tensor.requires_grad:
            raise OtherNumbers
        if self.kind == "turned":
            old = tensor.transpose(1, 2).contiguous()
            new = old if write else torch.empty_like(old)
            return old, new, new.transpose(1, 2)
        if self.counter is not None:
            return self._cache(tensor, write, int(position(self.counter).max()) + 1)
        old = tensor.contiguous()
        new = old if write else torch.empty_like(old)
        return old, new, new

    def _cache(self, old: Tensor, write: bool, used: int) -> tuple[Tensor, Tensor, Tensor]:
        """A cache is written into: the caller's own, or one with room for the step; room doubles where it may."""
        if not write or used > old.shape[1] or not old.is_contiguous():
            slots = max(used, 2 * old.shape[1], 64) if write else used
            new = old.new_zeros(old.shape[0], slots, *old.shape[2:])
            kept = min(used, old.shape[1])
            new[:, :kept] = old[:, :kept]
            old = new
        return old, old, old


class OtherNumbers(Exception):
    """A state in another dtype or place than programs compute with."""


class Lowering:
    """One traced piece on its way: which storage lies where, and the instructions so far."""

    def __init__(self, memory: Memory):
        self.memory, self.instructions = memory, list[Instruction]()
        self.places: dict[int, tuple[int, int]] = {}  # storages that change from step to step: region, offset
        self.resources: dict[int, int] = {}
        self.destined: dict[int, tuple[int, int]] = {}  # where a result must come to lie, by storage
        self.leaves: dict[int, Leaf] = {}  # by the storage of the old numbers
        self.targets: dict[int, Leaf] = {}  # results that are some leaf's new numbers, by storage
        self.alive: list[Any] = []

    # places

    def put(self, tensor: Tensor, region: int, at: int, resource: int | None = None) -> None:
        """Say where a tensor's storage lies."""
        key = storage(tensor)
        self.places[key] = (region, at)
        self.resources[key] = key if resource is None else resource
        self.alive.append(tensor)

    def dynamic(self, tensor: Tensor) -> bool:
        """Whether it depends on the input."""
        return storage(tensor) in self.places

    def new(self, result: Tensor) -> None:
        """Find room for a result."""
        if result.dtype not in (torch.float32, torch.complex64):
            raise Unsupported(f"numbers of {result.dtype} that depend on the input")
        place = self.destined.get(storage(result))
        self.put(result, *(place or (WORKSPACE, self.memory.room(result.untyped_storage().nbytes() // 4))))

    def destine(self, tensor: Tensor, region: int, at: int) -> None:
        """Say where a result must come to lie; `arrive` sees to it that it does."""
        whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == 4 * tensor.numel()
        if whole and not self.dynamic(tensor):
            self.destined[storage(tensor)] = (region, at)

    def arrive(self, tensor: Tensor, region: int, at: int, resource: int) -> None:
        """The instruction that copies a result to its place, if it does not lie there."""
        if self.places.get(storage(tensor)) == (region, at) and self.destined.get(storage(tensor)) == (region, at):
            return
        loops = collapsed(tuple(tensor.shape), [_contiguous(tuple(tensor.shape)), tuple(tensor.stride())])
        if loops is None:
            raise Unsupported("a result of too many axes")
        source, strides = (tensor if self.dynamic(tensor) else tensor.to(torch.float32)), loops[1]
        places = [Place(region, at, strides[0]), self.place(source, strides[1])]
        self.emit(Op.UNARY, loops[0], [], [source], places=places, number=(UNARY.index("copy"),))
        self.instructions[-1].writes.add(resource)

    def new_memory(self, after: Tensor) -> None:
        """Where an operator's memory after a step goes: straight into the new state where it is one."""
        leaf = self.targets.get(storage(after))
        if leaf is None or tuple(after.shape) != leaf.shape or not after.is_contiguous():
            self.new(after)
        else:
            self.bind(after, leaf)

    def bind(self, after: Tensor, leaf: Leaf) -> None:
        """Say that a result is the new state, which may take the old one's place."""
        self.put(after, leaf.new, 0, leaf.old)
        leaf.written, leaf.written_by = True, len(self.instructions)

    def place(self, tensor: Tensor, strides: tuple[int, ...] | None = None) -> Place:
        """An operand, its strides filled up to four at the end unless they are given."""
        if strides is None:
            strides = tuple(tensor.stride())
            if len(strides) > 4:
                raise Unsupported(f"an operand of {len(strides)} axes")
        strides = (*strides, *[0] * (4 - len(strides)))
        if self.dynamic(tensor):
            region, at = self.places[storage(tensor)]
            leaf = self.leaves.get(storage(tensor))
            if leaf is not None and leaf.written and len(self.instructions) != leaf.written_by:
                raise Unsupported("a state that is read after it was written")
            return Place(region, at + tensor.storage_offset(), strides)
        if tensor.dtype != torch.float32:
            raise Unsupported(f"a constant of {tensor.dtype}")
        self.alive.append(tensor)
        return Place(-1, tensor.data_ptr(), strides)

    def constant(self, tensor: Tensor) -> Tensor:
        """A constant in fp32, which lies in one piece."""
        if self.dynamic(tensor):
            raise Unsupported("a weight that depends on the input")
        tensor = tensor.detach().to(torch.float32).contiguous()
        self.alive.append(tensor)
        return tensor

    # instructions

    def emit(
        self,
        op: Op,
        shape: tuple[int, ...],
        writes: list[Tensor],
        reads: list[Tensor | None],
        *,
        places: list[Place] | None = None,
        shared: bool = False,
        **more: Any,
    ) -> None:
        """Add an instruction; its operands are `places`, or those of the tensors it writes and reads."""
        operands = [NOWHERE if x is None else self.place(x) for x in (*writes, *reads)] if places is None else places
        touched = [
            {self.resources[storage(x)] for x in group if x is not None and self.dynamic(x)} for group in (reads, writes)
        ]
        self.instructions.append(
            Instruction(op, shape, operands, shared=shared, reads=touched[0], writes=touched[1], **more)
        )

    def elementwise(self, op: Op, result: Tensor, inputs: list[Tensor], **more: Any) -> None:
        """result = f(inputs), all broadcast to its shape; complex ones part by part."""
        if result.is_complex():
            if not all(x.is_complex() for x in inputs):
                raise Unsupported("complex and real numbers together")
            result, inputs = _pairs(result), [_pairs(x) for x in inputs]
        shape = tuple(result.shape)
        inputs = [x if self.dynamic(x) else x.to(torch.float32) for x in inputs]
        loops = collapsed(shape, [strides_of(x, shape) for x in (result, *inputs)])
        if loops is None:
            raise Unsupported(f"a shape of too many axes, {shape}")
        places = [self.place(x, strides) for x, strides in zip((result, *inputs), loops[1])]
        shape, large = loops[0], result.numel() >= SHARED_FROM
        if large and shape[0] * shape[1] * shape[2] == 1:  # one long row: in pieces, so that threads can share it
            piece = next((p for p in (16, 8, 4, 2) if shape[3] % p == 0), 1)
            shape = (1, 1, piece, shape[3] // piece)
            places = [
                Place(p.region, p.at, (0, 0, p.strides[3] * shape[3], p.strides[3])) for p in places
            ]
        self.emit(op, shape, [result], list(inputs), places=places, shared=large, **more)

    def copy(self, source: Tensor, target: Tensor) -> None:
        self.elementwise(Op.UNARY, target, [source], number=(UNARY.index("copy"),))

    def product(self, result: Tensor, x: Tensor, matrix: PackedMatrix) -> None:
        """result (rows, outputs) = x (rows, inputs) W^T."""
        rows, (outputs, inputs) = x.numel() // matrix.shape[1], matrix.shape
        x, result = x.reshape(rows, inputs) if not self.dynamic(x) else _as_rows(x, inputs), _as_rows(result, outputs)
        self.memory.scratch_for(rows * -(-inputs // 32) * 32)
        self.memory.work += rows * outputs * inputs
        self.alive.append(matrix)
        self.emit(Op.PRODUCT, (rows,), [result], [x], matrix=matrix, shared=outputs * inputs >= 1 << 14)

    def lower(self, graph: fx.GraphModule, values: dict[fx.Node, Any]) -> None:
        """Instructions of a graph whose values on a sample are known: constants are these values."""
        for node in graph.graph.nodes:
            if node.op != "call_function":
                continue
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            result = values[node]
            given, made = _tensors((args, kwargs)), _tensors(result)
            if not any(self.dynamic(x) for x in given):
                continue  # a constant
            name = getattr(node.target, "_opname", None) or getattr(node.target, "__name__", str(node.target))
            if name == "getitem" or name in BLANK:
                continue
            schema = getattr(node.target, "_schema", None)
            if schema is not None and schema.is_mutable and (name not in MUTATING or not self.dynamic(given[0])):
                raise Unsupported(f"{name} writes into what may be needed")
            if name not in MUTATING and all(any(storage(x) == storage(y) for y in given) for x in made):
                continue  # a view
            handler = _handlers.get(name)
            if handler is None:
                raise Unsupported(f"no instruction for {name}")
            handler(self, result, *args, **kwargs)


class Record(fx.Interpreter):
    """Runs a graph and keeps every value."""

    def __init__(self, graph: fx.GraphModule):
        super().__init__(graph, garbage_collect_values=False)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.values[n] = super().run_node(n)
        return self.values[n]


def _pairs(tensor: Tensor) -> Tensor:
    """A complex tensor as a real one with an axis more, of the same storage."""
    if tensor.is_conj():
        raise Unsupported("a conjugate")
    return torch.view_as_real(tensor)


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(torch.empty(shape, device="meta").stride())


def storage(tensor: Tensor) -> int:
    """What tells one piece of memory from another."""
    return tensor.untyped_storage()._cdata


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return _tensors(list(value.values()))
    return [x for part in value for x in _tensors(part)] if isinstance(value, (list, tuple)) else []


def _as_rows(tensor: Tensor, width: int) -> Tensor:
    """(rows, width), without a copy."""
    try:
        flat = tensor.view(-1, width)
    except RuntimeError as error:
        raise Unsupported(f"a product of rows that are spread, {tuple(tensor.stride())}") from error
    if flat.stride(-1) != 1 and width > 1:
        raise Unsupported("a product of rows that are spread")
    return flat


# elementwise


def _unary(name: str) -> Handler:
    def lower(low: Lowering, result: Tensor, x: Tensor, **_: Any) -> None:
        if not low.dynamic(result):
            low.new(result)
        low.elementwise(Op.UNARY, result, [x], number=(UNARY.index(name),))

    return lower


for _name, _operator in {
    "neg": "neg", "exp": "exp", "sigmoid": "sigmoid", "silu": "silu", "tanh": "tanh", "relu": "relu", "sqrt": "sqrt",
    "rsqrt": "rsqrt", "reciprocal": "reciprocal", "abs": "abs", "log": "log", "expm1": "expm1", "sin": "sin", "cos": "cos",
    "clone": "copy", "contiguous": "copy", "detach": "copy", "alias": "copy", "_to_copy": "copy", "lift_fresh_copy": "copy",
    "exp_": "exp", "neg_": "neg", "sigmoid_": "sigmoid", "relu_": "relu",
}.items():  # fmt: skip
    handles(_name)(_unary(_operator))
BLANK = {"zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty"}
"""What takes a tensor for its shape alone."""
MUTATING = {"add_", "sub_", "mul_", "div_", "exp_", "neg_", "sigmoid_", "relu_"}


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
        factor = {"add": 1.0, "sub": 1.0, "mul": y, "div": 1 / y}[name]
        _affine(low, result, x, factor, {"add": alpha * y, "sub": -alpha * y}.get(name, 0.0))

    return lower


def _count(low: Lowering, result: Tensor, position: Tensor, name: str, more: Any) -> None:
    """Positions, a step later."""
    leaf = low.leaves.get(storage(position))
    if name != "add" or isinstance(more, Tensor) or more != 1 or leaf is None or low.targets.get(storage(result)) is not leaf:
        raise Unsupported("whole numbers that depend on the input")
    leaf.kind = "positions"
    low.emit(Op.ADVANCE, position.shape, [], [position], number=(leaf.old, leaf.new))
    low.bind(result, leaf)
    low.instructions[-1].writes.add(leaf.old)


def _complex_product(low: Lowering, result: Tensor, x: Any, y: Any) -> None:
    """By real and imaginary parts; either factor may be real."""
    low.new(result)
    mul, add, sub = ((Op.BINARY, {"number": (BINARY.index(n),), "real": (1.0,)}) for n in ("mul", "add", "sub"))
    parts = [_pairs(z).unbind(-1) if z.is_complex() else (z, None) for z in (x, y)]
    (a, b), (c, d) = parts
    first, second = (torch.empty(result.shape) for _ in range(2))
    for spare in (first, second):
        low.new(spare)
    for to, pairs, join in zip(_pairs(result).unbind(-1), (((a, c), (b, d)), ((a, d), (b, c))), (sub, add)):
        terms = [pair for pair in pairs if None not in pair]
        if len(terms) == 1:
            low.elementwise(mul[0], to, list(terms[0]), **mul[1])
            continue
        for spare, pair in zip((first, second), terms):
            low.elementwise(mul[0], spare, list(pair), **mul[1])
        low.elementwise(join[0], to, [first, second], **join[1])


@handles("complex")
def _complex(low: Lowering, result: Tensor, real: Tensor, imaginary: Tensor) -> None:
    low.new(result)
    for to, part in zip(_pairs(result).unbind(-1), (real, imaginary)):
        low.copy(part, to)


for _name in BINARY:
    handles(_name, _name + "_")(_binary(_name))


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
    weight = weight if isinstance(weight, Tensor) else torch.tensor(float(weight))
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


@handles("constant_pad_nd")
def _pad(low: Lowering, result: Tensor, x: Tensor, sizes: list[int], value: float = 0.0) -> None:
    low.new(result)
    low.copy(torch.tensor(float(value)), result)
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
def _length(low: Lowering, result: Tensor, x: Tensor, order: float = 2, dims: Any = None, keepdim: bool = False) -> None:
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
    weight, bias = torch.ones(()) if weight is None else weight, torch.zeros(()) if bias is None else bias
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
        low.product(result, x, PackedMatrix(weight.t(), "fp32"))


@handles("addmm")
def _addmm(low: Lowering, result: Tensor, bias: Tensor, x: Tensor, weight: Tensor, **scales: Any) -> None:
    if scales or low.dynamic(weight) or low.dynamic(bias) or bias.ndim != 1:
        raise Unsupported("a product with a sum that depends on the input")
    low.new(result)
    low.product(result, x, PackedMatrix(weight.t(), "fp32", bias))


@handles("bmm")
def _bmm(low: Lowering, result: Tensor, a: Tensor, b: Tensor) -> None:
    low.new(result)
    _batched(low, result, a, b)


def _batched(low: Lowering, y: Tensor, a: Tensor, b: Tensor) -> None:
    shape = (y.shape[0], y.shape[1], y.shape[2], a.shape[2])
    low.memory.work += y.numel() * a.shape[2]
    low.emit(Op.BATCHED, shape, [y], [a, b], shared=y.numel() * a.shape[2] >= 1 << 15)


# memories


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
    _one_step(q, k, v)
    o, after = result[:2]
    low.new(o)
    low.new_memory(after)
    rows, _, heads, values = v.shape
    low.memory.scratch_for(2 * (-(-q.shape[3] // 32) * 32))
    low.memory.work += 8 * after.numel()
    numbers = (0 if g is None else g.ndim - 2, int(beta is not None), int(a is not None))
    parts = [None if x is None else x[:, 0] for x in (q, k, _dense(v), beta, g, a, b)]
    low.emit(
        Op.DELTA, (rows, heads, q.shape[3], values), [o[:, 0], after], [*parts, before], number=numbers, real=(scale, 0.0),
        shared=after.numel() >= SHARED_FROM,
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
    cached = [_target(low, new, old, kind) for new, old in zip(after[:2], (keys, values))]
    counted = _target(low, after[2], position, "positions")
    low.new(o)
    for new, leaf in zip(after, (*cached, counted)):
        low.bind(new, leaf)
    rows, _, heads, key_dim = q.shape
    groups, value_dim = k.shape[2], v.shape[3]
    for leaf in cached:
        leaf.counter = None if window else counted
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


@handles("turn")
def _turn(
    low: Lowering, result: Tensor, x: Tensor, position: Tensor, base: float, dims: int, stretch: float
) -> None:
    _one_step(x)
    leaf = low.leaves.get(storage(position))
    if leaf is None or leaf.kind not in ("plain", "positions"):
        raise Unsupported("positions that are not a state's")
    leaf.kind = "positions"
    low.new(result)
    speed = base ** -(torch.arange(0, dims, 2, dtype=torch.float64) / max(dims, 1)) / stretch
    low.alive.append(speed)
    places = [low.place(result[:, 0]), low.place(x[:, 0]), Place(-1, speed.data_ptr(), (0,) * 4)]
    rows, _, heads, channels = x.shape
    low.emit(
        Op.ROTATE, (rows, heads, channels), [result], [x, position], places=places, number=(dims, leaf.old)
    )
