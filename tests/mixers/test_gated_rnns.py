"""Gated linear RNNs and LFM2's gated convolution compute their papers' equations, and begin as published."""

import math
from collections.abc import Callable

import pytest
import torch
from mixers.test_initialisation import LAYERS, D, layer, normal, uniform
from torch import Tensor
from torch.nn import functional as F

from bestiary import channel_mixers, mixers
from bestiary.conformance import LAWS, check
from bestiary.mixers.base import Mixer


def awake(name: str, **options: object) -> tuple[Mixer, Tensor]:
    """A small mixer in float64 whose parameters are all random, and an input."""
    torch.manual_seed(0)
    mixer = mixers.build(name, 32, **options).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return mixer, torch.randn(2, 15, 32, dtype=torch.float64)


def recurrence(decay: Tensor, write: Tensor) -> Tensor:
    """All h_t = a_t h_{t-1} + b_t from h_0 = 0."""
    h, found = torch.zeros_like(write[:, 0]), []
    for a, b in zip(decay.unbind(1), write.unbind(1)):
        h = a * h + b
        found.append(h)
    return torch.stack(found, dim=1)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


# the equations


@pytest.mark.parametrize("depth", [0, 2])
def test_hgrn_is_its_equations(depth: int) -> None:
    mixer, x = awake("hgrn", layer_index=depth, n_layers=LAYERS)
    bound = torch.sigmoid(mixer.bound) if depth else 0.0
    f = bound + (1 - bound) * torch.sigmoid(x @ mixer.forget.weight.T)
    h = recurrence(f, (1 - f) * F.silu(x @ mixer.input.weight.T))
    normed = h / (h.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norm.weight
    close(mixer(x)[0], (normed * F.silu(x @ mixer.gate.weight.T)) @ mixer.out.weight.T)


@pytest.mark.parametrize("unscaled_start", [False, True])
def test_rg_lru_is_its_equations(unscaled_start: bool) -> None:
    mixer, x = awake("rg_lru", lru_width=48, n_heads=3, unscaled_start=unscaled_start)
    u = F.pad(mixer.input(x), (0, 0, 3, 0)).transpose(1, 2)
    u = F.conv1d(u, mixer.conv.weight[:, None], mixer.conv.bias, groups=48).transpose(1, 2)
    r, i = (
        torch.sigmoid(u @ torch.block_diag(*gate.weight) + gate.bias)
        for gate in (mixer.recurrence_gate, mixer.input_gate)
    )
    a = torch.sigmoid(-mixer.Lambda) ** (8 * r)
    scale = (1 - a**2).sqrt()
    if unscaled_start:
        scale = torch.cat([torch.ones_like(scale[:, :1]), scale[:, 1:]], dim=1)
    h = recurrence(a, scale * i * u)
    close(mixer(x)[0], mixer.out(F.gelu(mixer.gate(x), approximate="tanh") * h))


def g(v: Tensor) -> Tensor:
    return torch.where(v >= 0, v + 0.5, torch.sigmoid(v))


def same(v: Tensor) -> Tensor:
    return v


@pytest.mark.parametrize(("positive", "candidate"), [(False, same), (True, g)])
def test_min_gru_is_its_equations(positive: bool, candidate: Callable[[Tensor], Tensor]) -> None:
    mixer, x = awake("min_gru", positive=positive)
    v, z = mixer.input(x).chunk(2, dim=-1)
    z = torch.sigmoid(z)
    close(mixer(x)[0], recurrence(1 - z, z * candidate(v)) @ mixer.out.weight.T)


@pytest.mark.parametrize(("positive", "candidate"), [(False, same), (True, g)])
def test_min_lstm_is_its_equations(positive: bool, candidate: Callable[[Tensor], Tensor]) -> None:
    mixer, x = awake("min_lstm", positive=positive)
    v, f, i = mixer.input(x).chunk(3, dim=-1)
    f, i = torch.sigmoid(f), torch.sigmoid(i)
    close(mixer(x)[0], recurrence(f / (f + i), i / (f + i) * candidate(v)) @ mixer.out.weight.T)


def test_a_min_lstm_whose_gates_sum_to_one_is_a_min_gru() -> None:
    gru, x = awake("min_gru")
    lstm, _ = awake("min_lstm")
    v, z = gru.input.weight.chunk(2)
    b, c = gru.input.bias.chunk(2)
    lstm.load_state_dict(
        {
            "input.weight": torch.cat([v, -z, z]),
            "input.bias": torch.cat([b, -c, c]),
            "out.weight": gru.out.weight,
        }
    )
    close(lstm(x)[0], gru(x)[0])


@pytest.mark.parametrize(("options", "taps"), [({}, 3), ({"conv_kernel": 5, "bias": True}, 5)])
def test_gated_conv_is_its_formula(options: dict, taps: int) -> None:
    mixer, x = awake("gated_conv", **options)
    B, C, u = mixer.in_proj(x).chunk(3, dim=-1)
    padded = F.pad((B * u).transpose(1, 2), (taps - 1, 0))
    y = F.conv1d(padded, mixer.conv.weight[:, None], mixer.conv.bias, groups=32).transpose(1, 2)
    close(mixer(x)[0], mixer.out_proj(C * y))


def test_geglu_is_a_gate_by_gelu() -> None:
    mlp, x = channel_mixers.build("geglu", 32), torch.randn(2, 5, 32)
    gate, up = mlp.gate_up.weight.chunk(2)
    expected = (F.gelu(x @ gate.T, approximate="tanh") * (x @ up.T)) @ mlp.down.weight.T
    torch.testing.assert_close(mlp(x)[0], expected)


# where gates shut entirely


def test_the_rg_lrus_gradient_is_exact_where_a_is_within_rounding_of_one() -> None:
    """There h_1 is proportional to sqrt(r_1), so that its derivative by the gate's logit is h_1 / 2."""
    mixer, x = awake("rg_lru", n_heads=1)
    with torch.no_grad():
        mixer.recurrence_gate.weight.zero_()
        mixer.recurrence_gate.bias.fill_(-60.0)
    _, state = mixer(x[:, :1])
    (slope,) = torch.autograd.grad(state.h.sum(), [mixer.recurrence_gate.bias])
    torch.testing.assert_close(slope, state.h.sum(0) / 2, rtol=1e-9, atol=0)


@pytest.mark.parametrize("logit", [-1e3, 1e3])
def test_the_rg_lrus_gradients_are_finite_where_gates_saturate(logit: float) -> None:
    mixer, x = awake("rg_lru")
    with torch.no_grad():
        mixer.recurrence_gate.bias.fill_(logit)
    mixer.float()(x.float())[0].sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mixer.parameters())


def test_a_min_lstm_with_both_gates_shut_writes_half() -> None:
    mixer, x = awake("min_lstm")
    with torch.no_grad():
        mixer.input.weight[mixer.d_inner :] = 0
        mixer.input.bias[mixer.d_inner :] = -1e4  # sigmoid is 0 here: f / (f + i) as written would be 0 / 0
    v = mixer.input(x)[..., : mixer.d_inner]
    close(mixer(x)[0], recurrence(torch.full_like(v, 0.5), v / 2) @ mixer.out.weight.T)


VARIANTS: list[tuple[str, dict]] = [
    ("hgrn", {"layer_index": 2, "n_layers": LAYERS}),
    ("hgrn", {"expand": 1.5}),
    ("rg_lru", {"unscaled_start": True}),
    ("gated_conv", {"bias": True}),
]


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
def test_options_obey_the_laws(name: str, options: dict) -> None:
    verdicts = check(name, lambda: mixers.build(name, 32, **options), examples=6)
    assert len(verdicts) > 15 and [(v.law, v.message) for v in verdicts if not v.holds] == []


@pytest.mark.parametrize("name", ["min_gru", "min_lstm"])
def test_the_positive_kind_obeys_the_laws_but_has_a_kink(name: str) -> None:
    """g bends at 0, where no central difference measures a slope: that law is for smooth functions."""
    laws = [law for law in LAWS if law.name != "derivative"]
    verdicts = check(name, lambda: mixers.build(name, 32, positive=True), examples=6, laws=laws)
    assert len(verdicts) > 15 and [(v.law, v.message) for v in verdicts if not v.holds] == []


# the beginnings


def test_hgrns_bounds_rise_from_zero_with_the_depth() -> None:
    assert layer("hgrn", 0).bound is None
    for index in range(1, LAYERS):
        mixer = layer("hgrn", index)
        torch.testing.assert_close(torch.sigmoid(mixer.bound), torch.full((D,), index / LAYERS))
        assert mixer.bound._no_weight_decay
    std = 0.02 * math.sqrt(768 / D)
    assert all(normal(linear.weight, std) for linear in (mixer.input, mixer.forget, mixer.gate, mixer.out))


def test_rg_lru() -> None:
    mixer = layer("rg_lru{lru_width=4096, n_heads=64}")
    slowest = torch.sigmoid(-mixer.Lambda.double()) ** 8
    assert 0.9 <= slowest.min() < 0.901 and 0.998 < slowest.max() <= 0.999
    assert slowest.mean().item() == pytest.approx(0.9495, abs=0.002)
    assert slowest.std().item() == pytest.approx(0.099 / math.sqrt(12), rel=0.05)
    assert normal(mixer.input.weight, D**-0.5) and normal(mixer.gate.weight, D**-0.5)
    assert normal(mixer.out.weight, math.sqrt(2 / LAYERS / 4096)) and normal(mixer.conv.weight, 0.05)
    assert normal(mixer.recurrence_gate.weight, 1 / 8) and normal(mixer.input_gate.weight, 1 / 8)
    assert mixer.Lambda._no_weight_decay
    assert not any(
        part.bias.any()
        for part in (mixer.input, mixer.gate, mixer.out, mixer.conv, mixer.recurrence_gate, mixer.input_gate)
    )


@pytest.mark.parametrize(("d_model", "width", "heads"), [(32, 32, 1), (96, 128, 4), (768, 1024, 16)])
def test_rg_lru_is_about_four_thirds_as_wide_as_the_model(d_model: int, width: int, heads: int) -> None:
    mixer = mixers.build("rg_lru", d_model)
    assert (mixer.lru_width, len(mixer.input_gate.weight)) == (width, heads) and mixer.channel_mixer == "geglu"


def test_gated_conv() -> None:
    mixer, std = layer("gated_conv"), 0.02 * math.sqrt(768 / D)
    assert normal(mixer.in_proj.weight, std) and normal(mixer.out_proj.weight, std / math.sqrt(2 * LAYERS))
    assert uniform(mixer.conv.weight, 3**-0.5) and mixer.conv.bias is None
