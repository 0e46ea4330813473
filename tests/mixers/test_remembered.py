"""What is remembered of parameters is never used after they have changed, however they changed."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from bestiary import mixers
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


def _behind_its_back(linear: nn.Linear) -> None:
    """Torch counts no change through .data: this is how moving averages of weights are put in place."""
    linear.weight.data.mul_(1.5)


@pytest.mark.parametrize(
    "change", [_behind_its_back, _written, _rounded_and_widened, _replaced_twice, _pointed_elsewhere_and_back]
)
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


def test_changing_the_mode_drops_what_a_sample_of_the_numbers_would_not_notice() -> None:
    class Owner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.remembered = nn.Parameter(torch.ones(1000)), Remembered()

        def forward(self) -> float:
            return self.remembered.get([self.weight], lambda: float(self.weight.sum()))

    owner = Owner().eval()
    with torch.no_grad():
        assert owner() == 1000
        owner.weight.data[100:200] = 0
        assert owner.eval()() == 900
        owner.weight.data[100:200] = 2
        assert owner.train()() == 1100
    assert not owner.remembered.state_dict() and "remembered" not in "".join(owner.state_dict())


@pytest.mark.parametrize("name", ["hyena", "s4", "s4d", "h3", "hyena_li", "m2_gpt", "striped_hyena"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_filters_follow_weights_that_were_changed_behind_their_back(name: str, context: Callable) -> None:
    mixer, fresh, x = mixers.build(name, 32).eval(), mixers.build(name, 32).eval(), torch.randn(1, 60, 32)
    with context():
        mixer(x)
    for parameter in mixer.parameters():
        parameter.data.mul_(1.3)
    fresh.load_state_dict(mixer.state_dict())
    with context():
        assert torch.equal(mixer(x)[0], fresh(x)[0])
