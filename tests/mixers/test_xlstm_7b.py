"""The mLSTM layer of xLSTM 7B: as published at first, the paper's equations, and lawful with each option."""

import math
from typing import Any

import pytest
import torch
from mixers.test_initialisation import LAYERS, D, layer, normal
from torch import Tensor

from bestiary import UsageError, mixers
from bestiary.conformance import check
from bestiary.mixers.base import Mixer

OPTIONS: list[dict[str, Any]] = [{}, {"n_heads": 2, "expand_k": 1.0, "expand_v": 2.0}, {"gate_cap": None}]


def awake(gate_bias: float = 0.0, **options: Any) -> tuple[Mixer, Tensor]:
    """A small layer in float64 whose parameters are all random, and an input; gate_bias: what their input gates add."""
    torch.manual_seed(4)
    mixer = mixers.build("xlstm_7b", 32, **options).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.copy_(torch.randn_like(parameter) * (parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.5))
        mixer.gates.bias[: mixer.n_heads] += gate_bias
    return mixer, torch.randn(2, 40, 32, dtype=torch.float64)


def paper(mixer: Mixer, x: Tensor, *, cap: float | None, eps: float = 0.0) -> Tensor:
    """The layer as its equations stand: no stabiliser, a loop, a head at a time; eps is added to the divisor."""
    heads, (d_key, _, d_value, _) = mixer.n_heads, mixer.widths
    key_dim = d_key // heads
    q, k, v, o = (x @ w.T for w in mixer.qkvo.weight.split([d_key, d_key, d_value, d_value]))
    i, f = (x @ mixer.gates.weight.T + mixer.gates.bias).split(heads, dim=-1)
    if cap is not None:
        i, f = cap * torch.tanh(i / cap), cap * torch.tanh(f / cap)
    read = []
    for n in range(heads):
        C = torch.zeros(x.shape[0], d_value // heads, key_dim, dtype=x.dtype)
        norm, h = torch.zeros(x.shape[0], key_dim, dtype=x.dtype), []
        largest = torch.zeros(x.shape[0], 1, dtype=x.dtype)  # the unit in which the published code counts eps
        for t in range(x.shape[1]):
            keep, write = torch.sigmoid(f[:, t, n, None]), i[:, t, n, None].exp()
            key, value = (part[:, t].unflatten(-1, (heads, -1))[:, n] for part in (k, v))
            query = q[:, t].unflatten(-1, (heads, -1))[:, n] / math.sqrt(key_dim)
            C = keep[..., None] * C + write[..., None] * value[..., None] * key[:, None]
            norm = keep * norm + write * key
            largest = torch.maximum(largest + keep.log(), write.log())
            divisor = (norm * query).sum(-1, keepdim=True).abs().clamp(min=1) + eps * largest.exp()
            h.append((C @ query[..., None])[..., 0] / divisor)
        y = torch.stack(h, dim=1)
        read.append((y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt())
    return (torch.cat(read, dim=-1) * mixer.norm.weight * torch.sigmoid(o)) @ mixer.out.weight.T


@pytest.mark.parametrize("gate_bias", [-10.0, 0.0, 20.0])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_is_the_papers_equations(options: dict[str, Any], gate_bias: float) -> None:
    mixer, x = awake(gate_bias, **options)
    expected = paper(mixer, x, cap=options.get("gate_cap", 15.0))
    torch.testing.assert_close(mixer(x)[0], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("gate_bias", [-10.0, 0.0, 20.0])
def test_the_published_epsilon_in_the_divisor_is_lost_in_the_norm(gate_bias: float) -> None:
    mixer, x = awake(gate_bias)
    torch.testing.assert_close(mixer(x)[0], paper(mixer, x, cap=15.0, eps=1e-6), rtol=0, atol=3e-6)


def test_capped_gates_write_at_most_e_to_the_15() -> None:
    mixer, x = awake(1e6)
    assert mixer(x)[1].max.max() == 15
    assert awake(1e6, gate_cap=None)[0](x)[1].max.max() > 1e5


def test_it_begins_as_published() -> None:
    mixer = layer("xlstm_7b")
    *written, gate = mixer.qkvo.weight.split([D // 2, D // 2, D, D])
    assert all(normal(weight, math.sqrt(2 / (5 * D))) for weight in written)
    assert normal(mixer.out.weight, 2 / LAYERS / math.sqrt(D))
    assert not gate.any() and not mixer.gates.weight.any()  # gates begin the same at every step
    assert torch.equal(mixer.gates.bias, torch.cat([torch.full((4,), -10.0), torch.linspace(3, 6, 4)]))
    assert torch.equal(mixer.norm.weight, torch.ones(D)) and mixer.norm.bias is None
    assert mixer.channel_mixer == "swiglu"


def test_its_state_is_half_as_large_as_values_by_values() -> None:
    state = mixers.build("xlstm_7b", 64).initial_state(3)
    assert state.memory.shape == (3, 4, 8, 17) and state.max.shape == (3, 4)


@pytest.mark.parametrize("options", OPTIONS[1:], ids=str)
def test_options_obey_the_laws(options: dict[str, Any]) -> None:
    verdicts = check("xlstm_7b", lambda: mixers.build("xlstm_7b", 32, **options), examples=6)
    assert len(verdicts) > 15 and [(v.law, v.message) for v in verdicts if not v.holds] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [({"n_heads": 3}, "n_heads=3"), ({"expand_k": 0.0}, "key_width"), ({"gate_cap": 0.0}, "gate_cap must be positive")],
)
def test_bad_options_are_one_clear_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        mixers.build("xlstm_7b", 32, **options)
