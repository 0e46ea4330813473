"""Matrix memories beyond GLA and DeltaNet: their published initialisations, and what each is a case of."""

import math

import pytest
import torch
from mixers.test_initialisation import LAYERS, D, layer, log_uniform_step, normal, uniform, xavier
from torch import Tensor
from torch.nn import functional as F

from bestiary import UsageError, mixers, ops
from bestiary.conformance import LAWS, check
from bestiary.mixers.base import Mixer

GAIN = 2**-2.5


def build(name: str, **options) -> Mixer:
    """A mixer in float64, each of its parameters moved off what it begins as."""
    torch.manual_seed(5)
    mixer = mixers.build(name, 32, **options).double().eval()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return mixer


def inputs(time: int = 20) -> Tensor:
    return torch.randn(2, time, 32, dtype=torch.float64)


def heads(x: Tensor, n: int) -> Tensor:
    return x.unflatten(-1, (n, -1))


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


# initialisations


def test_kda_begins_as_published() -> None:
    kda = layer("kda{n_heads=32, rank=32}")
    std = 0.02 * math.sqrt(768 / D)
    for linear in (kda.qkv, kda.beta, kda.decay_down, kda.decay_up, kda.gate_down, kda.gate_up, kda.out):
        assert normal(linear.weight, std)
    A = kda.A_log.exp()
    assert 1 <= A.min() < 3 and 13 < A.max() <= 16 and log_uniform_step(kda.dt_bias) and uniform(kda.conv.weight, 0.5)


def test_delta_product_begins_as_published() -> None:
    mixer = layer("delta_product{n_steps=3, gated=true, n_heads=32}")
    d_key, d_value = 96, 192
    for part in mixer.qkv.weight.split([d_key] * 4 + [d_value] * 3):  # each step's maps are maps of their own
        assert xavier(part, GAIN)
    assert all(xavier(linear.weight, GAIN) for linear in (mixer.beta, mixer.decay.logits, mixer.gate, mixer.out))
    A = mixer.decay.A_log.exp()
    assert 0 < A.min() < 3 and 13 < A.max() <= 16 and log_uniform_step(mixer.decay.dt_bias)


@pytest.mark.parametrize("index", range(LAYERS))
def test_hgrn2_forgets_less_in_deeper_layers(index: int) -> None:
    mixer = layer("hgrn2", index)
    assert all(xavier(m.weight, GAIN) for m in (mixer.query, mixer.forget, mixer.value, mixer.out))
    if index:
        assert torch.allclose(torch.sigmoid(mixer.lower), torch.full((D,), index / LAYERS))
    else:
        assert mixer.lower is None


def test_mlstm_begins_as_published() -> None:
    mixer = layer("mlstm")
    for part in (mixer.up, mixer.query, mixer.key, mixer.value):
        assert normal(part.weight, math.sqrt(2 / (5 * D)))
    assert normal(mixer.down.weight, 2 / LAYERS / math.sqrt(D)) and uniform(mixer.conv.weight, 0.5)
    assert not mixer.input_gate.weight.any() and not mixer.forget_gate.weight.any()
    assert torch.equal(mixer.forget_gate.bias, torch.linspace(3, 6, 4))
    growing = layer("mlstm{forget=exponential}").forget_gate.bias  # begins as the sigmoid does
    assert torch.allclose(growing.exp(), torch.sigmoid(mixer.forget_gate.bias))
    assert normal(layer("mlstm{n_heads=64}").input_gate.bias, 0.1)
    assert torch.equal(mixer.skip, torch.ones(2 * D)) and torch.equal(mixer.norm.weight, torch.ones(2 * D))


@pytest.mark.parametrize("index", range(LAYERS))
def test_slstm_begins_as_published(index: int) -> None:
    mixer = layer("slstm", index)
    assert normal(mixer.input_forget.weight, math.sqrt(2 / (5 * D)))
    assert normal(mixer.cell_output.weight, math.sqrt(2 / (5 * D)))
    forget = -(-5 + 12 * (torch.arange(32) / 31) ** (0.3 + 1.3 * index / (LAYERS - 1)))
    assert torch.allclose(mixer.bias[:, 1], forget.expand(4, 32))
    assert not mixer.recurrent.any() and not mixer.bias[:, [0, 2, 3]].any()


def test_log_linear_attention_begins_as_published() -> None:
    mixer = layer("log_linear_attention{expand=8.0}")
    assert torch.allclose(mixer.A_log.exp(), torch.arange(1.0, 17.0)) and log_uniform_step(mixer.dt_bias)
    assert torch.equal(mixer.L, torch.ones(16, 15)) and torch.equal(mixer.D, torch.ones(16))
    assert uniform(mixer.in_proj.weight, D**-0.5)


@pytest.mark.parametrize("name", ["kda", "hgrn2", "mlstm", "slstm", "log_linear_attention"])
def test_decays_and_gates_are_spared_by_weight_decay(name: str) -> None:
    spared = {n for n, p in layer(name).named_parameters() if p.ndim < 2 or getattr(p, "_no_weight_decay", False)}
    own = {
        "kda": {"A_log", "dt_bias"},
        "hgrn2": {"lower"},
        "mlstm": {"skip", "input_gate.bias", "forget_gate.bias"},
        "slstm": {"bias"},
        "log_linear_attention": {"A_log", "dt_bias", "D", "L"},
    }
    assert own[name] <= spared and not any(n.endswith("proj.weight") or n == "qkv.weight" for n in spared)


# what each is a case of


def test_kda_with_one_gate_a_head_is_gated_delta_net() -> None:
    gated, kda = build("gated_delta_net", n_heads=2, expand_k=1.0, expand_v=1.0), build("kda", n_heads=2)
    with torch.no_grad():
        for name in ("qkv", "conv", "beta"):
            getattr(kda, name).load_state_dict(getattr(gated, name).state_dict())
        kda.decay_down.weight.zero_()[:2] = gated.decay.logits.weight
        kda.decay_up.weight.zero_().unflatten(0, (2, -1))[[0, 1], :, [0, 1]] = 1  # channels of a head share its logit
        kda.A_log.copy_(gated.decay.A_log[:, None])
        kda.dt_bias.copy_(gated.decay.dt_bias[:, None].expand_as(kda.dt_bias))
    x = inputs(70)
    close(kda(x)[1].memory, gated(x)[1].memory)
    assert not torch.allclose(build("kda", n_heads=2)(x)[1].memory, gated(x)[1].memory)


@pytest.mark.parametrize("negative", [False, True])
def test_delta_product_with_one_step_is_delta_net(negative: bool) -> None:
    one = build("delta_product", n_steps=1, negative=negative, expand_k=1.0, expand_v=1.0)
    delta = build("delta_net", negative=negative)
    delta.load_state_dict({k: v for k, v in one.state_dict().items() if k != "gate.weight"})
    x = inputs(70)
    read = []
    for mixer in (one, delta):  # what is read, before norm, gate and output
        mixer.norm.register_forward_hook(lambda module, given, found: read.append(given[0]))
        mixer(x)
    close(*read)


def test_delta_product_with_one_gated_step_is_gated_delta_net() -> None:
    one, gated = build("delta_product", n_steps=1, gated=True, negative=False), build("gated_delta_net")
    gated.load_state_dict(one.state_dict())
    x = inputs(70)
    close(one(x)[0], gated(x)[0])


def test_delta_product_decays_once_writes_often_and_reads_last() -> None:
    mixer, x = build("delta_product", n_steps=3, gated=True, n_heads=2), inputs()
    y, _ = mixer(x)
    qkv, _ = mixer.conv(mixer.qkv(x), None)
    q, k, v = qkv.split([24, 72, 144], dim=-1)
    k, v = k.unflatten(-1, (3, 2, 12)), v.unflatten(-1, (3, 2, 24))
    beta, decay = (
        2 * torch.sigmoid(mixer.beta(x)).unflatten(-1, (3, 2)),
        F.softplus(mixer.decay.logits(x) + mixer.decay.dt_bias),
    )
    q, k = heads(q, 2), k / (k.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    q = q / (q.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    S = torch.zeros(2, 2, 12, 24, dtype=x.dtype)
    for t in range(20):
        S = S * (-mixer.decay.A_log.exp() * decay[:, t]).exp()[..., None, None]
        for j in range(3):
            key, b = k[:, t, j, :, :, None], beta[:, t, j, :, None, None]
            S = S - b * key @ (key.mT @ S) + b * key * v[:, t, j, :, None]
        o = mixer.norm((S.mT @ q[:, t, ..., None])[..., 0] / 12**0.5).flatten(-2)
        close(y[:, t], mixer.out(o * F.silu(mixer.gate(x[:, t]))))


def test_two_reflections_rotate_what_is_remembered() -> None:
    angle = torch.tensor(0.7, dtype=torch.float64)
    first, second = (torch.stack([torch.cos(a), torch.sin(a)]) for a in (torch.zeros_like(angle), angle / 2))
    k, memory = torch.stack([first, second])[None, :, None], torch.randn(1, 1, 2, 3, dtype=torch.float64)
    v, beta = torch.zeros(1, 2, 1, 3, dtype=torch.float64), torch.full((1, 2, 1), 2.0, dtype=torch.float64)
    _, after = ops.delta_rule(k, k, v, beta, state=memory)
    rotation = torch.tensor([[torch.cos(angle), -torch.sin(angle)], [torch.sin(angle), torch.cos(angle)]])
    close(after[0, 0], rotation.double() @ memory[0, 0])


@pytest.mark.parametrize("layer_index", [0, 2])
def test_hgrn2_writes_what_it_forgets(layer_index: int) -> None:
    mixer, x = build("hgrn2", n_heads=2, layer_index=layer_index, n_layers=4), inputs()
    y, _ = mixer(x)
    lower = torch.sigmoid(mixer.lower) if layer_index else torch.zeros(32, dtype=x.dtype)
    f, q, v = lower + (1 - lower) * torch.sigmoid(mixer.forget(x)), F.silu(mixer.query(x)), mixer.value(x)
    S = torch.zeros(2, 2, 16, 16, dtype=x.dtype)
    for t in range(20):
        keep = heads(f[:, t], 2)[..., None]
        S = keep * S + (1 - keep) * heads(v[:, t], 2)[..., None, :]
        o = (heads(q[:, t], 2)[..., None, :] @ S)[..., 0, :] / 4
        close(y[:, t], mixer.out(mixer.norm(o.flatten(-2))))


@pytest.mark.parametrize("forget", ["sigmoid", "exponential"])
def test_mlstm_is_the_papers_block(forget: str) -> None:
    mixer, x = build("mlstm", forget=forget), inputs()
    y, _ = mixer(x)
    u, z = mixer.up(x).chunk(2, dim=-1)
    c = F.silu(F.conv1d(F.pad(u.mT, (3, 0)), mixer.conv.weight[:, None], mixer.conv.bias, groups=64).mT)
    q, k, v = (
        given @ torch.block_diag(*part.weight).T for given, part in ((c, mixer.query), (c, mixer.key), (u, mixer.value))
    )
    together = torch.cat([q, k, v], dim=-1)
    i, f = mixer.input_gate(together).exp(), mixer.forget_gate(together)
    f = torch.sigmoid(f) if forget == "sigmoid" else f.exp()
    C, n = torch.zeros(2, 4, 16, 16, dtype=x.dtype), torch.zeros(2, 4, 16, dtype=x.dtype)
    for t in range(20):
        query, key, value = (heads(part[:, t], 4) for part in (q, k / 4, v))
        C = f[:, t, :, None, None] * C + i[:, t, :, None, None] * value[..., None] * key[..., None, :]
        n = f[:, t, :, None] * n + i[:, t, :, None] * key
        h = (C @ query[..., None])[..., 0] / (n * query).sum(-1, keepdim=True).abs().clamp(min=1)
        h = F.group_norm(h.flatten(-2), 4, mixer.norm.weight)
        close(y[:, t], mixer.down((h + mixer.skip * c[:, t]) * F.silu(z[:, t])))


@pytest.mark.parametrize("forget", ["sigmoid", "exponential"])
@pytest.mark.parametrize("conv_kernel", [0, 4])
def test_slstm_is_the_papers_cell(conv_kernel: int, forget: str) -> None:
    mixer, x = build("slstm", forget=forget, conv_kernel=conv_kernel), inputs()
    y, _ = mixer(x)
    u = x if mixer.conv is None else mixer.conv(x, None)[0]
    zero = torch.zeros(2, 32, dtype=x.dtype)
    h, c, n = zero, zero, zero
    W = [torch.block_diag(*part.weight[:, rows]) for part in (mixer.input_forget, mixer.cell_output)
         for rows in (slice(0, 8), slice(8, 16))]  # fmt: skip
    R = [torch.block_diag(*part) for part in mixer.recurrent.chunk(4, dim=1)]
    for t in range(20):
        i, f, z, o = (
            w @ given[:, t, :, None] + r @ h[..., None] + b.flatten()[:, None]
            for w, r, b, given in zip(W, R, mixer.bias.unbind(1), (u, u, x, x))
        )
        i, f, z, o = (gate[..., 0] for gate in (i.exp(), torch.sigmoid(f) if forget == "sigmoid" else f.exp(), z, o))
        c, n = f * c + i * torch.tanh(z), f * n + i
        h = torch.sigmoid(o) * c / n
        close(y[:, t], F.group_norm(h, 4, mixer.norm.weight))


def test_slstm_stays_exact_at_exponents_beyond_fp32() -> None:
    mixer, x = build("slstm").float(), inputs().float()
    mixer.recurrent.requires_grad_(False).zero_()
    expected, _ = mixer(x)
    mixer.bias.requires_grad_(False)[:, 0] += 200.0  # a common factor of all writes: c / n does not change
    torch.testing.assert_close(mixer(x)[0], expected, rtol=0, atol=1e-3)


def test_log_linear_attention_reads_equal_levels_as_one_memory() -> None:
    mixer, x = build("log_linear_attention", n_levels=5), inputs(70)
    with torch.no_grad():
        mixer.L.zero_()  # all weights softplus(0)
    found, _ = mixer(x)
    z, vkq, dt, _ = mixer.in_proj(x).split(mixer.widths, dim=-1)
    v, k, q = mixer.conv(vkq, None)[0].split([64, 32, 32], dim=-1)
    dt, v = F.softplus(dt + mixer.dt_bias), heads(v, 2)
    o, _ = ops.linear_attention(
        q[:, :, None], k[:, :, None], dt[..., None] * v, -dt * mixer.A_log.exp(), scale=math.log(2)
    )
    y = (o + mixer.D[:, None] * v).flatten(-2) * F.silu(z)
    close(found, mixer.out_proj(mixer.norm(y)))


# options


OPTIONS = [
    ("kda", {"negative": True, "rank": 8, "expand_v": 2.0}),
    ("delta_product", {"n_steps": 3, "gated": True}),
    ("delta_product", {"n_steps": 1, "negative": False}),
    ("hgrn2", {"layer_index": 2, "n_layers": 3}),
    ("mlstm", {"forget": "exponential", "block": 8, "n_heads": 2}),
    ("slstm", {"forget": "exponential", "conv_kernel": 0}),
    ("log_linear_attention", {"n_levels": 3, "d_state": 8}),
]


@pytest.mark.parametrize(
    ("name", "options"), OPTIONS, ids=[f"{name}-{number}" for number, (name, _) in enumerate(OPTIONS)]
)
def test_options_keep_the_laws(name: str, options: dict) -> None:
    laws = [law for law in LAWS if law.name != "long_decode"]
    verdicts = check(name, lambda: mixers.build(name, 32, **options), examples=3, seed=3, laws=laws)
    assert [(v.law, v.message) for v in verdicts if not v.holds] == []


@pytest.mark.parametrize(
    ("name", "options", "word"),
    [
        ("kda", {"n_heads": 5}, "n_heads=5"),
        ("kda", {"rank": 0}, "rank"),
        ("delta_product", {"n_steps": 0}, "n_steps"),
        ("hgrn2", {"n_heads": 3}, "n_heads=3"),
        ("mlstm", {"forget": "tanh"}, "sigmoid"),
        ("mlstm", {"block": 5}, "block=5"),
        ("slstm", {"conv_kernel": -1}, "conv_kernel"),
        ("slstm", {"forget": "none"}, "exponential"),
        ("log_linear_attention", {"n_levels": 1}, "level"),
    ],
)
def test_a_wrong_option_is_one_clear_error(name: str, options: dict, word: str) -> None:
    with pytest.raises(UsageError, match=word):
        mixers.build(name, 32, **options)
