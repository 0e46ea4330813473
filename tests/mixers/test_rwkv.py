"""RWKV-5, 6 and 7: initialisations on assembled models, the papers' equations as plain loops, shared values."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bestiary import LanguageModel, ModelConfig, UsageError, mixers
from bestiary.conformance import check
from bestiary.mixers import Context, Mixer
from bestiary.mixers.parts import HeadNorm
from bestiary.training.config import TrainConfig
from bestiary.training.optimizer import build_optimizer

LAYERS, D = 4, 128
RWKV = ["rwkv5{version=5.1}", "rwkv5", "rwkv6", "rwkv7"]


def model(layout: str, d_model: int = D, dtype: torch.dtype = torch.float32) -> LanguageModel:
    torch.manual_seed(3)
    return LanguageModel(ModelConfig(layout, d_model)).to(dtype)


def layer(layout: str, index: int = 2) -> Mixer:
    return model(f"{layout}*{LAYERS}").blocks[index].mixer


def channel(layout: str, index: int = 2) -> Mixer:
    return model(f"{layout}*{LAYERS}").blocks[index].channel


def awake(part: nn.Module, size: float = 0.2) -> nn.Module:
    """In float64, with noise on every parameter: nothing is zero, nothing alike."""
    torch.manual_seed(4)
    part.double()
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return part


def mixer(name: str, d_model: int = 64, **options) -> Mixer:
    return awake(mixers.build(name, d_model, **options))


def inputs(time: int = 9, d_model: int = 64) -> Tensor:
    return torch.randn(2, time, d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def orthogonal(weight: Tensor, gain: float) -> bool:
    rows, columns = weight.shape
    product = weight @ weight.T if rows <= columns else weight.T @ weight
    return torch.allclose(product, gain**2 * torch.eye(min(rows, columns)), atol=1e-5)


def uniform(weight: Tensor, bound: float) -> bool:
    tight = 0.95 * bound < weight.abs().max() <= bound * (1 + 1e-6)
    return bool(tight) and weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.08)


def places(index: int) -> tuple[float, float]:
    """0 in the first layer to 1 in the last; 1 in the first to almost 0 in the last."""
    return index / (LAYERS - 1), 1 - index / LAYERS


i = torch.arange(D)


@pytest.mark.parametrize("index", [0, 1, 3])
def test_rwkv5s_initialisation(index: int) -> None:
    five, (deep, shallow) = layer("rwkv5", index), places(index)
    assert torch.allclose(five.mix_k, (i / D) ** shallow) and torch.allclose(five.mix_r, (i / D) ** (0.5 * shallow))
    assert torch.allclose(five.mix_v, (i / D) ** shallow + 0.3 * deep) and torch.equal(five.mix_g, five.mix_r)
    assert five.time_decay.shape == five.bonus.shape == (4, 32)
    assert torch.allclose(five.time_decay.flatten(), -6 + 5 * (i / (D - 1)) ** (0.7 + 1.3 * deep))
    assert torch.allclose(five.bonus.flatten(), deep * (1 - i / (D - 1)) + 0.1 * ((i + 1) % 3 - 1), atol=1e-7)
    assert all(orthogonal(linear.weight, 1) for linear in (five.receptance, five.key, five.value, five.gate))
    assert not five.output.weight.any() and torch.equal(five.ln_x.weight, torch.full((D,), ((1 + index) / 4) ** 0.7))
    mix = channel("rwkv5", index)
    assert torch.equal(mix.mix_k, mix.mix_r) and torch.allclose(mix.mix_k, (i / D) ** shallow)
    assert mix.d_hidden == 448 and orthogonal(mix.key.weight, math.sqrt(3.5))
    assert not mix.value.weight.any() and not mix.receptance.weight.any()


@pytest.mark.parametrize("index", [0, 1, 3])
def test_rwkv51s_initialisation(index: int) -> None:
    old, (deep, _) = layer("rwkv5{version=5.1}", index), places(index)
    h = torch.arange(4)
    assert torch.allclose(old.time_decay, -6 + 5 * (h / 3) ** (0.7 + 1.3 * deep))
    assert torch.equal(old.time_first, torch.full((4,), -3.0)) and not hasattr(old, "gate")


@pytest.mark.parametrize("index", [0, 1, 3])
def test_rwkv6s_initialisation(index: int) -> None:
    six, five, (_, shallow) = layer("rwkv6", index), layer("rwkv5", index), places(index)
    usual, value, half = five.mix_k, five.mix_v, five.mix_r
    assert torch.allclose(six.maa, 1 - torch.stack([usual, usual, value, half, half])) and torch.allclose(
        six.maa_x, 1 - usual
    )
    assert torch.equal(six.time_decay, five.time_decay.flatten()) and torch.equal(six.bonus, five.bonus)
    assert not six.mix_down.weight.any() and not six.decay.down.weight.any()
    assert uniform(six.mix_up, 0.01) and uniform(six.decay.up.weight, 0.01)
    assert all(orthogonal(linear.weight, 0.1) for linear in (six.key, six.gate))
    assert all(orthogonal(linear.weight, 1) for linear in (six.receptance, six.value))
    assert not six.output.weight.any() and torch.equal(six.ln_x.weight, five.ln_x.weight)
    mix = channel("rwkv6", index)
    assert torch.equal(mix.maa_k, mix.maa_r) and torch.allclose(mix.maa_k, 1 - (i / D) ** (shallow**3))
    assert mix.d_hidden == 448 and orthogonal(mix.key.weight, 1)
    assert not mix.value.weight.any() and not mix.receptance.weight.any()


@pytest.mark.parametrize("index", [0, 1, 3])
def test_rwkv7s_initialisation(index: int) -> None:
    seven, (deep, shallow) = layer("rwkv7", index), places(index)
    for name, power in {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}.items():
        assert torch.allclose(getattr(seven, f"x_{name}"), 1 - (i / D) ** (power * shallow))
    line, z = i / (D - 1) - 0.5, (i % 32 - 15.5) / 15.5
    zigzag = z * z.abs()
    assert torch.allclose(seven.w0, -6 + 6 * (i / (D - 1)) ** (1 + deep**0.3) + 0.5 + 2.5 * zigzag, atol=1e-5)
    assert torch.allclose(seven.a0, -0.19 + 0.3 * zigzag + 0.4 * line, atol=1e-6)
    assert torch.allclose(seven.k_k, 0.71 - 0.1 * line) and (seven.k_a == 1.02).all() and (seven.r_k == -0.04).all()
    lows = [seven.w_low, seven.a_low, seven.g_low]
    if index:
        assert torch.allclose(seven.v0, 0.73 - 0.4 * line)
        lows.append(seven.v_low)
    else:
        assert not hasattr(seven, "v0") and not hasattr(seven, "v_low")
    assert all(not low.down.weight.any() and orthogonal(low.up.weight, 0.1) for low in lows)
    assert uniform(seven.receptance.weight, 0.5 / math.sqrt(D)) and uniform(seven.value.weight, 0.5 / math.sqrt(D))
    assert uniform(seven.key.weight, 0.05 / math.sqrt(D)) and not seven.output.weight.any()
    assert torch.equal(seven.ln_x.weight, torch.full((D,), ((1 + index) / 4) ** 0.7))
    mix = channel("rwkv7", index)
    assert torch.allclose(mix.x_k, 1 - (i / D) ** (shallow**4)) and not mix.value.weight.any()
    assert mix.d_hidden == 512 and uniform(mix.key.weight, 0.5 / math.sqrt(D))


@pytest.mark.parametrize(
    ("d_model", "ranks"), [(32, [16, 16, 8, 32]), (768, [64, 64, 32, 128]), (2048, [128, 128, 64, 224])]
)
def test_rwkv7s_ranks_are_the_published_ones_at_published_widths(d_model: int, ranks: list[int]) -> None:
    with torch.device("meta"):
        seven = mixers.build("rwkv7", d_model, layer_index=1, n_layers=2)
    assert [low.down.out_features for low in (seven.w_low, seven.a_low, seven.v_low, seven.g_low)] == ranks


@pytest.mark.parametrize(
    ("name", "scales"),
    [
        ("rwkv5{version=5.1}", {"time_decay": 2, "time_first": 3}),
        ("rwkv5", {"time_decay": 2}),
        ("rwkv6", {"time_decay": 2}),
        ("rwkv7", {"w0": 2}),
    ],
)
def test_large_matrices_alone_decay_and_decays_learn_faster(name: str, scales: dict[str, float]) -> None:
    rwkv = model(f"{name}*2", 64)
    names = {id(p): n for n, p in rwkv.blocks.named_parameters()}
    decaying, scaled = set(), {}
    for group in build_optimizer(rwkv, TrainConfig(weight_decay=0.1)).param_groups:
        for parameter in group["params"]:
            found = names.get(id(parameter), "")
            if found and group["weight_decay"]:
                decaying.add(found.split(".", 2)[2])
            if group["lr_scale"] != 1:
                scaled[found.split(".", 2)[2]] = group["lr_scale"]
    large = {"receptance", "key", "value", "output", "gate"}
    assert decaying == {f"{part}.weight" for part in large if not (part == "gate" and name in (RWKV[0], RWKV[3]))}
    assert scaled == scales


def shifted(x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 1, -1))


def group_norm(y: Tensor, part: Mixer) -> Tensor:
    """(batch, time, heads, N) -> (batch, time, d_model), by PyTorch's own group norm."""
    flat = y.flatten(0, 1).flatten(1)
    norm = F.group_norm(flat, part.n_heads, part.ln_x.weight, part.ln_x.bias, part.ln_x.eps)
    return norm.view(*y.shape[:2], -1)


def eagle(r: Tensor, k: Tensor, v: Tensor, d: Tensor, u: Tensor) -> Tensor:
    """RWKV-5's and 6's loop: d (batch, time, heads, N) decays, u (heads, N) the bonus."""
    S, said = r.new_zeros(r.shape[0], r.shape[2], r.shape[3], r.shape[3]), []
    for t in range(r.shape[1]):
        write = torch.einsum("bhi,bhj->bhij", k[:, t], v[:, t])
        said.append(torch.einsum("bhi,bhij->bhj", r[:, t], S + u[..., None] * write))
        S = d[:, t, :, :, None] * S + write
    return torch.stack(said, 1)


@pytest.mark.parametrize("version", [5.1, 5.2])
@torch.no_grad()
def test_rwkv5_is_linear_attention_with_a_bonus(version: float) -> None:
    five, x = mixer("rwkv5", version=version, head_size=16), inputs()

    def heads(linear: nn.Linear, mix: Tensor) -> Tensor:
        return linear(x * mix + shifted(x) * (1 - mix)).view(2, -1, 4, 16)

    r, k, v = heads(five.receptance, five.mix_r), heads(five.key, five.mix_k), heads(five.value, five.mix_v)
    d = torch.exp(-torch.exp(five.time_decay))
    d, u = (d, five.bonus) if version == 5.2 else (d[:, None], five.time_first.exp()[:, None].expand(4, 16))
    y = group_norm(eagle(r, k, v, d.expand_as(k), u), five)
    if version == 5.2:
        y = y * F.silu(heads(five.gate, five.mix_g).flatten(2))
    assert torch.allclose(five(x)[0], five.output(y), rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_rwkv6_is_linear_attention_whose_decay_and_shift_see_the_data() -> None:
    six, x = mixer("rwkv6", head_size=16), inputs()
    sx = shifted(x) - x
    inner = torch.tanh((x + sx * six.maa_x) @ six.mix_down.weight.T).chunk(5, dim=-1)
    xw, xk, xv, xr, xg = (x + sx * (maa + part @ up) for maa, part, up in zip(six.maa, inner, six.mix_up))
    r, k, v = (linear(z).view(2, -1, 4, 16) for linear, z in ((six.receptance, xr), (six.key, xk), (six.value, xv)))
    w = six.time_decay + torch.tanh(xw @ six.decay.down.weight.T) @ six.decay.up.weight.T
    y = group_norm(eagle(r, k, v, torch.exp(-torch.exp(w)).view(2, -1, 4, 16), six.bonus), six)
    assert torch.allclose(six(x)[0], six.output(y * F.silu(six.gate(xg))), rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_rwkv6_without_its_low_ranks_is_rwkv5() -> None:
    six, five, x = mixer("rwkv6"), mixer("rwkv5"), inputs(40)
    nn.init.zeros_(six.mix_down.weight)
    nn.init.zeros_(six.decay.down.weight)
    same = six.state_dict()
    same = {name: same.get(name, old) for name, old in five.state_dict().items()}
    same |= {f"mix_{part}": 1 - row for part, row in zip("kvrg", six.maa[1:])}
    same["time_decay"] = six.time_decay.view_as(five.time_decay)
    five.load_state_dict(same)
    assert torch.allclose(six(x)[0], five(x)[0], rtol=1e-10, atol=1e-12)


def goose(seven: Mixer, x: Tensor, v_first: Tensor | None) -> Tensor:
    """RWKV-7 as the paper writes it: S is (value, key) there, and is multiplied from the right."""
    sx, sigmoid = shifted(x) - x, torch.sigmoid

    def low(part: nn.Module, z: Tensor, f=lambda inner: inner) -> Tensor:
        return f(z @ part.down.weight.T) @ part.up.weight.T

    xr, xw, xk, xv, xa, xg = (x + sx * getattr(seven, f"x_{part}") for part in "rwkvag")
    r, k, v = seven.receptance(xr), seven.key(xk), seven.value(xv)
    d = torch.exp(-math.exp(-0.5) * sigmoid(seven.w0 + low(seven.w_low, xw, torch.tanh)))
    a, g = sigmoid(seven.a0 + low(seven.a_low, xa)), low(seven.g_low, xg, sigmoid)
    if v_first is not None:
        v = v + (v_first - v) * sigmoid(seven.v0 + low(seven.v_low, xv))
    kappa, k = k * seven.k_k, k * (1 + (a - 1) * seven.k_a)
    r, k, v, d, a, kappa = (z.view(2, -1, seven.n_heads, seven.head_size) for z in (r, k, v, d, a, kappa))
    kappa = kappa / kappa.norm(dim=-1, keepdim=True)
    S, said = x.new_zeros(2, seven.n_heads, seven.head_size, seven.head_size), []
    for t in range(x.shape[1]):
        transition = torch.diag_embed(d[:, t]) - kappa[:, t, :, :, None] * (a * kappa)[:, t, :, None, :]
        S = S @ transition + v[:, t, :, :, None] * k[:, t, :, None, :]
        said.append((S @ r[:, t, :, :, None])[..., 0])
    bonus = (r * k * seven.r_k).sum(-1, keepdim=True) * v
    return seven.output((group_norm(torch.stack(said, 1), seven) + bonus.flatten(2)) * g)


@pytest.mark.parametrize("index", [0, 1])
@torch.no_grad()
def test_rwkv7_is_the_papers_equation(index: int) -> None:
    seven, x = mixer("rwkv7", head_size=16, layer_index=index, n_layers=2), inputs()
    v_first = inputs(9).flip(0) if index else None
    context = Context(v_first=v_first)
    y, _ = seven(x, context=context)
    assert torch.allclose(y, goose(seven, x, v_first), rtol=1e-10, atol=1e-12)
    left = seven.value(x + (shifted(x) - x) * seven.x_v) if v_first is None else v_first
    assert torch.allclose(context.v_first, left, rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_rwkv7_alone_mixes_no_foreign_values() -> None:
    seven, x = mixer("rwkv7", head_size=16, layer_index=1, n_layers=2), inputs()
    assert torch.allclose(seven(x)[0], goose(seven, x, None), rtol=1e-10, atol=1e-12)


def values_matter(rwkv: LanguageModel, index: int) -> bool:
    """Whether the layer's own values reach the logits."""
    tokens = torch.randint(256, (1, 12), generator=torch.Generator().manual_seed(6))
    before, _ = rwkv(tokens)
    rwkv.blocks[index].mixer.value.weight.neg_()
    return not torch.allclose(rwkv(tokens)[0], before, atol=1e-9)


@pytest.mark.parametrize(
    ("layout", "first", "later"),
    [
        ("rwkv7*2", 0, 1),
        ("rwkv7*3", 0, 2),
        ("attention rwkv7 attention rwkv7", 1, 3),
        ("rwkv4 rwkv7 mamba rwkv7", 1, 3),
    ],
)
@torch.no_grad()
def test_layers_share_the_values_of_the_first_of_their_kind(layout: str, first: int, later: int) -> None:
    rwkv = awake(model(layout, 64), 0.1)
    for block in rwkv.blocks:
        if hasattr(block.mixer, "v0"):
            block.mixer.v0.fill_(200.0)  # a gate that takes nothing but the shared values
    assert values_matter(rwkv, first) and not values_matter(rwkv, later)


@pytest.mark.parametrize(
    "layout", ["rwkv7*3", "attention rwkv7 mamba rwkv7", "rwkv6 rwkv5 rwkv4 rwkv7{train_state=true}*2"]
)
@torch.no_grad()
def test_a_model_is_the_same_whole_split_stepped_padded_and_packed(layout: str) -> None:
    rwkv = awake(model(layout, 32), 0.1)
    tokens = torch.randint(256, (2, 17))
    whole, end = rwkv(tokens)
    state = rwkv.initial_state(2)
    for t in range(17):
        logits, state = rwkv.step(tokens[:, t], state)
        assert torch.allclose(logits, whole[:, t], atol=1e-9)
    head, state = rwkv(tokens[:, :6])
    tail, state = rwkv(tokens[:, 6:], state)
    assert torch.allclose(torch.cat([head, tail], 1), whole, atol=1e-9)
    assert torch.allclose(rwkv(tokens, state)[0], rwkv(tokens, end)[0], atol=1e-9)
    packed, _ = rwkv(torch.cat([tokens[:1, :5], tokens[1:, :12]], 1), cu_seqlens=torch.tensor([0, 5, 17]))
    assert torch.allclose(packed[0], torch.cat([whole[0, :5], whole[1, :12]]), atol=1e-9)
    padded, _ = rwkv(tokens, lengths=torch.tensor([5, 12]))
    assert torch.allclose(padded[0, :5], whole[0, :5], atol=1e-9)
    assert torch.allclose(padded[1, :12], whole[1, :12], atol=1e-9)


@pytest.mark.parametrize("name", ["rwkv5", "rwkv6", "rwkv7"])
def test_a_prompts_continuation_is_what_it_is_alone(name: str) -> None:
    rwkv = awake(model(f"{name}{{train_state=true}}*2", 32), 0.1)
    prompts = [[1, 2, 3], [5], [7, 8, 9, 10, 11, 12, 13]]
    together = rwkv.generate(prompts, max_new_tokens=6)
    assert together == [rwkv.generate([prompt], max_new_tokens=6)[0] for prompt in prompts]


@pytest.mark.parametrize("name", RWKV)
def test_a_trained_first_state_is_the_start_and_learns(name: str) -> None:
    name, _, version = name.partition("{version=")
    options = {"version": 5.1} if version else {}
    plain, trained, x = mixer(name, **options), mixer(name, train_state=True, **options), inputs()
    assert not plain.initial_state(1).memory.any() and plain.first_memory is None
    plain.load_state_dict({key: value for key, value in trained.state_dict().items() if key != "first_memory"})
    start = plain.initial_state(2)._replace(memory=trained.first_memory.expand(2, -1, -1, -1))
    y, _ = trained(x)
    assert torch.equal(y, plain(x, start)[0]) and not torch.allclose(y, plain(x)[0], atol=1e-3)
    y[:, -1].square().sum().backward()
    assert (trained.first_memory.grad.abs() > 0).all()


@pytest.mark.parametrize("name", ["rwkv5", "rwkv6", "rwkv7"])
def test_a_first_state_begins_as_zero(name: str) -> None:
    assert torch.equal(
        layer(f"{name}{{train_state=true}}").first_memory, torch.zeros(4, 32, 32)
    )  # so that a model tuned by its state starts as itself


def test_the_norms_epsilon_is_that_of_heads_divided_by_8() -> None:
    norm, y = (
        awake(HeadNorm(4, 64, eps=64e-5, bias=True)),
        0.01 * inputs().view(2, 9, 4, 16),
    )  # small enough for eps to matter
    expected = F.group_norm(y.flatten(0, 1).flatten(1) / 8, 4, norm.weight, norm.bias, 1e-5).view(2, 9, 64)
    assert torch.allclose(norm(y.flatten(-2)), expected, rtol=1e-10)
    assert not torch.allclose(awake(HeadNorm(4, 64, eps=1e-5, bias=True))(y.flatten(-2)), expected, rtol=0.1)


@pytest.mark.parametrize("name", ["rwkv5", "rwkv6", "rwkv7"])
def test_the_norms_epsilon_can_be_chosen(name: str) -> None:
    assert layer(name).ln_x.eps == 64e-5 and layer(f"{name}{{gn_eps=1e-5}}").ln_x.eps == 1e-5


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("rwkv5", {"version": 5.1, "train_state": True}),
        ("rwkv6", {"train_state": True, "head_size": 8}),
        ("rwkv7", {"layer_index": 1, "n_layers": 2, "train_state": True, "head_size": 16}),
    ],
)
def test_every_option_obeys_the_laws(name: str, options: dict) -> None:
    verdicts = check(name, lambda: mixers.build(name, 32, **options), examples=4)
    assert [(v.law, v.message) for v in verdicts if not v.holds] == []


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("rwkv5", {"version": 5.3}, "5.1 or 5.2"),
        ("rwkv5", {"head_size": 48}, "head_size"),
        ("rwkv6", {"head_size": 1}, "head_size"),
        ("rwkv6", {"mix_rank": 0}, "mix_rank"),
        ("rwkv6", {"gn_eps": 0.0}, "gn_eps"),
        ("rwkv7", {"gate_rank": 0}, "gate_rank"),
    ],
)
def test_bad_options_are_named(name: str, options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        mixers.build(name, 64, **options)
