"""Causal softmax attention over all of the past or a window of it, with a KV cache as its state (arXiv:1706.03762).

    o_t = sum_s softmax_s(scale q_t.k_s) v_s            over s <= t, or t - window < s <= t

Grouped queries (arXiv:2305.13245): each head of k and v serves several heads of q.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from bestiary import state as states
from bestiary.errors import UsageError
from bestiary.ops import dispatch
from bestiary.ops.native import traced
from bestiary.ops.short_convolution import last_inputs

QUERY_BLOCK = 128


@states.register
class KVCache(NamedTuple):
    """Keys and values of the past.

    Without a window, row b holds its steps 0 ... position[b]-1 in its first slots. With one, the slots are the
    last window-1 steps, the newest last; those from before the beginning hold zeros and are never read.
    """

    keys: Float[Tensor, "batch slots kv_heads key_dim"]
    values: Float[Tensor, "batch slots kv_heads value_dim"]
    position: Int[Tensor, " batch"]


def attention(
    q: Float[Tensor, "batch time heads key_dim"],
    k: Float[Tensor, "batch time kv_heads key_dim"],
    v: Float[Tensor, "batch time kv_heads value_dim"],
    *,
    window: int | None = None,
    scale: float | None = None,
    state: KVCache | None = None,
    lengths: Int[Tensor, " batch"] | None = None,
) -> tuple[Float[Tensor, "batch time heads value_dim"], KVCache]:
    """Attend to the cached past and causally within the segment; returns (o, cache) with o in q's dtype.

    Args:
        window: each step sees itself and the window-1 steps before; None for all of the past.
        scale: of the scores; None for key_dim ** -0.5.
        state: the cache after the steps before this segment; None for an empty one.
        lengths: real steps of each row of a right-padded batch; only these enter the cache.
    """
    (batch, time), groups = k.shape[:2], k.shape[2]
    if q.shape[2] % groups:
        raise UsageError(f"the number of query heads, {q.shape[2]}, must be a multiple of the key heads, {groups}")
    if window is not None and window < 1:
        raise UsageError(f"window must be at least 1, not {window}")
    if state is None:
        state = empty_cache(batch, groups, k.shape[3], v.shape[3], window=window, dtype=k.dtype, device=k.device)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if traced.active():
        o, *after = torch.ops.bestiary.attend(q, k, v, *state, window or 0, scale)
        return o, KVCache(*after)
    step = torch.arange(time, device=q.device)
    place = state.position[:, None] + step
    if not state.keys.shape[1] or _begins(state):  # the segment is all there is to see
        after = remember(state, k, v, window, lengths)
        place = step.expand(batch, time)
        keys, values, slot, before = k, v, place, 0
    else:
        q = q.to(state.keys.dtype)
        if window is None:
            after = remember(state, k, v, window, lengths)
            used = after.keys.shape[1] if not states.may_write() else int(after.position.max())
            keys, values = after.keys[:, :used], after.values[:, :used]
            slot, before = torch.arange(used, device=q.device).expand(batch, used), None
        else:
            keys = torch.cat([state.keys, k.to(state.keys.dtype)], dim=1)
            values = torch.cat([state.values, v.to(state.values.dtype)], dim=1)
            after = remember(state, k, v, window, lengths)
            before = window - 1
            slot = state.position[:, None] - before + torch.arange(before + time, device=q.device)
    o = dispatch.choose("attention", time=time)(q, keys, values, slot, place, before, window, scale)
    return o.to(v.dtype), after


def _begins(state: KVCache) -> bool:
    """Whether no row has a past; a compiler, which must not look at numbers, takes the general way."""
    return not torch.compiler.is_compiling() and not state.position.any()


def empty_cache(
    batch: int,
    kv_heads: int,
    key_dim: int,
    value_dim: int,
    *,
    window: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> KVCache:
    """The cache before the first step: without slots, or with the window's."""
    slots = 0 if window is None else window - 1
    return KVCache(
        torch.zeros(batch, slots, kv_heads, key_dim, dtype=dtype, device=device),
        torch.zeros(batch, slots, kv_heads, value_dim, dtype=dtype, device=device),
        torch.zeros(batch, dtype=torch.int64, device=device),
    )


# Both forms: q (B, T, H, K); keys (B, S, G, K); values (B, S, G, V); slot (B, S), place (B, T): absolute positions of
# the keys and of the queries; before: how many slots precede the first query's own, where all rows have the same.


@dispatch.form("attention", "reference")
def stepwise(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    slot: Tensor,
    place: Tensor,
    before: int | None,
    window: int | None,
    scale: float,
) -> Tensor:
    """Each query by itself."""
    del before
    outputs = []
    for q_t, place_t in zip(q.unbind(1), place.unbind(1)):
        scores = torch.einsum("bgrk,bsgk->bgrs", q_t.unflatten(1, (keys.shape[2], -1)) * scale, keys)
        scores = scores.masked_fill(~_visible(slot, place_t[:, None], window)[:, None], -torch.inf)
        outputs.append(torch.einsum("bgrs,bsgv->bgrv", scores.softmax(dim=-1), values).flatten(1, 2))
    return torch.stack(outputs, dim=1) if outputs else q.new_zeros(*q.shape[:3], values.shape[3])


@dispatch.form("attention", "torch")
def blocked(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    slot: Tensor,
    place: Tensor,
    before: int | None,
    window: int | None,
    scale: float,
) -> Tensor:
    """PyTorch's fused attention, over blocks of queries where a mask is needed."""
    time, heads, groups = q.shape[1], q.shape[2], keys.shape[2]
    if not time:
        return q.new_zeros(*q.shape[:3], values.shape[3])
    q, keys, values = (x.transpose(1, 2) for x in (q, keys, values))
    keys, values = (x.repeat_interleave(heads // groups, dim=1) if heads > groups else x for x in (keys, values))
    if before == 0 and (window is None or window >= time):
        return F.scaled_dot_product_attention(q, keys, values, is_causal=True, scale=scale).transpose(1, 2)
    outputs = []
    for start in range(0, time, QUERY_BLOCK):
        stop, first, last = min(start + QUERY_BLOCK, time), 0, keys.shape[2]
        if before is not None and window is not None:
            first, last = max(0, before + start - window + 1), before + stop
        mask = _visible(slot[:, first:last], place[:, start:stop], window)[:, None]
        part = keys[:, :, first:last], values[:, :, first:last]
        outputs.append(F.scaled_dot_product_attention(q[:, :, start:stop], *part, attn_mask=mask, scale=scale))
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _visible(slot: Tensor, place: Tensor, window: int | None) -> Tensor:
    """(B, S), (B, T) -> (B, T, S): whether the step at `place` sees the one at `slot`."""
    slot, place = slot[:, None], place[:, :, None]
    seen = (slot >= 0) & (slot <= place)
    return seen if window is None else seen & (slot > place - window)


def remember(cache: KVCache, k: Tensor, v: Tensor, window: int | None = None, lengths: Tensor | None = None) -> KVCache:
    """The cache after a segment: what `attention` returns beside its output."""
    position = cache.position + (k.shape[1] if lengths is None else lengths)
    if window is not None:
        return KVCache(last_inputs(cache.keys, k, lengths), last_inputs(cache.values, v, lengths), position)
    if states.may_write():
        keys, values = (_write(old, new, cache.position, position) for old, new in ((cache.keys, k), (cache.values, v)))
    elif not cache.keys.shape[1] and lengths is None:  # all rows begin here, and end together
        keys, values = (torch.cat([old, new.to(old.dtype)], dim=1) for old, new in ((cache.keys, k), (cache.values, v)))
    else:
        keys, values = (
            _append(old, new, cache.position, position) for old, new in ((cache.keys, k), (cache.values, v))
        )
    return KVCache(keys, values, position)


def _append(old: Tensor, new: Tensor, position: Tensor, end: Tensor) -> Tensor:
    """Row b: its first position[b] old entries, then its first end[b] - position[b] new ones; zeros after."""
    slots, new = old.shape[1], new.to(old.dtype)
    joined = torch.cat([old, new], dim=1)
    if torch.compiler.is_compiling():  # which must not look at numbers: as many slots as there may be
        used = joined.shape[1]
    else:
        used = int(end.max()) if end.numel() else 0
        if used == joined.shape[1] and bool((position == slots).all() & (end == used).all()):
            return joined
    slot = torch.arange(used, device=old.device)
    source = torch.where(slot < position[:, None], slot, slots + slot - position[:, None])
    rows = torch.arange(old.shape[0], device=old.device)[:, None]
    found = joined[rows, source.clamp(max=max(joined.shape[1] - 1, 0))]
    return torch.where((slot < end[:, None])[..., None, None], found, 0)


def _write(old: Tensor, new: Tensor, position: Tensor, end: Tensor) -> Tensor:
    """The same in place; capacity doubles when it is used up, so that a step costs no copy of the past."""
    used = int(end.max()) if end.numel() else 0
    if used > old.shape[1]:
        old = F.pad(old, (0, 0, 0, 0, 0, max(used, 2 * old.shape[1], 64) - old.shape[1]))
    step = torch.arange(new.shape[1], device=new.device)
    real = step < (end - position)[:, None]
    row = torch.arange(new.shape[0], device=new.device)[:, None].expand_as(real)
    old[row[real], (position[:, None] + step)[real]] = new[real].to(old.dtype)
    return old
