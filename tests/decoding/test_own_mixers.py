"""Mixers that a user may write, and models first used in unusual surroundings: natively as they are, or as they are."""

import contextlib
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from decoding.kit import close, make
from ops.native.kit import needed
from torch import Tensor, nn

from bestiary import LanguageModel, mixers, ops, state
from bestiary.mixers import Mixer
from bestiary.mixers.attention import Attention

pytestmark = needed


@state.register
class OwnSum(NamedTuple):
    total: Tensor


class OfOnesOwn(Mixer):
    """A sum of what was, and whatever else a test makes of it."""

    name = "own"

    def __init__(self, d_model: int):
        super().__init__(d_model)
        self.gate = nn.Linear(d_model, d_model)
        self.begin = nn.Parameter(torch.ones(d_model))

    def reset_parameters(self) -> None:
        self.gate.reset_parameters()

    def initial_state(self, batch_size: int, *, device: Any = None, dtype: Any = None) -> OwnSum:
        return OwnSum(self.begin.detach().expand(batch_size, -1))

    def mixing_flops(self, context: int) -> float:
        return float(context)

    def mix(self, x: Tensor, state: Any, lengths: Tensor | None) -> tuple[Tensor, Any]:
        del lengths
        (total,), outputs = state, []
        for x_t in self.gate(x).unbind(1):
            outputs.append(total := self.sum(total, x_t))
        return torch.stack(outputs, 1), OwnSum(total)

    def sum(self, total: Tensor, x: Tensor) -> Tensor:
        return 0.9 * total + x


def made_of(monkeypatch: pytest.MonkeyPatch, mixer: type[Mixer]) -> LanguageModel:
    """A model of a mixer of one's own, which exists as long as the test."""
    monkeypatch.setitem(mixers.registry._classes, "own", mixer)
    return make("own*2")


def test_a_learned_beginning_is_not_written_over(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made_of(monkeypatch, OfOnesOwn)
    fast, token = model.packed("fp32"), torch.tensor([3])
    with torch.no_grad(), state.in_place():
        for _ in range(2):
            ours, theirs = fast.initial_state(1), model.initial_state(1)
            for _ in range(3):
                found, ours = fast.step(token, ours)
                expected, theirs = model.step(token, theirs)
                assert close(found, expected)
    assert fast.decoder is not None and fast.decoder.report() == [None] * 3


@pytest.mark.parametrize(
    "around",
    [
        torch.inference_mode,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: ops.use("torch"),
        lambda: ops.use("reference"),
        state.in_place,
    ],
)
def test_what_surrounds_the_first_step_does_not_last(around: Callable[[], AbstractContextManager[Any]]) -> None:
    model = make("mamba rwkv7 rwkv4 attention")
    tokens = torch.randint(50, (3, 2))
    for inside in (False, True):  # whether the model is packed there, too
        with around() if inside else contextlib.nullcontext():
            fast = model.packed("fp32")
        with around(), torch.no_grad():
            fast.step(tokens[0], fast.initial_state(2))
        assert fast.decoder is not None and fast.decoder.report(2) == [None] * 5
        with torch.no_grad():
            ours, theirs = fast.initial_state(2), model.initial_state(2)
            for token in tokens:
                found, ours = fast.step(token, ours)
                expected, theirs = model.step(token, theirs)
                assert close(found, expected)


def test_layers_that_run_as_they_are_are_told_of_once() -> None:
    fast, token = make("gla hyena").packed("fp32"), torch.tensor([3])
    with torch.no_grad():
        with pytest.warns(RuntimeWarning, match="layer 1.*docs/decoding.md"):
            fast.step(token, fast.initial_state(1))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fast.step(token, fast.initial_state(1))
            fast.step(token.expand(2), fast.initial_state(2))
            native = make("gla").packed("fp32")
            native.step(token, native.initial_state(1))


class TurningBack(Attention):
    """Its values are turned by their positions as well, and its outputs once more, after the cache moved on."""

    name = "own"

    def mix(self, x: Tensor, state: Any, lengths: Tensor | None) -> tuple[Tensor, Any]:
        widths = [self.d_inner, *[self.n_kv_heads * self.head_dim] * 2]
        q, k, v = (z.unflatten(-1, (-1, self.head_dim)) for z in self.qkv(x).split(widths, -1))
        place = ops.positions(state.position, x.shape[1])
        q, k, v = (ops.rotate(z, place, base=100.0) for z in (q, k, v))
        o, after = ops.attention(q, k, v, state=state, lengths=lengths)
        return self.out(ops.rotate(o, place, base=100.0).flatten(-2)), after


def test_positions_may_be_read_after_they_moved_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made_of(monkeypatch, TurningBack)
    fast = model.packed("fp32")
    with torch.no_grad():
        _, theirs = model(torch.tensor([[1, 2, 3, 4]]))
        ours = state.fork(theirs)
        for token in torch.randint(50, (4, 1)):
            expected, theirs = model.step(token, theirs)
            with state.in_place():
                found, ours = fast.step(token, ours)
            assert close(found, expected)


def item(total: Tensor) -> bool:
    return total.abs().max().item() > 3


def truth(total: Tensor) -> bool:
    return bool((total.abs() > 3).any())


def numbers(total: Tensor) -> bool:
    return max(map(abs, total.flatten().tolist())) > 3


def array(total: Tensor) -> bool:
    return float(numpy.abs(numpy.asarray(total)).max()) > 3


def size(total: Tensor) -> bool:
    return len(total[total.abs() > 3]) > 0


def equality(total: Tensor) -> bool:
    return not torch.equal(total, total.clamp(-3, 3))


@pytest.mark.parametrize("large", [item, truth, numbers, array, size, equality])
def test_python_that_looks_at_numbers_is_not_made_into_a_program(
    monkeypatch: pytest.MonkeyPatch, large: Callable[[Tensor], bool]
) -> None:
    class Forgetful(OfOnesOwn):
        def sum(self, total: Tensor, x: Tensor) -> Tensor:
            return (0 * total if large(total) else total) + x

    model = made_of(monkeypatch, Forgetful)
    fast, largest = model.packed("fp32"), 0.0
    with torch.no_grad():
        ours, theirs = fast.initial_state(1), model.initial_state(1)
        for token in torch.randint(50, (30, 1)):
            found, ours = fast.step(token, ours)
            expected, theirs = model.step(token, theirs)
            assert close(found, expected)
            largest = max(largest, theirs.layers[0].mixer.total.abs().max().item())
    assert largest > 3
    assert fast.decoder is not None and "looks at numbers" in str(fast.decoder.report()[0])


class Growing(OfOnesOwn):
    """Its state is all it has seen."""

    def initial_state(self, batch_size: int, *, device: Any = None, dtype: Any = None) -> OwnSum:
        return OwnSum(torch.zeros(batch_size, 0, self.d_model))

    def mix(self, x: Tensor, state: Any, lengths: Tensor | None) -> tuple[Tensor, Any]:
        seen = torch.cat([state.total, self.gate(x)], 1)
        return seen.cumsum(1)[:, state.total.shape[1] :], OwnSum(seen)


class Counting(OfOnesOwn):
    """Its state are whole numbers, which no step changes."""

    def initial_state(self, batch_size: int, *, device: Any = None, dtype: Any = None) -> OwnSum:
        return OwnSum(torch.full((batch_size,), 1 << 40))

    def mix(self, x: Tensor, state: Any, lengths: Tensor | None) -> tuple[Tensor, Any]:
        return self.gate(x), state


@pytest.mark.parametrize("mixer", [Growing, Counting])
def test_states_that_programs_do_not_know_stay_with_their_layers(
    monkeypatch: pytest.MonkeyPatch, mixer: type[Mixer]
) -> None:
    model = made_of(monkeypatch, mixer)
    fast = model.packed("fp32")
    with torch.no_grad():
        ours, theirs = fast.initial_state(2), model.initial_state(2)
        for token in torch.randint(50, (4, 2)):
            found, ours = fast.step(token, ours)
            expected, theirs = model.step(token, theirs)
            assert close(found, expected)
            assert all(map(close, state.tensors(ours), state.tensors(theirs)))
    assert fast.decoder is not None and None not in fast.decoder.report(2)[:2]
