"""Mixers side by side in a layer, and layers that share their weights, are mixers and models like any other."""

import pytest
import torch

import bestiary
from bestiary import LanguageModel, ModelConfig, mixers
from bestiary.conformance import check
from bestiary.mixers.parallel import Parallel
from bestiary.models.costs import costs, total

PAIRS = [("attention", "mamba"), ("hyena", "gla", "rwkv4"), ("lstm", "attention")]


def build(names: tuple[str, ...], join: str = "norm", d_model: int = 32) -> Parallel:
    return Parallel([mixers.build(name, d_model) for name in names], join)


@pytest.mark.parametrize("names", PAIRS, ids="+".join)
@pytest.mark.parametrize("join", ["norm", "sum"])
def test_mixers_side_by_side_obey_the_laws(names: tuple[str, ...], join: str) -> None:
    verdicts = check("+".join(names), lambda: build(names, join), examples=3)
    assert len(verdicts) > 15 and [(v.law, v.message) for v in verdicts if not v.holds] == []


def test_sum_adds_what_each_says() -> None:
    torch.manual_seed(0)
    both, x = build(("gla", "mamba"), "sum"), torch.randn(2, 9, 32)
    torch.testing.assert_close(both(x)[0], both.parts[0](x)[0] + both.parts[1](x)[0])


def test_norm_makes_both_as_loud() -> None:
    torch.manual_seed(0)
    both, x = build(("gla", "mamba")), torch.randn(2, 9, 32)
    expected, _ = both(x)
    with torch.no_grad():
        both.parts[1].out_proj.weight.mul_(1000)
    torch.testing.assert_close(both(x)[0], expected, rtol=0.05, atol=0.05)  # up to the norm's epsilon


def test_a_model_of_side_by_side_layers_trains_and_generates() -> None:
    model = LanguageModel(ModelConfig("(attention{window=8}+mamba{join=sum})*2", 32))
    assert model.mixer_names() == ["attention+mamba"] * 2
    tokens = torch.randint(256, (2, 12))
    loss, _ = model.loss(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert len(model.eval().generate([[1, 2, 3]], max_new_tokens=4)[0]) == 7


@pytest.fixture
def sharing() -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(ModelConfig("(mamba attention{share=a})*3", 32)).eval()


def test_layers_that_share_weights_are_one_module_with_a_state_each(sharing: LanguageModel) -> None:
    assert sharing.blocks[1] is sharing.blocks[3] is sharing.blocks[5] and sharing.blocks[0] is not sharing.blocks[2]
    alone = LanguageModel(ModelConfig("(mamba attention)*3", 32))
    shared = sum(parameter.numel() for parameter in sharing.blocks[1].parameters())
    assert sharing.n_parameters() == alone.n_parameters() - 2 * shared
    tokens = torch.randint(256, (1, 11))
    whole, state = sharing(tokens)
    assert not torch.equal(state.layers[1].mixer.keys, state.layers[3].mixer.keys)
    first, state = sharing(tokens[:, :4])
    second, _ = sharing(tokens[:, 4:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-4, atol=1e-5)


def test_shared_weights_are_saved_once_and_counted_once(sharing: LanguageModel, tmp_path) -> None:
    bestiary.save(sharing, None, tmp_path / "model")
    loaded, _ = bestiary.load(tmp_path / "model")
    tokens = torch.randint(256, (1, 7))
    assert torch.equal(loaded.eval()(tokens)[0], sharing(tokens)[0]) and loaded.blocks[1] is loaded.blocks[5]
    parts = costs(sharing)
    assert total(parts).parameters == sharing.n_parameters()
    assert parts[4].parameters == 0 and parts[4].flops == parts[2].flops
