"""Instructions for the compiled interpreter (csrc/program.h), and where their numbers lie."""

import ctypes
import enum
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from bestiary.ops.native.library import buffer, kernel
from bestiary.ops.native.matvec import PackedMatrix

AXES = 4
WORKSPACE = 0
"""The region of all that is computed on the way."""
SHARED_FROM = 4096
"""Numbers that small instructions must at least touch to be shared by the threads: a wait costs as much."""
THREADS_FROM = 200_000
"""Multiply-adds of a step below which one thread is faster."""


class Op(enum.IntEnum):
    """As in csrc/program.h."""

    UNARY = 0
    BINARY = enum.auto()
    LERP = enum.auto()
    REDUCE = enum.auto()
    LAYER_NORM = enum.auto()
    PRODUCT = enum.auto()
    BATCHED = enum.auto()
    CONVOLUTION = enum.auto()
    SCAN = enum.auto()
    LINEAR = enum.auto()
    DELTA = enum.auto()
    WKV = enum.auto()
    ATTEND = enum.auto()
    ADVANCE = enum.auto()
    ROTATE = enum.auto()
    GATHER = enum.auto()
    FENWICK = enum.auto()


UNARY = [
    *("copy", "neg", "exp", "sigmoid", "silu", "tanh", "relu", "softplus", "log_sigmoid", "gelu", "gelu_tanh", "elu"),
    *("sqrt", "rsqrt", "reciprocal", "abs", "log", "expm1", "sin", "cos", "affine", "square", "clamp"),
]
BINARY = ["add", "sub", "mul", "div", "maximum", "minimum", "turned"]
REDUCTIONS = ["sum", "mean", "amax", "length"]


@dataclass(frozen=True)
class Place:
    """Numbers of a region, or (region -1) of a constant, at an address."""

    region: int
    at: int
    strides: tuple[int, ...] = ()


NOWHERE = Place(-1, 0, (0,) * AXES)


class _Operand(ctypes.Structure):
    _fields_ = (("region", ctypes.c_int64), ("at", ctypes.c_int64), ("stride", ctypes.c_int64 * AXES))


class _Instruction(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("op", "shared", "wait")),
        ("shape", ctypes.c_int64 * AXES),
        ("number", ctypes.c_int64 * 6),
        ("real", ctypes.c_double * 2),
        ("matrix", ctypes.c_void_p),
        ("operands", ctypes.c_int64),
    )


class _Program(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "instructions", "scratch", "threads")),
        *((name, ctypes.c_void_p) for name in ("list", "operands")),
    )


@dataclass
class Instruction:
    """One instruction: its operands are what it writes, then what it reads.

    Args:
        shared: whether all threads take part.
        first: whether all threads must have finished before it: memory is used anew from here on.
        reads, writes: what it touches, by a number for each piece of memory.
    """

    op: Op
    shape: tuple[int, ...]
    operands: list[Place]
    number: tuple[int, ...] = ()
    real: tuple[float, ...] = ()
    matrix: PackedMatrix | None = None
    shared: bool = False
    first: bool = False
    reads: set[int] = field(default_factory=set)
    writes: set[int] = field(default_factory=set)


class _Order:
    """Which instructions must wait: those that touch what other threads may still be at.

    What is not shared is done by the first thread, one after the other.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.read: dict[bool, set[int]] = {False: set(), True: set()}
        self.written: dict[bool, set[int]] = {False: set(), True: set()}

    def waits(self, i: Instruction) -> bool:
        kinds = (False, True) if i.shared else (True,)
        wait = i.first or any(self.written[k] & (i.reads | i.writes) or self.read[k] & i.writes for k in kinds)
        if wait:
            self.clear()
        self.read[i.shared] |= i.reads
        self.written[i.shared] |= i.writes
        return wait


class Program:
    """Instructions made ready to run, many times.

    Args:
        rows: of every tensor.
        instructions: in order.
        workspace: numbers that it needs for itself.
        scratch: numbers that each thread needs.
        regions: how many there are, the workspace included.
        work: multiply-adds, roughly.
        alive: whatever the instructions' addresses point into.
    """

    def __init__(
        self,
        rows: int,
        instructions: list[Instruction],
        *,
        workspace: int,
        scratch: int,
        regions: int,
        work: float,
        alive: list[Any],
    ):
        self.alive, self.workspace = [alive, instructions], buffer(workspace)
        self._list = (_Instruction * len(instructions))()
        operands = [operand for i in instructions for operand in i.operands]
        self._operands = (_Operand * len(operands))(
            *(_Operand(o.region, o.at, (ctypes.c_int64 * AXES)(*o.strides)) for o in operands)
        )
        first, order = 0, _Order()
        for made, i in zip(self._list, instructions):
            made.op, made.shared, made.operands = i.op, i.shared, first
            made.shape[: len(i.shape)], made.number[: len(i.number)] = i.shape, i.number
            made.real[: len(i.real)] = i.real
            made.matrix = None if i.matrix is None else ctypes.addressof(i.matrix.fields)
            first += len(i.operands)
            made.wait = order.waits(i)
        addresses = (ctypes.addressof(self._list), ctypes.addressof(self._operands))
        threads = 1 if work < THREADS_FROM else 1 << 16
        self._program = _Program(rows, len(instructions), scratch, threads, *addresses)
        self._call, self._address = kernel("bestiary_program"), ctypes.byref(self._program)
        self.regions = (ctypes.c_void_p * regions)()
        self.regions[WORKSPACE] = self.workspace.data_ptr()

    def run(self) -> None:
        """Once through, on what `regions` point to."""
        self._call(self._address, self.regions)


def collapsed(
    shape: tuple[int, ...], strides: list[tuple[int, ...]]
) -> tuple[tuple[int, ...], list[tuple[int, ...]]] | None:
    """The same loops over few axes, the last the longest that lies in one piece; None where more than four are left."""
    axes = [i for i, n in enumerate(shape) if n != 1]
    sizes, steps = [shape[i] for i in axes], [[s[i] for i in axes] for s in strides]
    i = len(sizes) - 2
    while i >= 0:
        if all(step[i] == step[i + 1] * sizes[i + 1] for step in steps):
            sizes[i : i + 2] = [sizes[i] * sizes[i + 1]]
            for step in steps:
                step[i : i + 2] = [step[i + 1]]
        i -= 1
    if len(sizes) > AXES:
        return None
    more = AXES - len(sizes)
    return (1,) * more + tuple(sizes), [(0,) * more + tuple(step) for step in steps]


def strides_of(tensor: Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a tensor broadcast to a shape."""
    return tuple(tensor.expand(shape).stride())


__all__ = [
    "BINARY",
    "NOWHERE",
    "REDUCTIONS",
    "UNARY",
    "Instruction",
    "Op",
    "Place",
    "Program",
    "collapsed",
    "strides_of",
]
