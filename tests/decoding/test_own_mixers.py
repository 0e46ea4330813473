"""Mixers that a user may write: what the native step makes of them is what they are, or they run as they are."""

from typing import Any, NamedTuple

import pytest
import torch
from decoding.kit import close, make
from ops.native.kit import needed
from torch import Tensor, nn

from bestiary import LanguageModel, mixers, state
from bestiary.mixers import Mixer

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
