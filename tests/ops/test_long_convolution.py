"""The long convolution: FFT over segments and online steps are the sum over lags, at every split and beyond l_max."""

import pytest
import torch
from ops.forms import check_forms, normal

from bestiary import ops, state
from bestiary.ops.long_convolution import ConvolutionState, long_convolution, ring_size, past_nbytes

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


def test_online_work_grows_by_a_little_more_than_the_length() -> None:
    """The multiply-adds of all tiles and windows, counted: L log^2 L, far from L^2."""

    def work(length: int) -> float:
        total, since, window = 0.0, 0, 0
        for t in range(length):
            if since == window:
                window, since = 1 << max(0, t.bit_length() - 1), 0
                total += 2 * window * max(1, window.bit_length())
            since += 1
            size = since & -since if since < window else 0
            total += size**2 if size <= 32 else 4 * size * size.bit_length()
        return total

    assert work(8192) < 3 * work(4096) and work(8192) < 8192**2 / 20


def test_states_from_different_lengths_stack() -> None:
    torch.manual_seed(0)
    kernel, x = normal(C, 16), normal(2, 40, C)
    states: list[ConvolutionState] = [long_convolution(x[i : i + 1, :n], kernel)[1] for i, n in ((0, 3), (1, 20))]
    past, rows = state.stack(states), torch.arange(2)
    for k in range(12):
        y, past = long_convolution(x[rows, torch.tensor([3, 20]) + k][:, None], kernel, state=past)
        for i, n in ((0, 3), (1, 20)):
            torch.testing.assert_close(y[i, 0], definition(x, kernel)[i, n + k], rtol=0, atol=1e-12)
