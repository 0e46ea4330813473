"""Monarch matrices (Dao et al. 2022, arXiv:2204.00595): a product of two block-diagonal matrices and permutations.

    y = P^T B_2 P B_1 x          P writes the entries (block, place) in the order (place, block)

With b blocks each and inner width m, an (out x in) map costs 2 b (in/b m/b + m/b out/b) FLOPs in place of 2 in out.
What else is known of them (projection, the DFT, more factors, causal products) is in monarch_tools.py.
"""

import torch
from jaxtyping import Inexact
from torch import Tensor

from bestiary.errors import UsageError
from bestiary.ops import dispatch


def monarch(
    x: Inexact[Tensor, "*batch in_features"],
    first: Inexact[Tensor, "blocks inner in_block"],
    second: Inexact[Tensor, "inner_blocks out_block inner_block"],
) -> Inexact[Tensor, "*batch out_features"]:
    """Multiply by a Monarch matrix.

    Args:
        x: in_features = blocks * in_block entries.
        first: B_1; the blocks' outputs have blocks * inner entries in all.
        second: B_2, of inner_blocks * inner_block = blocks * inner inputs (inner_blocks = inner and inner_block =
            blocks in a square Monarch matrix); out_features = inner_blocks * out_block.

    Raises:
        UsageError: the shapes do not fit.
    """
    blocks, inner, in_block = first.shape
    inner_blocks, _, inner_block = second.shape
    if x.shape[-1] != blocks * in_block:
        raise UsageError(f"x has {x.shape[-1]} entries, the first factor takes {blocks} x {in_block}")
    if inner_blocks * inner_block != blocks * inner or inner % inner_blocks:
        raise UsageError(
            f"the factors do not fit: {blocks} blocks of {inner} outputs, {inner_blocks} blocks of {inner_block} inputs"
        )
    dtype = torch.promote_types(x.dtype, first.dtype)
    # no recurrence: both forms take time as one more batch dimension
    return dispatch.choose("monarch", time=2)(x.to(dtype), first.to(dtype), second.to(dtype))


@dispatch.form("monarch", "reference")
def by_matrix(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Multiply by the full matrix."""
    return x @ dense(first, second).T


@dispatch.form("monarch", "torch")
def by_blocks(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Two batched products with a transposition between them and after."""
    inner = block_diagonal(x, first)
    outer = block_diagonal(_permute(inner, second.shape[0]), second)
    return outer.unflatten(-1, (second.shape[0], -1)).mT.flatten(-2)


def block_diagonal(
    x: Inexact[Tensor, "*batch in_features"], blocks: Inexact[Tensor, "blocks out_block in_block"]
) -> Inexact[Tensor, "*batch out_features"]:
    """Multiply by a block-diagonal matrix, given its blocks; a single factor mixes nothing across blocks."""
    if x.shape[-1] != blocks.shape[0] * blocks.shape[2]:
        raise UsageError(f"x has {x.shape[-1]} entries, the factor takes {blocks.shape[0]} x {blocks.shape[2]}")
    dtype = torch.promote_types(x.dtype, blocks.dtype)
    parts = x.to(dtype).unflatten(-1, (blocks.shape[0], -1))
    return torch.einsum("...bi,boi->...bo", parts, blocks.to(dtype)).flatten(-2)


def dense(
    first: Inexact[Tensor, "blocks inner in_block"], second: Inexact[Tensor, "inner_blocks out_block inner_block"]
) -> Inexact[Tensor, "out_features in_features"]:
    """The full matrix of two factors."""
    left, right = torch.block_diag(*second), torch.block_diag(*first)
    order = _permute(torch.arange(right.shape[0], device=first.device), second.shape[0])
    final = torch.arange(left.shape[0], device=first.device).unflatten(0, (second.shape[0], -1)).T.flatten()
    return left[final] @ right[order]


def _permute(x: Tensor, groups: int) -> Tensor:
    """Every groups-th entry together, so that each block of the second factor sees all blocks of the first."""
    return x.unflatten(-1, (-1, groups)).mT.flatten(-2)
