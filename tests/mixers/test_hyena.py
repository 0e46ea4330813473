"""Hyena: it is its formula, with trivial filters a gate, and it decodes exactly beyond the reach of its filter."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bestiary import mixers, state
from bestiary.conformance.run import check
from bestiary.mixers.hyena import Hyena

D = 32
OPTIONS: list[dict[str, Any]] = [
    {},
    {"shift": 0.0, "filter_bands": 2, "frequency": 10.0},
    {"modulation": False, "trained_features": True},
    {"trained_features": True},
]


def hyena(l_max: int = 64, **options: Any) -> Hyena:
    return mixers.build("hyena", D, l_max=l_max, **options).double()


def restless(mixer: Hyena) -> Hyena:
    """With parameters larger than drawn, so that every term counts."""
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return mixer


def by_definition(mixer: Hyena, u: Tensor, *, shift: float = 0.05, modulation: bool = True, **_: Any) -> Tensor:
    """The layer on one sequence (time, d_model): complex features, a network, a dense Toeplitz matrix a channel."""
    time, l_max, filter = len(u), mixer.l_max, mixer.filter
    lag = torch.arange(l_max, dtype=torch.float64)[:, None]
    wave = torch.exp(
        -2j * math.pi * lag / l_max * torch.linspace(1e-4, filter.bands - 1, filter.bands, dtype=torch.float64)
    )
    t = lag / (l_max - 1)
    h = torch.cat([t, wave.real, wave.imag], 1) if filter.features.weight is None else filter.features.weight
    for layer in filter.layers:
        h = torch.sin(filter.frequency * (h @ layer.weight.T + layer.bias))
    h = h @ filter.last.weight.T
    if modulation:
        slow, fast = math.log(0.01) / 1.5, math.log(0.01) / 0.3
        h = h * (torch.exp(-t * torch.linspace(slow, fast, D, dtype=torch.float64).abs()) + shift)
    h = F.pad(h, (0, 0, 0, time))
    distance = torch.arange(time)[:, None] - torch.arange(time)
    toeplitz = torch.where((distance >= 0)[..., None], h[distance.clamp(min=0)], 0)  # (time, time, d_model)

    z = mixer.in_proj(u).T[None]
    z = F.conv1d(z, mixer.conv.weight[:, None], mixer.conv.bias, padding=2, groups=3 * D)[0, :, :time].T
    x0, x1, v = z.chunk(3, dim=1)
    v = x1 * v
    return mixer.out_proj(x0 * (torch.einsum("tsc,sc->tc", toeplitz, v) + mixer.beta * v))


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ",".join(options))
@pytest.mark.parametrize("time", [1, 20, 50, 75])
def test_hyena_is_its_formula_also_beyond_its_filter(time: int, options: dict[str, Any]) -> None:
    mixer, x = restless(hyena(50, **options)), torch.randn(2, time, D, dtype=torch.float64)
    with torch.no_grad():
        wanted = torch.stack([by_definition(mixer, row, **options) for row in x])
        torch.testing.assert_close(mixer(x)[0], wanted, rtol=0, atol=1e-11 * wanted.abs().max().item())


def test_trained_features_begin_as_the_computed_ones_and_learn() -> None:
    plain, trained = hyena(), hyena(trained_features=True)
    missing, unexpected = trained.load_state_dict(plain.state_dict(), strict=False)
    assert missing == ["filter.features.weight"] and not unexpected
    assert trained.filter.features.weight.shape == (64, 33)
    x = torch.randn(2, 70, D, dtype=torch.float64)
    torch.testing.assert_close(trained(x)[0], plain(x)[0], rtol=0, atol=1e-7)  # stored in fp32 when built
    trained.reset_parameters()
    wanted = plain.filter.features(64, dtype=torch.float64, device="cpu")
    torch.testing.assert_close(trained.filter.features.weight, wanted, rtol=0, atol=1e-15)
    trained(x)[0].square().sum().backward()
    assert trained.filter.features.weight.grad.abs().amax(1).count_nonzero() == 64  # every lag's


def test_trained_features_stay_in_fp32_in_half_precision() -> None:
    mixer = mixers.build("hyena", D, l_max=64, trained_features=True)
    before = mixer.filter.features.weight.clone()
    mixer = mixer.to(torch.bfloat16)
    assert mixer.in_proj.weight.dtype == torch.bfloat16 and torch.equal(mixer.filter.features.weight, before)
    assert mixer(torch.randn(1, 9, D, dtype=torch.bfloat16))[0].dtype == torch.bfloat16


def test_nothing_of_the_filter_decays() -> None:
    mixer = mixers.build("hyena", D, trained_features=True)
    spared = {name for name, parameter in mixer.named_parameters() if getattr(parameter, "_no_weight_decay", False)}
    assert spared == {"beta", *(f"filter.{name}" for name, _ in mixer.filter.named_parameters())}
    assert {name.split(".")[1] for name in spared - {"beta"}} == {"features", "layers", "last", "frequency"}


@pytest.mark.parametrize("options", OPTIONS[1:], ids=lambda options: ",".join(options))
def test_every_law_holds_with_the_filter_s_options(options: dict[str, Any]) -> None:
    broken = [
        v for v in check("hyena", lambda: mixers.build("hyena", D, l_max=40, **options), examples=3) if not v.holds
    ]
    assert not broken, broken


def test_with_delta_filters_hyena_is_a_gate() -> None:
    """h = (1, 0, 0, ...) and a short filter of one tap: y = W_out ((1 + beta) x0 x1 v)."""
    mixer = hyena()
    mixer.filter.taps = lambda lags, dtype: F.pad(torch.ones(D, 1, dtype=dtype), (0, lags - 1))
    with torch.no_grad():
        mixer.conv.weight.zero_()[:, -1] = 1
        mixer.conv.bias.zero_()
        x = torch.randn(2, 90, D, dtype=torch.float64)
        x0, x1, v = mixer.in_proj(x).chunk(3, dim=-1)
        wanted = mixer.out_proj((1 + mixer.beta) * x0 * x1 * v)
        torch.testing.assert_close(mixer(x)[0], wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("prompt", [0, 1, 2, 3, 40, 100])
def test_decoding_is_exact_at_every_length_and_beyond_l_max(prompt: int) -> None:
    """Online tiles, window after window, until the ring of inputs has gone round three times."""
    mixer, time = hyena(l_max=50), 230
    with torch.no_grad():
        for parameter in mixer.filter.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))  # a filter that says something
        x = torch.randn(2, time, D, dtype=torch.float64)
        whole, _ = mixer(x)
        first, past = mixer(x[:, :prompt])
        parts = [first]
        past = state.fork(past)
        with state.in_place():
            for t in range(prompt, time):
                y, past = mixer.step(x[:, t], past)
                parts.append(y[:, None])
    assert mixer.filter.taps(50, torch.float64)[:, 1:].abs().mean() > 0.01
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-11 * whole.abs().max().item())
    assert state.nbytes(past) == 2 * (D * (2 * 3 + 2 * 64) * 8 + 3 * 8)


def _added(mixer: Hyena) -> None:
    mixer.filter.last.weight.add_(0.1)


def _stepped(mixer: Hyena) -> None:
    optimizer = torch.optim.AdamW(mixer.parameters(), lr=0.1)
    with torch.enable_grad():
        mixer(torch.randn(1, 40, D, dtype=torch.float64))[0].square().sum().backward()
    optimizer.step()


def _loaded(mixer: Hyena) -> None:
    mixer.load_state_dict(restless(hyena()).state_dict())


def _assigned(mixer: Hyena) -> None:
    for _ in range(2):  # the second may stand where the first parameters stood
        mixer.load_state_dict({k: v.clone() for k, v in restless(hyena()).state_dict().items()}, assign=True)


def _rounded(mixer: Hyena) -> None:
    mixer.bfloat16().double()


def _drawn(mixer: Hyena) -> None:
    mixer.filter.reset_parameters()


@pytest.mark.parametrize("change", [_added, _stepped, _loaded, _assigned, _rounded, _drawn])
def test_no_transform_outlives_the_parameters_it_was_made_of(change: Callable[[Hyena], None]) -> None:
    mixer, x = hyena(), torch.randn(1, 50, D, dtype=torch.float64)

    def outputs(mixer: Hyena) -> list[Tensor]:
        """Of a segment, of one more, of steps through a window."""
        y, past = mixer(x[:, :40])
        parts = [y]
        for a, b in [(40, 45), *((t, t + 1) for t in range(45, 50))]:
            y, past = mixer(x[:, a:b], past)
            parts.append(y)
        return parts

    with torch.no_grad():
        for _ in range(3):
            before = outputs(restless(mixer))
            change(mixer)
            found = outputs(mixer)
            fresh = hyena()
            fresh.load_state_dict(mixer.state_dict())
            assert not torch.allclose(found[0], before[0], rtol=0, atol=1e-12)
            for a, b in zip(found, outputs(fresh)):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_filters_keep_transforms_in_inference_alone_and_in_no_checkpoint() -> None:
    mixer, x = hyena(), torch.randn(1, 30, D, dtype=torch.float64)
    names = list(mixer.state_dict())
    with torch.no_grad():
        mixer(x)
        kept = mixer.filter.remembered.value
        assert kept.nbytes > 0 and list(mixer.state_dict()) == names
        mixer(x)
        assert mixer.filter.remembered.value is kept
        assert copy.deepcopy(mixer).filter.remembered.value is None
    mixer(x)
    assert mixer.filter.remembered.value is None


def test_inference_mode_computes_the_same() -> None:
    mixer, x = restless(hyena()), torch.randn(2, 50, D, dtype=torch.float64)
    wanted, _ = mixer(x)
    with torch.inference_mode():
        for _ in range(2):
            torch.testing.assert_close(mixer(x)[0], wanted.detach(), rtol=0, atol=1e-12)
        made = restless(hyena())  # its parameters count no changes
        first = made(x)[0]
        made.filter.last.weight.add_(0.1)
        assert not torch.allclose(made(x)[0], first)
