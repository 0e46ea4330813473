"""RWKV-4's operator: the scan is the stabilised recurrence, which is the quotient of sums, for any exponents."""

import pytest
import torch
from ops.forms import LENGTHS, check_forms, normal

from bestiary import ops
from bestiary.ops.wkv import WKVState

B, C = 2, 5


def case(time: int, size: float, decay: float) -> list[torch.Tensor]:
    """Keys up to `size`, log-decays down to -decay, and a past that an earlier segment left."""
    torch.manual_seed(time)
    w = -decay * torch.rand(C, dtype=torch.float64)
    _, past = ops.wkv(size / 3 * normal(B, 4, C), normal(B, 4, C), w, normal(C))
    return [size / 3 * normal(B, time, C), normal(B, time, C), w, normal(C), past.num, past.den, past.max]


@pytest.mark.parametrize("time", LENGTHS)
@pytest.mark.parametrize("size", [3.0, 40.0])
@pytest.mark.parametrize("decay", [0.0, 1.0, 50.0])
def test_the_scan_is_the_recurrence(time: int, size: float, decay: float) -> None:
    inputs, ahead = case(time, size, decay), normal(B, 3, C)

    def op(k, v, w, u, num, den, top):
        y, state = ops.wkv(k, v, w, u, state=WKVState(num, den, top))
        # the state is a triple in units of its own: what it does to later steps is what counts
        return y, ops.wkv(ahead.to(k.dtype), ahead.to(k.dtype), w, u, state=state)[0]

    check_forms(op, inputs, joint=True)


@pytest.mark.parametrize("form", ["reference", "torch"])
def test_it_is_the_quotient_of_sums(form: str) -> None:
    k, v, w, u = case(20, 3.0, 1.0)[:4]
    with ops.use(form):
        y, _ = ops.wkv(k, v, w, u)
    for t in range(20):
        age = torch.arange(t - 1, -1, -1, dtype=torch.float64)[:, None]
        past, now = (age * w + k[:, :t]).exp(), (u + k[:, t]).exp()
        expected = ((past * v[:, :t]).sum(1) + now * v[:, t]) / (past.sum(1) + now)
        torch.testing.assert_close(y[:, t], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", ["reference", "torch"])
def test_padding_leaves_the_state_alone(form: str) -> None:
    k, v, w, u, *past = case(30, 3.0, 1.0)
    with ops.use(form):
        _, state = ops.wkv(k, v, w, u, state=WKVState(*past), lengths=torch.tensor([0, 11]))
        _, alone = ops.wkv(k[1:, :11], v[1:, :11], w, u, state=WKVState(*(x[1:] for x in past)))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(state, past))
    for a, b in zip(state, alone):
        torch.testing.assert_close(a[1:], b, rtol=0, atol=1e-12)


def test_a_long_sequence_with_strong_decay_stays_exact_in_fp32() -> None:
    torch.manual_seed(0)
    k, v, w, u = 60 * torch.randn(1, 20_000, C), torch.randn(1, 20_000, C), -50 * torch.rand(C), torch.randn(C)
    y, _ = ops.wkv(k, v, w, u)
    expected, _ = ops.wkv(k.double(), v.double(), w.double(), u.double())
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=5e-6)
