"""Mixers that read both ways: any causal mixer in the wrapper, and attention without a mask."""

import math

import pytest
import torch
from torch import Tensor

import bestiary
from bestiary import LanguageModel, ModelConfig, UsageError, mixers
from bestiary.mixers import Context
from bestiary.mixers.base import Mixer
from bestiary.mixers.bidirectional import read_backward, reverse
from bestiary.models.layout import parse, spell

CAUSAL = [name for name in mixers.names() if mixers.get(name).causal]
LENGTHS = torch.tensor([11, 4, 0])


def build(name: str, d_model: int = 32, dtype: torch.dtype = torch.float64, **options) -> Mixer:
    torch.manual_seed(1)
    mixer = mixers.build(name, d_model, **options).to(dtype)
    with torch.no_grad():  # matrices that start at zero would hide what flows through them
        for parameter in mixer.parameters():
            if parameter.ndim >= 2 and not parameter.any():
                parameter.normal_(std=0.2)
    return mixer


def inputs(batch: int = 3, time: int = 11, d_model: int = 32) -> Tensor:
    return torch.randn(batch, time, d_model, dtype=torch.float64)


def test_reversing_keeps_padding_where_it_is_and_undoes_itself() -> None:
    x = torch.arange(8.0).reshape(2, 4)
    assert reverse(x, torch.tensor([3, 0])).tolist() == [[2, 1, 0, 3], [4, 5, 6, 7]]
    assert reverse(x, None).tolist() == [[3, 2, 1, 0], [7, 6, 5, 4]]
    y = inputs()
    assert torch.equal(reverse(reverse(y, LENGTHS), LENGTHS), y)


@pytest.mark.parametrize("name", CAUSAL)
def test_any_causal_mixer_reads_each_row_both_ways_within_its_own_length(name: str) -> None:
    mixer, x = build("bidirectional", mixer=name), inputs()
    with torch.no_grad():
        y, state = mixer(x, lengths=LENGTHS)
        for row, length in enumerate(LENGTHS.tolist()):
            alone = x[row : row + 1, :length]
            expected = mixer.ahead(alone)[0] + mixer.back(alone.flip(1))[0].flip(1)
            torch.testing.assert_close(y[row : row + 1, :length], expected, rtol=1e-9, atol=1e-10)
        changed = x.clone()
        changed[0, -1] += 1  # the last step reaches the output before it, as it cannot in a causal mixer
        assert not torch.allclose(mixer(changed)[0][0, -2], mixer(x)[0][0, -2], rtol=1e-6)
        changed = x.clone()
        changed[0, 0] += 1
        assert not torch.allclose(mixer(changed)[0][0, 1], mixer(x)[0][0, 1], rtol=1e-6)
    assert isinstance(state, bestiary.state.Empty) and not y[2].any()


def test_with_shared_weights_a_reversed_sequence_has_reversed_outputs_for_half_the_parameters() -> None:
    shared, own = (build("bidirectional", mixer="gla", tied=tied) for tied in (True, False))
    x = inputs()
    torch.testing.assert_close(shared(x.flip(1))[0], shared(x)[0].flip(1), rtol=1e-10, atol=1e-12)
    assert not torch.allclose(own(x.flip(1))[0], own(x)[0].flip(1))
    sizes = [sum(p.numel() for p in mixer.parameters()) for mixer in (shared, own)]
    assert 2 * sizes[0] == sizes[1]
    assert shared.flops_per_token(100) == own.flops_per_token(100)  # what is shared still works twice


def test_joins() -> None:
    x = inputs()
    total, mean, concat = (build("bidirectional", mixer="gla", join=join) for join in ("sum", "average", "concat"))
    mean.load_state_dict(total.state_dict())
    torch.testing.assert_close(mean(x)[0], total(x)[0] / 2)
    f, b = concat.ahead(x)[0], concat.back(x.flip(1))[0].flip(1)
    W, c = concat.out.weight, concat.out.bias
    torch.testing.assert_close(concat(x)[0], f @ W[:, :32].T + b @ W[:, 32:].T + c)


def test_both_directions_of_a_sum_count_as_writers_of_the_residual_path() -> None:
    place = {"n_layers": 4, "residuals": 8}
    std = 0.02 * math.sqrt(768 / 256)
    for join, writers in (("sum", 16), ("average", 8)):
        torch.manual_seed(0)
        mixer = mixers.build("bidirectional", 256, mixer="attention", join=join, **place)
        for direction in (mixer.ahead, mixer.back):
            assert direction.out.weight.std().item() == pytest.approx(std / math.sqrt(writers), rel=0.02)


def test_the_inner_mixers_options_are_options_and_others_are_named() -> None:
    layout = "bidirectional{mixer=gla, n_heads=2, tied=true}*2"
    assert spell(parse(layout)) == layout
    assert build("bidirectional", mixer="gla", n_heads=2).ahead.n_heads == 2
    for wrong, message in (
        ({"mixer": "gla", "d_state": 8}, "d_state.*n_heads"),
        ({"mixer": "glo"}, "gla"),
        ({"mixer": "encoder_attention"}, "bidirectional already"),
        ({"mixer": "bidirectional"}, "bidirectional already"),
        ({"join": "product"}, "average, concat, sum"),
    ):
        with pytest.raises(UsageError, match=message):
            build("bidirectional", **wrong)
    with pytest.raises(UsageError, match=r"d_state.*n_heads"):
        parse("bidirectional{mixer=gla, d_state=8}")


@pytest.mark.parametrize("name", ["bidirectional", "encoder_attention"])
def test_a_bidirectional_mixer_refuses_to_step_and_to_stand_in_a_language_model(name: str) -> None:
    mixer = build(name)
    with pytest.raises(UsageError, match="cannot step"):
        mixer.step(inputs()[:, 0], mixer.initial_state(3))
    assert mixer.state_nbytes(1000) == 0
    with pytest.raises(UsageError, match="bidirectional"):
        LanguageModel(ModelConfig(name, 32))


@pytest.mark.parametrize("name", ["bidirectional", "encoder_attention"])
def test_lower_precision_stays_close(name: str) -> None:
    x = inputs()
    expected, _ = build(name)(x)
    single, _ = build(name, dtype=torch.float32)(x.float())
    torch.testing.assert_close(single.double(), expected, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half, _ = build(name, dtype=torch.float32)(x.float())
    assert (half.double() - expected).abs().max() < 0.03 * expected.abs().max()


def test_read_backward_the_time_before_a_step_is_the_time_after_it() -> None:
    lengths = torch.tensor([4, 2])
    seen = read_backward(Context(intervals=torch.tensor([[1.0, 2, 3, 4], [5, 6, 0, 0]])), lengths)
    assert seen.intervals[0].tolist() == [1, 4, 3, 2]
    assert seen.intervals[1, :2].tolist() == [1, 6]
    context = Context(embeddings=inputs())
    backward = read_backward(context, LENGTHS)
    assert torch.equal(backward.embeddings, reverse(context.embeddings, LENGTHS))
    assert backward.losses is context.losses and backward.measures is context.measures


@pytest.mark.parametrize("rotary", [False, True])
def test_attention_both_ways_is_its_formula(rotary: bool) -> None:
    mixer, x = build("encoder_attention", 64, rotary=rotary), inputs(d_model=64)
    q, k, v = (z.unflatten(-1, (2, 32)) for z in mixer.qkv(x).chunk(3, -1))
    if rotary:
        angle = torch.arange(11.0, dtype=torch.float64)[:, None] * 10000.0 ** (-torch.arange(16.0).double() / 16)
        turn = torch.polar(torch.ones_like(angle), angle)[:, None]
        q, k = (torch.complex(z[..., :16], z[..., 16:]) * turn for z in (q, k))
        scores = torch.einsum("bthd,bshd->bhts", q, k.conj()).real
    else:
        scores = torch.einsum("bthd,bshd->bhts", q, k)
    weights = (scores / math.sqrt(32)).softmax(-1)
    expected = mixer.out(torch.einsum("bhts,bshd->bthd", weights, v).flatten(-2))
    torch.testing.assert_close(mixer(x)[0], expected, rtol=1e-9, atol=1e-10)


def test_attention_without_positions_knows_no_order() -> None:
    mixer, x = build("encoder_attention"), inputs()
    order = torch.randperm(11)
    torch.testing.assert_close(mixer(x[:, order])[0], mixer(x)[0][:, order])
    turned = build("encoder_attention", rotary=True)
    assert not torch.allclose(turned(x[:, order])[0], turned(x)[0][:, order])


def test_a_row_of_padding_alone_leaves_gradients_finite() -> None:
    mixer, x = build("encoder_attention"), inputs()
    x[2] = float("nan")
    mixer(x, lengths=LENGTHS)[0].square().sum().backward()
    assert all(p.grad.isfinite().all() for p in mixer.parameters())
