"""Systems with steps of their own lengths: the chunks are the recurrence, which is the regular one at regular steps."""

import pytest
import torch
from ops.forms import LENGTHS, check_forms, normal
from ops.test_ssm import CHANNELS, HALF, system
from torch import Tensor

from bestiary import UsageError, ops
from bestiary.ops import ssm

# The shortest interval, and the powers of ten up to the longest. A turn by hundreds of radians that is not yet damped
# is known to 1e-5 in fp32, whatever the form: steps between 10 and 100 are left out.
SPREADS = {"regular": (1.0, 0.0), "mixed": (1e-3, 4.0), "long": (100.0, 0.1)}


def gaps(kind: str, *shape: int) -> Tensor:
    """Intervals of 1, of very different sizes (0 among them), or of about 100."""
    least, spread = SPREADS[kind]
    found = least * 10 ** (spread * torch.rand(shape, dtype=torch.float64))
    return torch.where(torch.rand(shape) < 0.1, 0, found) if kind == "mixed" else found


def pairs(*parts: Tensor) -> list[Tensor]:
    return [torch.view_as_real(part).clone() for part in parts]


@pytest.mark.parametrize("time", LENGTHS)
@pytest.mark.parametrize("rule", ["zoh", "bilinear"])
@pytest.mark.parametrize("kind", SPREADS)
def test_the_diagonal_system_in_chunks(kind: str, rule: str, time: int) -> None:
    L, _, B, C, dt = system()

    def op(u, intervals, a, b, c, dt, d, state):
        a, b, c = (torch.view_as_complex(x) for x in (a, b, c))
        return ops.irregular_diagonal_ssm(u, intervals, a, b, c, dt, d, rule=rule, state=state)

    inputs = [normal(2, time, CHANNELS), gaps(kind, 2, time), *pairs(L, B, C), dt, normal(CHANNELS)]
    check_forms(op, [*inputs, normal(2, CHANNELS, HALF, 2)])


@pytest.mark.parametrize("time", LENGTHS)
@pytest.mark.parametrize("kind", SPREADS)
def test_the_dplr_system_in_chunks(kind: str, time: int) -> None:
    L, P, B, C, dt = system()

    def op(u, intervals, a, p, b, c, dt, d, state):
        a, p, b, c = (torch.view_as_complex(x) for x in (a, p, b, c))
        return ops.irregular_dplr_ssm(u, intervals, a, p, b, c, dt, d, state=state)

    inputs = [normal(2, time, CHANNELS), gaps(kind, 2, time), *pairs(L, P, B, C), dt, normal(CHANNELS)]
    check_forms(op, [*inputs, normal(2, CHANNELS, 2 * HALF)])


@pytest.mark.parametrize("rule", ["zoh", "bilinear"])
def test_equal_intervals_are_the_regular_diagonal_system(rule: str) -> None:
    L, _, B, C, dt = system()
    u, D, start = normal(2, 70, CHANNELS), normal(CHANNELS), normal(2, CHANNELS, HALF, 2)
    every = torch.full((2, 70), 3.0, dtype=torch.float64)
    found = ops.irregular_diagonal_ssm(u, every, L, B, C, dt, D, rule=rule, state=start)
    discretise = ssm.zoh if rule == "zoh" else ssm.bilinear
    expected = ops.diagonal_ssm(u, *discretise(L, B, 3 * dt[:, None]), C, D, state=start)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


def test_the_dplr_step_is_the_bilinear_rule_of_the_full_matrix() -> None:
    L, P, B, C, dt = system()
    u, h, intervals = normal(2, 20, CHANNELS), normal(2, CHANNELS, 2 * HALF), gaps("mixed", 2, 20)
    y, last = ops.irregular_dplr_ssm(u, intervals, L, P, B, C, dt, state=h)
    a, b, c = (x.expand(2, *x.shape) for x in ssm.real_dplr(L, P, P, B, C))
    for t in range(20):
        A_bar, B_bar = ssm.bilinear_dense(a, b, intervals[:, t, None] * dt)
        h = (A_bar @ h[..., None])[..., 0] + B_bar * u[:, t, :, None]
        torch.testing.assert_close(y[:, t], (c * h).sum(-1), rtol=0, atol=1e-10)
    torch.testing.assert_close(last, h, rtol=0, atol=1e-10)


def test_zero_order_hold_is_the_matrix_exponential_of_the_system_and_its_input() -> None:
    """Van Loan: exp of (A, B; 0, 0) times dt holds A_bar and B_bar."""
    L, _, B, C, dt = system()
    u, intervals = normal(1, 12, CHANNELS), gaps("mixed", 1, 12) / 30
    y, _ = ops.irregular_diagonal_ssm(u, intervals, L, B, C, dt)
    for channel in range(CHANNELS):
        both = torch.zeros(HALF + 1, HALF + 1, dtype=torch.complex128)
        both[:HALF, :HALF], both[:HALF, HALF] = torch.diag(L[channel]), B[channel]
        h = torch.zeros(HALF, dtype=torch.complex128)
        for t in range(12):
            step = torch.linalg.matrix_exp(both * dt[channel] * intervals[0, t])
            h = step[:HALF, :HALF] @ h + step[:HALF, HALF] * u[0, t, channel]
            torch.testing.assert_close(y[0, t, channel], 2 * (C[channel] @ h).real, rtol=0, atol=1e-10)


def test_a_step_is_two_steps_with_the_same_input_that_take_its_time_together() -> None:
    L, _, B, C, dt = system()
    u, intervals, share = normal(2, 9, CHANNELS), gaps("mixed", 2, 9), torch.rand(2, 9, dtype=torch.float64)
    y, end = ops.irregular_diagonal_ssm(u, intervals, L, B, C, dt)
    halves = torch.stack([share * intervals, (1 - share) * intervals], dim=-1).flatten(1)
    twice, same = ops.irregular_diagonal_ssm(u.repeat_interleave(2, dim=1), halves, L, B, C, dt)
    torch.testing.assert_close((twice[:, 1::2], same), (y, end), rtol=0, atol=1e-10)


@pytest.mark.parametrize("form", ["reference", "torch"])
def test_padding_takes_no_time(form: str) -> None:
    L, P, B, C, dt = system()
    lengths = torch.tensor([0, 1, 33, 70])
    u, intervals = normal(4, 70, CHANNELS), gaps("mixed", 4, 70)
    h, modal = normal(4, CHANNELS, 2 * HALF), normal(4, CHANNELS, HALF, 2)
    padded = torch.where(torch.arange(70) < lengths[:, None], intervals, torch.nan)
    with ops.use(form):
        _, last = ops.irregular_dplr_ssm(u, padded, L, P, B, C, dt, state=h, lengths=lengths)
        _, last_modal = ops.irregular_diagonal_ssm(u, padded, L, B, C, dt, state=modal, lengths=lengths)
    assert torch.equal(last[0], h[0]) and torch.equal(last_modal[0], modal[0])
    for i, n in enumerate(lengths.tolist()):
        row = u[i : i + 1, :n], intervals[i : i + 1, :n]
        _, alone = ops.irregular_dplr_ssm(*row, L, P, B, C, dt, state=h[i : i + 1])
        torch.testing.assert_close(last[i : i + 1], alone, rtol=0, atol=1e-11)
        _, alone = ops.irregular_diagonal_ssm(*row, L, B, C, dt, state=modal[i : i + 1])
        torch.testing.assert_close(last_modal[i : i + 1], alone, rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", ["diagonal", "dplr"])
def test_no_tensor_of_time_channels_and_state_is_kept(kind: str) -> None:
    time, channels, half = 512, 32, 16
    A, B, C, P = (torch.randn(channels, half, dtype=torch.complex64) for _ in range(4))
    A = torch.complex(-A.real.abs(), A.imag)
    sizes: list[int] = []

    def keep(x: Tensor) -> Tensor:
        sizes.append(x.numel())
        return x

    u, dt = torch.randn(1, time, channels, requires_grad=True), torch.rand(channels, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        if kind == "diagonal":
            y, _ = ops.irregular_diagonal_ssm(u, torch.rand(1, time), A, B, C, dt)
        else:
            y, _ = ops.irregular_dplr_ssm(u, torch.rand(1, time), A, P, B, C, dt)
    assert 0 < sum(sizes) < time * channels * half
    y.sum().backward()
    assert dt.grad is not None and dt.grad.isfinite().all()


def test_an_unknown_rule_is_one_clear_line() -> None:
    L, _, B, C, dt = system()
    with pytest.raises(UsageError, match="valid: bilinear, zoh"):
        ops.irregular_diagonal_ssm(normal(1, 2, CHANNELS), gaps("regular", 1, 2), L, B, C, dt, rule="euler")
