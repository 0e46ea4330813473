"""Costs by formula against what is there: parameters, state tensors, and the counter's matrix products."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import bestiary
from bestiary import LanguageModel, ModelConfig
from bestiary import state as states
from bestiary.models.costs import costs, total

NAMES = [name for name in bestiary.mixers.names() if bestiary.mixers.get(name).causal]


@pytest.mark.parametrize("name", NAMES)
def test_costs_are_what_the_model_holds(name: str) -> None:
    model = LanguageModel(ModelConfig(f"{name}*2", d_model=64, vocab_size=100))
    whole = total(costs(model, (16, 48)))
    assert whole.parameters == model.n_parameters()
    for context in (16, 48):
        _, state = model(torch.randint(100, (1, context)))
        assert whole.state_bytes[context] == states.nbytes(state)
        assert whole.flops[context] > 2 * 64 * 100


@pytest.mark.parametrize("name", NAMES)
def test_the_projections_flops_are_those_that_the_counter_sees(name: str) -> None:
    mixer = bestiary.mixers.build(name, 64)
    linears = [
        module for module in mixer.modules() if isinstance(module, nn.Linear) and not hasattr(module, "is_filter")
    ]
    counted = 0
    with torch.no_grad():
        for linear in linears:
            with FlopCounterMode(display=False) as counter:
                linear(torch.randn(1, 32, linear.in_features))
            counted += counter.get_total_flops() / 32
    assert mixer.flops_per_token(256) - mixer.mixing_flops(256) == counted


def test_attention_costs_grow_with_the_context_and_a_recurrence_costs_the_same() -> None:
    attention, gla = (total(costs(LanguageModel(ModelConfig(f"{name}*1", 64)))) for name in ("attention", "gla"))
    assert attention.flops[32768] > 2 * attention.flops[256]
    position = 8  # bytes; the keys and values are the rest
    assert attention.state_bytes[32768] - position == 128 * (attention.state_bytes[256] - position)
    assert gla.flops[32768] == gla.flops[256] and gla.state_bytes[32768] == gla.state_bytes[256]
