"""Published initialisations, on assembled models: nothing that a model does later may overwrite them."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bestiary import LanguageModel, ModelConfig, mixers
from bestiary.mixers.base import Mixer
from bestiary.ops import ssm

LAYERS, D = 4, 128


def layer(layout: str, index: int = 2) -> Mixer:
    torch.manual_seed(3)
    return LanguageModel(ModelConfig(f"{layout}*{LAYERS}", D)).blocks[index].mixer


def channel(layout: str, index: int = 2) -> Mixer:
    torch.manual_seed(3)
    return LanguageModel(ModelConfig(f"{layout}*{LAYERS}", D)).blocks[index].channel


def uniform(weight: Tensor, bound: float) -> bool:
    """Whether the entries fill (-bound, bound) evenly: the extremes, and the standard deviation bound / sqrt(3)."""
    tight = 0.95 * bound < weight.abs().max() <= bound * (1 + 1e-6)
    return bool(tight) and weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.08)


def normal(weight: Tensor, std: float) -> bool:
    """Whether the entries are as wide as N(0, std^2), and one in about 20 is beyond two deviations."""
    tails = (weight.abs() > 2 * std).double().mean().item()
    return weight.std().item() == pytest.approx(std, rel=0.15) and 0.01 < tails < 0.1


def log_uniform_step(bias: Tensor) -> bool:
    """Whether softplus(bias) fills 0.001 ... 0.1 evenly on a logarithmic scale."""
    dt = F.softplus(bias).log10()
    return bool((dt >= -3.001).all() and (dt <= -0.999).all()) and dt.mean().item() == pytest.approx(-2, abs=0.25)


def xavier(weight: Tensor, gain: float) -> bool:
    return uniform(weight, gain * math.sqrt(6 / sum(weight.shape)))


def test_mamba() -> None:
    mixer = layer("mamba")
    assert torch.equal(mixer.A_log, torch.arange(1.0, 17).log().expand(2 * D, 16)) and torch.equal(
        mixer.D, torch.ones(2 * D)
    )
    assert log_uniform_step(mixer.dt_proj.bias) and uniform(mixer.dt_proj.weight, 8**-0.5)
    assert uniform(mixer.in_proj.weight, D**-0.5) and uniform(mixer.conv.weight, 0.5)
    assert uniform(mixer.out_proj.weight, (2 * D) ** -0.5 / math.sqrt(LAYERS))
    assert uniform(layer("mamba{channel=swiglu}").out_proj.weight, (2 * D) ** -0.5 / math.sqrt(2 * LAYERS))


def test_mamba2() -> None:
    mixer = layer("mamba2{head_dim=4}")  # many heads, so that there is something to measure
    A = mixer.A_log.exp()
    assert 1 <= A.min() < 3 and 14 < A.max() <= 16 and torch.equal(mixer.D, torch.ones(64))
    assert log_uniform_step(mixer.dt_bias) and torch.equal(mixer.norm_weight, torch.ones(2 * D))
    assert uniform(mixer.out_proj.weight, (2 * D) ** -0.5 / math.sqrt(LAYERS))


def test_s4_begins_as_hippo() -> None:
    mixer = layer("s4")
    L, P, B, _ = ssm.legs_dplr(64)
    assert torch.allclose(-mixer.log_A_real.double().exp(), L.real.expand(D, 32), atol=1e-6)
    for actual, expected in (
        (mixer.A_imag, L.imag),
        (mixer.P, torch.view_as_real(P)),
        (mixer.B, torch.view_as_real(B)),
    ):
        assert torch.allclose(actual.double(), expected.expand(actual.shape), rtol=1e-6, atol=1e-6)
    assert normal(mixer.C, math.sqrt(0.5)) and normal(mixer.D, 1.0)
    assert mixer.log_dt.min() / math.log(10) >= -3 and mixer.log_dt.max() / math.log(10) <= -1


@pytest.mark.parametrize(("init", "system"), [("lin", ssm.s4d_lin), ("inv", ssm.s4d_inv)])
def test_s4d(init: str, system) -> None:
    mixer = layer(f"s4d{{init={init}}}").ssm
    A = torch.complex(-mixer.log_A_real.exp(), mixer.A_imag)
    assert torch.allclose(A.to(torch.complex128), system(32).expand(D, 32), rtol=1e-6)
    assert normal(mixer.C, math.sqrt(0.5)) and normal(mixer.D, 1.0)


def test_s4d_legs_reads_through_hippos_b() -> None:
    readout = torch.view_as_complex(layer("s4d{init=legs}").ssm.C) / torch.view_as_complex(layer("s4d").ssm.C)
    assert torch.allclose(readout, ssm.legs_dplr(64)[2].to(readout.dtype).expand(D, 32), rtol=1e-4)


def test_h3() -> None:
    mixer = layer("h3")
    assert uniform(mixer.shift, 1 / 8) and normal(mixer.shift_D, 1.0) and mixer.ssm.rule == "bilinear"
    assert normal(mixer.out.weight, 0.02 * math.sqrt(768 / D / (2 * LAYERS)))


def test_hyena() -> None:
    mixer = layer("hyena")
    for linear in (*mixer.filter.layers, mixer.filter.last):
        assert normal(linear.weight, 0.02) and (linear.bias is None or not linear.bias.any())
    assert torch.equal(mixer.filter.frequency, torch.full_like(mixer.filter.frequency, 14.0)) and normal(
        mixer.beta, 1.0
    )
    assert normal(mixer.out_proj.weight, 0.02 * math.sqrt(768 / D / (2 * LAYERS)))


@pytest.mark.parametrize("name", ["attention", "based", "based_conv"])
def test_gpt2s_residual_scaling(name: str) -> None:
    std = 0.02 * math.sqrt(768 / D)
    assert normal(layer(name).out.weight, std / math.sqrt(2 * LAYERS))
    assert normal(layer(f"{name}{{channel=none}}").out.weight, std / math.sqrt(LAYERS))
    assert normal(channel(name).gate_up.weight, std) and normal(channel(name).down.weight, std / math.sqrt(2 * LAYERS))
    mlp = channel(f"{name}{{channel=gelu_mlp}}")
    assert normal(mlp.down.weight, std / math.sqrt(2 * LAYERS)) and not mlp.up.bias.any()


def test_retnet_gla_and_the_delta_rules() -> None:
    gain = 2**-2.5
    retnet, gla, delta, gated = (layer(name) for name in ("retnet", "gla", "delta_net", "gated_delta_net"))
    for part in retnet.qkv.weight.split([D, D, 2 * D]):
        assert xavier(part, gain)
    assert xavier(retnet.out.weight, 0.5)
    assert all(
        xavier(linear.weight, gain) for linear in (gla.query, gla.key, gla.value, gla.gate, gla.out, gla.decay_up)
    )
    assert all(xavier(part, gain) for part in delta.qkv.weight.chunk(3)) and xavier(delta.out.weight, gain)
    assert all(xavier(part, gain) for part in gated.qkv.weight.split(gated.widths))
    many = layer("gated_delta_net{n_heads=32}")
    A = many.decay.A_log.exp()
    assert 0 < A.min() < 3 and 13 < A.max() <= 16 and log_uniform_step(many.decay.dt_bias)


@pytest.mark.parametrize("index", [0, 1, 3])
def test_rwkv4(index: int) -> None:
    mixer, mix = layer("rwkv4", index), channel("rwkv4", index)
    up, down, i = index / (LAYERS - 1), 1 - index / LAYERS, torch.arange(D)
    assert torch.allclose(mixer.mix_k, (i / D) ** down) and torch.allclose(mixer.mix_v, (i / D) ** down + 0.3 * up)
    assert torch.allclose(mixer.mix_r, (i / D) ** (0.5 * down))
    assert torch.allclose(mixer.time_decay, -5 + 8 * (i / (D - 1)) ** (0.7 + 1.3 * up))
    assert torch.allclose(mixer.time_first, math.log(0.3) + 0.5 * ((i + 1) % 3 - 1))
    assert not any(
        linear.weight.any() for linear in (mixer.key, mixer.receptance, mixer.output, mix.value, mix.receptance)
    )
    assert torch.allclose(mixer.value.weight @ mixer.value.weight.T, torch.eye(D), atol=1e-5)
    assert torch.allclose(mix.key.weight.T @ mix.key.weight, 4 * torch.eye(D), atol=1e-5)


@pytest.mark.parametrize("name", [name for name in mixers.names() if mixers.get(name).causal])
def test_a_new_model_predicts_as_if_it_knew_nothing(name: str) -> None:
    torch.manual_seed(0)
    # with a tied head, layers that say nothing yet would leave a preference for the token that was read
    model = LanguageModel(ModelConfig(f"{name}*{LAYERS}", D, tie_embeddings=False))
    tokens = torch.randint(256, (2, 65))
    loss, _ = model.loss(tokens[:, :-1], tokens[:, 1:])
    spread = 0.02**2 * 768  # variance of the logits, whatever the width: half of it is lost to confidence in nothing
    assert loss.item() == pytest.approx(math.log(256) + spread / 2, abs=0.15)
