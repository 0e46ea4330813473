"""Log-linear attention (Guo et al. 2025, arXiv:2506.04761): linear attention with a memory for each scale of the past.

The past of step t is cut as in a Fenwick tree: for each bit l of t that is 1, one bucket of 2^l steps, the larger the
older. Bucket l is level l + 1, step t itself is level 0, and each level has its memory and, at each step, its weight:

    S_t^(l) = sum of exp(g_{s+1} + ... + g_t) k_s v_s^T over the steps s of level l
    o_t = sum_l lambda_t[l] (S_t^(l))^T q_t

The level of s, seen from t, is the bit length of s XOR t: 1 + the highest bit in which they differ. With L levels
beside 0, the last one is also that of all older steps. With all weights 1 this is linear attention.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bestiary import state as states
from bestiary.ops import decay, dispatch
from bestiary.ops.native import traced

CHUNK = 64


@states.register
class FenwickState(NamedTuple):
    """Memories of the levels from 1, as the step at `position` will find them, before its decay."""

    memory: Float[Tensor, "batch levels heads key_dim value_dim"]
    position: Int[Tensor, " batch"]


def log_linear_attention(
    q: Float[Tensor, "batch time heads key_dim"],
    k: Float[Tensor, "batch time heads key_dim"],
    v: Float[Tensor, "batch time heads value_dim"],
    log_decay: Float[Tensor, "batch time heads"],
    weights: Float[Tensor, "batch time heads all_levels"],
    *,
    scale: float | None = None,
    state: FenwickState | None = None,
    lengths: Int[Tensor, " batch"] | None = None,
) -> tuple[Float[Tensor, "batch time heads value_dim"], FenwickState]:
    """Read the past by scales; returns (o, state), o in v's dtype.

    Args:
        log_decay: at most 0.
        weights: lambda, of the current step (level 0) and of each level of the state.
        scale: of the queries; None for key_dim ** -0.5.
        state: the past, fp32 or wider; None for none.
        lengths: real steps of each row of a right-padded batch; only these enter the state.
    """
    if state is None:
        sizes = v.shape[0], weights.shape[3] - 1, v.shape[2], k.shape[3], v.shape[3]
        state = empty_fenwick(*sizes, dtype=dispatch.wide(q.dtype, k.dtype, v.dtype), device=v.device)
    scale = k.shape[3] ** -0.5 if scale is None else scale
    if traced.active():
        o, *after = torch.ops.bestiary.log_linear(q, k, v, log_decay, weights, *state, scale)
        return o, FenwickState(*after)
    lengths = torch.full_like(state.position, v.shape[1]) if lengths is None else lengths
    with dispatch.full_precision(v):
        wide = [x.to(state.memory.dtype) for x in (q * scale, k, v, log_decay, weights)]
        real = (torch.arange(v.shape[1], device=v.device) < lengths[:, None])[..., None]
        wide[1], wide[3] = torch.where(real[..., None], wide[1], 0), torch.where(real, wide[3], 0)
        o, state = dispatch.choose("log_linear_attention", time=v.shape[1])(*wide, state, lengths)
        return o.to(v.dtype), state


def empty_fenwick(
    *sizes: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> FenwickState:
    """The state before the first step; `sizes` are batch, levels, heads, key_dim and value_dim."""
    position = torch.zeros(sizes[0], dtype=torch.int64, device=device)
    return FenwickState(torch.zeros(sizes, dtype=dtype, device=device), position)


@dispatch.form("log_linear_attention", "reference")
def recurrent(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, weights: Tensor, state: FenwickState, lengths: Tensor
) -> tuple[Tensor, FenwickState]:
    """Step through time. After step t, it and the levels of the 1s at the end of t in binary become one: a carry."""
    memory, position = state
    levels, outputs = memory.shape[1], [torch.zeros_like(v[:, :0])]
    level = torch.arange(levels + 1, device=v.device)
    for t, (q_t, k_t, v_t, g_t, weight_t) in enumerate(zip(*(x.unbind(1) for x in (q, k, v, g, weights)))):
        write = k_t[..., None] * v_t[..., None, :]
        full = torch.cat([write[:, None], g_t.exp()[:, None, :, None, None] * memory], dim=1)  # with level 0
        outputs.append(torch.einsum("bhk,bhl,blhkv->bhv", q_t, weight_t, full)[:, None])
        into = bit_length(position ^ (position + 1), levels)[:, None]
        merged = torch.where(_wide(level <= into), full, 0).sum(1, keepdim=True)
        after = torch.where(_wide(level > into), full, torch.where(_wide(level == into), merged, 0))[:, 1:]
        real = t < lengths
        memory, position = torch.where(_wide(real[:, None]), after, memory), position + real
    return torch.cat(outputs, dim=1), FenwickState(memory, position)


def _wide(mask: Tensor) -> Tensor:
    """(batch, levels) -> (batch, levels, 1, 1, 1)."""
    return mask[..., None, None, None]


@dispatch.form("log_linear_attention", "torch")
def chunked(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, weights: Tensor, state: FenwickState, lengths: Tensor
) -> tuple[Tensor, FenwickState]:
    """A chunk at a time, wherever it begins: the levels of all pairs of steps follow from their positions.

    A bucket is one to all later steps: what holds for its first position holds for it.
    """
    memory, position = state
    levels, outputs = memory.shape[1], [torch.zeros_like(v[:, :0])]
    level = torch.arange(1, levels + 1, device=v.device)
    for start, parts in zip(range(0, v.shape[1], CHUNK), zip(*(x.split(CHUNK, dim=1) for x in (q, k, v, g, weights)))):
        q_c, k_c, v_c, g_c, w_c = (x.movedim(2, 1) for x in parts)  # (B, H, c, ...)
        steps = position[:, None] + torch.arange(g_c.shape[2], device=v.device)
        after = position + (lengths - start).clamp(0, g_c.shape[2])
        buckets = position[:, None] >> level << level  # where each level begins

        def of_bucket(t: Tensor, buckets: Tensor = buckets) -> Tensor:  # the level of each bucket, seen from t
            return torch.maximum(bit_length(t[:, :, None] ^ buckets[:, None], levels), level)

        pair = bit_length(steps[:, :, None] ^ steps[:, None], levels)  # (B, t, s)
        scores = (q_c @ k_c.mT) * decay.between(g_c) * w_c.gather(3, pair[:, None].expand(-1, q_c.shape[1], -1, -1))
        seen = w_c.gather(3, of_bucket(steps)[:, None].expand(-1, q_c.shape[1], -1, -1))
        seen = seen * decay.since_start(g_c, -1).exp()[..., None]
        o = scores @ v_c + torch.einsum("bhtk,bhtl,blhkv->bhtv", q_c, seen, memory)
        outputs.append(o.movedim(1, 2))

        kept = g_c.sum(-1).exp()[:, None, :, None, None]
        moved = (of_bucket(after[:, None])[:, 0, :, None] == level).to(v.dtype)  # (B, from, to)
        written = (bit_length(steps ^ after[:, None], levels)[..., None] == level).to(v.dtype)  # (B, s, to)
        lasting = k_c * decay.until_end(g_c, -1).exp()[..., None]
        memory = kept * torch.einsum("bfl,bfhkv->blhkv", moved, memory)
        memory = memory + torch.einsum("bsl,bhsk,bhsv->blhkv", written, lasting, v_c)
        position = after
    return torch.cat(outputs, dim=1), FenwickState(memory, position)


def bit_length(x: Int[Tensor, "..."], most: int) -> Int[Tensor, "..."]:
    """Bits needed to write x, at most `most`: 0 for 0, 1 for 1, 2 for 2 and 3, 3 for 4 to 7."""
    return torch.bucketize(x, 1 << torch.arange(most, device=x.device), right=True)
