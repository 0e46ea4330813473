"""What is remembered of parameters is never used after they have changed, however they changed."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from bestiary.mixers.parts import Remembered


def _written(linear: nn.Linear) -> None:
    linear.weight.mul_(1.5)


def _rounded_and_widened(linear: nn.Linear) -> None:
    linear.bfloat16().float()


def _replaced_twice(linear: nn.Linear) -> None:
    for _ in range(2):
        linear.load_state_dict({"weight": torch.randn_like(linear.weight)}, assign=True)


def _pointed_elsewhere_and_back(linear: nn.Linear) -> None:
    for _ in range(2):
        linear.weight.data = linear.weight.data + 0.1


@pytest.mark.parametrize("change", [_written, _rounded_and_widened, _replaced_twice, _pointed_elsewhere_and_back])
def test_nothing_is_used_after_a_change(change: Callable[[nn.Linear], None]) -> None:
    """New numbers often stand at the address of old ones that were freed: an address alone would say nothing."""
    linear, remembered = nn.Linear(300, 300, bias=False), Remembered()

    def total() -> float:
        return float(linear.weight.double().sum())

    with torch.no_grad():
        for _ in range(20):
            assert remembered.get([linear.weight], total) == total()
            change(linear)
            assert remembered.get([linear.weight], total) == total()
            linear.weight.add_(0.1234567)


def test_it_is_computed_once_and_with_gradients_every_time() -> None:
    weight, remembered, calls = nn.Parameter(torch.ones(3)), Remembered(), []
    for _ in range(3):
        remembered.get([weight], lambda: calls.append(1))
    assert len(calls) == 3 and remembered.value is None and not remembered.held
    with torch.no_grad():
        for also in (1, 1, 2, 2):
            remembered.get([weight], lambda: calls.append(1), also)
    assert len(calls) == 5
