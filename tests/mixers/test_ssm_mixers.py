"""State-space mixers: how they begin, what they reduce to, and the time that passes between steps."""

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from mixers.test_initialisation import LAYERS, D, layer, log_uniform_step, normal, uniform
from torch import Tensor
from torch.nn import functional as F

from bestiary import LanguageModel, ModelConfig, UsageError, mixers, ops, state
from bestiary.conformance import LAWS, check
from bestiary.conformance.run import table
from bestiary.mixers import Context, Mixer
from bestiary.ops import ssm

TIMED: list[tuple[str, dict[str, Any]]] = [
    ("mamba", {}),
    ("mamba", {"discretisation": "zoh"}),
    ("mamba", {"discretisation": "bilinear"}),
    ("mamba2", {}),
    ("mamba3", {}),
    ("s4", {"d_state": 16}),
    ("s4d", {"d_state": 16}),
    ("s4d", {"d_state": 16, "rule": "bilinear"}),
    ("h3", {"d_state": 16}),
    ("s5", {}),
    ("s5", {"rule": "bilinear"}),
]
QUICK = [law for law in LAWS if law.name != "long_decode"]
IDS = [" ".join([name, *(str(value) for value in options.values() if value != 16)]) for name, options in TIMED]


def built(name: str, d_model: int = 32, **options: Any) -> Mixer:
    return mixers.build(name, d_model, **options).double()


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def gaps(*shape: int) -> Tensor:
    """Intervals from a hundredth of a step to ten steps."""
    return 10 ** (3 * torch.rand(*shape, dtype=torch.float64) - 2)


# --------------------------------------------------------------------------------------------------- initialisation


def test_mamba3() -> None:
    mixer = layer("mamba3{head_dim=4}")  # many heads, so that there is something to measure
    assert log_uniform_step(mixer.dt_bias) and uniform(mixer.in_proj.weight, D**-0.5)
    for ones in (mixer.D, mixer.B_bias, mixer.C_bias, mixer.B_norm.weight, mixer.C_norm.weight):
        assert torch.equal(ones, torch.ones_like(ones))
    assert mixer.B_bias.shape == (64, 128) and mixer.n_angles == 32  # half of the channels turn, two at a time
    assert uniform(mixer.out_proj.weight, (2 * D) ** -0.5 / math.sqrt(2 * LAYERS))


def test_lru_begins_on_a_ring() -> None:
    mixer = layer("lru{d_state=2000, r_min=0.6, r_max=0.9, max_phase=1.5}")
    decay = mixer.system(torch.float64)[0]
    radius, phase = decay.abs(), decay.angle()
    assert 0.6 < radius.min() < 0.61 and 0.89 < radius.max() < 0.9
    assert 0 < phase.min() < 0.01 and 1.49 < phase.max() < 1.5
    area = (radius**2 - 0.6**2) / (0.9**2 - 0.6**2)
    assert area.mean().item() == pytest.approx(0.5, abs=0.03)  # even on the ring, not in the radius
    torch.testing.assert_close(mixer.gamma_log.double().exp(), (1 - radius**2).sqrt(), rtol=1e-4, atol=0)
    assert normal(mixer.B, (2 * D) ** -0.5) and normal(mixer.C, 2000**-0.5) and normal(mixer.D, 1.0)


def test_lru_keeps_the_size_of_its_input() -> None:
    """Gamma: white noise of variance 1 gives every state the variance of B u, whatever its eigenvalue."""
    mixer = built("lru", r_min=0.5, r_max=0.95)
    decay, B, _ = mixer.system(torch.float64)
    gram = (decay.abs() ** 2)[:, None] ** torch.arange(2000) @ torch.ones(2000, dtype=torch.float64)
    variance = (B.abs() ** 2).sum(1) * gram
    plain = torch.view_as_complex(mixer.B).abs().square().sum(1)
    torch.testing.assert_close(variance, plain, rtol=1e-4, atol=0)


def test_s5_begins_as_hippo_in_blocks() -> None:
    mixer = layer("s5{d_state=256, blocks=8}")
    A, _, _, basis = ssm.legs_dplr(32)
    assert torch.allclose(-mixer.log_A_real.double().exp(), A.real.repeat(8), atol=1e-6)
    assert torch.allclose(mixer.A_imag.double(), A.imag.repeat(8), atol=1e-4)
    assert mixer.log_dt.min() >= math.log(1e-3) and mixer.log_dt.max() <= math.log(1e-1) and len(mixer.log_dt) == 128
    assert normal(mixer.D, 1.0)
    # back in HiPPO's basis, B and C are real and of variance 1/P, C with a part for each of the pair
    half = basis[:, :16]
    B = 2 * (half @ torch.view_as_complex(mixer.B.double()).unflatten(0, (8, 16))).real
    assert B.std().item() == pytest.approx(256**-0.5, rel=0.05) and B.abs().max() < 5 * 256**-0.5
    C = torch.view_as_complex(mixer.C.double())
    assert C.abs().square().mean().item() == pytest.approx(2 / 256, rel=0.05)


def test_mamba_with_norms() -> None:
    plain, weighted = layer("mamba{norm_dt_bc=true}"), layer("mamba{norm_dt_bc=weighted}")
    assert not list(plain.norms.parameters()) and [norm.eps for norm in plain.norms] == [1e-6] * 3
    assert [len(norm.weight) for norm in weighted.norms] == [8, 16, 16]
    assert all(torch.equal(norm.weight, torch.ones_like(norm.weight)) for norm in weighted.norms)
    assert not len(layer("mamba").norms)


# --------------------------------------------------------------------------------------------- what they reduce to


def directed(x: Tensor, norm: torch.nn.Module, bias: Tensor, turn: Tensor) -> Tensor:
    """Mamba-3's B or C of one step, (batch, groups N), for every head: normed, shifted, turned by complex numbers."""
    x = x.unflatten(-1, (-1, bias.shape[1]))
    x = norm.weight * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    x = x.repeat_interleave(bias.shape[0] // x.shape[1], dim=1) + bias
    pairs = torch.view_as_complex(x[..., : 2 * turn.shape[-1]].unflatten(-1, (-1, 2)).contiguous())
    return torch.cat([torch.view_as_real(pairs * turn).flatten(-2), x[..., 2 * turn.shape[-1] :]], dim=-1)


@pytest.mark.parametrize("decay", ["heavy_tail", "softplus"])
@pytest.mark.parametrize("options", [{}, {"n_groups": 2, "rope_fraction": 1.0}, {"d_state": 10}])
def test_mamba3_is_a_loop_over_the_paper_s_equations(options: dict[str, Any], decay: str) -> None:
    mixer, x = built("mamba3", 64, decay=decay, **options), inputs(2, 15, 64)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        found, end = mixer(x)
        z, v, B, C, dt, a, trap, theta = mixer.in_proj(x).split(mixer.widths, dim=-1)
        v = v.unflatten(-1, (mixer.n_heads, -1))
        dt, share = F.softplus(dt + mixer.dt_bias), torch.sigmoid(trap)
        A = -F.softplus(a) if decay == "softplus" else -torch.where(a >= 0, 1 + a, 1 / (1 - a))
        angle, h, k_before, v_before = (torch.zeros_like(part) for part in end[:4])
        for t in range(15):
            angle = angle + math.pi * torch.tanh(theta[:, t, None]) * dt[:, t, :, None]
            turn = torch.polar(torch.ones_like(angle), angle)
            k = directed(B[:, t], mixer.B_norm, mixer.B_bias, turn)
            q = directed(C[:, t], mixer.C_norm, mixer.C_bias, turn)
            alpha = (dt[:, t] * A[:, t]).exp()
            beta, gamma = (1 - share[:, t]) * dt[:, t] * alpha, share[:, t] * dt[:, t]
            h = alpha[..., None, None] * h + torch.einsum("bh,bhn,bhp->bhnp", beta, k_before, v_before)
            h = h + torch.einsum("bh,bhn,bhp->bhnp", gamma, k, v[:, t])
            y = torch.einsum("bhnp,bhn->bhp", h, q) + mixer.D[:, None] * v[:, t]
            wanted = mixer.out_proj(y.flatten(1) * F.silu(z[:, t]))
            torch.testing.assert_close(found[:, t], wanted, rtol=0, atol=1e-12 * found.abs().max().item())
            k_before, v_before = k, v[:, t]
    whole = end.memory + torch.einsum("bh,bhn,bhp->bhnp", end.weight, end.key, end.value)
    states = (end.angle, whole, end.key, end.value, end.weight)
    for actual, expected in zip(states, (angle % (2 * math.pi), h, k_before, v_before, gamma)):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def test_mamba3_at_lambda_one_without_turning_is_mamba2_s_recurrence() -> None:
    mixer, x = built("mamba3"), inputs(2, 20, 32)
    x[..., 0] = 1
    with torch.no_grad():
        *_, trap, theta = mixer.in_proj.weight.split(mixer.widths)
        trap[:], theta[:] = 0, 0
        trap[:, 0] = 1e3
        found, _ = mixer(x)
        z, v, B, C, dt, a, _, _ = mixer.in_proj(x).split(mixer.widths, dim=-1)
        k, q = mixer.B_norm(B)[:, :, None] + mixer.B_bias, mixer.C_norm(C)[:, :, None] + mixer.C_bias
        dt, heads = F.softplus(dt + mixer.dt_bias), v.unflatten(-1, (mixer.n_heads, -1))
        y, _ = ops.linear_attention(q, k, heads * dt[..., None], -dt * mixer.rate(a), scale=1.0)
        y = (y + mixer.D[:, None] * heads).flatten(-2)
    torch.testing.assert_close(found, mixer.out_proj(y * F.silu(z)), rtol=0, atol=1e-12)


def test_mamba3_counts_in_its_angles() -> None:
    """Parity of a bit string: each 1 turns the key by pi, and the angle, modulo 2 pi, is all that is needed."""
    bits = torch.randint(2, (4, 300), dtype=torch.float64)
    angle = ops.sum_angles(torch.zeros(4, 1, dtype=torch.float32), (math.pi * bits)[..., None])
    parity = (bits.cumsum(1) % 2)[..., None]
    torch.testing.assert_close(angle.cos().double(), 1 - 2 * parity, rtol=0, atol=1e-6)
    assert angle.dtype == torch.float32 and angle.min() >= 0 and angle.max() < 2 * math.pi + 1e-6


@pytest.mark.parametrize("rule", ["euler", "zoh", "bilinear"])
@pytest.mark.parametrize("norm", [True, "weighted"])
def test_mamba_norms_come_before_the_step_size_is_projected_up(norm: bool | str, rule: str) -> None:
    mixer, x = built("mamba", norm_dt_bc=norm, discretisation=rule), inputs(2, 9, 32)
    with torch.no_grad():
        for weight in mixer.norms.parameters():
            weight.normal_()
        found, _ = mixer(x)
        u, z = mixer.in_proj(x).chunk(2, dim=-1)
        u, _ = mixer.conv(u, None)
        dt, B, C = mixer.x_proj(u).split([2, 16, 16], dim=-1)
        weights = [norm.weight for norm in mixer.norms] if norm == "weighted" else [1, 1, 1]
        dt, B, C = (y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w for y, w in zip((dt, B, C), weights))
        dt = F.softplus(mixer.dt_proj(dt))
        A = -mixer.A_log.exp()
        h = torch.zeros(2, 64, 16, dtype=torch.float64)
        for t in range(9):
            if rule == "euler":
                h = (dt[:, t, :, None] * A).exp() * h + (dt[:, t] * u[:, t])[..., None] * B[:, t, None]
            elif rule == "zoh":
                A_bar = (dt[:, t, :, None] * A).exp()
                h = A_bar * h + (A_bar - 1) / A * B[:, t, None] * u[:, t, :, None]
            else:
                below = 1 - dt[:, t, :, None] * A / 2
                h = (2 - below) / below * h + (dt[:, t] * u[:, t])[..., None] / below * B[:, t, None]
            y = (h @ C[:, t, :, None])[..., 0] + mixer.D * u[:, t]
            torch.testing.assert_close(found[:, t], mixer.out_proj(y * F.silu(z[:, t])), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["lru", "s5"])
def test_lru_and_s5_are_convolutions_with_their_impulse_response(name: str) -> None:
    mixer, x = built(name), inputs(2, 50, 32)
    with torch.no_grad():
        found, _ = mixer(x)
        decay, B, C = mixer.system(torch.float64)
        kernel = ops.impulse_response(decay, B, C, 50)
        s = torch.stack([torch.einsum("loi,bli->bo", kernel[: t + 1].flip(0), x[:, : t + 1]) for t in range(50)], dim=1)
        g = F.gelu(s + mixer.D * x)
        expected = F.glu(mixer.out(g), dim=-1) if name == "lru" else g * torch.sigmoid(mixer.gate(g))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("rule", ["zoh", "bilinear"])
def test_s5_is_the_discretised_real_system_behind_its_conjugate_pairs(rule: str) -> None:
    mixer, x = built("s5", rule=rule), inputs(1, 12, 32)
    with torch.no_grad():
        found, _ = mixer(x)
        A = torch.complex(-mixer.log_A_real.exp(), mixer.A_imag)
        A, dt = torch.cat([A, A.conj()]), mixer.log_dt.exp().repeat(2)
        B, C = (torch.view_as_complex(y) for y in (mixer.B, mixer.C))
        B, C = torch.cat([B, B.conj()]), torch.cat([C, C.conj()], dim=1)
        one = torch.ones_like(A)
        A_bar, B_bar = ssm.zoh(A, one, dt) if rule == "zoh" else ssm.bilinear(A, one, dt)
        h = torch.zeros(32, dtype=torch.complex128)
        for t in range(12):
            h = A_bar * h + B_bar * (B @ x[0, t].to(B.dtype))
            s = C @ h
            assert s.imag.abs().max() < 1e-12
            g = F.gelu(s.real + mixer.D * x[0, t])
            torch.testing.assert_close(found[0, t], g * torch.sigmoid(mixer.gate(g)), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lru", {"r_min": 0.9, "r_max": 0.5}, "r_min < r_max"),
        ("s5", {"blocks": 5}, "blocks of an even size|blocks=5"),
        ("s5", {"rule": "euler"}, "valid: bilinear, zoh"),
        ("mamba3", {"rope_fraction": 0.0}, "rope_fraction"),
        ("mamba3", {"decay": "heavy"}, "did you mean 'heavy_tail'"),
        ("mamba", {"norm_dt_bc": "rms"}, "valid: false, true, weighted"),
        ("mamba", {"discretisation": "foh"}, "valid: bilinear, euler, zoh"),
    ],
)
def test_bad_options_are_one_clear_line(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        mixers.build(name, 32, **options)


# ------------------------------------------------------------------------------------ the time between the steps


class WithTimes(Mixer):
    """A mixer whose intervals follow from its inputs, so that every law holds for the two together."""

    def __init__(self, inner: Mixer):
        super().__init__(inner.d_model)
        self.inner = inner

    def initial_state(self, batch_size: int, *, device: Any = None, dtype: Any = None) -> Any:
        return self.inner.initial_state(batch_size, device=device, dtype=dtype)

    def mix_in_context(self, x: Tensor, state: Any, lengths: Tensor | None, context: Context) -> tuple[Tensor, Any]:
        times = 3 * torch.sigmoid(2 * x[..., 0].float() if x.dtype == torch.bfloat16 else 2 * x[..., 0])
        return self.inner.mix_in_context(x, state, lengths, replace(context, intervals=times))


@pytest.mark.parametrize(("name", "options"), TIMED, ids=IDS)
def test_every_law_holds_with_intervals(name: str, options: dict[str, Any]) -> None:
    verdicts = check(name, lambda: WithTimes(mixers.build(name, 32, **options)), examples=3, seed=5, laws=QUICK)
    assert [(v.law, v.message) for v in verdicts if not v.holds] == [], table(verdicts)


@pytest.mark.parametrize(
    ("name", "options"), [case for case in TIMED if "discretisation" in case[1]] + [("mamba", {"norm_dt_bc": True})]
)
def test_every_law_holds_for_mamba_s_options(name: str, options: dict[str, Any]) -> None:
    verdicts = check(name, lambda: mixers.build(name, 32, **options), examples=3, seed=5, laws=QUICK)
    assert [(v.law, v.message) for v in verdicts if not v.holds] == [], table(verdicts)


@pytest.mark.parametrize(("name", "options"), TIMED, ids=IDS)
def test_equal_intervals_are_no_intervals(name: str, options: dict[str, Any]) -> None:
    mixer, x = built(name, **options), inputs(2, 40, 32)
    with torch.no_grad():
        (y, end), (z, last) = mixer(x), mixer(x, context=Context(intervals=torch.ones(2, 40)))
        torch.testing.assert_close(z, y, rtol=0, atol=1e-11)
        torch.testing.assert_close(mixer(x[:, :5], last)[0], mixer(x[:, :5], end)[0], rtol=0, atol=1e-11)
        other, _ = mixer(x, context=Context(intervals=torch.full((2, 40), 2.0)))
    assert (other - y).abs().max() > 1e-4


def slower(mixer: Mixer, name: str) -> None:
    """Double the step size in the parameters (those that depend on the data then must not)."""
    with torch.no_grad():
        if name == "mamba":
            mixer.dt_proj.bias.copy_(_doubled(mixer.dt_proj.bias))
        elif name in ("mamba2", "mamba3"):
            mixer.dt_bias.copy_(_doubled(mixer.dt_bias))
        else:
            (mixer.ssm if name in ("s4d", "h3") else mixer).log_dt.add_(math.log(2))


def _doubled(bias: Tensor) -> Tensor:
    """The bias whose softplus is twice as large."""
    return (2 * F.softplus(bias)).expm1().log()


@pytest.mark.parametrize(("name", "options"), TIMED, ids=IDS)
def test_half_the_intervals_and_twice_the_step_size_are_the_same(name: str, options: dict[str, Any]) -> None:
    mixer, x, times = built(name, **options), inputs(2, 30, 32), gaps(2, 30)
    with torch.no_grad():
        if name == "mamba":
            mixer.dt_proj.weight.zero_()
        elif name == "mamba2":
            mixer.in_proj.weight[-mixer.n_heads :] = 0
        elif name == "mamba3":
            start = sum(mixer.widths[:4])
            mixer.in_proj.weight[start : start + mixer.n_heads] = 0
        y, _ = mixer(x, context=Context(intervals=times))
        slower(mixer, name)
        z, _ = mixer(x, context=Context(intervals=times / 2))
    torch.testing.assert_close(z, y, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("name", "options"), TIMED, ids=IDS)
def test_packed_documents_bring_their_own_intervals(name: str, options: dict[str, Any]) -> None:
    mixer, x, times, bounds = built(name, **options), inputs(1, 30, 32), gaps(1, 30), [0, 4, 4, 30]
    with torch.no_grad():
        y, _ = mixer(x, cu_seqlens=torch.tensor(bounds), context=Context(intervals=times))
        for a, b in itertools.pairwise(bounds):
            alone, _ = mixer(x[:, a:b], context=Context(intervals=times[:, a:b]))
            torch.testing.assert_close(y[:, a:b], alone, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("name", "options"), TIMED, ids=IDS)
def test_intervals_in_padding_may_be_anything(name: str, options: dict[str, Any]) -> None:
    mixer, x, times, lengths = built(name, **options), inputs(3, 20, 32), gaps(3, 20), torch.tensor([0, 7, 20])
    padded = torch.where(torch.arange(20) < lengths[:, None], times, torch.nan)
    start = mixer(inputs(3, 5, 32))[1]
    y, end = mixer(x, start, lengths=lengths, context=Context(intervals=padded))
    (y.sum() + sum(part.sum() for part in end)).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in mixer.parameters())
    assert all(torch.equal(after[0], before[0]) for after, before in zip(end, start))
    for row, n in enumerate(lengths.tolist()):
        own = state.select(start, row)
        alone, last = mixer(x[row : row + 1, :n], own, context=Context(intervals=times[row : row + 1, :n]))
        torch.testing.assert_close(y[row : row + 1, :n], alone, rtol=0, atol=1e-11)
        for actual, expected in zip(state.select(end, row), last):
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", ["s4", "s4d", "s5"])
def test_no_time_no_change(name: str) -> None:
    mixer = built(name, d_state=16)
    _, before = mixer(inputs(2, 6, 32))
    _, after = mixer(inputs(2, 3, 32), before, context=Context(intervals=torch.zeros(2, 3)))
    assert torch.equal(after.h, before.h)


@pytest.mark.parametrize(("name", "options"), [("s4d", {"d_state": 8}), ("s5", {})])
def test_a_held_input_may_be_told_once_or_again_and_again(name: str, options: dict[str, Any]) -> None:
    """Under zero-order hold, one step of length a + b is a step of a and one of b with the same input."""
    mixer, x, times, share = built(name, **options), inputs(2, 12, 32), gaps(2, 12), torch.rand(2, 12).double()
    with torch.no_grad():
        y, end = mixer(x, context=Context(intervals=times))
        parts = torch.stack([share * times, (1 - share) * times], dim=-1).flatten(1)
        z, last = mixer(x.repeat_interleave(2, dim=1), context=Context(intervals=parts))
    torch.testing.assert_close(z[:, 1::2], y, rtol=0, atol=1e-11)
    torch.testing.assert_close(last.h, end.h, rtol=0, atol=1e-11)


def test_wrong_intervals_are_one_clear_line() -> None:
    mixer, x = built("s4d"), inputs(2, 4, 32)
    with pytest.raises(UsageError, match=r"shape \(2, 4\)"):
        mixer(x, context=Context(intervals=torch.ones(2, 3)))
    for wrong in (-1.0, float("nan")):
        with pytest.raises(UsageError, match="at least 0"):
            mixer(x, context=Context(intervals=torch.full((2, 4), wrong)))
    with pytest.raises(UsageError, match="no step size"):
        built("lru")(x, context=Context(intervals=torch.ones(2, 4)))


@pytest.mark.parametrize("layout", ["s4d{d_state=8} attention", "mamba2*2"])
def test_a_model_takes_intervals(layout: str) -> None:
    model = LanguageModel(ModelConfig(layout, 32)).double()
    tokens, times = torch.randint(256, (2, 9)), gaps(2, 9)
    with torch.no_grad():
        plain, _ = model(tokens)
        torch.testing.assert_close(model(tokens, intervals=torch.ones(2, 9))[0], plain, rtol=0, atol=1e-9)
        whole, _ = model(tokens, intervals=times)
        assert (whole - plain).abs().max() > 1e-3
        first, middle = model(tokens[:, :4], intervals=times[:, :4])
        second, _ = model(tokens[:, 4:], middle, intervals=times[:, 4:])
        torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=0, atol=1e-9)
        loss, _ = model.loss(tokens, tokens, intervals=times)
        torch.testing.assert_close(loss, F.cross_entropy(whole.flatten(0, 1), tokens.flatten()))
        packed, _ = model(tokens.reshape(1, 18), cu_seqlens=torch.tensor([0, 9, 18]), intervals=times.reshape(1, 18))
        torch.testing.assert_close(packed.reshape(whole.shape), whole, rtol=0, atol=1e-9)


def test_a_model_that_cannot_follow_intervals_says_who_can() -> None:
    model = LanguageModel(ModelConfig("gla", 32))
    with pytest.raises(UsageError, match="these can: h3, mamba, mamba2, mamba3, s4, s4d, s5"):
        model(torch.randint(256, (1, 3)), intervals=torch.ones(1, 3))
