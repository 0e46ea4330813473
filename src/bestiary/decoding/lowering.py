"""A traced step as instructions: constants are computed once, views cost nothing, the rest is one instruction each.

Every operator of torch that may appear has a function here, registered by name. What has none is `Unsupported`: the
layer then runs as it is.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from bestiary.decoding.program import (
    NOWHERE,
    SHARED_FROM,
    UNARY,
    WORKSPACE,
    Instruction,
    Op,
    Place,
    collapsed,
    strides_of,
)
from bestiary.decoding.trace import BLANK, Call, storage, tensors
from bestiary.errors import UsageError
from bestiary.ops.native.matvec import PackedMatrix

MUTATING = {"add_", "sub_", "mul_", "div_", "exp_", "neg_", "sigmoid_", "relu_"}

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


class Matrices:
    """Matrices that steps multiply with and that the model did not pack: packed once for all programs.

    Args:
        weights: the model's, which stay as they are; what a step computes itself is packed for its program alone.
    """

    def __init__(self, weights: Iterable[Tensor]):
        self.weights = {storage(x): x.detach() for x in weights}
        self.made: dict[Any, PackedMatrix] = {}

    def packed(self, weight: Tensor, bias: Tensor | None = None) -> PackedMatrix:
        """In fp32."""
        parts = [x for x in (weight, bias) if x is not None]
        if any(storage(x) not in self.weights for x in parts):
            return PackedMatrix(weight, "fp32", bias)
        key = tuple((storage(x), x.storage_offset(), x.shape, x.stride()) for x in parts)
        if key not in self.made:
            self.made[key] = PackedMatrix(weight, "fp32", bias)
        return self.made[key]


class Memory:
    """Room in the workspace and the numbers of regions, over a whole program."""

    def __init__(self, matrices: Matrices) -> None:
        self.matrices = matrices
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
        self.caches: list[Leaf] = []  # of a cache: those with the same positions, itself among them
        self.written, self.written_by = False, -1

    def check(self, tensor: Tensor, layer: int) -> None:
        """Refuse what a program cannot read; `layer` is for messages."""
        shape = self.shape if self.counter is None else (self.shape[0], *tensor.shape[1:2], *self.shape[2:])
        if tensor.shape != shape:
            raise UsageError(
                f"layer {layer}: a tensor of its state must be of shape {shape}, not {tuple(tensor.shape)}"
            )
        if tensor.dtype != self.dtype or tensor.device.type != "cpu" or tensor.requires_grad:
            raise OtherNumbers

    def ready(self, tensor: Tensor, layer: int, write: bool, state: dict[int, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """(old numbers, where the new ones go, the new state's tensor); nothing is written over yet.

        Args:
            layer: for messages.
            write: whether the old ones may be written over.
            state: the layer's tensors by the id of their leaf, all of which are checked.
        """
        if self.kind == "turned":
            old = tensor.transpose(1, 2).contiguous()
            new = old if write else torch.empty_like(old)
            return old, new, new.transpose(1, 2)
        if self.counter is not None:
            return self._cache(tensor, layer, write, state)
        old = tensor.contiguous()
        new = old if write else torch.empty_like(old)
        return old, new, new

    def _cache(self, old: Tensor, layer: int, write: bool, state: dict[int, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """A cache is written into: the caller's own, or one with room for the step; room doubles where it may.

        Those that share their positions have equal slots, whole or not, and so one number of them.
        """
        assert self.counter is not None
        positions, has = state[id(self.counter)].tolist(), old.shape[1]
        if not 0 <= min(positions) <= max(positions) <= has:
            raise UsageError(f"layer {layer}: positions must lie in 0..{has}, its cache's slots, not {positions}")
        used, caches = max(positions) + 1, [state[id(leaf)] for leaf in self.caches]
        if not write or used > has or any(x.shape[1] != has or not x.is_contiguous() for x in caches):
            slots = max(used, 2 * max(x.shape[1] for x in caches), 64) if write else used
            new = old.new_zeros(old.shape[0], slots, *old.shape[2:])
            new[:, : used - 1] = old[:, : used - 1]
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
        self.alive: list[Any] = []  # what instructions point into
        self.seen: list[Tensor] = []  # so that each storage stays the only one of its name

    # places

    def put(self, tensor: Tensor, region: int, at: int, resource: int | None = None) -> None:
        """Say where a tensor's storage lies."""
        key = storage(tensor)
        self.places[key] = (region, at)
        self.resources[key] = key if resource is None else resource
        self.seen.append(tensor)

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
            if (leaf := self.leaves.get(storage(tensor))) is not None:
                self.check_old(leaf)
            return Place(region, at + int(tensor.storage_offset()), strides)
        if tensor.dtype != torch.float32:
            raise Unsupported(f"a constant of {tensor.dtype}")
        self.alive.append(tensor)
        return Place(-1, tensor.data_ptr(), strides)

    def check_old(self, leaf: Leaf) -> None:
        """Refuse to read what the new numbers may have been written over; the writer itself reads them first."""
        if leaf.written and len(self.instructions) != leaf.written_by:
            raise Unsupported("a state that is read after it was written")

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
            {self.resources[storage(x)] for x in group if x is not None and self.dynamic(x)}
            for group in (reads, writes)
        ]
        self.instructions.append(
            Instruction(op, shape, operands, shared=shared, reads=touched[0], writes=touched[1], **more)
        )

    def elementwise(self, op: Op, result: Tensor, inputs: list[Tensor], **more: Any) -> None:
        """result = f(inputs), all broadcast to its shape; complex ones part by part."""
        if result.is_complex():
            if not all(x.is_complex() for x in inputs):
                raise Unsupported("complex and real numbers together")
            result, inputs = pairs(result), [pairs(x) for x in inputs]
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
            places = [Place(p.region, p.at, (0, 0, p.strides[3] * shape[3], p.strides[3])) for p in places]
        self.emit(op, shape, [result], list(inputs), places=places, shared=large, **more)

    def copy(self, source: Tensor, target: Tensor) -> None:
        self.elementwise(Op.UNARY, target, [source], number=(UNARY.index("copy"),))

    def product(self, result: Tensor, x: Tensor, matrix: PackedMatrix) -> None:
        """result (rows, outputs) = x (rows, inputs) W^T."""
        rows, (outputs, inputs) = x.numel() // matrix.shape[1], matrix.shape
        x, result = x.reshape(rows, inputs) if not self.dynamic(x) else _as_rows(x, inputs), _as_rows(result, outputs)
        self.memory.scratch_for(-(-rows // 8) * 8 * (-(-inputs // 32) * 32 + 16) + 16 * 256)  # or less, with few rows
        self.memory.work += rows * outputs * inputs
        self.alive.append(matrix)
        self.emit(Op.PRODUCT, (rows,), [result], [x], matrix=matrix, shared=outputs * inputs >= 1 << 14)

    def lower(self, calls: list[Call]) -> None:
        """Instructions of what was traced; what does not depend on the input is a constant."""
        for call in calls:
            given, made = tensors((call.args, call.kwargs)), tensors(call.result)
            if call.name in BLANK or not any(self.dynamic(x) for x in given):
                continue
            if call.mutates and (call.name not in MUTATING or not self.dynamic(given[0])):
                raise Unsupported(f"{call.name} writes into what may be needed")
            if not call.mutates and all(any(storage(x) == storage(y) for y in given) for x in made):
                continue  # a view
            if call.name not in _handlers:
                raise Unsupported(f"no instruction for {call.name}")
            _handlers[call.name](self, call.result, *call.args, **call.kwargs)


def pairs(tensor: Tensor) -> Tensor:
    """A complex tensor as a real one with an axis more, of the same storage."""
    if tensor.is_conj():
        raise Unsupported("a conjugate")
    return torch.view_as_real(tensor)


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(torch.empty(shape, device="meta").stride())


def _as_rows(tensor: Tensor, width: int) -> Tensor:
    """(rows, width), without a copy."""
    try:
        flat = tensor.view(-1, width)
    except RuntimeError as error:
        raise Unsupported(f"a product of rows that are spread, {tuple(tensor.stride())}") from error
    if flat.stride(-1) != 1 and width > 1:
        raise Unsupported("a product of rows that are spread")
    return flat
