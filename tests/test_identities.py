"""The puzzle behind this library, as theorems: linear attention is a linear RNN, but not vice versa; both are
convolutions while nothing in them depends on the data. Each test states one identity between two families, in float64.
"""

import math

import pytest
import torch
from torch import Tensor

from bestiary import mixers, ops
from bestiary.ops import ssm

B, T, H, K, V = 2, 23, 3, 4, 5
EXACT = {"rtol": 0.0, "atol": 1e-10}


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def gates(*shape: int) -> Tensor:
    return -torch.rand(shape, dtype=torch.float64)


def causal_convolution(kernel: Tensor, u: Tensor) -> Tensor:
    """y_t = sum_s kernel_{t-s} u_s, as a double loop would do it: kernel (C, T), u (B, T, C)."""
    time = u.shape[1]
    lag = torch.arange(time)[:, None] - torch.arange(time)
    toeplitz = torch.where(lag >= 0, kernel[:, lag.clamp(min=0)], 0)  # (C, t, s)
    return torch.einsum("cts,bsc->btc", toeplitz, u)


def test_linear_attention_is_a_linear_rnn() -> None:
    """Its state is a matrix whose entries are the channels of a diagonal linear RNN, fed with k_i v_j."""
    q, k, v, g = normal(B, T, H, K), normal(B, T, H, K), normal(B, T, H, V), gates(B, T, H, K)
    o, memory = ops.linear_attention(q, k, v, g, scale=1.0)
    write = k[..., :, None] * v[..., None, :]
    h, last = ops.linear_recurrence(g.exp()[..., None].expand_as(write), write)
    torch.testing.assert_close(o, torch.einsum("bthk,bthkv->bthv", q, h), **EXACT)
    torch.testing.assert_close(memory, last, **EXACT)


def test_not_every_linear_rnn_is_linear_attention() -> None:
    """One whose state must be cleared and kept at once, channel by channel of a value, is none: its gate is no row."""
    write, decay = torch.ones(1, 2, 1, 2, dtype=torch.float64), torch.tensor([[[1.0, 1.0]], [[1.0, 0.0]]])
    h, _ = ops.linear_recurrence(decay.double()[None].expand_as(write), write)
    # gates of key channels act on whole rows of S: its two values, fed alike, would have to stay alike
    o, _ = ops.linear_attention(write[..., :1], write[..., :1], write, torch.zeros(1, 2, 1, 1).double(), scale=1.0)
    assert h[0, 1, 0].tolist() == [2.0, 1.0] and o[0, 1, 0, 0] == o[0, 1, 0, 1]


def test_a_linear_rnn_with_fixed_coefficients_is_a_convolution() -> None:
    a, b, c, u = gates(7).exp(), normal(7), normal(7), normal(B, T, 7)
    h, _ = ops.linear_recurrence(a.expand_as(u), b * u)
    kernel = c[:, None] * b[:, None] * a[:, None] ** torch.arange(T)
    torch.testing.assert_close(c * h, causal_convolution(kernel, u), **EXACT)


def test_and_none_where_they_depend_on_the_data() -> None:
    """A convolution is linear: twice the input gives twice the output. A gate that reads the input breaks that."""
    u = normal(B, T, 7)
    h, twice = (ops.linear_recurrence(torch.sigmoid(x), x)[0] for x in (u, 2 * u))
    assert (twice - 2 * h).abs().max() > 0.1


def diagonal(rule) -> tuple[Tensor, Tensor, Tensor]:
    A = ssm.s4d_lin(8).expand(6, 8)
    return *rule(A, torch.ones_like(A), torch.rand(6, 1, dtype=torch.float64)), torch.view_as_complex(normal(6, 8, 2))


@pytest.mark.parametrize("rule", [ssm.zoh, ssm.bilinear])
def test_s4d_is_a_convolution_with_its_impulse_response(rule) -> None:
    system, u = diagonal(rule), normal(B, T, 6)
    impulse = torch.zeros(1, T, 6, dtype=torch.float64)
    impulse[:, 0] = 1
    response, _ = ops.diagonal_ssm(impulse, *system)
    torch.testing.assert_close(response[0].T, ssm.vandermonde_kernel(*system, T), **EXACT)
    torch.testing.assert_close(ops.diagonal_ssm(u, *system)[0], causal_convolution(response[0].T, u), **EXACT)


def test_s4s_kernel_by_cauchy_products_is_its_dense_recurrence() -> None:
    L, P, read_in = (x.expand(6, -1) for x in ssm.legs_dplr(16)[:3])
    C, dt = torch.view_as_complex(normal(6, 8, 2)), 0.1 * torch.rand(6, dtype=torch.float64)
    A, b, c = ssm.real_dplr(L, P, P, read_in, C)
    u = normal(B, T, 6)
    y, _ = ops.dense_ssm(u, *ssm.bilinear_dense(A, b, dt), c)
    torch.testing.assert_close(y, causal_convolution(ssm.dplr_kernel(L, P, P, read_in, C, dt, T), u), **EXACT)


@pytest.mark.parametrize(("rule", "method"), [(ssm.zoh, "zoh"), (ssm.bilinear, "bilinear")])
def test_discretisations_are_those_of_control_theory(rule, method: str) -> None:
    signal = pytest.importorskip("scipy.signal")
    a, b, dt = -torch.rand(5, dtype=torch.float64), normal(5), torch.tensor(0.3, dtype=torch.float64)
    A_bar, B_bar = rule(a, b, dt)
    A, read_in = torch.diag(a).numpy(), b[:, None].numpy()
    expected = signal.cont2discrete((A, read_in, A[:1], A[:1, :1]), dt.item(), method)
    torch.testing.assert_close(torch.diag(A_bar), torch.from_numpy(expected[0]), **EXACT)
    torch.testing.assert_close(B_bar, torch.from_numpy(expected[1])[:, 0], **EXACT)
    if method == "bilinear":
        dense = ssm.bilinear_dense(torch.diag(a), b, dt)
        torch.testing.assert_close(dense[0], torch.from_numpy(expected[0]), **EXACT)


def test_mamba_that_does_not_look_at_its_input_is_s4d() -> None:
    """With constant dt, B and C the selective scan is a diagonal LTI system, discretised by Euler's rule for B."""
    channels, N = 6, 4
    u, A, dt = normal(B, T, channels), -torch.rand(channels, N, dtype=torch.float64), torch.rand(channels).double()
    read_in, C = normal(N), normal(N)
    y, _ = ops.selective_scan(u, dt.expand_as(u), A, read_in.expand(B, T, N), C.expand(B, T, N))
    A_bar = (dt[:, None] * A).exp()
    kernel = torch.einsum("n,cnl->cl", C * read_in, A_bar[..., None] ** torch.arange(T)) * dt[:, None]
    torch.testing.assert_close(y, causal_convolution(kernel, u), **EXACT)
    system = (A_bar, dt[:, None] * read_in, C.expand(channels, N) / 2)  # ops.diagonal_ssm reads 2 Re(C h)
    torch.testing.assert_close(y, ops.diagonal_ssm(u, *(x.to(torch.complex128) for x in system))[0], **EXACT)


def test_mamba_2_is_gated_linear_attention_with_one_decay_a_head() -> None:
    """And Mamba whose A is one number a head: state-space duality."""
    x, dt, A = normal(B, T, H, V), torch.rand(B, T, H, dtype=torch.float64), -torch.rand(H, dtype=torch.float64)
    read_in, C = normal(B, T, K), normal(B, T, K)
    g = (dt * A)[..., None].expand(B, T, H, K)
    q, k = (z[:, :, None].expand(B, T, H, K) for z in (C, read_in))
    gla, _ = ops.linear_attention(q, k, x * dt[..., None], g, scale=1.0)
    each, wide = (z[..., None].expand(*z.shape, V).flatten(-2) for z in (dt, A))
    mamba, _ = ops.selective_scan(x.flatten(2), each, wide[:, None].expand(-1, K), read_in, C)
    torch.testing.assert_close(gla.flatten(2), mamba, **EXACT)


def test_rwkv_4_is_a_quotient_of_two_linear_rnns() -> None:
    k, v, w, u = normal(B, T, K), normal(B, T, K), gates(K), normal(K)
    decay = w.exp().expand_as(k)
    (top, _), (bottom, _) = (ops.linear_recurrence(decay, write) for write in (k.exp() * v, k.exp()))
    top, bottom = (torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1] for x in (top, bottom))  # the past alone
    now = (u + k).exp()
    torch.testing.assert_close(ops.wkv(k, v, w, u)[0], (top + now * v) / (bottom + now), **EXACT)


def test_the_delta_rule_is_online_gradient_descent_on_recall() -> None:
    """Every step is one of gradient descent, of rate beta, on |S^T k - v|^2 / 2."""
    q, v, beta = normal(B, T, H, K), normal(B, T, H, V), torch.rand(B, T, H, dtype=torch.float64)
    k = torch.nn.functional.normalize(normal(B, T, H, K), dim=-1)
    o, _ = ops.delta_rule(q, k, v, beta, scale=1.0)
    S = torch.zeros(B, H, K, V, dtype=torch.float64)
    for t in range(T):
        S.requires_grad_()
        loss = (torch.einsum("bhkv,bhk->bhv", S, k[:, t]) - v[:, t]).square().sum() / 2
        (slope,) = torch.autograd.grad(loss, S)
        S = (S - beta[:, t, :, None, None] * slope).detach()
        torch.testing.assert_close(o[:, t], torch.einsum("bhkv,bhk->bhv", S, q[:, t]), **EXACT)


def test_retnet_is_gla_whose_gates_are_fixed() -> None:
    q, k, v = normal(B, T, H, K), normal(B, T, H, K), normal(B, T, H, V)
    g = mixers.build("retnet", 96, n_heads=H).log_decay(q)
    assert torch.allclose(g.exp(), 1 - 2.0 ** (-5.0 - torch.arange(H).double()))
    retnet, gla = (ops.linear_attention(q, k, v, x)[0] for x in (g, g[:, None].expand(B, T, H, K)))
    torch.testing.assert_close(retnet, gla, **EXACT)


def test_retention_is_a_convolution_of_keys_with_values_not_of_the_input() -> None:
    q, k, v, g = normal(B, T, H, K), normal(B, T, H, K), normal(B, T, H, V), gates(H)
    o, _ = ops.linear_attention(q, k, v, g, scale=1.0)
    products = (k[..., :, None] * v[..., None, :]).flatten(2)
    kernel = (g[:, None] * torch.arange(T)).exp().repeat_interleave(K * V, dim=0)
    seen = causal_convolution(kernel, products).unflatten(2, (H, K, V))
    torch.testing.assert_close(o, torch.einsum("bthk,bthkv->bthv", q, seen), **EXACT)


def test_softmax_attention_is_linear_attention_with_endless_features() -> None:
    """Based keeps three terms of exp's Taylor series: with small scores that is attention, and closer the smaller."""
    from bestiary.mixers.based import taylor

    errors = []
    for size in (0.4, 0.2, 0.1):
        torch.manual_seed(0)
        q, k, v = size * normal(B, T, H, 16), size * normal(B, T, H, 16), normal(B, T, H, V)
        based, _ = ops.linear_attention(taylor(q), taylor(k), v, scale=1.0, normalise=True, eps=0.0)
        errors.append((based - ops.attention(q, k, v)[0]).abs().max().item())
    # the first term left out is s^3 / 6, and s goes with the square of the size: halving it divides the error by 64
    assert errors[0] / errors[1] == pytest.approx(64, rel=0.3) and errors[1] / errors[2] == pytest.approx(64, rel=0.3)


def test_attention_over_a_window_as_long_as_the_text_is_attention() -> None:
    q, k, v = normal(B, T, H, K), normal(B, T, H, K), normal(B, T, H, V)
    full, _ = ops.attention(q, k, v)
    for window in (T, T + 5, 10 * T):
        torch.testing.assert_close(ops.attention(q, k, v, window=window)[0], full, **EXACT)
    assert not torch.allclose(ops.attention(q, k, v, window=T - 1)[0], full)


def test_s4s_hippo_remembers_its_whole_past_as_legendre_coefficients() -> None:
    """x' = A x / t + B u / t holds the coefficients of u on [0, t] in Legendre polynomials, here of a line."""
    N, steps = 6, 4000
    A, read_in = ssm.hippo_legs(N)
    state, dt = torch.zeros(N, dtype=torch.float64), 1.0 / steps
    state[0] = 1.0  # the coefficients at the start: u(0) = 1, a constant so far
    for n in range(1, steps + 1):
        t, u = n * dt, 1 + 2 * (n * dt)  # u(t) = 1 + 2 t
        one = torch.eye(N, dtype=torch.float64)
        state = torch.linalg.solve(one - dt / t * A, state + dt / t * read_in * u)  # implicit Euler
    expected = torch.zeros(N, dtype=torch.float64)
    expected[0], expected[1] = 2.0, 1 / math.sqrt(3)  # 1 + 2 t on [0, 1]: 2 P_0 + 1 P_1, P_n scaled by sqrt(2n + 1)
    torch.testing.assert_close(state, expected, rtol=0, atol=3e-3)
