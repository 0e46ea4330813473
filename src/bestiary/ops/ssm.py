"""Linear time-invariant state-space models: S4 (arXiv:2111.00396), S4D (2206.11893), and HiPPO (2008.07669).

    x'(t) = A x(t) + B u(t),   y(t) = C x(t) + D u(t)            in continuous time, one system a channel
    h_t = A_bar h_{t-1} + B_bar u_t,   y_t = C h_t + D u_t       discretised with a step size dt
    y = K * u,   K_l = C A_bar^l B_bar                           the same, as a convolution

A is diagonal (S4D) or diagonal plus low rank, diag(L) - P Q^* (S4). Real systems have their eigenvalues in conjugate
pairs, of which one half is stored: sums over all are 2 Re sums over the half.

Here are the systems that models begin with, their discretisations and their kernels; ssm_scan.py computes with them.
"""

import math
from typing import Any

import torch
from jaxtyping import Complex, Float
from torch import Tensor

CHUNK = 64

# ------------------------------------------------------------------------------------------------ initial systems


def hippo_legs(n: int) -> tuple[Float[Tensor, "n n"], Float[Tensor, " n"]]:
    """HiPPO-LegS: A and B of the system whose state holds the Legendre coefficients of all it has seen; float64."""
    root = (2 * torch.arange(n, dtype=torch.float64) + 1).sqrt()
    A = -torch.outer(root, root).tril(-1) - torch.diag(torch.arange(1, n + 1, dtype=torch.float64))
    return A, root


def legs_dplr(
    n: int,
) -> tuple[Complex[Tensor, " half"], Complex[Tensor, " half"], Complex[Tensor, " half"], Complex[Tensor, "n n"]]:
    """HiPPO-LegS as diagonal minus low rank: (L, P, B) of one half of the conjugate pairs, and the basis V.

    A = V (diag(L) - P P^*) V^* and B = V B' over all n (even) eigenvalues; L = -1/2 + i lambda, P_k = sqrt(k + 1/2).
    """
    A, B = hippo_legs(n)
    P = (torch.arange(n, dtype=torch.float64) + 0.5).sqrt()
    normal = A + torch.outer(P, P)  # -1/2 I plus a skew-symmetric matrix
    skew = normal - torch.diag(normal.diagonal())
    frequency, V = torch.linalg.eigh(skew * -1j)
    order = frequency.argsort(descending=True)  # the positive half first
    frequency, V = frequency[order], V[:, order]
    half = n // 2
    back = V.mH.to(torch.complex128)
    L = torch.complex(torch.full_like(frequency, -0.5), frequency)
    return L[:half], (back @ P.to(back.dtype))[:half], (back @ B.to(back.dtype))[:half], V


def s4d_lin(half: int) -> Complex[Tensor, " half"]:
    """S4D-Lin: A_n = -1/2 + i pi n."""
    n = torch.arange(half, dtype=torch.float64)
    return torch.complex(torch.full_like(n, -0.5), math.pi * n)


def s4d_inv(half: int) -> Complex[Tensor, " half"]:
    """S4D-Inv: A_n = -1/2 + i (N / pi) (N / (2n + 1) - 1), N = 2 half."""
    n = torch.arange(half, dtype=torch.float64)
    return torch.complex(torch.full_like(n, -0.5), 2 * half / math.pi * (2 * half / (2 * n + 1) - 1))


# -------------------------------------------------------------------------------------------------- discretisation


def growth(x: Tensor) -> Tensor:
    """(exp(x) - 1) / x, 1 at 0: what a constant input adds up to in a step; real or complex."""
    return _Growth.apply(x)


class _Growth(torch.autograd.Function):
    """With the derivative in full precision near 0, where (exp(x) - growth(x)) / x cancels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        safe = torch.where(x == 0, 1e-30, x)
        grown = _expm1(safe) / safe
        ctx.save_for_backward(x, grown)
        return grown

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x, grown = ctx.saved_tensors
        small = x.abs() < 1 / 8
        near, series = torch.where(small, x, 0), torch.zeros_like(x)
        for n in range(9, -1, -1):  # sum of (n + 1) x^n / (n + 2)!
            series = torch.addcmul(x.new_tensor((n + 1) / math.factorial(n + 2)), series, near)
        far = (1 + (x - 1) * grown) / torch.where(small, 1, x)  # (exp(x) - grown) / x
        return grad * torch.where(small, series, far).conj()


def _exp(x: Tensor) -> Tensor:
    return torch.polar(x.real.exp(), x.imag) if x.is_complex() else x.exp()  # several times faster than complex exp


def _expm1(x: Tensor) -> Tensor:
    if not x.is_complex():
        return torch.expm1(x)
    grown, half = torch.expm1(x.real), torch.sin(x.imag / 2)
    return torch.complex(grown - 2 * half**2 * (grown + 1), (grown + 1) * torch.sin(x.imag))


def zoh_factors(x: Tensor) -> tuple[Tensor, Tensor]:
    """Zero-order hold (inputs are constant during a step) as factors of x = dt A: A_bar, and B_bar / (dt B)."""
    return _exp(x), growth(x)


def bilinear_factors(x: Tensor) -> tuple[Tensor, Tensor]:
    """The bilinear (Tustin) rule as factors of x = dt A: A_bar, and B_bar / (dt B)."""
    scale = 1 / (1 - x / 2)
    return scale * (1 + x / 2), scale


RULES = {"zoh": zoh_factors, "bilinear": bilinear_factors}
"""Discretisations of a diagonal A, by name."""


def zoh(A: Tensor, B: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """Zero-order hold of a diagonal A: A_bar = exp(dt A), B_bar = (A_bar - 1) / A B, which is dt B where A = 0.

    A, B: (..., N) real or complex; dt: broadcastable to them.
    """
    A_bar, gain = zoh_factors(dt * A)
    return A_bar, dt * gain * B


def bilinear(A: Tensor, B: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """Bilinear rule of a diagonal A: A_bar = (1 + dt A/2) / (1 - dt A/2), B_bar = dt B / (1 - dt A/2)."""
    A_bar, gain = bilinear_factors(dt * A)
    return A_bar, gain * dt * B


def bilinear_dense(
    A: Float[Tensor, "*batch n n"], B: Float[Tensor, "*batch n"], dt: Float[Tensor, "*batch"]
) -> tuple[Float[Tensor, "*batch n n"], Float[Tensor, "*batch n"]]:
    """The bilinear rule of a full matrix: A_bar = (I - dt A/2)^-1 (I + dt A/2), B_bar = (I - dt A/2)^-1 dt B."""
    half = dt[..., None, None] * A / 2
    one = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    solved = torch.linalg.solve(one - half, torch.cat([one + half, (dt[..., None] * B)[..., None]], dim=-1))
    return solved[..., :-1], solved[..., -1]


def real_dplr(
    L: Complex[Tensor, "*batch half"],
    P: Complex[Tensor, "*batch half"],
    Q: Complex[Tensor, "*batch half"],
    B: Complex[Tensor, "*batch half"],
    C: Complex[Tensor, "*batch half"],
) -> tuple[Float[Tensor, "*batch n n"], Float[Tensor, "*batch n"], Float[Tensor, "*batch n"]]:
    """The real system of size n = 2 half behind one half of the conjugate pairs: (A, B, C).

    Its state is (Re h, Im h); the full system maps h to L h - 2 P Re(Q^* h), and reads 2 Re(C h).
    """
    a, b = torch.diag_embed(L.real), torch.diag_embed(L.imag)
    A = torch.cat([torch.cat([a, -b], dim=-1), torch.cat([b, a], dim=-1)], dim=-2)
    p, q = (torch.cat([x.real, x.imag], dim=-1) for x in (P, Q))
    low_rank = 2 * p[..., :, None] * q[..., None, :]
    return A - low_rank, torch.cat([B.real, B.imag], dim=-1), 2 * torch.cat([C.real, -C.imag], dim=-1)


# --------------------------------------------------------------------------------------------------------- kernels


def powers(x: Tensor, count: int) -> Tensor:
    """1, x, x^2, ..., x^(count-1) along a new last dimension, by doubling (exact for 0, no logarithm)."""
    found = torch.ones_like(x)[..., None]
    step = x[..., None]
    while found.shape[-1] < count:
        found = torch.cat([found, found * step], dim=-1)
        step = step * step
    return found[..., :count]


def vandermonde_kernel(
    A_bar: Complex[Tensor, "channels half"],
    B_bar: Complex[Tensor, "channels half"],
    C: Complex[Tensor, "channels half"],
    length: int,
) -> Float[Tensor, "channels length"]:
    """K_l = 2 Re sum_n C_n B_n A_n^l for l < length: the kernel of a diagonal system.

    A (channels, half, length) tensor is never held: powers within CHUNK steps, times powers of A^CHUNK.
    """
    inner = powers(A_bar, min(CHUNK, length))
    outer = powers(A_bar**CHUNK, -(-length // CHUNK)) * (C * B_bar)[..., None]
    return 2 * torch.einsum("cnj,cni->cji", outer, inner).real.flatten(1)[:, :length]


def dplr_kernel(
    L: Complex[Tensor, "channels half"],
    P: Complex[Tensor, "channels half"],
    Q: Complex[Tensor, "channels half"],
    B: Complex[Tensor, "channels half"],
    C: Complex[Tensor, "channels half"],
    dt: Float[Tensor, " channels"],
    length: int,
) -> Float[Tensor, "channels length"]:
    """K_l = C A_bar^l B_bar for l < length of A = diag(L) - P Q^*, discretised by the bilinear rule (S4's algorithm 1).

    The truncated generating function sum_l K_l w^l at the roots of unity w is C~ (I - A_bar w)^-1 B_bar with
    C~ = C (I - A_bar^length); the inverse is a Cauchy product in L and a rank-one correction (Woodbury). C is the
    system's own readout, not C~: the kernel depends on the lag alone, however many lags are asked for.
    """
    A, b, c = real_dplr(L, P, Q, B, C)
    A_bar, _ = bilinear_dense(A, b, dt)
    truncated = c - (c[..., None, :] @ torch.linalg.matrix_power(A_bar, length))[..., 0, :]
    half = L.shape[-1]
    C = torch.complex(truncated[..., :half], -truncated[..., half:]) / 2
    w = torch.exp(-2j * math.pi * torch.arange(length, dtype=torch.float64, device=L.device) / length).to(L.dtype)

    def generating(w: Tensor) -> Tensor:
        """The generating function at some roots."""
        # 2/dt (1-w)/(1+w) has a pole at w = -1: everything is multiplied by (1+w), which leaves that point finite
        top, bottom = (2 * (1 - w)) / dt[:, None], 1 + w
        cauchy = 1 / (top[..., None] - bottom[..., None] * L[:, None])  # (channels, roots, half)
        mirror = 1 / (top[..., None] - bottom[..., None] * L[:, None].conj())

        def dot(x: Tensor, y: Tensor) -> Tensor:
            """x . (z - L)^-1 y over both halves of the conjugate pairs."""
            return (cauchy @ (x * y)[..., None])[..., 0] + (mirror @ (x * y).conj()[..., None])[..., 0]

        correction = dot(C, P) * bottom * dot(Q.conj(), B) / (1 + bottom * dot(Q.conj(), P))
        return 2 * (dot(C, B) - correction)

    return torch.fft.ifft(torch.cat([generating(part) for part in w.split(CHUNK)], dim=-1)).real
