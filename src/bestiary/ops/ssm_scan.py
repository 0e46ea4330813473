"""Discrete linear time-invariant systems on sequences, with a state in and out.

    h_t = A_bar h_{t-1} + B_bar u_t,   y_t = C h_t + D u_t       A_bar diagonal, complex or real, or a dense matrix

A chunk at a time: inside it the kernel of ssm.py, as a small Toeplitz matrix; from chunk to chunk the state. So a final
state costs no more than a convolution, and no (batch, time, channels, state) tensor exists.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from bestiary.ops import dispatch
from bestiary.ops.ssm import CHUNK, powers


def diagonal_ssm(
    u: Float[Tensor, "batch time channels"],
    A_bar: Complex[Tensor, "channels half"],
    B_bar: Complex[Tensor, "channels half"],
    C: Complex[Tensor, "channels half"],
    D: Float[Tensor, " channels"] | None = None,
    *,
    state: Float[Tensor, "batch channels half 2"] | None = None,
    lengths: Int[Tensor, " batch"] | None = None,
) -> tuple[Float[Tensor, "batch time channels"], Float[Tensor, "batch channels half 2"]]:
    """h_t = A_bar h_{t-1} + B_bar u_t, y_t = 2 Re(C . h_t) + D u_t (modal form); returns (y, state).

    Args:
        state: h before this segment, real and imaginary parts, fp32 or wider; None for zeros.
        lengths: real steps of each row of a right-padded batch; padding takes no time.
    """
    if state is None:
        dtype = dispatch.wide(u.dtype, A_bar.real.dtype)
        state = torch.zeros(u.shape[0], *A_bar.shape, 2, dtype=dtype, device=u.device)
    with dispatch.full_precision(u):
        wide = u.to(state.dtype)
        to = torch.promote_types(torch.complex64, state.dtype)
        form = dispatch.choose("diagonal_ssm", time=u.shape[1])
        y, state = form(wide, A_bar.to(to), B_bar.to(to), C.to(to), state, lengths)
        return (y if D is None else y + D.to(y.dtype) * wide).to(u.dtype), state


@dispatch.form("diagonal_ssm", "reference")
def diagonal_recurrent(
    u: Tensor, A_bar: Tensor, B_bar: Tensor, C: Tensor, state: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Step through time, as the equation reads."""

    def step(h: Tensor, u_t: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.view_as_real(A_bar * torch.view_as_complex(h) + B_bar * u_t[..., None])
        return h, 2 * (C * torch.view_as_complex(h)).real.sum(-1)

    return _stepwise(step, u, state.contiguous(), lengths)


@dispatch.form("diagonal_ssm", "torch")
def diagonal_chunked(
    u: Tensor, A_bar: Tensor, B_bar: Tensor, C: Tensor, state: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Toeplitz products within chunks, the recurrence between them."""
    size = _chunk_size(u.shape[1])
    lag = powers(A_bar, size + 1)  # (channels, half, lags)
    read = 2 * C[..., None] * lag[..., 1:]
    reads = torch.stack([read.real, -read.imag], dim=2).flatten(1, 2)
    writes = torch.view_as_real(B_bar[..., None] * lag[..., :-1].flip(-1)).movedim(-1, 2).flatten(1, 2)

    def advance(h: Tensor, steps: int) -> Tensor:
        moved = torch.view_as_complex(h.unflatten(-1, (-1, 2)).contiguous()) * lag[..., steps]
        return torch.view_as_real(moved).flatten(-2)

    kernel = 2 * (C * B_bar)[:, None] @ lag[..., :-1]
    chunked = _Chunked(kernel.real[:, 0], reads, writes, advance)
    y, after = _chunkwise(u, chunked, state.flatten(-2), lengths)
    return y, after.unflatten(-1, (-1, 2))


def real_ssm(
    u: Float[Tensor, "batch time channels"],
    A_bar: Float[Tensor, "channels n"],
    B_bar: Float[Tensor, "channels n"],
    C: Float[Tensor, "channels n"],
    D: Float[Tensor, " channels"] | None = None,
    *,
    state: Float[Tensor, "batch channels n"] | None = None,
    lengths: Int[Tensor, " batch"] | None = None,
) -> tuple[Float[Tensor, "batch time channels"], Float[Tensor, "batch channels n"]]:
    """h_t = A_bar h_{t-1} + B_bar u_t, y_t = C . h_t + D u_t with real eigenvalues (decays); returns (y, state).

    Args and state as in `diagonal_ssm`, the state being real; no conjugates, so no factor 2.
    """
    return _real("real_ssm", u, A_bar, B_bar, C, D, state, lengths)


@dispatch.form("real_ssm", "reference")
def real_recurrent(
    u: Tensor, A_bar: Tensor, B_bar: Tensor, C: Tensor, state: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Step through time, as the equation reads."""

    def step(h: Tensor, u_t: Tensor) -> tuple[Tensor, Tensor]:
        h = A_bar * h + B_bar * u_t[..., None]
        return h, (C * h).sum(-1)

    return _stepwise(step, u, state, lengths)


@dispatch.form("real_ssm", "torch")
def real_chunked(
    u: Tensor, A_bar: Tensor, B_bar: Tensor, C: Tensor, state: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Toeplitz products within chunks, the recurrence between them."""
    lag = powers(A_bar, _chunk_size(u.shape[1]) + 1)  # (channels, n, lags)

    def advance(h: Tensor, steps: int) -> Tensor:
        return h * lag[..., steps]

    kernel = ((C * B_bar)[:, None] @ lag[..., :-1])[:, 0]
    reads, writes = C[..., None] * lag[..., 1:], B_bar[..., None] * lag[..., :-1].flip(-1)
    return _chunkwise(u, _Chunked(kernel, reads, writes, advance), state, lengths)


def dense_ssm(
    u: Float[Tensor, "batch time channels"],
    A_bar: Float[Tensor, "channels n n"],
    B_bar: Float[Tensor, "channels n"],
    C: Float[Tensor, "channels n"],
    D: Float[Tensor, " channels"] | None = None,
    *,
    state: Float[Tensor, "batch channels n"] | None = None,
    lengths: Int[Tensor, " batch"] | None = None,
) -> tuple[Float[Tensor, "batch time channels"], Float[Tensor, "batch channels n"]]:
    """h_t = A_bar h_{t-1} + B_bar u_t, y_t = C . h_t + D u_t with a full matrix a channel (S4); returns (y, state).

    Args and state as in `diagonal_ssm`, the state being real.
    """
    return _real("dense_ssm", u, A_bar, B_bar, C, D, state, lengths)


def _real(
    op: str,
    u: Tensor,
    A_bar: Tensor,
    B_bar: Tensor,
    C: Tensor,
    D: Tensor | None,
    state: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """What the ops of real systems share: the initial state, the dtype, the skip."""
    if state is None:
        dtype = dispatch.wide(u.dtype, A_bar.dtype)
        state = torch.zeros(u.shape[0], *B_bar.shape, dtype=dtype, device=u.device)
    with dispatch.full_precision(u):
        wide, to = u.to(state.dtype), state.dtype
        form = dispatch.choose(op, time=u.shape[1])
        y, state = form(wide, A_bar.to(to), B_bar.to(to), C.to(to), state, lengths)
        return (y if D is None else y + D.to(to) * wide).to(u.dtype), state


@dispatch.form("dense_ssm", "reference")
def dense_recurrent(
    u: Tensor, A_bar: Tensor, B_bar: Tensor, C: Tensor, state: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Step through time, as the equation reads."""

    def step(h: Tensor, u_t: Tensor) -> tuple[Tensor, Tensor]:
        h = (A_bar @ h[..., None])[..., 0] + B_bar * u_t[..., None]
        return h, (C * h).sum(-1)

    return _stepwise(step, u, state, lengths)


@dispatch.form("dense_ssm", "torch")
def dense_chunked(
    u: Tensor, A_bar: Tensor, B_bar: Tensor, C: Tensor, state: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Toeplitz products within chunks, the recurrence between them; powers of A_bar by squaring."""
    size = _chunk_size(u.shape[1])
    squares = {1: A_bar}
    columns, rows = B_bar[..., None], (C[..., None, :] @ A_bar)  # A^l B for l = 0 ...; C A^l for l = 1 ...
    while columns.shape[-1] < size:
        n = columns.shape[-1]
        columns = torch.cat([columns, squares[n] @ columns], dim=-1)
        rows = torch.cat([rows, rows @ squares[n]], dim=-2)
        squares[2 * n] = squares[n] @ squares[n]

    def advance(h: Tensor, steps: int) -> Tensor:
        return torch.einsum("cnm,bcm->bcn", squares[steps], h)

    kernel = (C[..., None, :] @ columns)[..., 0, :]
    return _chunkwise(u, _Chunked(kernel, rows.mT, columns.flip(-1), advance), state, lengths)


class _Chunked(NamedTuple):
    """A system over a chunk of c steps, its state flattened to S real numbers a channel."""

    kernel: Tensor  # (channels, c): what an input adds to outputs 0, 1, ... steps later
    reads: Tensor  # (channels, S, c): what the state at the start adds to each output
    writes: Tensor  # (channels, S, c): what each input adds to the state at the end
    advance: Callable[
        [Tensor, int], Tensor
    ]  # the state (batch, channels, S) a power of two of steps later, without input


def _chunkwise(u: Tensor, system: _Chunked, state: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, time, _ = u.shape
    size = system.kernel.shape[-1]
    if not time:
        return torch.zeros_like(u), state
    padded = torch.nn.functional.pad(u, (0, 0, 0, -time % size))
    parts = padded.unflatten(1, (-1, size)).permute(3, 0, 1, 2)  # (channels, batch, n, c)
    added = torch.einsum("cbnt,cst->nbcs", parts, system.writes)
    starts = [state]
    for part in added[: time // size].unbind():
        starts.append(system.advance(starts[-1], size) + part)
    count = parts.shape[2]
    before = torch.stack(starts[:count], dim=2)  # (batch, channels, n, S)
    lag = torch.arange(size, device=u.device)
    lag = lag[None, :] - lag[:, None]  # (s, t): t - s
    toeplitz = torch.where(lag >= 0, system.kernel[:, lag.clamp(min=0)], 0)
    inside = parts.flatten(1, 2) @ toeplitz  # (channels, batch n, c)
    seen = before.movedim(0, 1).flatten(1, 2) @ system.reads
    y = (inside + seen).unflatten(1, (batch, count)).permute(1, 2, 3, 0).flatten(1, 2)[:, :time]
    return y, _final(padded, system, torch.stack(starts), time if lengths is None else lengths)


def _final(u: Tensor, system: _Chunked, starts: Tensor, end: int | Tensor) -> Tensor:
    """The state after `end` steps: from the start of the chunk where they end, by powers of two."""
    size = system.kernel.shape[-1]
    if isinstance(end, int):
        state, place = starts[end // size], end - end % size
        bit = size // 2
        while bit:
            if end & bit:
                state = system.advance(state, bit) + _written(u[:, place : place + bit], system)
                place += bit
            bit //= 2
        return state
    rows = torch.arange(u.shape[0], device=u.device)
    state, rest, start = starts[end // size, rows], end % size, end - end % size
    bit = size // 2
    while bit:
        step = torch.arange(bit, device=u.device)
        part = u[rows[:, None], (start[:, None] + step).clamp(max=u.shape[1] - 1)]
        moved = system.advance(state, bit) + _written(part, system)
        taken = (rest & bit) > 0
        state = torch.where(taken[:, None, None], moved, state)
        start = start + torch.where(taken, bit, 0)
        bit //= 2
    return state


def _written(u: Tensor, system: _Chunked) -> Tensor:
    """What a few inputs, up to a chunk, add to the state after them."""
    return torch.einsum("btc,cst->bcs", u, system.writes[..., system.writes.shape[-1] - u.shape[1] :])


def _stepwise(
    step: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], u: Tensor, state: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    outputs = []
    for t, u_t in enumerate(u.unbind(1)):
        moved, y_t = step(state, u_t)
        if lengths is not None:
            moved = torch.where((t < lengths).reshape(-1, *[1] * (state.ndim - 1)), moved, state)
        outputs.append(y_t)
        state = moved
    return (torch.stack(outputs, dim=1) if outputs else torch.zeros_like(u)), state


def _chunk_size(time: int) -> int:
    """A power of two, not much longer than the segment."""
    return min(CHUNK, 1 << max(0, time - 1).bit_length())
