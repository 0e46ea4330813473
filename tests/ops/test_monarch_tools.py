"""What is claimed of Monarch matrices: the nearest one, the DFT among them, more factors, counts, causal products."""

import math

import pytest
import torch
from ops.forms import normal
from torch import Tensor

from bestiary import UsageError, ops
from bestiary.ops import monarch_tools
from bestiary.ops.long_convolution import long_convolution
from bestiary.ops.monarch import dense
from bestiary.ops.monarch_tools import (
    dft,
    minimum_degree,
    multiply,
    polynomial_basis,
    polynomial_product,
    project,
    reverse_digits,
    solve,
)


def matrix_of(function, n: int) -> Tensor:
    return torch.stack([function(row) for row in torch.eye(n, dtype=torch.float64)], dim=1)


@pytest.mark.parametrize(
    ("blocks", "rank", "in_block", "out_blocks", "out_block"),
    [(4, 1, 4, 4, 4), (6, 1, 8, 8, 6), (4, 2, 3, 4, 5), (4, 8, 32, 4, 64), (2, 3, 5, 7, 4), (1, 1, 7, 7, 1)],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_the_projection_of_a_monarch_matrix_is_itself(
    blocks: int, rank: int, in_block: int, out_blocks: int, out_block: int, dtype: torch.dtype
) -> None:
    first = torch.randn(blocks, rank * out_blocks, in_block, dtype=dtype)
    second = torch.randn(out_blocks, out_block, blocks * rank, dtype=dtype)
    matrix = dense(first, second)
    found = project(matrix, blocks=blocks, out_blocks=out_blocks, rank=rank)
    assert found.first.shape == first.shape and found.second.shape == second.shape
    torch.testing.assert_close(dense(found.first, found.second), matrix, rtol=0, atol=1e-12 * matrix.abs().max())
    assert found.error < 1e-13


@pytest.mark.parametrize(("n_out", "n_in"), [(64, 64), (48, 48), (24, 96), (96, 36)])
@pytest.mark.parametrize("rank", [1, 3])
def test_the_error_of_a_projection_is_the_distance(n_out: int, n_in: int, rank: int) -> None:
    matrix = normal(n_out, n_in)
    found = project(matrix, rank=rank)
    distance = (matrix - dense(found.first, found.second)).norm() / matrix.norm()
    assert found.error == pytest.approx(distance.item(), rel=1e-10)
    assert 0 < found.error < 1


def test_no_monarch_matrix_near_the_projection_is_nearer() -> None:
    matrix = normal(24, 36)
    best = project(matrix)
    for seed in range(20):
        torch.manual_seed(seed)
        step = 10.0 ** -(seed % 5)
        moved = dense(best.first + step * normal(*best.first.shape), best.second + step * normal(*best.second.shape))
        assert (matrix - moved).norm() / matrix.norm() > best.error


def test_random_matrices_are_far_from_monarch_and_full_rank_is_exact() -> None:
    matrix = normal(64, 64)
    errors = [project(matrix, rank=rank).error for rank in range(1, 9)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-14
    assert 0.75 < errors[0] < 0.81
    assert project(torch.zeros(16, 16)).error == 0.0


def test_a_projection_is_computed_in_float64_and_returned_in_the_matrix_own_dtype() -> None:
    wide = dense(normal(8, 8, 8), normal(8, 8, 8))
    found, exact = project(wide.float()), project(wide.float().double())
    assert found.first.dtype == torch.float32 and found.error == exact.error
    torch.testing.assert_close(found.first.double(), exact.first, rtol=1e-7, atol=0)


def test_projections_that_do_not_fit_are_refused() -> None:
    for wrong, message in (({"blocks": 5}, "blocks=5"), ({"out_blocks": 0}, "out_blocks=0"), ({"rank": 9}, "1..8")):
        with pytest.raises(UsageError, match=message):
            project(normal(64, 64), **wrong)


@pytest.mark.parametrize(
    "radices", [(8, 8), (6, 6), (6, 8), (5, 17), (7, 24), (4, 4, 4), (2, 3, 5, 7), (13,), (2,) * 7]
)
def test_the_dft_is_a_monarch_matrix(radices: tuple[int, ...]) -> None:
    n = math.prod(radices)
    x = torch.randn(3, n, dtype=torch.complex128)
    factors = dft(*radices)
    assert [factor.shape for factor in factors] == [(n // radix, radix, radix) for radix in radices]
    found = multiply(reverse_digits(x, radices), factors)
    torch.testing.assert_close(found, torch.fft.fft(x), rtol=0, atol=1e-13 * n)
    torch.testing.assert_close(reverse_digits(solve(found, factors), radices[::-1]), x, rtol=0, atol=1e-12)
    real = multiply(reverse_digits(x.real, radices), factors)
    torch.testing.assert_close(real, torch.fft.fft(x.real), rtol=0, atol=1e-13 * n)


@pytest.mark.parametrize(("n1", "n2"), [(8, 8), (6, 8), (5, 17), (7, 24)])
def test_the_projection_finds_the_dft(n1: int, n2: int) -> None:
    n = n1 * n2
    swapped = torch.fft.fft(torch.eye(n, dtype=torch.complex128))[:, reverse_digits(torch.arange(n), (n2, n1))]
    assert project(swapped, blocks=n1, out_blocks=n2).error < 1e-13
    assert project(torch.fft.fft(torch.eye(n, dtype=torch.complex128))).error > 0.1  # digits must be reversed
    x = torch.randn(2, n, dtype=torch.complex128)
    found = ops.monarch(reverse_digits(x, (n2, n1)), *dft(n2, n1))
    torch.testing.assert_close(found, torch.fft.fft(x), rtol=0, atol=1e-11)


def test_two_factors_are_the_order_two_matrix() -> None:
    first, second, x = normal(6, 8, 8), normal(8, 6, 6), normal(2, 5, 48)
    torch.testing.assert_close(multiply(x, [first, second]), ops.monarch(x, first, second), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("size", "order"), [(4, 1), (4, 2), (3, 3), (2, 5)])
def test_an_order_p_matrix_is_the_product_of_its_permuted_factors(size: int, order: int) -> None:
    n = size**order
    factors = [normal(n // size, size, size) for _ in range(order)]
    to_front = torch.eye(n, dtype=torch.float64)[torch.arange(n).reshape(n // size, size).T.flatten()]
    expected = torch.eye(n, dtype=torch.float64)
    for factor in factors:
        expected = to_front @ torch.block_diag(*factor) @ expected
    torch.testing.assert_close(matrix_of(lambda x: multiply(x, factors), n), expected, rtol=0, atol=1e-12)
    assert sum(factor.numel() for factor in factors) == monarch_tools.parameters(n, order)
    assert monarch_tools.flops(factors) == 2 * monarch_tools.parameters(n, order)
    y = normal(3, n)
    torch.testing.assert_close(multiply(solve(y, factors), factors), y, rtol=1e-8, atol=1e-8)


def test_counts_are_those_of_the_paper() -> None:
    n = 4096
    assert [monarch_tools.parameters(n, p) for p in (1, 2, 3)] == [n**2, 2 * 262_144, 3 * 65_536]
    assert [monarch_tools.flops(dft(*radices)) for radices in ((64, 64), (16, 16, 16))] == [4_194_304, 1_572_864]
    square = (torch.empty(64, 64, 64), torch.empty(64, 64, 64))
    assert monarch_tools.flops(square) == 4 * n * 64 == 2 * n**2 // 32
    assert monarch_tools.flops([torch.empty(4, n // 4, n // 4)]) == 2 * n**2 // 4
    for n, order in ((10, 2), (0, 2), (16, 0)):
        with pytest.raises(UsageError, match="power"):
            monarch_tools.parameters(n, order)


def bases(b: int, *, causal: bool) -> list[list[Tensor]]:
    """Three bases with random coefficients: of minimum degree where `causal`, any otherwise."""
    found = []
    for _ in range(3):
        inner = torch.eye(b, dtype=torch.float64) + 0.3 * normal(b, b)
        outer = torch.eye(b, dtype=torch.float64) + 0.3 * normal(b, b, b)
        found.append(polynomial_basis(*(minimum_degree(inner, outer) if causal else (inner, outer))))
    return found


@pytest.mark.parametrize("b", [2, 4, 6])
def test_a_basis_of_minimum_degree_makes_the_product_causal(b: int) -> None:
    half, product = b * b // 2, bases(b, causal=True)
    u, k = normal(half), normal(half)
    jacobian = torch.autograd.functional.jacobian(lambda u: polynomial_product(u, k, *product), u)
    assert jacobian.triu(1).abs().max() < 1e-12
    assert (jacobian.tril().abs() > 1e-6).double().mean() * half**2 > half * (
        half + 1
    ) / 2 - half  # and no less than that
    by_kernel = torch.autograd.functional.jacobian(lambda k: polynomial_product(u, k, *product), k)
    assert by_kernel.triu(1).abs().max() < 1e-12


@pytest.mark.parametrize("b", [4, 6])
def test_any_other_basis_lets_the_future_in(b: int) -> None:
    half, product = b * b // 2, bases(b, causal=False)
    k = normal(half)
    jacobian = torch.autograd.functional.jacobian(lambda u: polynomial_product(u, k, *product), normal(half))
    assert jacobian.triu(1).abs().max() > 0.01


@pytest.mark.parametrize("b", [4, 6])
def test_the_polynomials_are_what_they_are_said_to_be(b: int) -> None:
    """Column j of the matrix, interpolated: divisible by Z^j, of a degree below n/2 for j < n/2, real."""
    n = b * b
    inner, outer = minimum_degree(normal(b, b), normal(b, b, b))
    columns = matrix_of(lambda x: multiply(reverse_digits(x, (b, b)), polynomial_basis(inner, outer)), n)
    coefficients = torch.fft.ifft(columns, dim=0)
    assert coefficients.imag.abs().max() < 1e-12
    assert coefficients.real.triu(1).abs().max() < 1e-12  # [degree, j]: nothing below degree j
    assert coefficients.real[n // 2 :, : n // 2].abs().max() < 1e-12
    j_0, j_1 = 1, b - 1
    expected = torch.zeros(n, dtype=torch.float64)
    for low in range(b):
        for high in range(b):
            if low + b * high < n:
                expected[low + b * high] += inner[j_1, low] * outer[j_1, j_0, high]
    torch.testing.assert_close(coefficients.real[:, j_0 * b + j_1], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("radices", [(4, 4), (6, 4), (4, 8), (2, 3, 4)])
def test_in_the_basis_of_monomials_it_is_the_causal_convolution(radices: tuple[int, ...]) -> None:
    half = math.prod(radices) // 2
    u, k, factors = normal(2, half), normal(half), dft(*radices)
    expected, _ = long_convolution(u[..., None], k[None])
    found = polynomial_product(u, k, factors, factors, factors)
    torch.testing.assert_close(found, expected[..., 0], rtol=0, atol=1e-12)


def test_the_monomials_are_a_basis_of_minimum_degree() -> None:
    b = 4
    eye = torch.eye(b, dtype=torch.float64)
    assert torch.equal(minimum_degree(eye, eye.expand(b, b, b))[1], eye.expand(b, b, b))
    for found, expected in zip(polynomial_basis(eye, eye.expand(b, b, b)), dft(b, b)):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


def test_coefficients_can_be_learned() -> None:
    b = 4
    inner, outer = (
        (normal(b, b) + 3 * torch.eye(b)).requires_grad_(),
        (normal(b, b, b) + 3 * torch.eye(b)).requires_grad_(),
    )
    u, k = normal(b * b // 2), normal(b * b // 2)

    def product(inner: Tensor, outer: Tensor) -> Tensor:
        basis = polynomial_basis(*minimum_degree(inner, outer))
        return polynomial_product(u, k, basis, dft(b, b), basis)

    assert torch.autograd.gradcheck(product, (inner, outer))


def test_products_of_the_wrong_size_are_refused() -> None:
    with pytest.raises(UsageError, match="half as many"):
        polynomial_product(normal(4), normal(4), *[dft(4, 4)] * 3)
    with pytest.raises(UsageError, match="even"):
        minimum_degree(normal(3, 3), normal(3, 3, 3))
    with pytest.raises(UsageError, match="radices"):
        reverse_digits(normal(5), (2, 2))
