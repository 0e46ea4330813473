"""The diagonal recurrence: the scan is the definition, for real and complex factors of any size up to 1."""

import math

import pytest
import torch
from ops.forms import KINDS, LENGTHS, check_forms, gates, normal

from bestiary import UsageError, ops

B, C = 2, 5


@pytest.mark.parametrize("time", LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_scan_is_the_recurrence(time: int, kind: str) -> None:
    torch.manual_seed(time)
    inputs = [gates(kind, B, time, C).exp(), normal(B, time, C), normal(B, C)]
    check_forms(lambda a, b, h: ops.linear_recurrence(a, b, state=h), inputs)


@pytest.mark.parametrize("time", LENGTHS)
@pytest.mark.parametrize("kind", ["none", "mixed"])
def test_complex_factors_turn_as_they_decay(time: int, kind: str) -> None:
    torch.manual_seed(time)

    def op(size, angle, write, start):
        write, start = torch.view_as_complex(write.contiguous()), torch.view_as_complex(start)
        h, state = ops.linear_recurrence(torch.polar(size, angle), write, state=start)
        return torch.view_as_real(h), torch.view_as_real(state)

    angle = 2 * math.pi * torch.rand(B, time, C, dtype=torch.float64)
    check_forms(op, [gates(kind, B, time, C).exp(), angle, normal(B, time, C, 2), normal(B, C, 2)])


@pytest.mark.parametrize("form", ["reference", "torch"])
def test_padding_leaves_h_alone(form: str) -> None:
    a, b, h = gates("weak", B, 9, C).exp(), normal(B, 9, C), normal(B, C)
    b[1, 4:] = float("nan")
    with ops.use(form):
        found, state = ops.linear_recurrence(a, b, state=h, lengths=torch.tensor([0, 4]))
        _, alone = ops.linear_recurrence(a[1:, :4], b[1:, :4], state=h[1:])
    assert torch.equal(state[0], h[0]) and torch.equal(state[1:], alone) and found.isfinite().all()


def test_any_trailing_shape_and_the_dtype_of_the_state() -> None:
    a, b = torch.rand(B, 6, 3, 2), torch.randn(B, 6, 3, 2).bfloat16()
    h, state = ops.linear_recurrence(a, b)
    assert h.shape == b.shape and state.shape == (B, 3, 2) and h.dtype == state.dtype == torch.float32
    scalar, _ = ops.linear_recurrence(a[..., 0, 0], b[..., 0, 0])
    torch.testing.assert_close(scalar, h[..., 0, 0])


def test_what_does_not_fit_is_one_clear_line() -> None:
    with pytest.raises(UsageError, match="one shape and kind"):
        ops.linear_recurrence(torch.rand(1, 2, 3), torch.randn(1, 2, 3, dtype=torch.complex64))
