"""Monarch matrices: the blocks are the full matrix. (What else is claimed of them: test_monarch_tools.py.)"""

import pytest
import torch
from ops.forms import normal

from bestiary import UsageError, ops
from bestiary.ops.monarch import dense


@pytest.mark.parametrize(
    ("first", "second"),
    [((4, 4, 4), (4, 4, 4)), ((2, 8, 3), (4, 5, 4)), ((4, 8, 8), (4, 32, 8)), ((1, 4, 4), (1, 3, 4))],
)
def test_blocks_are_the_full_matrix(first: tuple[int, ...], second: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    a, b, x = normal(*first), normal(*second), normal(3, 2, first[0] * first[2])
    matrix = dense(a, b)
    assert matrix.shape == (second[0] * second[1], first[0] * first[2])
    for form in ("reference", "torch"):
        with ops.use(form):
            torch.testing.assert_close(ops.monarch(x, a, b), x @ matrix.T, rtol=0, atol=1e-12)


def test_a_square_monarch_matrix_is_a_permuted_pair_of_block_diagonals() -> None:
    torch.manual_seed(0)
    n = 5
    a, b = normal(n, n, n), normal(n, n, n)
    swap = torch.arange(n * n).reshape(n, n).T.flatten()
    P = torch.eye(n * n, dtype=torch.float64)[swap]
    expected = P.T @ torch.block_diag(*b) @ P @ torch.block_diag(*a)
    torch.testing.assert_close(dense(a, b), expected, rtol=0, atol=1e-12)


def test_every_block_of_the_second_factor_sees_every_block_of_the_first() -> None:
    matrix = dense(torch.ones(4, 8, 8), torch.ones(4, 8, 8))
    assert (matrix > 0).all()


@pytest.mark.parametrize("shape", [(4, 6, 3), (1, 2, 5), (3, 1, 1)])
def test_one_factor_is_a_block_diagonal_matrix(shape: tuple[int, ...]) -> None:
    blocks, x = normal(*shape), normal(2, 3, shape[0] * shape[2])
    expected = x @ torch.block_diag(*blocks).T
    torch.testing.assert_close(ops.block_diagonal(x, blocks), expected, rtol=0, atol=1e-13)


def test_complex_factors_make_a_complex_product() -> None:
    a, b, x = (torch.randn(*shape, dtype=torch.complex128) for shape in ((4, 8, 3), (4, 5, 8), (2, 12)))
    for inputs in (x, x.real):
        for form in ("reference", "torch"):
            with ops.use(form):
                expected = inputs.to(a.dtype) @ dense(a, b).T
                torch.testing.assert_close(ops.monarch(inputs, a, b), expected, rtol=0, atol=1e-12)


def test_factors_that_do_not_fit_are_named() -> None:
    with pytest.raises(UsageError, match="first factor"):
        ops.monarch(torch.zeros(7), torch.zeros(2, 4, 4), torch.zeros(4, 2, 2))
    with pytest.raises(UsageError, match="do not fit"):
        ops.monarch(torch.zeros(8), torch.zeros(2, 4, 4), torch.zeros(3, 2, 2))
    with pytest.raises(UsageError, match="2 x 4"):
        ops.block_diagonal(torch.zeros(7), torch.zeros(2, 4, 4))
