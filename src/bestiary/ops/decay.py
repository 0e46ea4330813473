"""What the chunked forms share: time cut into chunks, and decays between the steps of a chunk.

A decay between two steps is the exponential of the sum of the gates strictly between. It is never taken as a difference
of long cumulative sums, which would lose weak gates that follow strong ones (fp32 error 3e-5 instead of 2e-7), nor
as a quotient of exponentials, which would overflow. All exponents here are sums of log-decays, so at most 0.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

BASE = 4
"""Blocks of this many steps are compared pair by pair; larger ones by matrix products."""


def chunk_size(time: int, largest: int) -> int:
    """The smallest power of two that holds the segment, within BASE ... largest."""
    return min(largest, max(BASE, 1 << max(0, time - 1).bit_length()))


def chunks(x: Tensor, size: int) -> Tensor:
    """(B, T, H, ...) -> (B, H, n, size, ...), zeros after the end."""
    missing = -x.shape[1] % size
    if missing:
        x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, missing))
    return x.unflatten(1, (-1, size)).movedim(3, 1)


def unchunk(x: Tensor, time: int) -> Tensor:
    """The inverse of `chunks`."""
    return x.movedim(1, 3).flatten(1, 2)[:, :time]


def since_start(g: Tensor, dim: int, *, inclusive: bool = True) -> Tensor:
    """Sum of the gates from the beginning of the chunk to each step, that step's own included or not."""
    return g.cumsum(dim) if inclusive else _shift(g, dim, 1).cumsum(dim)


def until_end(g: Tensor, dim: int) -> Tensor:
    """Sum of the gates after each step up to the end of the chunk: what a write at that step still loses."""
    return _shift(g, dim, -1).flip(dim).cumsum(dim).flip(dim)


def between(g: Tensor) -> Tensor:
    """exp(g_{s+1} + ... + g_t) for s <= t, else 0; (..., c) -> (..., t, s)."""
    later = torch.ones(g.shape[-1], g.shape[-1], dtype=torch.bool, device=g.device).tril(-1)
    total = torch.where(later, g[..., None], 0).cumsum(dim=-2)
    return torch.where(later.T, 0, total.exp())


def products(q: Tensor, k: Tensor, g: Tensor, *, inclusive: bool = True) -> Tensor:
    """sum_i q_t[i] k_s[i] exp(g_{s+1}[i] + ... + g_t[i]) for s <= t, else 0; (..., c, K) -> (..., t, s).

    With inclusive=False the sums end at g_{t-1} and the diagonal is 0. c is BASE times a power of two.

    A block of steps is halved again and again: between a step t of the right half and a step s of the left one, the
    decay is exp(from the middle to t) times exp(from s to the middle), both at most 1, so that the block of products is
    a matrix product of damped queries and keys; only blocks of BASE steps are compared pair by pair.
    """
    size = q.shape[-2]
    if size == BASE:
        return _pairs(q, k, g, inclusive)
    (q, k, g), half = (x.unflatten(-2, (2, size // 2)) for x in (q, k, g)), size // 2
    early = q.new_zeros(*q.shape[:-3], half, half)
    right = q[..., 1, :, :] * since_start(g[..., 1, :, :], -2, inclusive=inclusive).exp()
    left = k[..., 0, :, :] * until_end(g[..., 0, :, :], -2).exp()
    same = products(q, k, g, inclusive=inclusive)
    top = torch.cat([same[..., 0, :, :], early], dim=-1)
    return torch.cat([top, torch.cat([right @ left.mT, same[..., 1, :, :]], dim=-1)], dim=-2)


def _pairs(q: Tensor, k: Tensor, g: Tensor, inclusive: bool) -> Tensor:
    """`products` of a few steps, each pair by itself."""
    size = q.shape[-2]
    gates = g if inclusive else _shift(g, -2, 1)
    counted = torch.ones(size, size, dtype=torch.bool, device=q.device).tril(-1 if inclusive else -2)[..., None]
    total = torch.where(counted, gates[..., :, None, :], 0).cumsum(dim=-3)  # (..., t, s, K)
    weights = torch.einsum("...tk,...sk,...tsk->...ts", q, k, total.exp())
    return weights.tril(0 if inclusive else -1)


def _shift(x: Tensor, dim: int, by: int) -> Tensor:
    """x moved along `dim` by one step, with a zero where nothing comes in."""
    zero = torch.zeros_like(x.narrow(dim, 0, 1))
    size = x.shape[dim]
    return torch.cat([zero, x.narrow(dim, 0, size - 1)] if by > 0 else [x.narrow(dim, 1, size - 1), zero], dim)
