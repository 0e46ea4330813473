"""State-space models: HiPPO's identities, discretisations, kernels, and the recurrence in chunks."""

import pytest
import torch
from ops.forms import KINDS, LENGTHS, check_forms, gates, normal

from bestiary import ops
from bestiary.ops import ssm, ssm_scan

CHANNELS, HALF = 3, 4


def system() -> tuple[torch.Tensor, ...]:
    """(L, P, B, C, dt) of a DPLR system a channel, with real parts and steps of their own."""
    torch.manual_seed(0)
    L, P, B, _ = ssm.legs_dplr(2 * HALF)
    L, P, B = (x.expand(CHANNELS, -1) * (1 + torch.rand(CHANNELS, 1)) for x in (L, P, B))
    C = torch.randn(CHANNELS, HALF, dtype=torch.complex128)
    return L, P, B, C, 0.01 + 0.3 * torch.rand(CHANNELS, dtype=torch.float64)


@pytest.mark.parametrize("n", [2, 8, 64])
def test_legs_is_diagonal_minus_low_rank(n: int) -> None:
    A, B = ssm.hippo_legs(n)
    L, P, Bh, V = ssm.legs_dplr(n)
    root = (torch.arange(n, dtype=torch.float64) + 0.5).sqrt()
    diagonal = V.mH @ (A + torch.outer(root, root)).to(V.dtype) @ V
    torch.testing.assert_close(diagonal.diagonal()[: n // 2], L, rtol=0, atol=1e-10)
    torch.testing.assert_close(diagonal, torch.diag(diagonal.diagonal()), rtol=0, atol=1e-10)
    torch.testing.assert_close((V.mH @ root.to(V.dtype))[: n // 2], P)
    torch.testing.assert_close((V.mH @ B.to(V.dtype))[: n // 2], Bh)
    assert (L.imag > 0).all() and A[1, 0] == -(3**0.5) and A[0, 1] == 0 and A[1, 1] == -2


def test_the_real_system_is_hippo_in_another_basis() -> None:
    n = 8
    A, B = ssm.hippo_legs(n)
    L, P, Bh, V = ssm.legs_dplr(n)
    readout = normal(n)
    C = (readout.to(V.dtype) @ V)[: n // 2]
    a, b, c = ssm.real_dplr(L, P, P, Bh, C)
    for lag in range(5):  # C A^lag B is the same in every basis
        wanted = readout @ torch.linalg.matrix_power(A, lag) @ B
        torch.testing.assert_close(c @ torch.linalg.matrix_power(a, lag) @ b, wanted, rtol=1e-10, atol=1e-10)


def test_s4d_initial_eigenvalues() -> None:
    assert ssm.s4d_lin(3).tolist() == [-0.5, -0.5 + 1j * torch.pi, -0.5 + 2j * torch.pi]
    torch.testing.assert_close(ssm.s4d_inv(4)[0], torch.tensor(-0.5 + 1j * 8 / torch.pi * 7, dtype=torch.complex128))


def test_zero_order_hold_is_the_integral_and_bilinear_its_second_order_approximation() -> None:
    A, B, dt = (
        torch.tensor([-0.7 + 2j, 0.0, -3.0]).to(torch.complex128),
        torch.ones(3, dtype=torch.complex128),
        torch.tensor(0.1),
    )
    a, b = ssm.zoh(A, B, dt.double())
    grid = torch.linspace(0, 0.1, 20001, dtype=torch.float64)
    integral = torch.trapezoid((A[:, None] * grid).exp(), grid)
    torch.testing.assert_close(a, (A * 0.1).exp(), rtol=1e-7, atol=0)
    torch.testing.assert_close(b, integral, rtol=1e-6, atol=1e-9)
    errors = []
    for step in (0.1, 0.05):
        (exact, _), (approximate, _) = (rule(A, B, torch.tensor(step).double()) for rule in (ssm.zoh, ssm.bilinear))
        errors.append((exact - approximate).abs().max())
    assert 6 < errors[0] / errors[1] < 10  # third order in a single step


def test_growth_and_its_derivatives_are_exact_at_any_size() -> None:
    """(e^x - 1)/x is the mean of e^(x s) over s in 0..1, its derivative the mean of s e^(x s)."""
    sizes = torch.tensor([0, 1e-12, 1e-6, 0.01, 0.1249, 0.1251, 1, 30], dtype=torch.float64)
    x = torch.cat([-sizes, sizes * 1j, sizes * (-0.6 + 0.8j)]).requires_grad_()
    s = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    weight = (x.detach()[:, None] * s).exp()
    found = ssm.growth(x)
    torch.testing.assert_close(found.detach(), weight.mean(1), rtol=0, atol=1e-9)
    (slope,) = torch.autograd.grad(found.real.sum(), x)
    torch.testing.assert_close(slope.conj(), (s * weight).mean(1), rtol=0, atol=1e-9)
    low = x.detach().to(torch.complex64).requires_grad_()
    (rounded,) = torch.autograd.grad(ssm.growth(low).real.sum(), low)
    torch.testing.assert_close(rounded.to(slope.dtype), slope, rtol=0, atol=1e-6)
    assert torch.autograd.gradgradcheck(ssm.growth, x[1:])


def test_dense_bilinear_is_diagonal_bilinear_on_a_diagonal() -> None:
    A, B, dt = -torch.rand(2, 5).double(), normal(2, 5), torch.rand(2).double()
    a, b = ssm.bilinear_dense(torch.diag_embed(A), B, dt)
    expected_a, expected_b = ssm.bilinear(A, B, dt[:, None])
    torch.testing.assert_close(a.diagonal(dim1=-2, dim2=-1), expected_a)
    torch.testing.assert_close(b, expected_b)


@pytest.mark.parametrize("length", [1, 2, 3, 64, 100])
def test_kernels_are_the_powers_whatever_the_length(length: int) -> None:
    L, P, B, C, dt = system()
    a, b, c = ssm.real_dplr(L, P, P, B, C)
    A_bar, B_bar = ssm.bilinear_dense(a, b, dt)
    x, wanted = B_bar, []
    for _ in range(length):
        wanted.append((c * x).sum(-1))
        x = (A_bar @ x[..., None])[..., 0]
    torch.testing.assert_close(ssm.dplr_kernel(L, P, P, B, C, dt, length), torch.stack(wanted, 1), rtol=0, atol=1e-11)
    a_bar, b_bar = ssm.zoh(L, B, dt[:, None])
    wanted_diagonal = [2 * (C * b_bar * a_bar**lag).real.sum(-1) for lag in range(length)]
    found = ssm.vandermonde_kernel(a_bar, b_bar, C, length)
    torch.testing.assert_close(found, torch.stack(wanted_diagonal, 1), rtol=0, atol=1e-11)


@pytest.mark.parametrize("decay", [-1e-4, -1.0, -50.0, -800.0])
def test_kernels_and_their_gradients_are_finite_at_any_decay(decay: float) -> None:
    """exp(-800) is 0 in either precision; its powers and their derivatives are 0 too, and not NaN."""
    torch.manual_seed(0)
    angle, C = 3 * torch.rand(CHANNELS, HALF), torch.randn(CHANNELS, HALF, dtype=torch.complex128)
    found, grads = [], []
    for dtype in (torch.complex64, torch.complex128):
        z = torch.complex(torch.full_like(angle, decay), angle).to(dtype).requires_grad_()
        kernel = ssm.vandermonde_kernel(z.exp(), C.to(dtype), C.to(dtype), 200)
        grads.append(torch.view_as_real(*torch.autograd.grad((kernel**2).sum(), z)))
        found.append(kernel.detach().double())
    exact = torch.stack([2 * (C * C * (lag * z.detach()).exp()).real.sum(-1) for lag in range(200)], 1)
    torch.testing.assert_close(found[1], exact, rtol=0, atol=1e-11)
    # fp32: an angle of up to 3 is rounded to 1e-7 of itself, and 200 steps add that up
    torch.testing.assert_close(found[0], exact, rtol=0, atol=200 * 3e-7 * exact.abs().max().item())
    assert grads[0].isfinite().all() and grads[1].isfinite().all()


@pytest.mark.parametrize("time", LENGTHS)
@pytest.mark.parametrize("dt_scale", [0.0, 1.0, 100.0])
def test_the_diagonal_recurrence_in_chunks(time: int, dt_scale: float) -> None:
    L, _, B, C, dt = system()
    parts = torch.view_as_real(ssm.zoh(L, B, dt_scale * dt[:, None])[0]), torch.view_as_real(B), torch.view_as_real(C)

    def op(u, a, b, c, d, state):
        return ssm_scan.diagonal_ssm(u, *(torch.view_as_complex(x) for x in (a, b, c)), d, state=state)

    check_forms(op, [normal(2, time, CHANNELS), *parts, normal(CHANNELS), normal(2, CHANNELS, HALF, 2)])


@pytest.mark.parametrize("time", LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_real_recurrence_in_chunks(kind: str, time: int) -> None:
    torch.manual_seed(time)
    parts = gates(kind, CHANNELS, HALF).exp(), normal(CHANNELS, HALF), normal(CHANNELS, HALF)

    def op(u, a, b, c, d, state):
        return ssm_scan.real_ssm(u, a, b, c, d, state=state)

    check_forms(op, [normal(2, time, CHANNELS), *parts, normal(CHANNELS), normal(2, CHANNELS, HALF)])


def test_the_real_recurrence_is_half_the_complex_one_and_the_dense_one_on_a_diagonal() -> None:
    a, b, c, u = torch.rand(CHANNELS, HALF).double(), normal(CHANNELS, HALF), normal(CHANNELS, HALF), normal(2, 70, 3)
    y, h = ssm_scan.real_ssm(u, a, b, c)
    twice, modal = ssm_scan.diagonal_ssm(u, *(x.to(torch.complex128) for x in (a, b, c)))
    dense, _ = ssm_scan.dense_ssm(u, torch.diag_embed(a), b, c)
    torch.testing.assert_close(2 * y, twice, rtol=0, atol=1e-11)
    torch.testing.assert_close(torch.stack([h, torch.zeros_like(h)], -1), modal, rtol=0, atol=1e-11)
    torch.testing.assert_close(y, dense, rtol=0, atol=1e-11)


@pytest.mark.parametrize("time", LENGTHS)
def test_the_dense_recurrence_in_chunks(time: int) -> None:
    L, P, B, C, dt = system()
    a, b, c = ssm.real_dplr(L, P, P, B, C)
    A_bar, B_bar = ssm.bilinear_dense(a, b, dt)

    def op(u, a, b, c, state):
        return ssm_scan.dense_ssm(u, a, b, c, state=state)

    check_forms(op, [normal(2, time, CHANNELS), A_bar, B_bar, c, normal(2, CHANNELS, 2 * HALF)])


@pytest.mark.parametrize("form", ["reference", "torch"])
def test_padding_takes_no_time(form: str) -> None:
    L, P, B, C, dt = system()
    a, b, c = ssm.real_dplr(L, P, P, B, C)
    A_bar, B_bar = ssm.bilinear_dense(a, b, dt)
    lengths = torch.tensor([0, 1, 64, 77, 130])
    u, h, modal = normal(5, 130, CHANNELS), normal(5, CHANNELS, 2 * HALF), normal(5, CHANNELS, HALF, 2)
    with ops.use(form):
        _, last = ssm_scan.dense_ssm(u, A_bar, B_bar, c, state=h, lengths=lengths)
        _, last_modal = ssm_scan.diagonal_ssm(u, *ssm.zoh(L, B, dt[:, None]), C, state=modal, lengths=lengths)
        _, last_real = ssm_scan.real_ssm(u, L.real.exp(), B.real, C.real, state=modal[..., 0], lengths=lengths)
    assert torch.equal(last[0], h[0]) and torch.equal(last_modal[0], modal[0])
    assert torch.equal(last_real[0], modal[0, ..., 0])
    for i, n in enumerate(lengths.tolist()):
        _, alone = ssm_scan.dense_ssm(u[i : i + 1, :n], A_bar, B_bar, c, state=h[i : i + 1])
        torch.testing.assert_close(last[i : i + 1], alone, rtol=0, atol=1e-11)
        _, alone = ssm_scan.diagonal_ssm(u[i : i + 1, :n], *ssm.zoh(L, B, dt[:, None]), C, state=modal[i : i + 1])
        torch.testing.assert_close(last_modal[i : i + 1], alone, rtol=0, atol=1e-11)
        _, alone = ssm_scan.real_ssm(u[i : i + 1, :n], L.real.exp(), B.real, C.real, state=modal[i : i + 1, ..., 0])
        torch.testing.assert_close(last_real[i : i + 1], alone, rtol=0, atol=1e-11)
