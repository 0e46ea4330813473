"""Some layers as one program, and how a model's state is handed to it and comes back."""

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bestiary import state as states
from bestiary.decoding.lowering import Leaf, Lowering, Matrices, Memory, OtherNumbers, Unsupported
from bestiary.decoding.program import UNARY, WORKSPACE, Instruction, Op, Place, Program
from bestiary.decoding.trace import Reads, Trace, storage
from bestiary.errors import UsageError
from bestiary.mixers import Context
from bestiary.ops.native import traced
from bestiary.ops.native.library import buffer

TOLERANCE = 1e-4
"""Largest difference between layers and their program, as a share of the largest number."""
ROUNDED = 2**-6
"""The same where products round their inputs to bf16: what differed in its last place may differ by 2^-8 after each."""


class Ready:
    """States that a program may read: where each leaf's numbers are and where the new ones go, and the new states."""

    def __init__(self, write: bool):
        self.write = write  # whether the old numbers may be written over
        self.leaves, self.after = list[tuple[Leaf, Tensor, Tensor]](), list[Any]()


class Sample(NamedTuple):
    """A step that occurs: what a layer reads (RWKV-7's first values only where there are any), and what it makes."""

    x: Tensor
    embedded: Tensor
    values: Tensor | None
    before: Any
    y: Tensor
    after: Any


class Layer:
    """A part of a model that takes steps: its step, and its place among the others."""

    def __init__(self, step: Callable[[Tensor, Any, Context], tuple[Tensor, Any]], index: int):
        self.step, self.index, self.samples = step, index, list[Sample]()
        self.leaves: list[Leaf] = []
        self.first, self.layers = index, [self]

    def try_on(self, x: Tensor, embedded: Tensor, state: Any, context: Context) -> Tensor:
        """The result of a step that becomes a sample."""
        values = context.v_first
        y, after = self.step(x, states.fork(state), context)
        self.samples.append(Sample(x, embedded, values, state, y, after))
        return y

    def ready(self, before: Sequence[Any], taken: set[int], write: bool) -> Ready:
        """As for a piece: nothing needs to be looked at."""
        del taken
        ready = Ready(write)
        ready.after += before
        return ready

    def run(self, x: Tensor, ready: Ready, context: Context) -> Tensor:
        """One step as it is; the new state is in `ready.after`."""
        with states.in_place(ready.write):
            y, ready.after[0] = self.step(x, ready.after[0], context)
        return y

    def call(self, x: Tensor, embedded: Tensor, values: Tensor | None, leaves: Sequence[Tensor]) -> Any:
        """The step as a function of tensors alone: (result, first values, new leaves)."""
        context = Context(embeddings=embedded[:, None], v_first=values)
        y, after = self.step(x, rebuilt(self.samples[0].before, iter(leaves)), context)
        return y, context.v_first, states.tensors(after)


class Piece:
    """A program over layers in a row: `add` them, `close` it, and `run` it on their states."""

    def __init__(self, rows: int, matrices: Matrices):
        self.rows, self.memory, self.instructions = rows, Memory(matrices), list[Instruction]()
        self.layers, self.streams = list[Layer](), list[int]()
        self.input, self.embedded, self.output, self.values = (self.memory.region() for _ in range(4))
        self.said: tuple[int, tuple[int, ...]] | None = None  # where a layer put RWKV-7's first values, and their shape
        self.hears = False
        self.program: Program | None = None
        self.moved = False  # whether the last step left its new state beside the old one

    @property
    def first(self) -> int:
        """Of the model's layers."""
        return self.layers[0].index

    def add(self, layer: Layer) -> None:
        """Lower a layer, which has samples, behind what is there; Unsupported leaves everything as it was."""
        kept = (self.memory.regions, self.memory.used)
        try:
            self._add(layer)
        except Unsupported:
            self.memory.regions, self.memory.used = kept
            raise
        except Exception as error:  # whatever a user's own mixer may do: it then runs as it is
            self.memory.regions, self.memory.used = kept
            raise Unsupported(f"{type(error).__name__}: {str(error).splitlines()[0]}") from error

    def _add(self, layer: Layer) -> None:
        x, embedded, before, remembered, *_ = layer.samples[0]
        told = [] if before is None else [before]
        old = [leaf.clone(memory_format=torch.contiguous_format) for leaf in states.tensors(remembered)]
        inputs = [x.clone(), embedded.clone(), *(t.clone() for t in told), *old]

        trace = Trace()
        with traced.tracing(), trace, Reads(trace):
            y, values, new = layer.call(inputs[0], inputs[1], inputs[2] if told else None, old)
        if (reader := trace.told(inputs)) is not None:
            raise Unsupported(f"Python looks at numbers that depend on the input, by {reader}")
        said = () if values is None or told else (values,)
        calls = trace.needed((y, *said, *new))
        low, leaves = Lowering(self.memory), [Leaf(leaf, self.memory) for leaf in old]
        if not self.streams:
            self.streams = [self.memory.room(x.numel()) for _ in range(2)]
        given, result = self.streams if len(self.layers) % 2 else self.streams[::-1]
        to = (self.output, 0) if y.shape != x.shape else (WORKSPACE, result)  # the head's result is the last one
        heard = (self.memory.room(values.numel()), tuple(values.shape)) if said else None
        persistent = self.memory.used
        low.put(inputs[0], *((WORKSPACE, given) if self.layers else (self.input, 0)))
        low.put(inputs[1], self.embedded, 0)
        for tensor in inputs[2 : 2 + len(told)]:
            low.put(tensor, *((self.values, 0) if self.said is None else (WORKSPACE, self.said[0])))
        for tensor, made, leaf in zip(old, new, leaves):
            low.put(tensor, leaf.old, 0, leaf.old)
            low.leaves[storage(tensor)], low.targets[storage(made)] = leaf, leaf
        low.destine(y, *to)
        low.lower(calls)
        low.arrive(y, *to, -1)
        if heard is not None:
            low.arrive(values, WORKSPACE, heard[0], -2)
        moved = set[int]()
        for made, leaf in zip(new, leaves):
            if leaf.counter is None and made.shape != leaf.shape:
                raise Unsupported("a state that grows")
            if leaf.kind != "positions" and leaf.dtype != torch.float32:
                raise Unsupported(f"a state in {leaf.dtype}")
            if not leaf.written:
                if storage(made) in moved:
                    raise Unsupported("state that moves from one tensor to another")
                low.arrive(made, leaf.new, 0, leaf.old)
                moved |= {key for key, other in low.leaves.items() if other is leaf} - {storage(made)}
        low.instructions[0].first = True
        # all is well: only now does anything change
        self.memory.used = persistent
        self.memory.alive.append(low.alive)
        self.hears, self.said = self.hears or (bool(told) and self.said is None), heard or self.said
        self.result = (y, to)
        layer.leaves = leaves
        self.instructions += low.instructions
        self.layers.append(layer)

    def close(self) -> None:
        """Make the program, and see that it computes what the layers compute on the samples."""
        y, (region, at) = self.result
        del self.result
        if region == WORKSPACE:
            places = [Place(self.output, 0, (0, 0, 0, 1)), Place(WORKSPACE, at, (0, 0, 0, 1))]
            number = (UNARY.index("copy"),)
            self.instructions.append(Instruction(Op.UNARY, (1, 1, 1, y.numel()), places, number=number, first=True))
        self.shape, memory = tuple(y.shape), self.memory
        self.program = Program(
            self.rows,
            self.instructions,
            workspace=memory.most,
            scratch=memory.scratch,
            regions=memory.regions,
            work=memory.work,
            alive=memory.alive,
        )
        for i in range(len(self.layers[0].samples)):
            for write in (False, True):
                try:
                    self._try([layer.samples[i] for layer in self.layers], write)
                except (UsageError, OtherNumbers) as error:
                    raise Unsupported(f"states that differ by more than their numbers: {error}") from error

    def _try(self, samples: list[Sample], write: bool) -> None:
        """Take the samples' step; Unsupported where it is not the layers'."""
        first, y = samples[0], samples[-1].y
        context = Context(embeddings=first.embedded[:, None], v_first=first.values)
        ready = self.ready([states.fork(sample.before) for sample in samples], set(), write)
        found = self.run(first.x, ready, context)
        rounds = any(i.matrix is not None and i.matrix.rounds(self.rows) for i in self.instructions)
        tolerance = ROUNDED if rounds else TOLERANCE
        for name, ours, theirs in (("result", found, y), *(
            (f"state of layer {layer.index}", a[:, : b.shape[1]] if leaf.counter is not None else a, b)
            for layer, sample, new in zip(self.layers, samples, ready.after)
            for leaf, a, b in zip(layer.leaves, states.tensors(new), states.tensors(sample.after))
        )):  # fmt: skip
            size = theirs.abs().max().item() if theirs.numel() else 0.0
            same = ours.shape == theirs.shape and (ours - theirs).abs().le(tolerance * size + 1e-30).all().item()
            if not same:
                raise Unsupported(f"its program computes another {name}{', if it writes in place' if write else ''}")

    def ready(self, before: Sequence[Any], taken: set[int], write: bool) -> Ready:
        """Each layer's state made ready for `run`. One that is refused is left as it was, and so is the program.

        Args:
            taken: memory that holds something else as well, and so is not written over; what is ready joins it.
            write: whether other memory may be.
        """
        found = Ready(write)
        for layer, state in zip(self.layers, before):
            given, made = states.tensors(state), list[Tensor]()
            tensors = given.copy()
            if len(tensors) != len(layer.leaves):
                raise UsageError(f"layer {layer.index}: its state has {len(layer.leaves)} tensors, not {len(tensors)}")
            if not tensors:
                found.after.append(state)
                continue
            places = dict(zip(map(id, layer.leaves), tensors))
            for leaf, tensor in zip(layer.leaves, tensors):
                leaf.check(tensor, layer.index)
            if write:
                for i, tensor in enumerate(tensors):
                    memory = memory_of(tensor)
                    if memory in taken and tensor.numel():
                        tensors[i] = tensor.clone()
                    taken.add(memory)
            for leaf, tensor in zip(layer.leaves, tensors):
                old, new, result = leaf.ready(tensor, layer.index, write, places)
                found.leaves.append((leaf, old, new))
                made.append(result)
            found.after.append(state if all(map(operator.is_, made, given)) else rebuilt(state, iter(made)))
        return found

    def run(self, x: Tensor, ready: Ready, context: Context) -> Tensor:
        """One step; the new states are `ready.after`."""
        assert self.program is not None
        regions, alive = self.program.regions, list[Tensor]()
        y, x = buffer(*self.shape), x.contiguous()
        regions[self.input], regions[self.output] = x.data_ptr(), y.data_ptr()
        if context.embeddings is not None:
            alive.append(context.embeddings.contiguous())
            regions[self.embedded] = alive[-1].data_ptr()
        if self.hears and context.v_first is not None:
            alive.append(context.v_first.contiguous())
            regions[self.values] = alive[-1].data_ptr()
        for leaf, old, new in ready.leaves:
            regions[leaf.old], regions[leaf.new] = old.data_ptr(), new.data_ptr()
            if leaf.slots >= 0:
                regions[leaf.slots] = new.shape[1]
        self.program.run()
        self.moved = not ready.write
        if self.said is not None:
            at, shape = self.said
            context.v_first = self.program.workspace[at : at + math.prod(shape)].reshape(shape).clone()
        return y

    def again(self, x: Tensor) -> Tensor:
        """One step more from the state that `run` left, which is written over; x is the embedding as well."""
        assert self.program is not None
        regions, y, x = self.program.regions, buffer(*self.shape), x.contiguous()
        if self.moved:  # what was new is old now, and new again
            for layer in self.layers:
                for leaf in layer.leaves:
                    regions[leaf.old] = regions[leaf.new]
            self.moved = False
        regions[self.input], regions[self.output], regions[self.embedded] = x.data_ptr(), y.data_ptr(), x.data_ptr()
        self.program.run()
        return y

    @property
    def grows(self) -> bool:
        """Whether some state has caches, which need room."""
        return any(leaf.counter is not None for layer in self.layers for leaf in layer.leaves)


def rebuilt(state: Any, leaves: Iterator[Tensor]) -> Any:
    """A state of the same structure with other tensors."""
    return states.map_tensors(lambda _: next(leaves), state)


def memory_of(tensor: Tensor) -> int:
    """Where the memory begins that it is a part of."""
    return tensor.untyped_storage().data_ptr()
