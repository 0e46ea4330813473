"""The dense networks between the mixers are their formulas, with every option."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bestiary import channel_mixers

SQRT_2 = 2**0.5


def exact(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / SQRT_2)) / 2


def tanh(x: Tensor) -> Tensor:
    return x / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


GATES: list[tuple[str, dict[str, Any], Callable[[Tensor], Tensor]]] = [
    ("swiglu", {}, lambda x: x * torch.sigmoid(x)),
    ("geglu", {}, tanh),
    ("geglu", {"exact": True}, exact),
    ("bilinear", {}, lambda x: x),
]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("name", "options", "activation"), GATES)
def test_a_gated_network_is_its_formula(name: str, options: dict, activation: Callable, bias: bool) -> None:
    mlp = channel_mixers.build(name, 32, d_hidden=48, bias=bias, **options).double()
    x, biases = torch.randn(2, 5, 32).double(), [torch.zeros(48).double()] * 2 + [torch.zeros(32).double()]
    assert (mlp.gate_up.bias is not None) == (mlp.down.bias is not None) == bias
    if bias:
        assert not mlp.gate_up.bias.any() and not mlp.down.bias.any()
        torch.nn.init.normal_(mlp.gate_up.bias), torch.nn.init.normal_(mlp.down.bias)
        biases = [*mlp.gate_up.bias.chunk(2), mlp.down.bias]
    gate, up = (x @ weight.T + b for weight, b in zip(mlp.gate_up.weight.chunk(2), biases))
    expected = (activation(gate) * up) @ mlp.down.weight.T + biases[2]
    torch.testing.assert_close(mlp(x)[0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("precise", [True, False])
def test_gelu_mlp_has_either_gelu(precise: bool) -> None:
    mlp, x = channel_mixers.build("gelu_mlp", 32, exact=precise).double(), 3 * torch.randn(2, 5, 32).double()
    hidden = F.linear(x, mlp.up.weight, mlp.up.bias)
    expected = F.linear((exact if precise else tanh)(hidden), mlp.down.weight, mlp.down.bias)
    torch.testing.assert_close(mlp(x)[0], expected, rtol=0, atol=1e-12)
    assert (exact(hidden) - tanh(hidden)).abs().max() > 1e-5
