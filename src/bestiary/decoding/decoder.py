"""One native call a token: a model's step, traced once and made into a program for the compiled interpreter.

The step that is traced is the model's own, so there is no second definition of any mixer. Layers that cannot be traced
or lowered run as they are between the programs. Before a program is used, it has computed what its layers compute on a
random step.
"""

import contextlib
import threading
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bestiary import state as states
from bestiary.decoding.lowering import Matrices, OtherNumbers, Unsupported
from bestiary.decoding.piece import Layer, Piece, memory_of
from bestiary.errors import UsageError
from bestiary.mixers import Context
from bestiary.ops import dispatch
from bestiary.ops.native.matvec import FEW_ROWS

if TYPE_CHECKING:
    from bestiary.models.language_model import LanguageModel

SAMPLES = (3, 7)
"""Steps before those that a program is tried on, so that their states are such as occur; the first is traced."""


class Decoder:
    """Takes steps of a model that packs its weights, by programs made for each number of rows.

    Args:
        model: in fp32 on the CPU, not to be changed afterwards.
    """

    def __init__(self, model: "LanguageModel"):
        self.model, self.plans = model, dict[int, _Plan]()
        self.matrices = Matrices((*model.parameters(), *model.buffers()))
        self.latest: _Plan | None = None
        self.told = False  # whether a warning was given
        self.lock = threading.Lock()  # programs have a workspace of their own

    def step(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any] | None:
        """What `model.step` returns; None where the model is to do it itself: many rows, another dtype, gradients.

        There is no gradient with respect to a packed model's parameters, nor is there one through its programs.
        """
        rows = len(tokens)
        if not 1 <= rows <= FEW_ROWS:
            return None
        if len(state.layers) != len(self.model.blocks):
            raise UsageError(f"the state has {len(state.layers)} layers, the model {len(self.model.blocks)}")
        write = states.may_write()
        with self.lock, torch.no_grad():
            try:
                plan = self.plans.get(rows)
                if plan is None:
                    plan = self._plan(rows)
                    self._tell(plan.why_not)
                if plan is not self.latest:
                    self.forget()
                    self.latest = plan
                return plan.step(tokens, state, write)
            except OtherNumbers:
                return None

    def forget(self) -> None:
        """Let go of the last step's state, which it keeps to know it again: for the end of a session."""
        if self.latest is not None:
            self.latest.last = None

    def report(self, rows: int = 1) -> list[str | None]:
        """For each layer, and the head, why it runs as it is; None where it is part of a program."""
        with self.lock, torch.no_grad():
            return self._plan(rows).why_not

    def _plan(self, rows: int) -> "_Plan":
        if rows not in self.plans:  # it outlasts what surrounds its first step
            plain = (torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False))
            with contextlib.ExitStack() as surroundings:
                for context in (*plain, states.in_place(False), dispatch.use(None)):
                    surroundings.enter_context(context)
                self.plans[rows] = _Plan(self.model, rows, self.matrices)
        return self.plans[rows]

    def _tell(self, why_not: list[str | None]) -> None:
        """Say once that layers run as they are."""
        found = [f"layer {i} ({why})" for i, why in enumerate(why_not) if why is not None]
        if found and not self.told:
            self.told = True
            warnings.warn(
                f"{len(found)} of {len(why_not)} parts of this model take their steps outside of its compiled program, "
                f"and slower: {'; '.join(found)}; see docs/decoding.md",
                RuntimeWarning,
                stacklevel=4,
            )


class _Plan:
    """A model's step for a number of rows: programs, and layers that run as they are."""

    def __init__(self, model: "LanguageModel", rows: int, matrices: Matrices):
        self.model, self.why_not = model, list[str | None]()
        self.stretches: list[Piece | Layer] = []
        generator, given = torch.Generator().manual_seed(rows), list[tuple[Tensor, Any, Context]]()
        for steps in SAMPLES:
            tokens = torch.randint(model.config.vocab_size, (rows, steps + 1), generator=generator)
            before = model.hidden(tokens[:, :steps])[1].layers
            x = model.embed(tokens[:, -1])
            given.append((x, (*before, states.Empty()), Context(embeddings=x[:, None])))
        blocks: Any = model.blocks
        layers = [Layer(block.step, i) for i, block in enumerate(blocks)]
        layers.append(Layer(lambda x, state, context: (model.head(model.norm(x)), state), len(layers)))
        xs, piece = [embedded for embedded, *_ in given], Piece(rows, matrices)
        for i, layer in enumerate(layers):
            xs = [layer.try_on(x, embedded, before[i], context) for x, (embedded, before, context) in zip(xs, given)]
            try:
                piece.add(layer)
                self.why_not.append(None)
            except Unsupported as error:
                self.why_not.append(str(error))
                self._close(piece)
                self.stretches.append(layer)
                piece = Piece(rows, matrices)
        self._close(piece)
        for layer in layers:
            layer.samples.clear()
        (only, *others) = self.stretches
        self.whole = None if others or isinstance(only, Layer) or only.grows else only
        self.weights = {memory_of(x) for x in (*model.parameters(), *model.buffers())}  # a state may begin as one
        self.last: Any = None  # the state that the last step left, if the whole model is one program

    def _close(self, piece: Piece) -> None:
        if not piece.layers:
            return
        try:
            piece.close()
            self.stretches.append(piece)
        except Unsupported as error:
            self.stretches.extend(piece.layers)
            for layer in piece.layers:
                self.why_not[layer.index] = str(error)

    def step(self, tokens: Tensor, state: Any, write: bool) -> tuple[Tensor, Any]:
        x = embedded = self.model.embed(tokens)
        if self.whole is not None and state is self.last and write:
            return self.whole.again(x), state
        context, before = Context(embeddings=embedded[:, None]), (*state.layers, states.Empty())
        parts = [before[part.first : part.first + len(part.layers)] for part in self.stretches]
        taken = self.weights.copy()
        for part, layers in zip(self.stretches, parts):
            if isinstance(part, Layer):
                taken |= {memory_of(x) for x in states.tensors(layers)}
        given = [part.ready(layers, taken, write) for part, layers in zip(self.stretches, parts)]
        self.last = None  # all is well: only now does anything change
        for part, ready in zip(self.stretches, given):
            x = part.run(x, ready, context)
        state = type(state)(tuple(layer for ready in given for layer in ready.after)[:-1])
        self.last = None if self.whole is None else state
        return x, state
