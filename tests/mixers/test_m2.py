"""Monarch Mixer: M2-BERT's layer against dense matrices and the released shapes, and our causal M2-GPT."""

import copy
import math

import pytest
import torch
from mixers.test_initialisation import normal, uniform
from ops.test_bidirectional_convolution import toeplitz
from torch import Tensor, nn
from torch.nn import functional as F

import bestiary
from bestiary import LanguageModel, ModelConfig, UsageError, channel_mixers, mixers
from bestiary.mixers.base import Mixer
from bestiary.ops import monarch_tools

D = 64


def double(name: str, d_model: int = D, **options) -> Mixer:
    return mixers.build(name, d_model, **options).double()


def taps(implicit: nn.Module, l_max: int, lags: int) -> Tensor:
    """The published filter in complex numbers: (channels, lags)."""
    place = torch.arange(l_max, dtype=torch.float64)[:, None]
    wave = torch.exp(-1j * torch.tensor([1e-4, 1.0], dtype=torch.float64) * 2 * math.pi * place / l_max)
    t = place / max(1, l_max - 1)
    z = torch.cat([t, wave.real, wave.imag], 1) if implicit.features.weight is None else implicit.features.weight
    for linear in implicit.layers:
        z = torch.sin(implicit.frequency * (z @ linear.weight.T + linear.bias))
    channels = implicit.last.weight.shape[0]
    delta = torch.linspace(math.log(0.01) / 1.5, math.log(0.01) / 0.3, channels, dtype=torch.float64)
    return (z @ implicit.last.weight.T * torch.exp(-t * delta.abs())).T[:, :lags]


def gates(mixer: Mixer, u: Tensor) -> list[Tensor]:
    """x1, x2 and v of one sequence (time, d_model), the short filter as nn.Conv1d."""
    z = F.conv1d(
        mixer.in_proj(u).T[None], mixer.conv.weight[:, None], mixer.conv.bias, padding=2, groups=3 * u.shape[1]
    )
    return list(z[0, :, : u.shape[0]].T.chunk(3, dim=1))


def by_dense_matrices(mixer: Mixer, u: Tensor, l_max: int) -> Tensor:
    """M2-BERT's layer on one sequence, every convolution a dense Toeplitz matrix a channel."""

    def convolve(part: nn.Module, x: Tensor) -> Tensor:
        k, r = (taps(f, l_max, len(x)) for f in (part.ahead, part.back))
        return torch.einsum("cts,sc->tc", toeplitz(k, r, len(x)), x) + part.beta * x

    u = u if mixer.norm is None else F.layer_norm(u, u.shape[-1:], mixer.norm.weight, mixer.norm.bias)
    x1, x2, v = gates(mixer, u)
    y = convolve(mixer.long, x1 * v) * x2
    if mixer.residual is not None:
        y = y + convolve(mixer.residual, u)
    return y @ mixer.out_proj.weight.T + mixer.out_proj.bias


@pytest.mark.parametrize(
    "options",
    [{}, {"residual_long_conv": False}, {"input_norm": True}, {"trained_features": True}],
    ids=lambda options: "".join(options),
)
@pytest.mark.parametrize(("time", "l_max"), [(1, 32), (13, 32), (32, 32), (20, 8)])
def test_m2_is_its_equation_with_dense_matrices(time: int, l_max: int, options: dict) -> None:
    mixer = double("m2", l_max=l_max, **options)
    with torch.no_grad():
        for parameter in mixer.parameters():  # larger than drawn, so that every term counts
            parameter.add_(0.3 * torch.randn_like(parameter))
        u = torch.randn(2, time, D).double()
        y, _ = mixer(u)
        expected = torch.stack([by_dense_matrices(mixer, row, l_max) for row in u])
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-11 * expected.abs().max())


def test_m2_begins_as_published() -> None:
    torch.manual_seed(3)
    mixer = mixers.build("m2", 128)
    assert normal(mixer.in_proj.weight, 0.02 * math.sqrt(768 / 128)) and not mixer.in_proj.bias.any()
    assert normal(mixer.out_proj.weight, 0.02 * math.sqrt(768 / 128)) and not mixer.out_proj.bias.any()
    assert uniform(mixer.conv.weight, 3**-0.5) and uniform(mixer.conv.bias, 3**-0.5)
    for part in (mixer.long, mixer.residual):
        assert normal(part.beta, 1.0)
        for implicit in (part.ahead, part.back):
            assert torch.equal(implicit.frequency, torch.full((32,), 10.0))
            for linear in (*implicit.layers, implicit.last):
                assert normal(linear.weight, 0.02) and (linear.bias is None or not linear.bias.any())
        assert not torch.equal(part.ahead.last.weight, part.back.last.weight)


def test_both_directions_keep_one_sine_frequency() -> None:
    mixer = mixers.build("m2", D)
    for changed in (mixer, copy.deepcopy(mixer), mixers.build("m2", D).double()):
        assert changed.long.ahead.frequency is changed.long.back.frequency
        assert changed.long.ahead.frequency is not changed.residual.ahead.frequency


def test_trained_features_belong_to_both_directions_and_learn_slowly() -> None:
    mixer = mixers.build("m2", D, l_max=32, trained_features=True)
    for part in (mixer.long, mixer.residual):
        features = part.ahead.features.weight
        assert features is part.back.features.weight and features.shape == (32, 5)
        assert features._max_lr == 1e-5 and features._no_weight_decay
        assert not hasattr(part.back.last.weight, "_no_weight_decay")  # the networks decay, other than Hyena's
    assert mixer.long.ahead.features.weight is not mixer.residual.ahead.features.weight
    plain = mixers.build("m2", D, l_max=32)
    missing, unexpected = mixer.load_state_dict(plain.state_dict(), strict=False)
    assert {name.split(".")[2] for name in missing} == {"features"} and not unexpected
    x = torch.randn(2, 20, D)
    torch.testing.assert_close(mixer(x)[0], plain(x)[0], rtol=0, atol=1e-5)


def test_a_sine_frequency_and_its_features_are_counted_once() -> None:
    mixer = mixers.build("m2", D, trained_features=True)
    assert len({id(p) for p in mixer.parameters()}) == len(list(mixer.parameters()))


# a layer of M2-BERT-80M at 128 tokens: released name, its shape, our name
FILTER = {
    "bias": ((768,), "beta"),
    "pos_emb.z": ((1, 128, 5), "ahead.features.weight"),
    "implicit_filter.0.weight": ((128, 5), "ahead.layers.0.weight"),
    "implicit_filter.0.bias": ((128,), "ahead.layers.0.bias"),
    "implicit_filter.1.freq": ((1, 128), "ahead.frequency"),
    "implicit_filter.2.weight": ((128, 128), "ahead.layers.1.weight"),
    "implicit_filter.2.bias": ((128,), "ahead.layers.1.bias"),
    "implicit_filter.4.weight": ((128, 128), "ahead.layers.2.weight"),
    "implicit_filter.4.bias": ((128,), "ahead.layers.2.bias"),
    "implicit_filter.6.weight": ((768, 128), "ahead.last.weight"),
    "implicit_filter_rev.0.weight": ((128, 5), "back.layers.0.weight"),
    "implicit_filter_rev.0.bias": ((128,), "back.layers.0.bias"),
    "implicit_filter_rev.2.weight": ((128, 128), "back.layers.1.weight"),
    "implicit_filter_rev.2.bias": ((128,), "back.layers.1.bias"),
    "implicit_filter_rev.4.weight": ((128, 128), "back.layers.2.weight"),
    "implicit_filter_rev.4.bias": ((128,), "back.layers.2.bias"),
    "implicit_filter_rev.6.weight": ((768, 128), "back.last.weight"),
}
ATTENTION = {
    "in_linear.weight": ((2304, 768), "in_proj.weight"),
    "in_linear.bias": ((2304,), "in_proj.bias"),
    "short_filter.weight": ((2304, 1, 3), "conv.weight"),
    "short_filter.bias": ((2304,), "conv.bias"),
    "out_linear.weight": ((768, 768), "out_proj.weight"),
    "out_linear.bias": ((768,), "out_proj.bias"),
    **{f"filter_fn.{key}": (shape, f"long.{ours}") for key, (shape, ours) in FILTER.items()},
    **{f"filter_fn2.{key}": (shape, f"residual.{ours}") for key, (shape, ours) in FILTER.items()},
}
MLP = {
    "gated_layers.weight": ((4, 2 * 3072 // 4, 768 // 4), "gate_up.weight"),
    "wo.weight": ((4, 768 // 4, 3072 // 4), "down.weight"),
    "wo.bias": ((768,), "down.bias"),
}


@pytest.mark.parametrize(
    ("part", "released"),
    [
        (lambda: mixers.build("m2", 768, l_max=128, trained_features=True), ATTENTION),
        (lambda: channel_mixers.build("m2_mlp", 768, d_hidden=3072), MLP),
    ],
    ids=["mixer", "mlp"],
)
def test_a_layer_has_the_shapes_of_m2_bert_base(part, released: dict) -> None:
    with torch.device("meta"):
        ours = {name: tuple(parameter.shape) for name, parameter in part().named_parameters()}
    wanted = {name: shape for shape, name in released.values()}
    assert ours.keys() == wanted.keys()
    for name, shape in wanted.items():
        assert [n for n in ours[name] if n > 1] == [n for n in shape if n > 1]  # (2304, 1, 3) is (2304, 3)


@pytest.mark.parametrize(("hidden", "published"), [(768, 80.27e6), (960, 115.6e6), (1536, 259.1e6), (1792, 341.04e6)])
def test_twelve_layers_have_the_published_number_of_parameters(hidden: int, published: float) -> None:
    with torch.device("meta"):
        m2 = mixers.build("m2", hidden, l_max=128, trained_features=True)
        parts = [m2, channel_mixers.build("m2_mlp", hidden)]
    layer = sum(p.numel() for part in parts for p in part.parameters()) + 2 * hidden  # and a norm
    vocab = 30528
    embeddings, head = (vocab + 128 + 2 + 2) * hidden, hidden * (hidden + 1) + 2 * hidden + vocab
    assert 12 * layer + embeddings + head == pytest.approx(published, rel=2e-4)


def test_padding_leaks_in_the_released_mode_and_not_otherwise() -> None:
    x, lengths = torch.randn(2, 12, D).double(), torch.tensor([7, 12])
    changed = x.clone()
    changed[0, 7:] = torch.randn(5, D).double()
    longer = torch.cat([x, torch.randn(2, 6, D).double()], dim=1)
    ours, released = double("m2"), double("m2", released_padding=True)
    released.load_state_dict(ours.state_dict())
    with torch.no_grad():
        alone, _ = ours(x[:1, :7])
        for padded in (x, changed, longer):
            torch.testing.assert_close(ours(padded, lengths=lengths)[0][:1, :7], alone, rtol=0, atol=1e-12)
        y = [released(padded, lengths=lengths)[0] for padded in (x, changed, longer)]
        assert (y[0][0, :7] - alone[0]).abs().max() > 1e-3  # not what the row is alone
        assert (y[0][0, :7] - y[1][0, :7]).abs().max() > 1e-3  # but as the padding's content
        assert (y[0][1] - y[2][1, :12]).abs().max() > 1e-3  # and its length have it
        assert torch.equal(y[0], ours(x)[0])  # as if there were no lengths


def test_packs_and_bad_lengths_are_refused_in_the_released_mode() -> None:
    released = mixers.build("m2", D, released_padding=True)
    with pytest.raises(UsageError, match="packed documents"):
        released(torch.randn(1, 5, D), cu_seqlens=torch.tensor([0, 2, 5]))
    with pytest.raises(UsageError, match="lengths"):
        released(torch.randn(1, 5, D), lengths=torch.tensor([6]))


def test_m2_keeps_no_state_and_refuses_to_step_and_to_be_a_language_model() -> None:
    mixer = mixers.build("m2", D)
    _, state = mixer(torch.randn(2, 5, D))
    assert not mixer.causal and isinstance(state, bestiary.state.Empty) and mixer.state_nbytes(100) == 0
    with pytest.raises(UsageError, match="cannot step"):
        mixer.step(torch.randn(2, D), state)
    with pytest.raises(UsageError, match="bidirectional"):
        LanguageModel(ModelConfig("m2*2", D))


def test_every_step_of_m2_sees_every_other() -> None:
    mixer, x = double("m2", l_max=16), torch.randn(9, D).double()
    jacobian = torch.autograd.functional.jacobian(lambda x: mixer(x[None])[0][0].sum(-1), x)
    assert (jacobian.abs().amax(-1) > 1e-9).all()


def mlp_by_dense_matrices(mlp: nn.Module, x: Tensor) -> Tensor:
    gate, up = (x @ torch.block_diag(*mlp.gate_up.weight).T).chunk(2, dim=-1)
    h = up * gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2)))
    return h @ torch.block_diag(*mlp.down.weight).T + mlp.down.bias


@pytest.mark.parametrize(("blocks", "d_hidden"), [(4, None), (4, 96), (2, 128), (1, 64), (8, 64)])
def test_m2_mlp_is_two_block_diagonal_matrices(blocks: int, d_hidden: int | None) -> None:
    mlp = channel_mixers.build("m2_mlp", D, blocks=blocks, d_hidden=d_hidden).double()
    x = torch.randn(2, 5, D).double()
    torch.testing.assert_close(mlp(x)[0], mlp_by_dense_matrices(mlp, x), rtol=0, atol=1e-12)


def test_the_gate_of_m2_mlp_sees_one_half_of_the_input_and_the_values_the_other() -> None:
    """The split crosses blocks: two block-diagonal maps of the whole input would be another function."""
    mlp, x = channel_mixers.build("m2_mlp", D).double(), torch.randn(D).double()

    def halves(x: Tensor) -> Tensor:
        return torch.stack(mlp.gate_up(x).chunk(2, dim=-1))

    gate, up = torch.autograd.functional.jacobian(halves, x).abs().amax(1) > 0
    first = torch.arange(D) < D // 2
    assert torch.equal(gate, first) and torch.equal(up, ~first)
    weight = mlp.gate_up.weight.unflatten(1, (2, -1))  # each block split by itself
    apart = [x @ torch.block_diag(*weight[:, half]).T for half in (0, 1)]
    assert not torch.allclose(halves(x)[0], apart[0])


def test_m2_mlp_begins_as_published() -> None:
    torch.manual_seed(3)
    mlp = channel_mixers.build("m2_mlp", 128)
    assert uniform(mlp.gate_up.weight, math.sqrt(4) * 128**-0.5) and mlp.gate_up.bias is None
    assert uniform(mlp.down.weight, math.sqrt(4) * 512**-0.5) and uniform(mlp.down.bias, 128**-0.5)


@pytest.mark.parametrize("name", ["monarch_mlp", "m2_mlp"])
@pytest.mark.parametrize("d_model", [32, 64, 96, 160, 352, 768])
def test_monarch_mlps_fit_every_width(name: str, d_model: int) -> None:
    mlp, x = channel_mixers.build(name, d_model), torch.randn(2, 3, d_model)
    y, _ = mlp(x)
    assert y.shape == x.shape and y.std() > 0.01
    assert mlp.mixing_flops(1) < 2 * 12 * d_model**2 / 2  # dense: at least 12 d_model^2 weights
    assert mlp.mixing_flops(1) == 2 * sum(p.numel() for p in mlp.parameters() if p.ndim == 3)


def test_blocks_that_do_not_fit_are_named() -> None:
    with pytest.raises(UsageError, match="blocks=5"):
        channel_mixers.build("m2_mlp", D, blocks=5)
    with pytest.raises(UsageError, match="output width 90"):
        channel_mixers.build("m2_mlp", D, d_hidden=45)


@pytest.mark.parametrize("residual_long_conv", [True, False])
def test_m2_gpt_is_m2_without_a_future(residual_long_conv: bool) -> None:
    gpt, bert = (double(name, residual_long_conv=residual_long_conv, l_max=32) for name in ("m2_gpt", "m2"))
    x = torch.randn(2, 20, D).double()
    with torch.no_grad():
        bert.out_proj.load_state_dict(gpt.out_proj.state_dict())
        for tensor, source in (
            (bert.in_proj.weight, gpt.in_proj.weight),
            (bert.in_proj.bias, gpt.in_proj.bias),
            (bert.conv.weight, gpt.conv.weight),
            (bert.conv.bias, gpt.conv.bias),
        ):
            x0, x1, v = source.chunk(3)  # Hyena names the gates in the other order
            tensor.copy_(torch.cat([x1, x0, v]))
        pairs = [(gpt, bert.long)] + ([(gpt.residual, bert.residual)] if residual_long_conv else [])
        for mine, other in pairs:
            other.ahead.load_state_dict(mine.filter.state_dict())
            other.beta.copy_(mine.beta)
            other.back.last.weight.zero_()
        torch.testing.assert_close(gpt(x)[0], bert(x)[0], rtol=0, atol=1e-12)


def test_m2_gpt_begins_as_m2_does() -> None:
    torch.manual_seed(3)
    model = LanguageModel(ModelConfig("m2_gpt*4", 128))
    mixer = model.blocks[2].mixer
    assert type(model.blocks[2].channel).name == "monarch_mlp"
    assert normal(mixer.in_proj.weight, 0.02 * math.sqrt(768 / 128))
    assert normal(mixer.out_proj.weight, 0.02 * math.sqrt(768 / 128 / 8))
    for beta, implicit in ((mixer.beta, mixer.filter), (mixer.residual.beta, mixer.residual.filter)):
        assert normal(beta, 1.0) and implicit.shift == 0.0 and implicit.bands == 2
        assert torch.equal(implicit.frequency, torch.full((32,), 10.0))
        for linear in (*implicit.layers, implicit.last):
            assert normal(linear.weight, 0.02)
    tokens = torch.randint(256, (2, 65))
    loss, _ = model.loss(tokens[:, :-1], tokens[:, 1:])
    assert loss.item() == pytest.approx(math.log(256), abs=0.15)


def test_m2_gpt_is_drawn_anew_in_all_its_parts() -> None:
    mixer = mixers.build("m2_gpt", D)
    before = {name: parameter.clone() for name, parameter in mixer.named_parameters()}
    mixer.reset_parameters()
    same = {name for name, parameter in mixer.named_parameters() if torch.equal(parameter, before[name])}
    constant = {name for name, parameter in before.items() if parameter.unique().numel() == 1}
    assert same == constant and {name.split(".")[-1] for name in constant} == {"bias", "frequency"}


def test_m2_gpt_mixes_the_sequence_by_monarch_matrices_made_causal_by_padding() -> None:
    """Its ungated convolution is M_0^-1 (M_1 k . M_2 u), every M the DFT of twice the length in two factors."""
    mixer = double("m2_gpt", l_max=32)
    u = torch.randn(32, D).double()
    with torch.no_grad():
        y, _ = mixer.residual(u[None], bestiary.ops.empty_past(1, D, dtype=u.dtype), None)
        kernel, factors = mixer.residual.filter(32, u.dtype), monarch_tools.dft(8, 8)
        product = monarch_tools.polynomial_product(u.T, kernel, factors, factors, factors)
    torch.testing.assert_close(y[0], product.T + mixer.residual.beta * u, rtol=0, atol=1e-12)


def test_m2_gpt_is_causal_and_decodes_what_it_computes() -> None:
    """A model with Monarch matrices along both axes: the past alone counts, and steps continue the whole."""
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig("m2_gpt{l_max=32}*2", D)).double()
    tokens = torch.randint(256, (2, 40))
    with torch.no_grad():
        whole, _ = model(tokens)
        changed = tokens.clone()
        changed[:, 25:] = torch.randint(256, (2, 15))
        torch.testing.assert_close(model(changed)[0][:, :25], whole[:, :25], rtol=0, atol=1e-10)
        assert (model(changed)[0][:, 25:] - whole[:, 25:]).abs().max() > 0.01
        stepped, state = model(tokens[:, :7])
        parts = [stepped]
        for t in range(7, 40):
            logits, state = model(tokens[:, t : t + 1], state)
            parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-10)
