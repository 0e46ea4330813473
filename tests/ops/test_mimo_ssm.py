"""One state for many inputs and outputs: the recurrence, the convolution with its impulse response, pieces, padding."""

import sys

import pytest
import torch
from ops.forms import LENGTHS, check_forms, gates, normal
from torch import Tensor

from bestiary import ops

B, IN, OUT, N = 2, 3, 4, 5


def disk(kind: str, *shape: int) -> Tensor:
    """Complex numbers of size up to 1."""
    return torch.polar(gates(kind, *shape).exp(), 6 * torch.rand(shape, dtype=torch.float64))


def weights() -> tuple[Tensor, Tensor]:
    return torch.view_as_complex(normal(N, IN, 2)), torch.view_as_complex(normal(OUT, N, 2))


@pytest.mark.parametrize("time", LENGTHS)
@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("kind", ["weak", "mixed"])
def test_the_scan_is_the_recurrence(kind: str, fixed: bool, time: int) -> None:
    torch.manual_seed(time)
    shape = (N,) if fixed else (B, time, N)
    W, R = weights()

    def op(u, decay, gain, w, r, state):
        decay, gain, w, r = (torch.view_as_complex(x) for x in (decay, gain, w, r))
        return ops.mimo_ssm(u, decay, w, r, gain=gain, state=state)

    complex_parts = [torch.view_as_real(x).clone() for x in (disk(kind, *shape), disk("weak", *shape), W, R)]
    check_forms(op, [normal(B, time, IN), *complex_parts, normal(B, N, 2)])


@pytest.mark.parametrize("fixed", [True, False])
def test_it_is_the_equation(fixed: bool) -> None:
    W, R = weights()
    shape = (N,) if fixed else (B, 7, N)
    u, decay, gain, D, state = (
        normal(B, 7, IN),
        disk("weak", *shape),
        disk("weak", *shape),
        normal(OUT),
        normal(B, N, 2),
    )
    W, u = torch.cat([W, W[:, :1]], dim=1), torch.cat([u, u[..., :1]], dim=-1)  # as many inputs as outputs, for D
    y, end = ops.mimo_ssm(u, decay, W, R, D, gain=gain, state=state)
    h = torch.view_as_complex(state)
    for t in range(7):
        a, b = (decay, gain) if fixed else (decay[:, t], gain[:, t])
        h = a * h + b * (u[:, t].to(W.dtype) @ W.T)
        torch.testing.assert_close(y[:, t], (h @ R.T).real + D * u[:, t], rtol=0, atol=1e-12)
    torch.testing.assert_close(end, torch.view_as_real(h), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["none", "weak", "strong"])
def test_it_is_the_convolution_with_its_impulse_response(kind: str) -> None:
    (W, R), decay, gain, u = weights(), disk(kind, N), disk("weak", N), normal(B, 40, IN)
    kernel = ops.impulse_response(decay, W, R, 40, gain=gain)
    convolved = torch.stack([torch.einsum("loi,bli->bo", kernel[: t + 1].flip(0), u[:, : t + 1]) for t in range(40)], 1)
    y, _ = ops.mimo_ssm(u, decay, W, R, gain=gain)
    torch.testing.assert_close(y, convolved, rtol=0, atol=1e-11)
    impulse = torch.zeros(IN, 40, IN, dtype=torch.float64)
    impulse[:, 0] = torch.eye(IN)
    torch.testing.assert_close(ops.mimo_ssm(impulse, decay, W, R, gain=gain)[0].permute(1, 2, 0), kernel)


def test_pieces_of_time_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    (W, R), u, state, lengths = weights(), normal(3, 23, IN), normal(3, N, 2), torch.tensor([0, 9, 23])
    for shape in ((N,), (3, 23, N)):
        decay, gain = disk("weak", *shape), disk("weak", *shape)
        whole = ops.mimo_ssm(u, decay, W, R, gain=gain, state=state, lengths=lengths)
        with monkeypatch.context() as patch:
            patch.setattr(sys.modules["bestiary.ops.mimo_ssm"], "PIECE", 5)
            parts = ops.mimo_ssm(u, decay, W, R, gain=gain, state=state, lengths=lengths)
        torch.testing.assert_close(parts, whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", ["reference", "torch"])
def test_padding_leaves_h_alone(form: str) -> None:
    (W, R), u, state = weights(), normal(B, 9, IN), normal(B, N, 2)
    u[1, 4:] = float("nan")
    with ops.use(form):
        _, end = ops.mimo_ssm(u, disk("weak", N), W, R, state=state, lengths=torch.tensor([0, 4]))
    assert torch.equal(end[0], state[0]) and end.isfinite().all()


def test_what_is_kept_for_the_backward_pass_is_the_state_alone() -> None:
    time, n, width = 256, 64, 8
    W, R = torch.randn(n, width, dtype=torch.complex64), torch.randn(width, n, dtype=torch.complex64)
    decay = torch.polar(torch.rand(n), torch.rand(n)).requires_grad_()
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    u = torch.randn(1, time, width, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        y, _ = ops.mimo_ssm(u, decay, W.requires_grad_(), R.requires_grad_())
    state = time * n * 8
    assert state < sum(kept.values()) < 1.5 * state
    y.sum().backward()
    assert decay.grad is not None and decay.grad.isfinite().all()
