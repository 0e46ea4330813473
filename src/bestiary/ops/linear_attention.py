"""Gated linear attention: the recurrence shared by linear attention, RetNet, GLA, Based, Mamba-2 and RWKV-5/6.

A head keeps a matrix-valued state S (key_dim x value_dim), a fast-weight memory from keys to values:

    S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T            write, after the old memory has decayed
    o_t = S_t^T q_t                                     read
    o_t = (S_{t-1} + diag(u) k_t v_t^T)^T q_t           read with a bonus u for the current step (RWKV-5/6)

Members differ only in the log-decay g_t:

    linear attention, Based     g_t = 0                                        arXiv:2006.16236, 2402.18668
    RetNet                      g_t = log gamma_h, a constant per head         arXiv:2307.08621
    Mamba-2                     g_t = dt_t A_h, a scalar per head and step     arXiv:2405.21060
    GLA                         g_t = logsigmoid(W x_t) / 16, per key channel  arXiv:2312.06635

With a normaliser, the memory has one more column, that of a value which is always 1; what is read there divides all.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from bestiary.errors import UsageError
from bestiary.ops import decay, dispatch
from bestiary.ops.native.linear_attention import linear_attention as kernel

dispatch.has_kernel("linear_attention")
CHUNK = 64
PIECE = 2048
"""Steps whose chunks are computed together; bounds the memory of long segments."""


def linear_attention(
    q: Float[Tensor, "batch time key_heads key_dim"],
    k: Float[Tensor, "batch time key_heads key_dim"],
    v: Float[Tensor, "batch time heads value_dim"],
    log_decay: Float[Tensor, "..."] | None = None,
    *,
    bonus: Float[Tensor, "bonus_heads bonus_dim"] | None = None,
    scale: float | None = None,
    normalise: bool = False,
    eps: float = 1e-6,
    state: Float[Tensor, "batch heads key_dim columns"] | None = None,
) -> tuple[Float[Tensor, "batch time heads value_dim"], Float[Tensor, "batch heads key_dim columns"]]:
    """Write each step's key and value into a decaying memory and read it with the query; returns (o, state).

    Args:
        q, k: may have fewer heads than v, each then serving several of its heads, side by side (Mamba-2's groups).
        log_decay: None, (heads,), (batch, time, heads) or (batch, time, heads, key_dim); at most 0.
        bonus: (heads, key_dim), the weight of the current step's key channels, which then replaces its plain reading.
        scale: of the queries; None for key_dim ** -0.5.
        normalise: divide by the reading of ones plus `eps`; the state then has value_dim + 1 columns.
        state: the memory before this segment, fp32 or wider; None for zeros.

    o comes in v's dtype, the state in its own. The compiled kernel adds to the memory step by step in fp32: where
    nothing decays, its errors grow with the root of the length, 2e-6 to 4e-6 of the largest entry after 8192 steps.
    """
    _check(q, v, log_decay, bonus)
    key_dim = q.shape[3]
    if state is None:
        shape = (v.shape[0], v.shape[2], key_dim, v.shape[3] + normalise)
        state = torch.zeros(shape, dtype=dispatch.wide(q.dtype, k.dtype, v.dtype), device=v.device)
    scale = key_dim**-0.5 if scale is None else scale
    if dispatch.compiled("linear_attention", state):
        gates = log_decay.expand(*v.shape[:3]) if log_decay is not None and log_decay.ndim == 1 else log_decay
        parts = tuple(x if x is None else x.to(state.dtype) for x in (q, k, v, gates, bonus))
        o, state = kernel(parts, state, scale, normalise, eps)
        return o.to(v.dtype), state
    with dispatch.full_precision(v):
        wide_q, wide_k, values = q.to(state.dtype) * scale, k.to(state.dtype), v.to(state.dtype)
        if normalise:
            values = F.pad(values, (0, 1), value=1.0)
        gates = None if log_decay is None else log_decay.to(state.dtype)
        weight = None if bonus is None else bonus.to(state.dtype)
        form = dispatch.choose("linear_attention", time=v.shape[1], like=v)
        o, state = form(wide_q, wide_k, values, gates, weight, state)
        if normalise:
            o = o[..., :-1] / (o[..., -1:] + eps)
        return o.to(v.dtype), state


@dispatch.form("linear_attention", "reference")
def recurrent(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, bonus: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Step through time, as the equation reads."""
    q, k = _to_heads(q, v.shape[2]), _to_heads(k, v.shape[2])
    decays = _per_step(g, v).exp().expand(*v.shape[:3], -1)
    outputs = []
    for q_t, k_t, v_t, decay_t in zip(q.unbind(1), k.unbind(1), v.unbind(1), decays.unbind(1)):
        write, before = k_t[..., None] * v_t[..., None, :], state
        state = torch.addcmul(write, decay_t[..., None], state)
        seen = state if bonus is None else before + bonus[..., None] * write
        outputs.append((q_t[..., None, :] @ seen)[..., 0, :])
    return (torch.stack(outputs, dim=1) if outputs else torch.zeros_like(v)), state


@dispatch.form("linear_attention", "torch")
def chunked(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, bonus: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """All but one hand-over of the state per chunk as matrix products."""
    if not v.shape[1]:
        return torch.zeros_like(v), state
    gates = _per_step(g, v)
    by_channel = bonus is not None or gates.shape[-1] > 1
    if by_channel:
        q, k = _to_heads(q, v.shape[2]), _to_heads(k, v.shape[2])
        gates = gates.expand_as(k)
    outputs = []
    for q_p, k_p, v_p, g_p in zip(*(x.split(PIECE, dim=1) for x in (q, k, v, gates))):
        if by_channel:
            o, state = _by_channel(q_p, k_p, v_p, g_p, bonus, state)
        else:
            o, state = _by_head(q_p, k_p, v_p, g_p[..., 0], state)
        outputs.append(o)
    return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0], state


def _by_head(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Decays g of (batch or 1, time, heads or 1). Heads that share queries and keys share their products."""
    time, heads = v.shape[1:3]
    size, groups = decay.chunk_size(time, CHUNK), q.shape[2]
    shared = heads // groups
    q, k, v, g = (decay.chunks(x, size) for x in (q, k, v, g))  # (B, G, n, c, K), (B, H, n, c, V), (b, h, n, c)
    scores = (q @ k.mT)[:, :, None]
    grouped = (groups, shared) if g.shape[1] == heads else (1, 1)
    weights = (scores * decay.between(g).unflatten(1, grouped)).expand(-1, -1, shared, -1, -1, -1)
    inside = weights.flatten(1, 2) @ v
    kept = v * decay.until_end(g, -1).exp()[..., None]
    writes = k.mT @ _side_by_side(kept, groups)  # (B, G, n, K, r V)
    total = g.sum(-1).exp().expand(-1, heads, -1)
    starts, state = _hand_over(_apart(writes, heads), total[..., None, None], state)
    seen = _apart(q @ _side_by_side(starts, groups), heads) * decay.since_start(g, -1).exp()[..., None]
    return decay.unchunk(inside + seen, time), state


def _by_channel(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, bonus: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Decays g of (batch, time, heads, key_dim)."""
    time, size, inclusive = v.shape[1], decay.chunk_size(v.shape[1], CHUNK), bonus is None
    q, k, v, g = (decay.chunks(x, size) for x in (q, k, v, g))
    inside = decay.products(q, k, g, inclusive=inclusive) @ v
    if bonus is not None:
        inside = inside + (q * bonus[:, None, None] * k).sum(-1, keepdim=True) * v
    writes = (k * decay.until_end(g, -2).exp()).mT @ v
    starts, state = _hand_over(writes, g.sum(-2).exp()[..., None], state)
    seen = (q * decay.since_start(g, -2, inclusive=inclusive).exp()) @ starts
    return decay.unchunk(inside + seen, time), state


def _hand_over(writes: Tensor, kept: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """State at the start of each chunk, (B, H, n, K, V), and after the last, from what each chunk writes and keeps."""
    starts = []
    for write, share in zip(writes.unbind(2), kept.unbind(2)):
        starts.append(state)
        state = torch.addcmul(write, share, state)
    return torch.stack(starts, dim=2), state


def _side_by_side(x: Tensor, groups: int) -> Tensor:
    """(B, H, n, c, V) -> (B, G, n, c, r V): the values of heads that share keys, next to each other."""
    return x if x.shape[1] == groups else x.unflatten(1, (groups, -1)).movedim(2, 4).flatten(4)


def _apart(x: Tensor, heads: int) -> Tensor:
    """The inverse of `_side_by_side`."""
    groups = x.shape[1]
    return x if groups == heads else x.unflatten(-1, (heads // groups, -1)).movedim(4, 2).flatten(1, 2)


def _to_heads(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2)


def _per_step(g: Tensor | None, v: Tensor) -> Tensor:
    """Any log-decay as (batch or 1, time, heads or 1, key_dim or 1)."""
    if g is None:
        return v.new_zeros(1, v.shape[1], 1, 1)
    if g.ndim == 1:
        return g.expand(1, v.shape[1], -1)[..., None]
    return g[..., None] if g.ndim == 3 else g


def _check(q: Tensor, v: Tensor, g: Tensor | None, bonus: Tensor | None) -> None:
    batch, time, heads, key_dim = *v.shape[:3], q.shape[3]
    if heads % q.shape[2]:
        raise UsageError(f"the heads of v, {heads}, must be a multiple of those of q and k, {q.shape[2]}")
    allowed = [(heads,), (batch, time, heads), (batch, time, heads, key_dim)]
    if g is not None and tuple(g.shape) not in allowed:
        raise UsageError(f"log_decay must have a shape among {allowed}, not {tuple(g.shape)}")
    if bonus is not None and tuple(bonus.shape) != (heads, key_dim):
        raise UsageError(f"bonus must be {(heads, key_dim)}, not {tuple(bonus.shape)}")
