"""Latent attention is multi-head attention with a small cache; Zamba's attention sees the model's embeddings."""

import math

import pytest
import torch
from mixers.test_initialisation import LAYERS, layer, normal
from torch import Tensor, nn

from bestiary import LanguageModel, ModelConfig, UsageError, mixers, state
from bestiary.conformance import check
from bestiary.mixers import Context
from bestiary.mixers.base import Mixer


def awake(name: str, **options: object) -> tuple[Mixer, Tensor]:
    """A small mixer in float64 whose parameters are all random, and an input."""
    torch.manual_seed(0)
    mixer = mixers.build(name, 64, **options).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return mixer, torch.randn(2, 14, 64, dtype=torch.float64)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def pieces(mixer: Mixer, x: Tensor) -> Tensor:
    """The outputs over a first segment, a second, and single steps."""
    first, after = mixer(x[:, :5])
    second, after = mixer(x[:, 5:9], after)
    outputs = [first, second]
    for x_t in x[:, 9:].unbind(1):
        y, after = mixer.step(x_t, after)
        outputs.append(y[:, None])
    return torch.cat(outputs, dim=1)


# latent attention


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def turned(x: Tensor, base: float = 10000.0) -> Tensor:
    """Rotary positions by complex numbers: (batch, time, ..., dims), channel i with channel i + dims / 2."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[1])[:, None] * base ** (-torch.arange(half) / half).double()
    angle = angle.reshape(1, x.shape[1], *[1] * (x.ndim - 3), half)
    z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([z.real, z.imag], dim=-1)


def multi_head(mixer: Mixer, x: Tensor) -> Tensor:
    """Every head's own keys and values written out, and a softmax over each."""
    H, N, R, C = mixer.n_heads, mixer.head_dim, mixer.rope_dim, mixer.kv_rank
    asked = x if mixer.q_down is None else normed(x @ mixer.q_down.weight.T, mixer.q_norm.weight)
    q = (asked @ mixer.q_up.weight.T).unflatten(-1, (H, N + R))
    q = torch.cat([q[..., :N], turned(q[..., N:])], dim=-1)
    down = x @ mixer.kv_down.weight.T
    kv = (normed(down[..., :C], mixer.kv_norm.weight) @ mixer.kv_up.weight.T).unflatten(-1, (H, 2 * N))
    shared = turned(down[..., C:])
    outputs = []
    for head in range(H):
        k = torch.cat([kv[:, :, head, :N], shared], dim=-1)
        scores = q[:, :, head] @ k.transpose(1, 2) / math.sqrt(N + R)
        scores = scores.masked_fill(torch.ones_like(scores[0], dtype=torch.bool).triu(1), -math.inf)
        outputs.append(scores.softmax(-1) @ kv[:, :, head, N:])
    return torch.cat(outputs, dim=-1) @ mixer.out.weight.T


@pytest.mark.parametrize("options", [{}, {"q_rank": 12, "n_heads": 3, "head_dim": 10, "rope_dim": 4, "kv_rank": 9}])
def test_mla_is_multi_head_attention_written_out(options: dict) -> None:
    mixer, x = awake("mla", **options)
    close(mixer(x)[0], multi_head(mixer, x))


def test_mla_that_asks_its_latents_is_multi_head_attention_written_out() -> None:
    mixer, x = awake("mla", q_rank=12)
    close(pieces(mixer, x), multi_head(mixer, x))


class Adapted(nn.Linear):
    """As an adapter leaves a map: called, it is more than its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return 1.5 * super().forward(x)


def test_mla_with_a_wrapped_map_expands_its_latents_and_says_so() -> None:
    mixer, x = awake("mla")
    plain = mixer.kv_up
    mixer.kv_up = Adapted(plain.in_features, plain.out_features, bias=False, dtype=torch.float64)
    mixer.kv_up.load_state_dict(plain.state_dict())
    with pytest.warns(UserWarning, match="kv_up is wrapped"):
        found = pieces(mixer, x)
    with torch.no_grad():
        plain.weight.mul_(1.5)
    mixer.kv_up = plain
    close(found, pieces(mixer, x))


def test_mlas_cache_holds_a_latent_and_a_rotary_key() -> None:
    mixer, x = mixers.build("mla", 256), torch.randn(1, 30, 256)
    _, after = mixer(x)
    assert after.latents.shape == (1, 30, 1, 128 + 32)
    assert state.nbytes(after) == mixer.state_nbytes(30) == 30 * 160 * 4 + 8
    assert 3 * mixer.state_nbytes(1000) < mixers.build("attention", 256).state_nbytes(1000)


def test_mlas_cache_takes_another_dtype_than_its_weights() -> None:
    torch.manual_seed(0)
    mixer, x = mixers.build("mla", 64).bfloat16(), torch.randn(2, 5, 64, dtype=torch.bfloat16)
    y, after = mixer(x, mixer.initial_state(2, dtype=torch.float32))
    _, after = mixer.step(x[:, 0], after)
    assert y.dtype == torch.bfloat16 and after.latents.dtype == torch.float32


@pytest.mark.parametrize("options", [{"q_rank": 16}, {"rope_dim": 0}, {"n_heads": 3, "head_dim": 10}], ids=str)
def test_mlas_options_obey_the_laws(options: dict) -> None:
    verdicts = check("mla", lambda: mixers.build("mla", 64, **options), examples=5)
    assert len(verdicts) > 15 and [(v.law, v.message) for v in verdicts if not v.holds] == []


@pytest.mark.parametrize(
    "options", [{"n_heads": 5}, {"n_heads": 0, "head_dim": 8}, {"rope_dim": 3}, {"kv_rank": 0}, {"q_rank": 0}], ids=str
)
def test_mla_refuses_sizes_that_do_not_fit(options: dict) -> None:
    with pytest.raises(UsageError):
        mixers.build("mla", 64, **options)


# Zamba's attention


def test_zamba_attention_is_attention_over_stream_and_embeddings() -> None:
    mixer, x = awake("zamba_attention", rotary=False)
    e = 3 * torch.randn_like(x)
    both = torch.cat([x, nn.functional.rms_norm(e, (64,), eps=1e-5)], dim=-1)
    q, k, v = ((both @ w.T).unflatten(-1, (2, 64)).transpose(1, 2) for w in mixer.qkv.weight.chunk(3))
    o = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=32**-0.5)
    close(mixer(x, context=Context(embeddings=e))[0], o.transpose(1, 2).flatten(-2) @ mixer.out.weight.T)


def test_zamba_attention_outside_a_model_takes_x_for_the_embeddings() -> None:
    mixer, x = awake("zamba_attention")
    assert torch.equal(mixer(x)[0], mixer(x, context=Context(embeddings=x))[0])
    assert not torch.allclose(mixer(x)[0], mixer(x, context=Context(embeddings=-x))[0])


def test_zamba_attention_steps_pads_and_packs_its_embeddings_with_x() -> None:
    mixer, x = awake("zamba_attention")
    e = torch.randn_like(x)
    expected, _ = mixer(x, context=Context(embeddings=e))
    first, after = mixer(x[:, :6], context=Context(embeddings=e[:, :6]))
    outputs = [first]
    for t in range(6, 14):
        y, after = mixer.step(x[:, t], after, context=Context(embeddings=e[:, t : t + 1]))
        outputs.append(y[:, None])
    close(torch.cat(outputs, dim=1), expected)

    packed = Context(embeddings=torch.cat([e[0, :9], e[1]])[None])
    y, _ = mixer(torch.cat([x[0, :9], x[1]])[None], cu_seqlens=torch.tensor([0, 9, 23]), context=packed)
    close(y[0], torch.cat([expected[0, :9], expected[1]]))

    padded = e.clone()
    padded[0, 9:] = float("nan")
    y, after = mixer(x, lengths=torch.tensor([9, 14]), context=Context(embeddings=padded))
    close(y[0, :9], expected[0, :9])
    assert all(t.isfinite().all() for t in state.tensors(after))


def test_zamba_attention_sees_the_embeddings_whatever_lies_between() -> None:
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig("gla*2 zamba_attention", 64))
    mixer, said = model.blocks[2].mixer, []
    mixer.register_forward_hook(lambda module, arguments, output: said.append(output[0].detach()))
    tokens = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        mixer.qkv.weight[:, :64] = 0  # deaf to the stream: what it says follows from the embeddings alone
        model(tokens)
        model.blocks[0].mixer.out.weight.mul_(-3)
        model(tokens)
        model.embedding.weight[3].mul_(-1)
        model(tokens)
    assert torch.equal(said[0], said[1])
    assert torch.equal(said[1][:, :2], said[2][:, :2])
    assert (said[1][:, 2:] - said[2][:, 2:]).abs().amax(-1).min() > 1e-4


def test_zamba_attention_returns_with_the_same_weights_and_a_cache_each() -> None:
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig("(mamba zamba_attention{share=a})*2", 64))
    tokens = torch.randint(256, (2, 12))
    with torch.no_grad():
        expected, _ = model(tokens)
        first, after = model(tokens[:, :7])
        second, after = model(tokens[:, 7:], after)
    assert model.blocks[1].mixer is model.blocks[3].mixer
    torch.testing.assert_close(torch.cat([first, second], 1), expected, rtol=1e-4, atol=1e-4)
    assert not torch.equal(after.layers[1].mixer.keys, after.layers[3].mixer.keys)


# the beginnings


def test_maps_begin_as_gpt2s_by_their_inputs_width() -> None:
    mla, zamba = layer("mla{q_rank=64}"), layer("zamba_attention")
    for linear in (mla.q_down, mla.q_up, mla.kv_down, mla.kv_up, zamba.qkv):
        assert normal(linear.weight, 0.02 * math.sqrt(768 / linear.in_features))
    for linear in (mla.out, zamba.out):
        assert normal(linear.weight, 0.02 * math.sqrt(768 / linear.in_features / (2 * LAYERS)))
    assert torch.equal(mla.kv_norm.weight, torch.ones(64)) and torch.equal(mla.q_norm.weight, torch.ones(64))
