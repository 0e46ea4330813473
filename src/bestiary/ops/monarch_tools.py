"""What is known of Monarch matrices: their size, the nearest one to a matrix, the DFT, more factors, causal products.

    M[(s, g), (b, p)] = sum_e second[g, s, (b, e)] first[b, (e, g), p]       e < rank, 1 in a square Monarch matrix

So the slice of fixed g and b, an (s x p) matrix, has that rank and is free otherwise: the nearest Monarch matrix takes
the largest singular values of each slice (Dao et al. 2022, arXiv:2204.00595). With p factors (Fu et al. 2023, Monarch
Mixer, arXiv:2310.12109), each mixes one digit of the index:

    M = (P B_p) ... (P B_1) P_0          P moves the last digit to the front, P_0 reverses all digits or does nothing

                            parameters       FLOPs a vector          n = 4096
    dense                   n^2              2 n^2                   33,554,432
    order p                 p n^(1 + 1/p)    2 p n^(1 + 1/p)         1,048,576 (p = 2), 393,216 (p = 3)
    DFT of order p          -                8 p n^(1 + 1/p)         4,194,304, 1,572,864
    FFT                     -                5 n log2 n              245,760
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Complex, Float, Inexact, Shaped
from torch import Tensor
from torch.nn import functional as F

from bestiary.errors import UsageError
from bestiary.ops.monarch import block_diagonal

Factors = Sequence[Tensor]
"""B_1, ..., B_p of an order-p matrix, each (blocks, out_block, in_block); the radices are the sizes of the blocks."""


def parameters(n: int, order: int = 2) -> int:
    """Numbers in `order` factors of n^(1 - 1/order) blocks of n^(1/order) x n^(1/order): order n^(1 + 1/order)."""
    size = round(n ** (1 / order)) if order > 0 else 0
    if n < 1 or size**order != n:
        raise UsageError(f"n={n} is no {order}-th power")
    return order * n * size


def flops(factors: Factors) -> int:
    """FLOPs of multiplying one vector by these factors, a multiply-add being two (eight in complex numbers)."""
    return sum((8 if factor.is_complex() else 2) * factor.numel() for factor in factors)


class Projection(NamedTuple):
    """The nearest Monarch matrix in Frobenius norm, and how far it is: |M - projection| / |M|."""

    first: Inexact[Tensor, "blocks inner in_block"]
    second: Inexact[Tensor, "inner_blocks out_block inner_block"]
    error: float


@torch.no_grad()
def project(
    matrix: Inexact[Tensor, "out_features in_features"],
    *,
    blocks: int | None = None,
    out_blocks: int | None = None,
    rank: int = 1,
) -> Projection:
    """Factors for `ops.monarch` of the Monarch matrix nearest to a dense one; exact where it is one already.

    Computed in float64, whatever the dtype of the matrix, which the factors then have. A matrix of random numbers is
    far from any (a relative error of 0.8 at 64 x 64): the error is there to be looked at. A higher rank is nearer.

    Args:
        blocks: of the first factor, a divisor of in_features; by default the largest up to its root.
        out_blocks: of the second, a divisor of out_features; by default the smallest from its root on.
        rank: of each slice; rank * out_blocks outputs a block of the first factor.
    """
    n_out, n_in = matrix.shape
    blocks = _largest_divisor(n_in) if blocks is None else blocks
    out_blocks = n_out // _largest_divisor(n_out) if out_blocks is None else out_blocks
    for name, count, width in (("blocks", blocks, n_in), ("out_blocks", out_blocks, n_out)):
        if count < 1 or width % count:
            raise UsageError(f"{name}={count} must divide {width}")
    most = min(n_out // out_blocks, n_in // blocks)
    if not 1 <= rank <= most:
        raise UsageError(f"rank={rank} must lie in 1..{most}, the smaller side of a slice")
    wide = matrix.to(torch.complex128 if matrix.is_complex() else torch.float64)
    slices = wide.reshape(n_out // out_blocks, out_blocks, blocks, n_in // blocks).permute(1, 2, 0, 3)  # g, b, s, p
    left, sigma, right = torch.linalg.svd(slices, full_matrices=False)
    root = sigma[..., :rank].sqrt()
    second = (left[..., :rank] * root[..., None, :]).transpose(1, 2).flatten(2)  # g, s, (b, e)
    first = (root[..., None] * right[..., :rank, :]).permute(1, 2, 0, 3).flatten(1, 2)  # b, (e, g), p
    lost, norm = sigma[..., rank:].square().sum().sqrt().item(), wide.abs().square().sum().sqrt().item()
    return Projection(first.to(matrix.dtype), second.to(matrix.dtype), lost / norm if norm else 0.0)


def multiply(x: Inexact[Tensor, "*batch in_features"], factors: Factors) -> Inexact[Tensor, "*batch out_features"]:
    """(P B_p) ... (P B_1) x: each factor mixes the last digit of the index, which then moves to the front.

    With two square factors it is `ops.monarch`; p square factors have n^(1 - 1/p) blocks of size n^(1/p), or others
    whose sizes multiply to n.
    """
    for factor in factors:
        x = block_diagonal(x, factor).unflatten(-1, (factor.shape[0], -1)).mT.flatten(-2)
    return x


def solve(y: Inexact[Tensor, "*batch n"], factors: Factors) -> Inexact[Tensor, "*batch n"]:
    """The x of y = multiply(x, factors), for square blocks that can be inverted."""
    for factor in reversed(factors):
        parts = y.unflatten(-1, (factor.shape[1], factor.shape[0])).mT
        y = torch.linalg.solve(factor, parts[..., None].to(factor.dtype))[..., 0].flatten(-2)
    return y


def reverse_digits(x: Shaped[Tensor, "*batch n"], radices: Sequence[int]) -> Shaped[Tensor, "*batch n"]:
    """P_0: entries whose index has the digits (d_1, ..., d_p), the last one fastest, at (d_p, ..., d_1)."""
    if math.prod(radices) != x.shape[-1]:
        raise UsageError(f"the radices {tuple(radices)} multiply to {math.prod(radices)}, not {x.shape[-1]}")
    digits, batch = x.unflatten(-1, tuple(radices)), x.ndim - 1
    return digits.permute(*range(batch), *reversed(range(batch, digits.ndim))).flatten(batch)


def dft(*radices: int, dtype: torch.dtype = torch.complex128) -> list[Complex[Tensor, "blocks radix radix"]]:
    """Factors of the DFT of n = r_1 ... r_p: fft(x) = multiply(reverse_digits(x, radices), dft(*radices)).

    The i-th stage turns a digit of the time into one of the frequency, given the lower ones, twiddle factors included.
    """
    n, known, factors = math.prod(radices), 1, []
    for radix in radices:
        place = torch.arange(n // radix, dtype=torch.int64)
        low = place // (n // radix // known)  # the frequency so far, below `known`
        digit = torch.arange(radix, dtype=torch.int64)
        turns = (low[:, None, None] + known * digit[:, None]) * digit % (known * radix)
        angle = -2 * math.pi / (known * radix) * turns.double()
        factors.append(torch.polar(torch.ones_like(angle), angle).to(dtype))
        known *= radix
    return factors


def polynomial_basis(
    inner: Float[Tensor, "b b"], outer: Float[Tensor, "b b b"]
) -> list[Complex[Tensor, "blocks size size"]]:
    """Factors of the matrix whose columns are polynomials, at the n = b^2 roots of one.

    q_j(Z) = l_{j_1}(Z) r_{j_1 j_0}(Z^b) for j = j_0 b + j_1: the last digit chooses l, and both choose r. The factors
    take their input with digits reversed, as the DFT's do, whose l and r are the monomials.

    Args:
        inner: coefficients of l: [j_1, degree].
        outer: coefficients of r: [j_1, j_0, degree].
    """
    b = inner.shape[0]
    digit, place = (torch.arange(n, device=inner.device) for n in (b, b * b))
    coarse, fine = _powers(b, digit, digit), _powers(b * b, place, digit).unflatten(0, (b, b))  # (g, .), (s, g, .)
    first = torch.einsum("jkd,gd->jgk", outer.to(coarse.dtype), coarse)
    second = torch.einsum("sgd,jd->gsj", fine, inner.to(fine.dtype))
    return [first, second]


def minimum_degree(
    inner: Float[Tensor, "b b"], outer: Float[Tensor, "b b b"]
) -> tuple[Float[Tensor, "b b"], Float[Tensor, "b b b"]]:
    """Free coefficients -> those of a basis for causal products: q_j is divisible by Z^j, and below n/2 stays there."""
    b = inner.shape[0]
    if b % 2:
        raise UsageError(f"the size b={b} of the blocks must be even: half of the n = b^2 steps are padding")
    early = torch.arange(b, device=inner.device) < b // 2
    allowed = (early[None, :] | ~early[:, None]).triu()  # [j_0, degree]
    return inner.triu(), torch.where(allowed, outer, 0)


def polynomial_product(
    u: Float[Tensor, "*batch half"],
    k: Float[Tensor, "*kernels half"],
    product: Factors,
    kernel: Factors,
    inputs: Factors,
) -> Float[Tensor, "*batch half"]:
    """(M_0^-1 (M_1 k * M_2 u))[0 : n/2], u and k padded with zeros to n: values multiplied, then interpolated.

    Each M holds the values of a basis of polynomials, so that the polynomials of k and u are multiplied and the product
    is expanded in the basis M_0. It depends on the past of u and k alone if q_j, of every basis, is divisible by Z^j,
    and below n/2 has a degree below n/2 (Monarch Mixer, theorem 3; `minimum_degree` makes such bases): q_i q_j is
    divisible by Z^(i + j), and hence a sum of q_m with m >= i + j. In the basis of monomials it is the convolution.

    Args:
        product: factors of M_0 (square, invertible).
        kernel: factors of M_1.
        inputs: factors of M_2.
    """
    half = u.shape[-1]
    radices = [factor.shape[1] for factor in product]
    if math.prod(radices) != 2 * half or k.shape[-1] != half:
        raise UsageError(f"bases of size {math.prod(radices)} take half as many steps, not {half} and {k.shape[-1]}")
    values = [
        multiply(reverse_digits(F.pad(x, (0, half)), radices), factors) for x, factors in ((k, kernel), (u, inputs))
    ]
    expanded = reverse_digits(solve(values[0] * values[1], product), radices[::-1])
    return expanded[..., :half].real.to(u.dtype)


def _powers(n: int, place: Tensor, degree: Tensor) -> Tensor:
    """(exp(-2 pi i / n) ** place) ** degree, reduced before the angle is taken: (places, degrees)."""
    angle = -2 * math.pi / n * (place[:, None] * degree % n).double()
    return torch.polar(torch.ones_like(angle), angle)


def _largest_divisor(n: int) -> int:
    """The largest divisor up to the root."""
    return next(d for d in range(math.isqrt(n), 0, -1) if n % d == 0)
