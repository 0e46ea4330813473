"""State-space models whose steps differ in length: the systems of ssm.py on data that have times of their own.

    h_t = A_bar(dt_t) h_{t-1} + B_bar(dt_t) u_t,   y_t = C h_t + D u_t        dt_t = dt * interval_t

The system is discretised anew at every step, so there is no kernel: the recurrence is stepped through, a chunk at a
time. A chunk forgets what it computed and computes it again in the backward pass; no (batch, time, channels, state)
tensor exists. States are those of `diagonal_ssm` and `dense_ssm`: segments with and without intervals may alternate.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bestiary.errors import unknown
from bestiary.ops import dispatch, ssm
from bestiary.ops.linear_recurrence import scan

CHUNK_BYTES = 1 << 20
"""Size of a chunk's states."""


def irregular_diagonal_ssm(
    u: Float[Tensor, "batch time channels"],
    intervals: Float[Tensor, "batch time"],
    A: Complex[Tensor, "channels half"],
    B: Complex[Tensor, "channels half"],
    C: Complex[Tensor, "channels half"],
    dt: Float[Tensor, " channels"],
    D: Float[Tensor, " channels"] | None = None,
    *,
    rule: str = "zoh",
    state: Float[Tensor, "batch channels half 2"] | None = None,
    lengths: Int[Tensor, " batch"] | None = None,
) -> tuple[Float[Tensor, "batch time channels"], Float[Tensor, "batch channels half 2"]]:
    """`diagonal_ssm` with a step of its own length each time; returns (y, state).

    Args:
        intervals: time that passes before each step, in units of dt; at least 0.
        A, B: the system in continuous time.
        rule: its discretisation, "zoh" or "bilinear".
    """
    if rule not in ssm.RULES:
        raise unknown("discretisation", rule, ssm.RULES)
    if state is None:
        state = torch.zeros(u.shape[0], *A.shape, 2, dtype=dispatch.wide(u.dtype, A.real.dtype), device=u.device)
    discretise = ssm.zoh if rule == "zoh" else ssm.bilinear
    return _run("irregular_diagonal_ssm", u, intervals, (A, B, C), dt, D, state, lengths, discretise)


@dispatch.form("irregular_diagonal_ssm", "reference")
def diagonal_recurrent(
    u: Tensor, intervals: Tensor, A: Tensor, B: Tensor, C: Tensor, dt: Tensor, state: Tensor, discretise: Callable
) -> tuple[Tensor, Tensor]:
    """Step through time, as the equation reads."""
    outputs, h = [], torch.view_as_complex(state.contiguous())
    for u_t, interval in zip(u.unbind(1), intervals.unbind(1)):
        A_bar, B_bar = discretise(A, B, (interval[:, None] * dt)[..., None])
        h = A_bar * h + B_bar * u_t[..., None]
        outputs.append(2 * (C * h).real.sum(-1))
    return (torch.stack(outputs, dim=1) if outputs else torch.zeros_like(u)), torch.view_as_real(h)


@dispatch.form("irregular_diagonal_ssm", "torch")
def diagonal_chunked(
    u: Tensor, intervals: Tensor, A: Tensor, B: Tensor, C: Tensor, dt: Tensor, state: Tensor, discretise: Callable
) -> tuple[Tensor, Tensor]:
    """The steps of a chunk discretised together."""
    reads = 2 * torch.stack([C.real, -C.imag], dim=-1)

    def chunk(state: Tensor, u: Tensor, intervals: Tensor) -> tuple[Tensor, Tensor]:
        A_bar, B_bar = discretise(A, B, (intervals[..., None] * dt)[..., None])  # (batch, time, channels, half)
        start = torch.view_as_complex(state).flatten(1)
        h = torch.view_as_real(scan(A_bar.flatten(2), (B_bar * u[..., None]).flatten(2), start))
        h = h.unflatten(2, A.shape)
        return torch.einsum("btchr,chr->btc", h[:, 1:], reads), h[:, -1]

    return _in_chunks(chunk, (u, intervals), state.contiguous())


def irregular_dplr_ssm(
    u: Float[Tensor, "batch time channels"],
    intervals: Float[Tensor, "batch time"],
    L: Complex[Tensor, "channels half"],
    P: Complex[Tensor, "channels half"],
    B: Complex[Tensor, "channels half"],
    C: Complex[Tensor, "channels half"],
    dt: Float[Tensor, " channels"],
    D: Float[Tensor, " channels"] | None = None,
    *,
    state: Float[Tensor, "batch channels n"] | None = None,
    lengths: Int[Tensor, " batch"] | None = None,
) -> tuple[Float[Tensor, "batch time channels"], Float[Tensor, "batch channels n"]]:
    """S4's system diag(L) - P P^* under the bilinear rule, with a step of its own length each time; (y, state).

    A step costs O(n), not O(n^2): I - dt A/2 is diagonal plus rank one, so it is inverted by a division and a
    correction (Woodbury). Args as in `irregular_diagonal_ssm`; the state is (Re h, Im h), as `real_dplr` has it.
    """
    if state is None:
        dtype = dispatch.wide(u.dtype, L.real.dtype)
        state = torch.zeros(u.shape[0], L.shape[0], 2 * L.shape[1], dtype=dtype, device=u.device)
    return _run("irregular_dplr_ssm", u, intervals, (L, P, B, C), dt, D, state, lengths)


@dispatch.form("irregular_dplr_ssm", "reference")
def dplr_recurrent(
    u: Tensor, intervals: Tensor, L: Tensor, P: Tensor, B: Tensor, C: Tensor, dt: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Step through time."""
    outputs, h = [], torch.complex(*state.chunk(2, dim=-1))
    for u_t, interval in zip(u.unbind(1), intervals.unbind(1)):
        h = _dplr_step(h, *_dplr_factors(u_t, (interval[:, None] * dt), L, P, B))
        outputs.append(2 * (C * h).real.sum(-1))
    return (torch.stack(outputs, dim=1) if outputs else torch.zeros_like(u)), torch.cat([h.real, h.imag], dim=-1)


@dispatch.form("irregular_dplr_ssm", "torch")
def dplr_chunked(
    u: Tensor, intervals: Tensor, L: Tensor, P: Tensor, B: Tensor, C: Tensor, dt: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The factors of a chunk's steps computed together."""

    def chunk(state: Tensor, u: Tensor, intervals: Tensor) -> tuple[Tensor, Tensor]:
        h, found = torch.complex(*state.chunk(2, dim=-1)), []
        for factors in zip(*(x.unbind(1) for x in _dplr_factors(u, intervals[..., None] * dt, L, P, B))):
            h = _dplr_step(h, *factors)
            found.append(h)
        return 2 * torch.einsum("btch,ch->btc", torch.stack(found, dim=1), C).real, torch.cat([h.real, h.imag], dim=-1)

    return _in_chunks(chunk, (u, intervals), state)


def _dplr_factors(u: Tensor, dt: Tensor, L: Tensor, P: Tensor, B: Tensor) -> tuple[Tensor, ...]:
    """A_bar = diag(a) - c Re(r .) and B_bar u, from A_bar = 2 S - I and B_bar = S dt B with S = (I - dt A/2)^-1.

    S is the inverse d of the diagonal part and a correction of rank one: S x = d x - c/2 Re(P^* d x).
    """
    dt = dt[..., None]
    diagonal, damped = ssm.bilinear_factors(dt * L)
    read = P.conj() * damped
    correction = 2 * dt * damped * P / (1 + dt * (read * P).real.sum(-1, keepdim=True))
    write = dt * u[..., None] * B
    return diagonal, correction, read, damped * write - correction / 2 * (read * write).real.sum(-1, keepdim=True)


def _dplr_step(h: Tensor, diagonal: Tensor, correction: Tensor, read: Tensor, written: Tensor) -> Tensor:
    return diagonal * h - correction * (read * h).real.sum(-1, keepdim=True) + written


def _run(
    op: str,
    u: Tensor,
    intervals: Tensor,
    system: tuple[Tensor, ...],
    dt: Tensor,
    D: Tensor | None,
    state: Tensor,
    lengths: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    with dispatch.full_precision(u):
        wide, steps, dt = (x.to(state.dtype) for x in (u, intervals, dt))
        if lengths is not None:  # padding takes no time
            real = torch.arange(u.shape[1], device=u.device) < lengths[:, None]
            wide, steps = torch.where(real[..., None], wide, 0), torch.where(real, steps, 0)
        to = torch.promote_types(torch.complex64, state.dtype)
        form = dispatch.choose(op, time=u.shape[1])
        y, state = form(wide, steps, *(x.to(to) for x in system), dt, state, *options)
        return (y if D is None else y + D.to(y.dtype) * wide).to(u.dtype), state


def _in_chunks(
    chunk: Callable[..., tuple[Tensor, Tensor]], inputs: Sequence[Tensor], state: Tensor
) -> tuple[Tensor, Tensor]:
    """chunk(state, *inputs) -> (y, state) over stretches of time."""
    if not inputs[0].shape[1]:
        return torch.zeros_like(inputs[0]), state
    size = max(4, min(64, CHUNK_BYTES // max(1, state.numel() * state.element_size())))
    outputs = []
    for parts in zip(*(x.split(size, dim=1) for x in inputs)):
        y, state = checkpoint(chunk, state, *parts, use_reentrant=False, preserve_rng_state=False)
        outputs.append(y)
    return torch.cat(outputs, dim=1), state.clone()
