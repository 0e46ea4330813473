"""The delta rule (Schlag et al. 2021, arXiv:2102.11174): before a value is written, what its key recalls is erased.

    delta_rule   S_t = (I - beta_t k_t k_t^T) diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T     o_t = S_t^T q_t
    dplr         S_t = (diag(exp(w_t)) + b_t a_t^T) S_{t-1} + k_t v_t^T                     o_t = S_t^T r_t

The first is DeltaNet (no gate, arXiv:2406.06484), Gated DeltaNet (a gate per head, arXiv:2412.06464) and KDA (a gate
per key channel, arXiv:2510.26692); with unit keys, beta in (0, 1) erases partly, beta = 1 replaces, beta up to 2 may
negate. The second, diagonal plus rank one, is RWKV-7 (arXiv:2503.14456).

In a chunk that begins with S_0, what steps write depends on what earlier steps of the chunk wrote, through a unit lower
triangular system (the WY form): one triangular solve a chunk, all else matrix products.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from bestiary.errors import UsageError
from bestiary.ops import decay, dispatch
from bestiary.ops.native import delta_rule as native

dispatch.has_kernel("delta_rule")
dispatch.has_kernel("dplr")
CHUNK = 64
PIECE = 2048
"""Steps whose chunks are computed together; bounds the memory of long segments."""


def delta_rule(
    q: Float[Tensor, "batch time heads key_dim"],
    k: Float[Tensor, "batch time heads key_dim"],
    v: Float[Tensor, "batch time heads value_dim"],
    beta: Float[Tensor, "batch time heads"],
    log_decay: Float[Tensor, "..."] | None = None,
    *,
    scale: float | None = None,
    state: Float[Tensor, "batch heads key_dim value_dim"] | None = None,
) -> tuple[Float[Tensor, "batch time heads value_dim"], Float[Tensor, "batch heads key_dim value_dim"]]:
    """Replace what each key recalls by its value, to the degree beta; returns (o, state).

    Args:
        k: of unit length, where the recurrence is to be stable (mixers see to it).
        beta: in [0, 2].
        log_decay: None, (heads,), (batch, time, heads) or (batch, time, heads, key_dim); at most 0; the memory
            decays before it is corrected.
        scale: of the queries; None for key_dim ** -0.5.
        state: the memory before this segment, fp32 or wider; None for zeros.

    o comes in v's dtype, the state in its own.
    """
    allowed = [tuple(v.shape[2:3]), tuple(v.shape[:3]), (*v.shape[:3], q.shape[3])]
    if log_decay is not None and tuple(log_decay.shape) not in allowed:
        raise UsageError(f"log_decay must have a shape among {allowed}, not {tuple(log_decay.shape)}")
    state = _memory(q, v, state)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if dispatch.compiled("delta_rule", state):
        q, k, v_wide, beta = (x.to(state.dtype) for x in (q, k, v, beta))
        if log_decay is not None:
            log_decay = log_decay.to(state.dtype)
            log_decay = log_decay.expand(beta.shape) if log_decay.ndim == 1 else log_decay
        o, state = native.delta_rule(q, k, v_wide, beta, log_decay, state, scale)
        return o.to(v.dtype), state
    with dispatch.full_precision(v):
        gates = torch.zeros_like(beta, dtype=state.dtype) if log_decay is None else log_decay.to(state.dtype)
        if gates.ndim == 1:
            gates = gates.expand(beta.shape)
        wide = (x.to(state.dtype) for x in (q * scale, k, v, beta))
        o, state = dispatch.choose("delta_rule", time=v.shape[1], like=v)(*wide, gates, state)
        return o.to(v.dtype), state


@dispatch.form("delta_rule", "reference")
def recurrent(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Step through time, as the equation reads."""
    decays = (g if g.ndim == 4 else g[..., None]).exp()[..., None]
    outputs = []
    for q_t, k_t, v_t, beta_t, decay_t in zip(*(x.unbind(1) for x in (q, k, v, beta, decays))):
        state = decay_t * state
        recalled = torch.einsum("bhk,bhkv->bhv", k_t, state)
        state = state + k_t[..., None] * (beta_t[..., None] * (v_t - recalled))[..., None, :]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q_t, state))
    return (torch.stack(outputs, dim=1) if outputs else torch.zeros_like(v)), state


@dispatch.form("delta_rule", "torch")
def chunked(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """S_t = decayed S_0 + sum_s decayed k_s u_s^T; the u of a chunk solve (I + L) U = beta (V - decayed K S_0)."""
    if not v.shape[1]:
        return torch.zeros_like(v), state
    outputs = []
    for part in zip(*(x.split(PIECE, dim=1) for x in (q, k, v, beta, g))):
        o, state = _delta_chunks(state, *part)
        outputs.append(o)
    return torch.cat(outputs, dim=1), state


def _delta_chunks(state: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    time, size = v.shape[1], decay.chunk_size(v.shape[1], CHUNK)
    q, k, v, g = (decay.chunks(x, size) for x in (q, k, v, g))
    beta = decay.chunks(beta, size)[..., None]
    if g.ndim == 5:
        own, seen = decay.products(k, k, g), decay.products(q, k, g)
    else:
        between = decay.between(g)
        own, seen, g = (k @ k.mT) * between, (q @ k.mT) * between, g[..., None]
    inflow = decay.since_start(g, -2).exp()
    right = torch.cat([beta * v, beta * k * inflow], dim=-1)
    solved = torch.linalg.solve_triangular((beta * own).tril(-1), right, upper=False, unitriangular=True)
    values, keys = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
    kept, total = (k * decay.until_end(g, -2).exp()).mT, g.sum(-2).exp()[..., None]
    starts, writes = [], []
    for value, key, keep, share in zip(*(x.unbind(2) for x in (values, keys, kept, total))):
        starts.append(state)
        writes.append(value - key @ state)
        state = share * state + keep @ writes[-1]
    o = (q * inflow) @ torch.stack(starts, dim=2) + seen @ torch.stack(writes, dim=2)
    return decay.unchunk(o, time), state


def dplr(
    r: Float[Tensor, "batch time heads key_dim"],
    w: Float[Tensor, "batch time heads key_dim"],
    k: Float[Tensor, "batch time heads key_dim"],
    v: Float[Tensor, "batch time heads value_dim"],
    a: Float[Tensor, "batch time heads key_dim"],
    b: Float[Tensor, "batch time heads key_dim"],
    *,
    state: Float[Tensor, "batch heads key_dim value_dim"] | None = None,
) -> tuple[Float[Tensor, "batch time heads value_dim"], Float[Tensor, "batch heads key_dim value_dim"]]:
    """The general transition, diagonal plus rank one; returns (o, state).

    Args:
        r: what reads (RWKV's receptance), unscaled.
        w: log-decay of each key channel, at most 0.
        a, b: what is read from the old memory along a is added along b (RWKV-7: a = -kappa, b = kappa * rate).
        state: the memory before this segment, fp32 or wider; None for zeros.

    o comes in v's dtype, the state in its own.
    """
    state = _memory(r, v, state)
    if dispatch.compiled("dplr", state):
        r, w, k, v_wide, a, b = (x.to(state.dtype) for x in (r, w, k, v, a, b))
        o, state = native.dplr(r, w, k, v_wide, a, b, state)
        return o.to(v.dtype), state
    with dispatch.full_precision(v):
        wide = (x.to(state.dtype) for x in (r, w, k, v, a, b))
        o, state = dispatch.choose("dplr", time=v.shape[1], like=v)(*wide, state)
        return o.to(v.dtype), state


@dispatch.form("dplr", "reference")
def dplr_recurrent(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Step through time, as the equation reads."""
    outputs = []
    for r_t, w_t, k_t, v_t, a_t, b_t in zip(*(x.unbind(1) for x in (r, w, k, v, a, b))):
        recalled = torch.einsum("bhk,bhkv->bhv", a_t, state)
        state = (
            w_t.exp()[..., None] * state + b_t[..., None] * recalled[..., None, :] + k_t[..., None] * v_t[..., None, :]
        )
        outputs.append(torch.einsum("bhk,bhkv->bhv", r_t, state))
    return (torch.stack(outputs, dim=1) if outputs else torch.zeros_like(v)), state


@dispatch.form("dplr", "torch")
def dplr_chunked(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """What step t recalls, z_t = S_{t-1}^T a_t, solves (I - L) Z = decayed A S_0 + what earlier values add."""
    if not v.shape[1]:
        return torch.zeros_like(v), state
    outputs = []
    for part in zip(*(x.split(PIECE, dim=1) for x in (r, w, k, v, a, b))):
        o, state = _dplr_chunks(state, *part)
        outputs.append(o)
    return torch.cat(outputs, dim=1), state


def _dplr_chunks(
    state: Tensor, r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor]:
    time, size = v.shape[1], decay.chunk_size(v.shape[1], CHUNK)
    r, w, k, v, a, b = (decay.chunks(x, size) for x in (r, w, k, v, a, b))
    recall = -decay.products(a, b, w, inclusive=False)
    right = torch.cat(
        [
            decay.products(a, k, w, inclusive=False) @ v,
            a * decay.since_start(w, -2, inclusive=False).exp(),
        ],
        dim=-1,
    )
    solved = torch.linalg.solve_triangular(recall, right, upper=False, unitriangular=True)
    values, keys = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
    after = decay.until_end(w, -2).exp()
    kept, written, total = (b * after).mT, (k * after).mT @ v, w.sum(-2).exp()[..., None]
    starts, recalled = [], []
    for value, key, keep, write, share in zip(*(x.unbind(2) for x in (values, keys, kept, written, total))):
        starts.append(state)
        recalled.append(value + key @ state)
        state = share * state + keep @ recalled[-1] + write
    o = (r * decay.since_start(w, -2).exp()) @ torch.stack(starts, dim=2)
    o = o + decay.products(r, b, w) @ torch.stack(recalled, dim=2) + decay.products(r, k, w) @ v
    return decay.unchunk(o, time), state


def _memory(q: Tensor, v: Tensor, state: Tensor | None) -> Tensor:
    if state is not None:
        return state
    shape = (v.shape[0], v.shape[2], q.shape[3], v.shape[3])
    return torch.zeros(shape, dtype=dispatch.wide(q.dtype, v.dtype), device=v.device)
