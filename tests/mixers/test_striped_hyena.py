"""StripedHyena's operators: their filters are what the equations say, and they begin as published."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bestiary import LanguageModel, ModelConfig, UsageError, mixers, ops, state
from bestiary.mixers.striped_hyena import GatedOperator, ModalFilter
from bestiary.mixers.striped_hyena2 import ExplicitFilter, RealModalFilter

D, N = 32, 3
OPERATORS = ["striped_hyena", "hyena_se", "hyena_mr", "hyena_li"]


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def circle(radius: float, *shape: int) -> Tensor:
    """Complex numbers within a circle."""
    return torch.polar(radius * torch.rand(shape, dtype=torch.float64), 2 * math.pi * torch.rand(shape).double())


def open_gates(mixer: GatedOperator) -> GatedOperator:
    """The operator with x1 = x2 = 1, v = x, and nothing after the gates: what it says is what its filter says."""
    heads = torch.zeros(mixer.n_heads, 3, D // mixer.n_heads, D).double()
    heads[:, 2] = torch.eye(D).double().unflatten(0, (mixer.n_heads, -1))
    with torch.no_grad():
        for parameter in (mixer.conv.weight, mixer.conv.bias, mixer.in_proj.bias, mixer.out_proj.bias):
            parameter.zero_()
        mixer.conv.weight[:, -1] = 1
        mixer.in_proj.weight.copy_(heads.flatten(0, 2))
        mixer.in_proj.bias.unflatten(0, (mixer.n_heads, 3, -1))[:, :2] = 1
        mixer.out_proj.weight.copy_(torch.eye(D))
    return mixer


# ------------------------------------------------------------------------------------------------------- the filters


@pytest.mark.parametrize("parametrisation", ["modal", "raw"])
def test_the_modal_filter_is_the_real_part_of_residues_times_powers_of_poles(parametrisation: str) -> None:
    poles, residues = circle(1, D, N), torch.view_as_complex(normal(D, N, 2))
    mixer = open_gates(mixers.build("striped_hyena", D, d_state=N, parametrisation=parametrisation).double())
    mixer.filter.load_modes(poles, residues)
    lag = torch.arange(150)
    wanted = (residues[..., None] * poles[..., None] ** lag).real.sum(1)  # no factor 2: no conjugates are implied
    torch.testing.assert_close(mixer.filter.taps(150, torch.float64), wanted, rtol=0, atol=1e-12)
    impulse = F.one_hot(torch.zeros(1, dtype=torch.long), 150).double().mT.expand(1, 150, D)
    response = mixer(impulse)[0].detach()
    wanted[:, 0] += mixer.filter.D.detach()
    torch.testing.assert_close(response[0].T, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("form", ["reference", "torch"])
def test_a_filter_convolves_with_its_taps_and_adds_the_skip(name: str, form: str) -> None:
    mixer, time = mixers.build(name, D).double(), 200
    if name == "hyena_mr":
        mixer.filter.weight.data.normal_()
    x, kernel = normal(2, time, D), mixer.filter.taps(time, torch.float64).detach()
    lag = torch.arange(time)[:, None] - torch.arange(time)
    wanted = torch.einsum("cts,bsc->btc", torch.where(lag >= 0, kernel[:, lag.clamp(min=0)], 0), x)
    skip = getattr(mixer.filter, "D", None)
    wanted = wanted if skip is None else wanted + skip.detach() * x
    start = mixer.initial_state(2, dtype=x.dtype).past
    with ops.use(form), torch.no_grad():
        first, past = mixer.filter(x[:, :130], start, None)
        second, _ = mixer.filter(x[:, 130:], past, None)
    torch.testing.assert_close(torch.cat([first, second], 1), wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_is_the_published_formula(name: str) -> None:
    """Projection, depthwise convolution, split within the heads, gate, filter, gate, projection: plain functions."""
    mixer = mixers.build(name, 2 * D, n_heads=4).double()
    mixer.filter.reset_parameters()
    if name == "hyena_mr":
        mixer.filter.weight.data.normal_()
    x, time = normal(2, 50, 2 * D), 50
    z = F.linear(x, mixer.in_proj.weight, mixer.in_proj.bias)
    z = F.conv1d(F.pad(z.mT, (2, 0)), mixer.conv.weight[:, None], mixer.conv.bias, groups=6 * D).mT
    x2, x1, v = (torch.cat([head.chunk(3, -1)[i] for head in z.chunk(4, -1)], -1) for i in range(3))
    u, kernel = x1 * v, mixer.filter.taps(time, torch.float64)
    y = F.conv1d(F.pad(u.mT, (time - 1, 0)), kernel.flip(1)[:, None], groups=2 * D).mT
    if name != "hyena_se":
        y = y + mixer.filter.D * u
    wanted = F.linear(x2 * y, mixer.out_proj.weight, mixer.out_proj.bias)
    torch.testing.assert_close(mixer(x)[0], wanted, rtol=0, atol=1e-10)


def test_heads_only_reorder_the_projections() -> None:
    one, four = (mixers.build("striped_hyena", D, n_heads=n).double() for n in (1, 4))
    four.load_state_dict(one.state_dict())
    order = torch.arange(3 * D).unflatten(0, (3, 4, -1)).transpose(0, 1).flatten()  # (part, head, .) -> (head, part, .)
    with torch.no_grad():
        for parameter in (four.in_proj.weight, four.in_proj.bias, four.conv.weight, four.conv.bias):
            parameter.copy_(parameter[order].clone())
    x = normal(2, 20, D)
    torch.testing.assert_close(four(x)[0], one(x)[0], rtol=0, atol=1e-12)
    every = mixers.build("hyena_li", D)
    assert every.n_heads == D  # Evo 2's projections alternate from channel to channel


def test_explicit_filters_are_shared_within_groups_and_medium_ones_decay() -> None:
    short, medium = ExplicitFilter(64, 7, 16, decay=None), ExplicitFilter(64, 128, 16, decay=1.5)
    short_taps, medium_taps = (filter.taps(200, torch.float64).detach() for filter in (short, medium))
    for taps, length in ((short_taps, 7), (medium_taps, 128)):
        assert all(torch.equal(taps[g : g + 16], taps[g].expand(16, -1)) for g in range(0, 64, 16))
        assert not torch.equal(taps[0], taps[16]) and not taps[:, length:].any() and taps[:, length - 1].any()
    assert torch.equal(short_taps[::16, :7], short.weight.flip(1).double())  # lag 0 stands last
    factor = medium_taps[::16, :128] / medium.weight.flip(1).double()
    alpha = 1.5 * torch.logspace(-4, 0, 4, dtype=torch.float64)
    torch.testing.assert_close(factor, torch.exp(-alpha[:, None] * torch.arange(128) / 127), rtol=1e-9, atol=0)
    assert torch.equal(ExplicitFilter(64, 1, 16, decay=9.0).taps(1, torch.float32)[:, 0] != 0, torch.ones(64) > 0)


# --------------------------------------------------------------------------------------------- parametrisation, loading


def test_published_pairs_are_taken_as_they_are_or_refused() -> None:
    poles, residues = torch.randn(D, 2, 1, 2) * 0.5, torch.randn(D, 2, 1, 2)
    poles[3, 1, 0] = torch.tensor([0.8, 0.7])  # of modulus 1.06
    raw, modal = (mixers.build("striped_hyena", D, parametrisation=p).filter for p in ("raw", "modal"))
    raw.load_modes(poles, residues)
    assert torch.equal(raw.poles, poles[:, :, 0]) and torch.equal(raw.residues, residues[:, :, 0])
    size = torch.view_as_complex(poles.double()).abs()
    with pytest.raises(UsageError, match=rf"{int((size >= 1).sum())} of 64 poles .* parametrisation=raw"):
        modal.load_modes(poles, residues)
    with pytest.raises(UsageError, match=r"poles are \(32, 3"):
        raw.load_modes(torch.zeros(D, 3, 2), residues)
    inside = poles / (size.max() + 1e-3)
    for filter in (raw, modal):
        filter.load_modes(inside, residues)
    torch.testing.assert_close(modal.taps(90, torch.float64), raw.taps(90, torch.float64), rtol=0, atol=1e-5)


def test_a_pole_of_zero_or_next_to_the_circle_can_be_loaded() -> None:
    poles = torch.tensor([[0, 1 - 1e-6], [-0.5, 1e-20]]).to(torch.complex128)
    filter = ModalFilter(2, 2).double()
    filter.load_modes(poles, torch.ones_like(poles))
    found, _ = filter.system(torch.float64)
    torch.testing.assert_close(found, poles, rtol=0, atol=1e-12)
    filter.taps(70, torch.float64).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in filter.parameters())


def test_modal_poles_stay_inside_the_circle_and_raw_ones_need_not() -> None:
    modal, raw = (mixers.build("striped_hyena", D, parametrisation=p).double() for p in ("modal", "raw"))
    with torch.no_grad():
        for parameter in (*modal.filter.parameters(), *raw.filter.parameters()):
            parameter.copy_(3 * torch.randn_like(parameter))
        assert (modal.filter.system(torch.float64)[0].abs() < 1).all()
        assert (raw.filter.system(torch.float64)[0].abs() > 1).any()


@pytest.mark.parametrize("name", OPERATORS)
def test_filters_stay_in_fp32_when_a_model_is_turned_to_bf16(name: str) -> None:
    model = LanguageModel(ModelConfig(name, D))
    before = {key: value.clone() for key, value in model.blocks[0].mixer.filter.state_dict().items()}
    model = model.to(torch.bfloat16)
    mixer = model.blocks[0].mixer
    assert mixer.in_proj.weight.dtype == mixer.conv.weight.dtype == torch.bfloat16
    assert all(torch.equal(value, before[key]) for key, value in mixer.filter.state_dict().items())
    logits, after = model(torch.randint(256, (1, 9)))
    assert logits.dtype == torch.bfloat16 and all(t.dtype == torch.float32 for t in state.tensors(after))
    assert all(p.dtype == torch.float64 for p in model.double().parameters())
    assert all(p.device.type == "meta" for p in model.to("meta").parameters())


def test_published_log_poles_of_the_long_filter_can_be_loaded() -> None:
    log_poles, residues = -torch.rand(D, N, 1).double() - 0.01, normal(D, N)
    filter = RealModalFilter(D, N).double()
    filter.load_modes(log_poles, residues)
    wanted = (residues[..., None] * (log_poles * torch.arange(90)).exp()).sum(1)
    torch.testing.assert_close(filter.taps(90, torch.float64), wanted, rtol=0, atol=1e-12)
    with pytest.raises(UsageError, match="log_poles must be below 0"):
        filter.load_modes(log_poles + 0.5, residues)
    with pytest.raises(UsageError, match="log_poles are"):
        filter.load_modes(log_poles[:, :2], residues)


def test_the_state_does_not_grow_and_is_as_small_as_published() -> None:
    """StripedHyena-7B: 65,536 bytes of poles' state and 2 inputs of 12,288 channels a layer."""
    with torch.device("meta"):
        mixer = mixers.build("striped_hyena", 4096)
    assert mixer.state_nbytes(10) == mixer.state_nbytes(10**6) == 65_536 + 2 * 12_288 * 4
    x = torch.randn(1, 300, D)
    for name, floats in (("hyena_se", 6), ("hyena_mr", 127), ("hyena_li", 16)):
        small = mixers.build(name, D)
        assert state.nbytes(small(x)[1]) == small.state_nbytes(300) == 4 * D * (floats + 2 * 3)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("striped_hyena", {"d_state": 0}),
        ("striped_hyena", {"n_heads": 5}),
        ("striped_hyena", {"parametrisation": "polar"}),
        ("striped_hyena", {"conv_kernel": 0}),
        ("hyena_se", {"filter_length": 0}),
        ("hyena_se", {"group_size": 5}),
        ("hyena_mr", {"decay": -1.0}),
        ("hyena_li", {"d_state": 0}),
        ("hyena_li", {"n_heads": 0}),
    ],
)
def test_bad_options_are_one_clear_error(name: str, options: dict[str, int | str]) -> None:
    with pytest.raises(UsageError, match=next(iter(options)).split("_")[0]):
        mixers.build(name, D, **options)


# ---------------------------------------------------------------------------------------------------- initialisation


def layer(name: str) -> GatedOperator:
    torch.manual_seed(3)
    return LanguageModel(ModelConfig(f"{name}*4", 256)).blocks[2].mixer


def about(weight: Tensor, std: float) -> bool:
    return weight.std().item() == pytest.approx(std, rel=0.1) and abs(weight.mean().item()) < std / 4


@pytest.mark.parametrize("parametrisation", ["modal", "raw"])
def test_striped_hyena_begins_as_the_published_training_code(parametrisation: str) -> None:
    mixer = layer(f"striped_hyena{{d_state=8, parametrisation={parametrisation}}}")
    poles, residues = mixer.filter.system(torch.float64)
    dt = -2 * poles.abs().log()
    assert torch.allclose(dt, dt[:, :1].expand_as(dt), rtol=1e-3)  # one a channel
    dt = dt[:, :1]
    assert -3.001 < dt.log10().min() < -2.9 and -1.1 < dt.log10().max() < -0.999
    assert dt.log10().mean().item() == pytest.approx(-2, abs=0.15)
    A = torch.complex(torch.tensor(-0.5).double(), math.pi * torch.arange(8.0).double())
    torch.testing.assert_close(poles, (dt * A).exp(), rtol=0, atol=1e-4)
    C = residues * (1 - dt * A / 2) / (2 * dt)
    assert about(C.real, math.sqrt(0.5)) and about(C.imag, math.sqrt(0.5))
    assert about(mixer.filter.D, 1.0) and mixer.conv.bias is not None and mixer.in_proj.bias is not None
    assert about(mixer.in_proj.weight, 0.02 * math.sqrt(3)) and about(mixer.out_proj.weight, 0.02 * math.sqrt(3 / 8))


def test_striped_hyena_2_begins_as_the_published_training_code() -> None:
    short, medium, long = layer("hyena_se"), layer("hyena_mr"), layer("hyena_li")
    assert short.filter.weight.shape == (16, 7) and short.filter.D is None
    assert 0.5 < short.filter.weight.abs().max() <= 3**-0.5
    assert medium.filter.weight.shape == (16, 128) and about(medium.filter.weight, 1e-5 / math.sqrt(128))
    assert long.filter.residues.shape == (256, 16) and about(long.filter.residues, 0.1 / 4)
    log_poles = long.filter.poles(torch.float64).log()
    assert 0.01 < -log_poles.max() * math.e < 0.011 and 0.099 < -log_poles.min() * math.e < 0.1
    for mixer in (short, medium, long):
        assert mixer.in_proj.bias is None and mixer.conv.bias is None and mixer.out_proj.bias is not None
        assert mixer.filter.D is None or about(mixer.filter.D, 1.0)


def test_poles_residues_and_skips_do_not_decay() -> None:
    for name in OPERATORS:
        for key, parameter in mixers.build(name, D).filter.named_parameters():
            assert getattr(parameter, "_no_weight_decay", False) == (key != "weight"), (name, key)
