"""Distillation: filters that are recurrences are recovered, others are fitted as well as is said, or refused."""

import math

import pytest
import torch
from torch import Tensor

import bestiary
from bestiary import LanguageModel, ModelConfig, UsageError, mixers, ops, state
from bestiary.mixers.hyena import Hyena
from bestiary.models.distill import distill
from bestiary.models.modal_fit import combine, fit_modes, norm_from

D = 32
SMOOTH = "l_max=64, filter_bands=2, frequency=2.0"


def modes(channels: int, pairs: int, real: int, radius: float = 0.98) -> tuple[Tensor, Tensor]:
    """Random poles, those of conjugate pairs in the upper half of the circle, and residues."""
    size = radius * (0.5 + 0.5 * torch.rand(channels, pairs + real, dtype=torch.float64))
    angle = math.pi * torch.rand(channels, pairs + real, dtype=torch.float64)
    angle[:, pairs:] = (angle[:, pairs:] > 1.5) * math.pi  # real poles, positive or negative
    residues = torch.randn(channels, pairs + real, 2, dtype=torch.float64)
    residues[:, pairs:, 1] = 0
    return torch.polar(size, angle), torch.view_as_complex(residues)


def with_filter(taps: Tensor) -> Hyena:
    """A Hyena with these taps, in float64."""
    mixer = mixers.build("hyena", taps.shape[0], l_max=taps.shape[1]).double()
    mixer.filter.taps = lambda lags, dtype: taps[:, :lags].to(dtype)
    return mixer


def relative(actual: Tensor, expected: Tensor) -> Tensor:
    return (actual - expected).norm(dim=1) / expected.norm(dim=1)


# ------------------------------------------------------------------------------------------------------------- the fit


@pytest.mark.parametrize("method", ["hankel", "gradient"])
@pytest.mark.parametrize(("pairs", "real"), [(1, 0), (0, 1), (2, 2), (4, 1)])
@pytest.mark.parametrize("spare", [0, 7])
def test_a_filter_that_is_a_recurrence_is_recovered(pairs: int, real: int, spare: int, method: str) -> None:
    poles, residues = modes(5, pairs, real)
    taps = combine(poles, residues, 200)
    found, weights = fit_modes(taps, 2 * pairs + real + spare, method=method)
    assert relative(combine(found, weights, 400), combine(poles, residues, 400)).max() < 1e-8  # beyond the data, too
    nearest = (found[:, :, None] - poles[:, None]).abs().amin(1)
    assert nearest.max() < 1e-5
    assert (found.abs() < 1).all()
    if not spare:
        assert found.shape[1] == pairs + real


def test_a_slow_pole_is_found_and_one_beyond_the_circle_is_moved_inside() -> None:
    for size, found_size in ((0.9999, 0.9999), (1.01, 0.9999)):
        poles = torch.tensor([[size]], dtype=torch.complex128)
        found, _ = fit_modes(combine(poles, torch.ones_like(poles), 64), 1)
        assert found.abs().item() == pytest.approx(found_size, abs=1e-9)


def test_an_empty_filter_is_fitted_by_nothing() -> None:
    taps = torch.zeros(2, 50, dtype=torch.float64)
    taps[1] = 0.9 ** torch.arange(50).double()
    for method in ("hankel", "gradient"):
        poles, residues = fit_modes(taps, 4, method=method)
        assert not residues[0].any() and relative(combine(poles, residues, 50), taps)[1] < 1e-10


def test_a_noisy_filter_is_fitted_badly_by_stable_poles_and_the_more_the_better() -> None:
    taps = torch.randn(6, 120, dtype=torch.float64)
    errors = []
    for order in (4, 12, 40):
        poles, residues = fit_modes(taps, order)
        errors.append(relative(combine(poles, residues, 120), taps))
        assert (poles.abs() < 1).all()
    assert errors[0].min() > 0.5 and (errors[0] > errors[2]).all()


def test_descent_never_makes_a_channel_worse_and_most_better() -> None:
    taps = mixers.build("hyena", D, l_max=128).filter.taps(128, torch.float64).detach()[:, 1:]
    start, end = (relative(combine(*fit_modes(taps, 8, method=method), 127), taps) for method in ("hankel", "gradient"))
    assert (end <= start).all() and (end < 0.98 * start).double().mean() > 0.8


def test_the_norm_beyond_a_lag_is_the_sum_of_squares() -> None:
    poles, residues = modes(4, 3, 1)
    taps = combine(poles, residues, 3000)
    for lag in (0, 1, 50):
        torch.testing.assert_close(norm_from(poles, residues, lag), taps[:, lag:].norm(dim=1), rtol=1e-9, atol=0)


# ------------------------------------------------------------------------------------------------------------ the mixer


@pytest.mark.parametrize("method", ["hankel", "gradient"])
def test_a_hyena_that_is_a_recurrence_is_distilled_exactly(method: str) -> None:
    poles, residues = modes(D, 2, 1, radius=0.9)
    taps = combine(poles, residues, 150)
    taps[:, 0] = torch.randn(D, dtype=torch.float64)  # lag 0 stands by itself
    hyena = with_filter(taps)
    recurrent, [fit] = distill(hyena, order=5, method=method)
    assert fit.worst < 1e-8 and fit.d_state == 3 and fit.largest_pole < 0.9
    assert fit.tail == pytest.approx(
        (combine(poles, residues, 900)[:, 150:].norm(dim=1) / taps[:, 1:].norm(dim=1)).max()
    )
    x = torch.randn(2, 150, D, dtype=torch.float64)
    with torch.no_grad():
        wanted, _ = hyena(x)
        y, after = recurrent(x)
        torch.testing.assert_close(y, wanted, rtol=0, atol=1e-8 * wanted.abs().max().item())
        past = recurrent.initial_state(2, dtype=torch.float64)
        for t in range(150):
            y_t, past = recurrent.step(x[:, t], past)
            torch.testing.assert_close(y_t, wanted[:, t], rtol=0, atol=1e-8 * wanted.abs().max().item())
    assert state.nbytes(past) == state.nbytes(after) == 2 * recurrent.state_nbytes(1) * 2 < state.nbytes(hyena(x)[1])


def test_more_poles_fit_a_fresh_hyena_better_and_the_report_is_true() -> None:
    hyena = mixers.build("hyena", 64, l_max=256)
    taps = hyena.filter.taps(256, torch.float64).detach()
    before, errors = [], []
    for order in (4, 8, 16, 32, 64):
        recurrent, [fit] = distill(hyena, order=order, force=True)
        errors.append(fit.median)
        fitted = recurrent.filter.taps(256, torch.float64).detach()
        torch.testing.assert_close(fit.errors, relative(fitted[:, 1:], taps[:, 1:]), rtol=1e-9, atol=0)
        torch.testing.assert_close(  # lag 0 is exact, up to the weights' rounding
            fitted[:, 0] + recurrent.filter.D.detach(), taps[:, 0] + hyena.beta.detach(), rtol=0, atol=1e-5
        )
        assert fit.largest_pole == recurrent.filter.system(torch.float64)[0].abs().max() < 1
        assert fit.median <= fit.worst == fit.errors.max() and fit.order == order
        assert f"{fit.worst:.2g}" in str(fit) and f"{fit.median:.2g}" in str(fit)
        before.append(recurrent.state_nbytes(10))
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.4 > 0.2 > errors[-1]
    assert before == sorted(before)


def test_outputs_differ_by_no_more_than_the_reported_error() -> None:
    """Cauchy and Schwarz: a filter's output is off by at most |error| |h| |u|, in each channel."""
    hyena = mixers.build("hyena", D, l_max=128)
    recurrent, [fit] = distill(hyena, order=8, force=True)
    taps = hyena.filter.taps(128, torch.float64).detach()
    u = torch.randn(3, 128, D, dtype=torch.float64)
    with torch.no_grad():
        wanted, _ = ops.long_convolution(u, taps, hyena.beta.double())
        found, _ = recurrent.double().filter(u, recurrent.initial_state(3, dtype=u.dtype).past, None)
        bound = fit.errors * taps[:, 1:].norm(dim=1) * u.norm(dim=1)
    off = (found - wanted).abs().amax(1)
    assert (off <= bound + 1e-5).all() and (off > bound / 100).any()  # and the bound is of their size


def test_a_bad_fit_is_refused_with_an_order_that_would_do() -> None:
    hyena = mixers.build("hyena", D, l_max=64)
    with pytest.raises(UsageError) as error:
        distill(hyena, order=2)
    fit = distill(hyena, order=2, force=True)[1][0]
    message = str(error.value)
    assert f"relative error of {fit.median:.2g} in the median channel and {fit.worst:.2g} in the worst" in message
    assert "tolerance is 0.05" in message and "force=True" in message
    with pytest.raises(UsageError, match=r"order (\d+) does for its worst channels") as error:
        distill(hyena, order=2, tolerance=0.3)
    order = int(str(error.value).split("; order ")[1].split()[0])
    assert distill(hyena, order=order, tolerance=0.3)[1][0].worst <= 0.3
    with pytest.raises(UsageError, match="no order up to 31 does, so that the filter is best kept"):
        distill(with_filter(torch.randn(D, 64, dtype=torch.float64)), order=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 0}, r"order must lie in 1\.\.31"),
        ({"order": 32}, r"order must lie in 1\.\.31, half of the mixer's l_max=64, not 32"),
        ({"method": "newton"}, "unknown method 'newton'"),
        ({"tolerance": 0.0}, "tolerance must be positive"),
    ],
)
def test_bad_arguments_are_one_clear_error(options: dict[str, int | str | float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        distill(mixers.build("hyena", D, l_max=64), **options)


def test_a_filter_that_is_not_finite_is_refused() -> None:
    with pytest.raises(UsageError, match="the filter of the mixer is not finite"):
        distill(with_filter(torch.full((D, 64), float("nan"))), order=4)


# ------------------------------------------------------------------------------------------------------------ the model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_distilled_model_says_what_the_original_says(dtype: torch.dtype, tmp_path) -> None:
    """With smooth filters, in layers of their own, beside attention, and shared; saved, loaded, decoded and trained."""
    one, shared = f"hyena{{{SMOOTH}, channel=gelu_mlp}}", f"hyena{{{SMOOTH}, share=a}}"
    config = ModelConfig(f"{one} attention+{one} {shared} attention {shared}", D)
    model = LanguageModel(config).to(dtype).eval()
    mark = model.fingerprint()
    distilled, fits = distill(model, order=12, tolerance=0.01)
    assert model.fingerprint() == mark and model.config is config
    assert [fit.name for fit in fits] == ["layer 1", "layer 2", "layer 3"] and max(fit.worst for fit in fits) < 0.01
    assert distilled.mixer_names().count("striped_hyena") == 3 and "hyena" not in distilled.mixer_names()
    assert distilled.blocks[2] is distilled.blocks[4] and not distilled.training
    tokens = torch.randint(256, (2, 60))
    with torch.no_grad():
        wanted, _ = model(tokens)
        logits, _ = distilled(tokens)
        assert 0 < (logits - wanted).norm() / wanted.norm() < 3 * max(fit.worst for fit in fits)
        bestiary.save(distilled, None, tmp_path / "m")
        loaded, _ = bestiary.load(tmp_path / "m")
        assert loaded.config == distilled.config and torch.equal(loaded(tokens)[0], logits)
        past, stepped = loaded.initial_state(2, dtype=dtype), []
        for t in range(60):
            y, past = loaded.step(tokens[:, t], past)
            stepped.append(y)
        torch.testing.assert_close(torch.stack(stepped, 1), logits, rtol=0, atol=1e-4)
    for block in (distilled.blocks[0], distilled.blocks[2]):
        assert block.mixer.state_nbytes(1) == block.mixer.state_nbytes(10**6)
    loss, _ = distilled.loss(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in distilled.parameters())


def test_every_layer_counts_and_the_worst_is_named() -> None:
    model = LanguageModel(ModelConfig(f"hyena{{{SMOOTH}}} hyena{{l_max=64}}", D))
    with pytest.raises(UsageError, match=r"^layer 2: order 12 .* The tolerance is 0\.05"):
        distill(model, order=12)
    _, fits = distill(model, order=12, force=True)
    assert fits[0].worst < 0.05 < fits[1].worst


def test_half_precision_models_keep_their_poles_in_fp32() -> None:
    model = LanguageModel(ModelConfig(f"hyena{{{SMOOTH}}}", D)).to(torch.bfloat16)
    distilled, _ = distill(model, order=12)
    mixer = distilled.blocks[0].mixer
    assert mixer.in_proj.weight.dtype == torch.bfloat16 and mixer.filter.residues.dtype == torch.float32
    assert distilled(torch.randint(256, (1, 20)))[0].dtype == torch.bfloat16


def test_distilling_draws_no_random_numbers() -> None:
    hyena = mixers.build("hyena", D, l_max=64)
    before = torch.get_rng_state()
    first, second = (distill(hyena, order=4, force=True)[0] for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))


def test_a_model_without_hyena_is_an_error() -> None:
    with pytest.raises(UsageError, match="no hyena layer to distill: the layout is 'mamba\\*2'"):
        distill(LanguageModel(ModelConfig("mamba*2", D)))
