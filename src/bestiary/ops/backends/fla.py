"""flash-linear-attention's kernels, of the package fla-core (arXiv:2312.06635 and later).

Its functions take (batch, time, heads, dim) and decays as natural logarithms, as we do, and keep states as
(batch, heads, key_dim, value_dim) in fp32. They scale queries by key_dim ** -0.5 unless told otherwise; ours arrive
scaled. All are called by keyword: the order of arguments has changed between versions.
"""

from typing import Any

import torch
from torch import Tensor

from bestiary.ops.backends.backend import Backend, Library

MOST_KEY_DIM = 256

LIBRARY = Library("fla", "fla-core", (0, 5, 2))


def _memory(state: Tensor) -> dict[str, Any]:
    """What all of them are told about scale and state."""
    return {"scale": 1.0, "initial_state": state, "output_final_state": True}


def _products(dtype: torch.dtype, heads: int, **tensors: Tensor) -> dict[str, Tensor]:
    """Queries, keys and values in the caller's dtype, with as many heads as the values have."""
    whole = {
        name: x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2)
        for name, x in tensors.items()
    }
    return {name: x.to(dtype) for name, x in whole.items()}


def _results(found: tuple[Tensor, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    o, state = found
    return o.to(dtype), state.to(dtype)


# linear_attention: (q, k, v, g, bonus, state); g None, (heads,), (B, T, heads) or (B, T, heads, key_dim)


def _not_by_head(dtype: torch.dtype, q: Tensor, k: Tensor, v: Tensor, g: Any, bonus: Any, state: Tensor) -> str | None:
    if bonus is not None:
        return "it has no bonus"
    return "it has one decay a head" if g is not None and g.ndim == 4 else None


def _by_head(function: Any, dtype: Any, q: Tensor, k: Tensor, v: Tensor, g: Any, bonus: Any, state: Tensor) -> Any:
    gates = None if g is None else g.expand(v.shape[:3])  # its g_gamma, (heads,), has no gradient
    found = function(**_products(dtype, v.shape[2], q=q, k=k, v=v), g=gates, **_memory(state))
    return _results(found, state.dtype)


def _not_by_channel(
    dtype: torch.dtype, q: Tensor, k: Tensor, v: Tensor, g: Any, bonus: Any, state: Tensor
) -> str | None:
    if bonus is not None:
        return "it has no bonus"
    return None if g is not None and g.ndim == 4 else "it wants a decay a key channel"


def _by_channel(
    function: Any, dtype: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, bonus: Any, state: Tensor
) -> Any:
    found = function(**_products(dtype, v.shape[2], q=q, k=k, v=v), g=g, **_memory(state))
    return _results(found, state.dtype)


def _without_bonus(
    dtype: torch.dtype, q: Tensor, k: Tensor, v: Tensor, g: Any, bonus: Any, state: Tensor
) -> str | None:
    return "it wants a bonus" if bonus is None else None


def _with_bonus(
    function: Any, dtype: Any, q: Tensor, k: Tensor, v: Tensor, g: Any, bonus: Tensor, state: Tensor
) -> Any:
    shape = (*v.shape[:3], k.shape[3])
    if g is None:
        g = k.new_zeros(1)
    elif g.ndim < 4:
        g = g[..., None]
    found = function(**_products(dtype, v.shape[2], r=q, k=k, v=v), w=g.expand(shape), u=bonus, **_memory(state))
    return _results(found, state.dtype)


# delta_rule: (q, k, v, beta, g, state); g (B, T, heads) or (B, T, heads, key_dim)


def _not_delta_by_head(
    dtype: torch.dtype, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, state: Tensor
) -> str | None:
    return "it has one decay a head" if g.ndim == 4 else _too_wide(k)


def _not_delta_by_channel(
    dtype: torch.dtype, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, state: Tensor
) -> str | None:
    return "it wants a decay a key channel" if g.ndim == 3 else _too_wide(k)


def _too_wide(k: Tensor) -> str | None:
    return f"it takes at most {MOST_KEY_DIM} channels of keys a head" if k.shape[3] > MOST_KEY_DIM else None


def _delta(function: Any, dtype: Any, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, state: Tensor) -> Any:
    # beta up to 2 needs no option: allow_neg_eigval is for the sigmoid inside the kernel, which we do not ask for
    found = function(**_products(dtype, v.shape[2], q=q, k=k, v=v), g=g, beta=beta, **_memory(state))
    return _results(found, state.dtype)


# dplr: (r, w, k, v, a, b, state)


def _not_dplr(dtype: torch.dtype, r: Tensor, w: Tensor, k: Tensor, *_: Tensor) -> str | None:
    return "it warns that it does not compute in fp32" if dtype == torch.float32 else _too_wide(k)


def _dplr(
    function: Any, dtype: Any, r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor
) -> Any:
    found = function(**_products(dtype, v.shape[2], q=r, k=k, v=v, a=a, b=b), gk=w, **_memory(state))
    return _results(found, state.dtype)


# wkv: (k, v, w, u, state, lengths)


def _not_wkv(dtype: torch.dtype, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Any, lengths: Any) -> str | None:
    return None if lengths is None else "it has no lengths: all rows must be whole"


def _wkv(function: Any, dtype: Any, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Any, lengths: Any) -> Any:
    """It computes the log-decay as -exp(w) itself, and keeps (numerator, denominator, exponent) as (B, 3, 1, C)."""
    raw = w.clamp(max=-1e-30).neg().log()  # its -exp(w) is then ours
    y, after = function(w=raw, u=u, k=k, v=v, state=torch.stack(tuple(state), dim=1)[:, :, None])
    return y, type(state)(*after[:, :, 0].unbind(1))


BACKENDS = {
    "linear_attention": (
        Backend(LIBRARY, "fla.ops.simple_gla.chunk_simple_gla", _not_by_head, _by_head),
        Backend(LIBRARY, "fla.ops.gla.chunk_gla", _not_by_channel, _by_channel),
        Backend(LIBRARY, "fla.ops.rwkv6.chunk_rwkv6", _without_bonus, _with_bonus),
    ),
    "delta_rule": (
        Backend(LIBRARY, "fla.ops.gated_delta_rule.chunk_gated_delta_rule", _not_delta_by_head, _delta),
        Backend(LIBRARY, "fla.ops.kda.chunk_kda", _not_delta_by_channel, _delta),
    ),
    "dplr": (Backend(LIBRARY, "fla.ops.generalized_delta_rule.chunk_dplr_delta_rule", _not_dplr, _dplr),),
    "wkv": (Backend(LIBRARY, "fla.ops.rwkv4.fused_recurrent_rwkv4", _not_wkv, _wkv),),
}
