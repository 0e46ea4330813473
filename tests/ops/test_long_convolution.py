"""The long convolution: FFT over segments and online steps are the sum over lags, at every split and beyond l_max."""

import contextlib
import importlib

import pytest
import torch
from ops.forms import check_forms, normal

from bestiary import ops, state
from bestiary.ops.long_convolution import ConvolutionState, long_convolution, past_nbytes, ring_size

long_convolution_module = importlib.import_module("bestiary.ops.long_convolution")  # ops.long_convolution is the op

B, C = 2, 3


def definition(x: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    lag = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])
    seen = (lag >= 0) & (lag < kernel.shape[1])
    toeplitz = torch.where(seen, kernel[:, lag.clamp(0, kernel.shape[1] - 1)], 0)
    return torch.einsum("cts,bsc->btc", toeplitz, x)


@pytest.mark.parametrize("form", ["reference", "torch"])
@pytest.mark.parametrize("l_max", [1, 2, 5, 8, 13, 64, 200])
@pytest.mark.parametrize("cuts", [(), (1,), (0, 3, 3), (60, 61, 62, 63), (7, 50, 90)])
def test_segments_and_steps_are_the_sum_over_lags(form: str, l_max: int, cuts: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    time = 100
    x, kernel, skip = normal(B, time, C), normal(C, l_max), normal(C)
    expected, past, parts = definition(x, kernel) + skip * x, None, []
    with ops.use(form):
        for a, b in zip((0, *cuts), (*cuts, time)):
            y, past = long_convolution(x[:, a:b], kernel, skip, state=past)
            parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("l_max", [1, 3, 16, 50, 64])
@pytest.mark.parametrize("prefix", [0, 1, 2, 31, 70])
def test_online_steps_after_a_segment_then_a_segment_after_steps(prefix: int, l_max: int, in_place: bool) -> None:
    torch.manual_seed(0)
    x, kernel = normal(B, 230, C), normal(C, l_max)
    expected = definition(x, kernel)
    with torch.no_grad():
        y, past = long_convolution(x[:, :prefix], kernel)
        parts = [y]
        for t in range(prefix, 200):
            if in_place:
                with state.in_place():
                    y, past = long_convolution(x[:, t : t + 1], kernel, state=past)
            else:
                y, past = long_convolution(x[:, t : t + 1], kernel, state=past)
            parts.append(y)
        parts.append(long_convolution(x[:, 200:], kernel, state=past)[0])
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=1e-12)


def test_rows_at_different_positions_and_windows() -> None:
    torch.manual_seed(0)
    x, kernel = normal(B, 90, C), normal(C, 24)
    expected = definition(x, kernel)
    seen, past = torch.zeros(B, dtype=torch.int64), None
    for lengths in [[5, 0], [1, 1], [1, 0], [1, 0], [0, 9], *[[1, 1]] * 30, [1, 7], *[[1, 0]] * 9, [3, 2]]:
        rows = [torch.arange(s, s + max(lengths)).clamp(max=89) for s in seen.tolist()]
        part = torch.stack([x[i, rows[i]] for i in range(B)])
        y, past = long_convolution(part, kernel, state=past, lengths=torch.tensor(lengths))
        for i, n in enumerate(lengths):
            torch.testing.assert_close(y[i, :n], expected[i, seen[i] : seen[i] + n], rtol=0, atol=1e-12)
        seen += torch.tensor(lengths)
    assert torch.equal(past.position, seen)


@pytest.mark.parametrize("time", [0, 2, 3, 17, 64, 130])
def test_both_forms_and_their_gradients_agree(time: int) -> None:
    torch.manual_seed(time)
    before = normal(B, 20, C)

    def op(x: torch.Tensor, kernel: torch.Tensor, past: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        _, carried = long_convolution(past, kernel)
        y, carried = long_convolution(x, kernel, state=carried)
        return y, carried.inputs

    check_forms(op, [normal(B, time, C), normal(C, 40), before])


def test_gradients_flow_through_online_steps() -> None:
    torch.manual_seed(0)
    x, kernel = normal(1, 12, C).requires_grad_(), normal(C, 8).requires_grad_()

    def steps(x: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
        past, parts = None, []
        for t in range(x.shape[1]):
            y, past = long_convolution(x[:, t : t + 1], kernel, state=past)
            parts.append(y)
        return torch.cat(parts, 1)

    wanted = torch.autograd.grad((definition(x, kernel) ** 2).sum(), (x, kernel))
    found = torch.autograd.grad((steps(x, kernel) ** 2).sum(), (x, kernel))
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_the_state_is_as_large_as_declared_and_bounded() -> None:
    for time in (0, 1, 5, 30, 100):
        _, past = long_convolution(torch.randn(1, time, C), torch.randn(C, 20))
        assert state.nbytes(past) == past_nbytes(C, 20, time)
    assert ring_size(20) == 32 and past.inputs.shape[1] == 32


def test_online_work_grows_by_a_little_more_than_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """The multiply-adds of the tiles and FFTs that steps really call, counted: L log^2 L, far from L^2."""
    spent = 0.0

    def counted_tile(x: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
        nonlocal spent
        spent += x.shape[1] ** 2 if x.shape[1] <= module.DIRECT_TILE else 0
        return tile(x, kernel)

    def counted_convolve(x: torch.Tensor, filter: ops.Filter, first: int, last: int, use: str) -> torch.Tensor:
        nonlocal spent
        spent += 2 * last * last.bit_length()
        return convolve(x, filter, first, last, use)

    module = long_convolution_module
    tile, convolve = module._tile, module.convolve
    monkeypatch.setattr(module, "_tile", counted_tile)
    monkeypatch.setattr(module, "convolve", counted_convolve)

    def work(length: int) -> float:
        nonlocal spent
        spent, past, kernel, x = 0.0, None, torch.randn(1, length), torch.randn(1, length, 1)
        with torch.no_grad(), state.in_place():
            for t in range(length):
                _, past = long_convolution(x[:, t : t + 1], kernel, state=past)
        return spent

    short, long = work(1024), work(2048)
    assert 2 * short < long < 3 * short
    assert long < 2048**2 / 10


def test_an_online_step_reads_a_tile_of_the_ring_and_not_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, read = torch.randn(C, 256), []
    original = long_convolution_module._read

    def noted(inputs: torch.Tensor, place: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        read.append((inputs.data_ptr(), place.numel()))
        return original(inputs, place, *others)

    with torch.no_grad(), state.in_place():
        _, past = long_convolution(torch.randn(1, 256, C), kernel)
        _, past = long_convolution(torch.randn(1, 1, C), kernel, state=past)  # begins a window
        ring = past.inputs.data_ptr()
        monkeypatch.setattr(long_convolution_module, "_read", noted)
        for _ in range(7):
            _, past = long_convolution(torch.randn(1, 1, C), kernel, state=past)
    assert read == [(ring, n) for n in (2, 1, 4, 1, 2, 1, 8)]  # the ring itself, no copy


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("time", [5, 8])
def test_steps_never_write_into_the_callers_inputs(time: int, in_place: bool) -> None:
    """Not even where a first segment fills the ring exactly and the state may be written."""
    x, kernel = normal(B, time, C), normal(C, 8)
    before = x.clone()
    with torch.no_grad():
        _, past = long_convolution(x, kernel)
        with state.in_place() if in_place else contextlib.nullcontext():
            for _ in range(9):
                _, past = long_convolution(normal(B, 1, C), kernel, state=past)
    assert torch.equal(x, before)


def test_a_step_leaves_the_old_state_as_it_was() -> None:
    x, kernel = normal(B, 40, C), normal(C, 13)
    _, past = long_convolution(x[:, :1], kernel)
    for t in range(1, 40):
        old = state.fork(past)
        _, following = long_convolution(x[:, t : t + 1], kernel, state=past)
        for a, b in zip(state.tensors(old), state.tensors(past)):
            assert torch.equal(a, b)
        past = following


@pytest.mark.parametrize("form", ["reference", "torch"])
@pytest.mark.parametrize("time", [0, 1, 2, 5])
def test_an_empty_batch(form: str, time: int) -> None:
    with ops.use(form):
        y, past = long_convolution(torch.zeros(0, time, C), torch.randn(C, 5))
        y, past = long_convolution(torch.zeros(0, 1, C), torch.randn(C, 5), state=past)
    assert y.shape == (0, 1, C) and len(past.position) == 0


def test_states_from_different_lengths_stack() -> None:
    torch.manual_seed(0)
    kernel, x = normal(C, 16), normal(2, 40, C)
    states: list[ConvolutionState] = [long_convolution(x[i : i + 1, :n], kernel)[1] for i, n in ((0, 3), (1, 20))]
    past, rows = state.stack(states), torch.arange(2)
    for k in range(12):
        y, past = long_convolution(x[rows, torch.tensor([3, 20]) + k][:, None], kernel, state=past)
        for i, n in ((0, 3), (1, 20)):
            torch.testing.assert_close(y[i, 0], definition(x, kernel)[i, n + k], rtol=0, atol=1e-12)
