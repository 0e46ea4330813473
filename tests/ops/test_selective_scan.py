"""The selective scan: the chunked form is the recurrence; padding takes no time; memory stays small."""

import pytest
import torch
from ops.forms import KINDS, LENGTHS, check_forms, gates, normal
from torch.nn import functional as F

from bestiary import UsageError, ops
from bestiary.ops import ssm

B, C, N = 2, 5, 4


def case(time: int, kind: str) -> list[torch.Tensor]:
    torch.manual_seed(time)
    A = -torch.rand(C, N, dtype=torch.float64)
    return [normal(B, time, C), -gates(kind, B, time, C), A, normal(B, time, N), normal(B, time, N), normal(B, C, N)]


@pytest.mark.parametrize("time", LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_chunked_is_recurrent(kind: str, time: int) -> None:
    check_forms(lambda u, dt, A, B, C, s: ops.selective_scan(u, dt, A, B, C, state=s), case(time, kind))


@pytest.mark.parametrize("time", LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", ["zoh", "bilinear"])
def test_chunked_is_recurrent_by_other_rules(rule: str, kind: str, time: int) -> None:
    def op(u, dt, A, B, C, state):
        return ops.selective_scan(u, dt, A, B, C, discretisation=rule, state=state)

    check_forms(op, case(time, kind))


@pytest.mark.parametrize("time", [1, 20])
@pytest.mark.parametrize("kind", KINDS)
def test_the_rules_are_those_of_the_linear_time_invariant_systems(kind: str, time: int) -> None:
    u, dt, A, Bm, Cm, s = case(time, kind)
    for name, rule in (("zoh", ssm.zoh), ("bilinear", ssm.bilinear)):
        h, (y, last) = s, ops.selective_scan(u, dt, A, Bm, Cm, discretisation=name, state=s)
        for t in range(time):
            A_bar, B_bar = rule(A, Bm[:, t, None], dt[:, t, :, None])
            h = A_bar * h + B_bar * u[:, t, :, None]
            torch.testing.assert_close(y[:, t], (h * Cm[:, t, None]).sum(-1), rtol=0, atol=1e-12)
        torch.testing.assert_close(last, h, rtol=0, atol=1e-12)


def test_constant_parts_make_it_a_convolution() -> None:
    """With dt, B and C that do not depend on the data, Mamba's scan is a diagonal LTI system with B_bar = dt B."""
    u, dt, A, Bm, Cm, _ = case(50, "weak")
    dt, Bm, Cm = (x[:1, :1].expand_as(x) for x in (dt, Bm, Cm))
    y, _ = ops.selective_scan(u, dt, A, Bm, Cm)
    step = dt[0, 0, :, None]
    parts = (x.to(torch.complex128) for x in ((step * A).exp(), step * Bm[0, 0], Cm[0, 0].expand(C, N) / 2))
    kernel = ssm.vandermonde_kernel(*parts, 50)  # which reads 2 Re(C h)
    convolved = torch.stack(
        [torch.einsum("cl,blc->bc", kernel[:, : t + 1].flip(1), u[:, : t + 1]) for t in range(50)], 1
    )
    torch.testing.assert_close(y, convolved, rtol=0, atol=1e-12)


def test_intervals_stretch_the_steps() -> None:
    u, dt, A, Bm, Cm, s = case(40, "weak")
    intervals, bias = torch.rand(B, 40, dtype=torch.float64), normal(C)
    found = ops.selective_scan(u, dt, A, Bm, Cm, dt_bias=bias, dt_softplus=True, intervals=intervals, state=s)
    step = F.softplus(dt + bias) * intervals[..., None]
    torch.testing.assert_close(found, ops.selective_scan(u, step, A, Bm, Cm, state=s))


def test_an_unknown_discretisation_is_one_clear_line() -> None:
    u, dt, A, Bm, Cm, _ = case(2, "weak")
    with pytest.raises(UsageError, match="did you mean 'zoh'"):
        ops.selective_scan(u, dt, A, Bm, Cm, discretisation="zho")


@pytest.mark.parametrize("time", [1, 3, 40])
def test_bias_softplus_skip_and_gate_come_in_this_order(time: int) -> None:
    u, dt, A, Bm, Cm, s = case(time, "weak")
    D, z, bias = normal(C), normal(B, time, C), normal(C)
    y, last = ops.selective_scan(u, dt, A, Bm, Cm, D, z=z, dt_bias=bias, dt_softplus=True, state=s)
    for t in range(time):
        step = F.softplus(dt[:, t] + bias)[..., None]
        s = (step * A).exp() * s + step * Bm[:, t, None] * u[:, t, :, None]
        expected = ((s * Cm[:, t, None]).sum(-1) + D * u[:, t]) * F.silu(z[:, t])
        torch.testing.assert_close(y[:, t], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(last, s, rtol=0, atol=1e-12)


def test_padding_takes_no_time() -> None:
    u, dt, A, Bm, Cm, s = case(40, "strong")
    lengths = torch.tensor([0, 13])
    _, last = ops.selective_scan(u, dt, A, Bm, Cm, state=s, dt_softplus=True, lengths=lengths)
    assert torch.equal(last[0], s[0])
    row = (x[1:, :13] for x in (u, dt))
    _, alone = ops.selective_scan(*row, A, Bm[1:, :13], Cm[1:, :13], state=s[1:], dt_softplus=True)
    torch.testing.assert_close(last[1:], alone, rtol=0, atol=1e-12)


def test_no_tensor_of_time_channels_and_state_is_kept() -> None:
    time, channels, n = 1024, 64, 16
    sizes: list[int] = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        sizes.append(x.numel())
        return x

    u, dt = torch.randn(1, time, channels, requires_grad=True), torch.rand(1, time, channels)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        y, _ = ops.selective_scan(u, dt, -torch.rand(channels, n), torch.randn(1, time, n), torch.randn(1, time, n))
        y.sum().backward()
    assert sum(sizes) < time * channels * n / 2


def test_inputs_that_need_no_gradient_get_none() -> None:
    u, dt, A, Bm, Cm, s = case(10, "weak")
    u.requires_grad_()
    y, _ = ops.selective_scan(u, dt, A, Bm, Cm, state=s)
    y.sum().backward()
    assert u.grad is not None and A.grad is None
