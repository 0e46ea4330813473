"""The two-sided convolution: both forms are a dense Toeplitz matrix, in both published conventions."""

import pytest
import torch
from ops.forms import LENGTHS, check_forms, normal
from torch import Tensor

from bestiary import UsageError, ops
from bestiary.ops import bidirectional_convolution

B, C = 2, 3


def toeplitz(k: Tensor, r: Tensor, time: int, start: int = 1) -> Tensor:
    """(channels, output, input), entry by entry."""
    matrix = torch.zeros(k.shape[0], time, time, dtype=k.dtype)
    for t in range(time):
        for s in range(time):
            if 0 <= t - s < k.shape[1]:
                matrix[:, t, s] += k[:, t - s]
            if 0 <= s - t - start < r.shape[1]:
                matrix[:, t, s] += r[:, s - t - start]
    return matrix


@pytest.mark.parametrize("form", ["reference", "torch"])
@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("taps", [(1, 1), (1, 40), (40, 1), (7, 12), (20, 20), (33, 40), (0, 5), (5, 0)])
@pytest.mark.parametrize("time", [0, 1, 2, 3, 20, 33])
def test_it_is_a_toeplitz_matrix(form: str, start: int, taps: tuple[int, int], time: int) -> None:
    x, k, r, skip = normal(B, time, C), normal(C, taps[0]), normal(C, taps[1]), normal(C)
    with ops.use(form):
        y = bidirectional_convolution(x, k, r, skip, reverse_start=start)
    expected = torch.einsum("cts,bsc->btc", toeplitz(k, r, time, start), x) + skip * x
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("time", LENGTHS)
def test_both_forms_and_their_gradients_agree(time: int, start: int) -> None:
    def op(x: Tensor, k: Tensor, r: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        y = bidirectional_convolution(x, k, r, skip, reverse_start=start)
        return y, y[:, :1]

    check_forms(op, [normal(B, time, C), normal(C, 40), normal(C, 50), normal(C)])


def test_the_conventions_differ_by_one_lag_and_safari_counts_the_present_twice() -> None:
    x, k, r = normal(B, 9, C), normal(C, 9), normal(C, 9)
    ours = bidirectional_convolution(x, k, r)
    safari = bidirectional_convolution(x, k + torch.eye(9)[0] * r[:, :1], r[:, 1:])
    torch.testing.assert_close(safari, bidirectional_convolution(x, k, r, reverse_start=0), rtol=0, atol=1e-12)
    assert (ours - safari).abs().max() > 0.1


def test_reversing_the_sequence_exchanges_past_and_future() -> None:
    x, k, r = normal(B, 17, C), normal(C, 20), normal(C, 8)
    swapped = bidirectional_convolution(x.flip(1), torch.cat([k[:, :1], r], 1), k[:, 1:])
    torch.testing.assert_close(swapped.flip(1), bidirectional_convolution(x, k, r), rtol=0, atol=1e-12)


def test_without_a_future_it_is_the_causal_convolution() -> None:
    x, k = normal(B, 30, C), normal(C, 12)
    y = bidirectional_convolution(x, k, torch.zeros(C, 0))
    torch.testing.assert_close(y, ops.long_convolution(x, k)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", ["reference", "torch"])
@pytest.mark.parametrize("time", [0, 1, 4])
def test_an_empty_batch(form: str, time: int) -> None:
    with ops.use(form):
        assert bidirectional_convolution(torch.zeros(0, time, C), normal(C, 5), normal(C, 5)).shape == (0, time, C)


def test_half_precision_is_computed_in_single() -> None:
    x, k, r = normal(B, 30, C).bfloat16(), normal(C, 30), normal(C, 30)
    y = bidirectional_convolution(x, k.float(), r.float())
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, bidirectional_convolution(x.float(), k.float(), r.float()).bfloat16())


def test_other_conventions_are_refused() -> None:
    with pytest.raises(UsageError, match="reverse_start"):
        bidirectional_convolution(normal(1, 2, C), normal(C, 1), normal(C, 1), reverse_start=2)
