"""Causal convolution with a filter as long as the sequence, one a channel (Hyena, arXiv:2302.10866).

    y_t = sum_{j < min(t + 1, l_max)} k_j x_{t-j} + D x_t            lags from l_max on weigh nothing

A filter that is no recurrence needs its inputs back: the state is a ring of the last P >= l_max of them (P a power of
two), which grows until it is full. A segment is one FFT over the history and itself. Single steps are the exact online
convolution of Flash Inference (arXiv:2410.12982): after step s of a window, the last U inputs, U the lowest set bit
of s, are convolved with the filter into the next U outputs, so that L tokens cost O(L log^2 L) in total and not O(L^2).

    window:   step  1  2  3  4  5  6  7  8
              U     1  2  1  4  1  2  1  -        each pair (input, later output) falls into exactly one tile

A window begins with one FFT that convolves all earlier inputs into its outputs; it is as long as the largest power
of two within the past, so that windows double with the sequence, up to P.

The two-sided convolution of encoders (M2-BERT, arXiv:2310.12109) sees a sequence as a whole and has no state:

    y_t = sum_{j >= 0} k_j x_{t-j} + sum_{j >= 1} r_{j-1} x_{t+j} + D x_t
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from bestiary import state as states
from bestiary.errors import UsageError
from bestiary.ops import dispatch
from bestiary.ops.fft_convolution import Filter, circular, convolve, fast_size

DIRECT_TILE = 32
"""Tiles of up to so many steps are matrix products; larger ones are FFTs."""


def _as_filter(kernel: Tensor | Filter, dtype: torch.dtype) -> Filter:
    """A filter in a dtype."""
    filter = kernel if isinstance(kernel, Filter) else Filter(kernel)
    return filter if filter.taps.dtype == dtype else Filter(filter.taps.to(dtype))


@states.register
class ConvolutionState(NamedTuple):
    """The past of an online convolution.

    Input number n stands in slot n mod P of the ring. `pending` holds what earlier tiles have added to the outputs of
    the window, which is `window` steps long and of which `since` have passed; it is void where both are equal.
    """

    inputs: Float[Tensor, "batch slots channels"]
    pending: Float[Tensor, "batch slots channels"]
    position: Int[Tensor, " batch"]
    since: Int[Tensor, " batch"]
    window: Int[Tensor, " batch"]


def long_convolution(
    x: Float[Tensor, "batch time channels"],
    kernel: Float[Tensor, "channels l_max"] | Filter,
    skip: Float[Tensor, " channels"] | None = None,
    *,
    state: ConvolutionState | None = None,
    lengths: Int[Tensor, " batch"] | None = None,
) -> tuple[Float[Tensor, "batch time channels"], ConvolutionState]:
    """Convolve each channel with its own long causal filter; returns (y, state), y in x's dtype.

    Args:
        kernel: the filter, k_0 first. For a filter of l_max lags, all of them, also where the segment is shorter. A
            Filter is the same and may keep its transforms.
        skip: D, weight of the input itself.
        state: the past, fp32 or wider; None for none.
        lengths: real steps of each row of a right-padded batch; only these enter the state.
    """
    if state is None:
        dtype = kernel.taps.dtype if isinstance(kernel, Filter) else kernel.dtype
        state = empty_past(x.shape[0], x.shape[2], dtype=dispatch.wide(x.dtype, dtype), device=x.device)
    with dispatch.full_precision(x):
        wide, filter = x.to(state.inputs.dtype), _as_filter(kernel, state.inputs.dtype)
        form = dispatch.choose("long_convolution", time=x.shape[1])
        y, state = form(wide, filter, state, lengths)
        return (y if skip is None else torch.addcmul(y, wide, skip.to(y.dtype))).to(x.dtype), state


def empty_past(
    batch: int, channels: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> ConvolutionState:
    """The state before the first step."""
    nothing = torch.zeros(batch, 0, channels, dtype=dtype, device=device)
    number = torch.zeros(batch, dtype=torch.int64, device=device)
    return ConvolutionState(nothing, nothing, number, number, number)


def past_nbytes(channels: int, l_max: int, time: int) -> int:
    """Bytes of one row's state after `time` steps, in fp32."""
    return 2 * min(time, ring_size(l_max)) * channels * 4 + 24


def ring_size(l_max: int) -> int:
    """P: the smallest power of two that is at least l_max."""
    return 1 << max(0, l_max - 1).bit_length()


@dispatch.form("long_convolution", "reference")
def definition(
    x: Tensor, filter: Filter, state: ConvolutionState, lengths: Tensor | None
) -> tuple[Tensor, ConvolutionState]:
    """The sum over lags as it stands; a single step is taken online."""
    if x.shape[1] == 1:
        return _step(x[:, 0], filter, state, lengths)
    kernel = filter.taps
    past, l_max = _past(state, kernel), kernel.shape[1]
    joined = torch.cat([past, x], dim=1)
    outputs = []
    for end in range(past.shape[1] + 1, joined.shape[1] + 1):
        window = joined[:, max(0, end - l_max) : end]
        outputs.append(torch.einsum("btc,ct->bc", window, kernel[:, : window.shape[1]].flip(1)))
    y = torch.stack(outputs, dim=1) if outputs else torch.zeros_like(x)
    return y, _after(state, past, x, lengths, kernel)


@dispatch.form("long_convolution", "torch")
def by_fft(
    x: Tensor, filter: Filter, state: ConvolutionState, lengths: Tensor | None
) -> tuple[Tensor, ConvolutionState]:
    """One FFT over the past and the segment."""
    if not x.shape[1]:
        return torch.zeros_like(x), state
    past = _past(state, filter.taps)
    joined = torch.cat([past, x], dim=1) if past.shape[1] else x
    y = convolve(joined, filter, past.shape[1], joined.shape[1], "segment")
    return y, _after(state, past, x, lengths, filter.taps)


def _past(state: ConvolutionState, kernel: Tensor) -> Tensor:
    """The inputs that lags below l_max reach, oldest first, zeros before the start: (batch, <= l_max - 1, channels)."""
    reach = min(kernel.shape[1] - 1, _most(state.position, state.inputs.shape[1]))
    place = state.position[:, None] - reach + torch.arange(reach, device=kernel.device)
    return _read(state.inputs, place, kernel)


def _most(position: Tensor, bound: int) -> int:
    """The largest of some positions, none being known to be above `bound`; the bound where code is traced."""
    if torch.compiler.is_compiling():
        return bound
    return int(position.max()) if bound and len(position) else 0


def _read(inputs: Tensor, place: Tensor, kernel: Tensor, rows: Tensor | None = None) -> Tensor:
    """Inputs of some rows (all by default) by their absolute number (rows, n); zeros before the beginning."""
    rows = (torch.arange(inputs.shape[0], device=inputs.device) if rows is None else rows)[:, None]
    slot = (place % ring_size(kernel.shape[1])).clamp(max=max(inputs.shape[1] - 1, 0))
    return torch.where((place >= 0)[..., None], inputs[rows, slot], 0)


def _after(
    state: ConvolutionState, past: Tensor, x: Tensor, lengths: Tensor | None, kernel: Tensor
) -> ConvolutionState:
    """The state after a segment: its inputs in the ring, no window begun."""
    batch, time, ring = *x.shape[:2], ring_size(kernel.shape[1])
    end = state.position + (time if lengths is None else lengths)
    if not state.inputs.shape[1] and lengths is None and time <= ring:
        inputs = x.clone()  # a fresh start: the ring is not yet full; the caller's x stays the caller's
    else:
        slot = torch.arange(min(_most(end, state.inputs.shape[1] + time), ring), device=x.device)
        place = end[:, None] - 1 - (end[:, None] - 1 - slot) % ring  # the newest input of each slot
        new = place - state.position[:, None]
        rows = torch.arange(batch, device=x.device)[:, None]
        fresh = torch.cat([x, x.new_zeros(batch, 1, x.shape[2])], dim=1)[rows, new.clamp(0, time)]
        kept = _read(state.inputs, place, kernel) if state.inputs.shape[1] else torch.zeros_like(fresh)
        inputs = torch.where((new >= 0)[..., None], fresh, torch.where((place >= 0)[..., None], kept, 0))
    void, pending = torch.zeros_like(end), x.new_zeros(1, 1, 1).expand_as(inputs)
    if lengths is None:
        return ConvolutionState(inputs, pending, end, void, void)
    moved = lengths > 0  # a row that did not move keeps its window
    pending = torch.where(moved[:, None, None], 0, _grown(state.pending, inputs.shape[1]))
    return ConvolutionState(
        inputs, pending, end, torch.where(moved, void, state.since), torch.where(moved, void, state.window)
    )


def _step(
    x: Tensor, filter: Filter, state: ConvolutionState, lengths: Tensor | None
) -> tuple[Tensor, ConvolutionState]:
    """One step of every row, online: the window's pending output, and what the input adds to it and to later ones."""
    kernel = filter.taps
    batch, ring = x.shape[0], ring_size(kernel.shape[1])
    slots = min(int(state.position.max()) + 1 if batch else 0, ring)
    if slots > state.inputs.shape[1]:
        slots = max(slots, min(2 * state.inputs.shape[1], ring)) if states.may_write() else slots
        state = state._replace(inputs=_grown(state.inputs, slots), pending=_grown(state.pending, slots))
    over = state.since == state.window
    state = _open_windows(state, filter, over if lengths is None else over & (lengths > 0))
    inputs, pending = state.inputs, state.pending
    if not states.may_write():
        inputs, pending = inputs.clone(), pending.clone()
    rows = torch.arange(batch, device=x.device)
    y = (pending[rows, state.since.clamp(max=slots - 1)] + kernel[:, 0] * x)[:, None]
    going = rows if lengths is None else rows[lengths > 0]
    inputs[going, state.position[going] % ring] = x[going]
    since = state.since[going] + 1
    tile = torch.where(since < state.window[going], since & -since, 0)
    for size in tile.unique().tolist():
        if size:
            chosen = going[tile == size]
            place = state.position[chosen, None] - size + 1 + torch.arange(size, device=x.device)
            later = (state.since[chosen] + 1)[:, None] + torch.arange(size, device=x.device)
            added = _tile(_read(inputs, place, kernel, chosen), filter)
            pending[chosen[:, None], later] = pending[chosen[:, None], later] + added
    moved = 1 if lengths is None else lengths
    return y, ConvolutionState(inputs, pending, state.position + moved, state.since + moved, state.window)


def _open_windows(state: ConvolutionState, filter: Filter, over: Tensor) -> ConvolutionState:
    """Begin a window in the rows whose last one is `over`: all earlier inputs, convolved into its outputs."""
    if not over.any():
        return state
    past = state.position.clamp(1, ring_size(filter.taps.shape[1]))
    length = 2 ** torch.log2(past.double()).floor().long()
    longest = int(length[over].max())
    reached = _past(state, filter.taps)
    now = reached.shape[1]
    pending = _grown(convolve(reached, filter, now, now + longest, "window"), state.pending.shape[1])
    return state._replace(
        pending=torch.where(over[:, None, None], pending, state.pending),
        since=torch.where(over, 0, state.since),
        window=torch.where(over, length, state.window),
    )


def _tile(x: Tensor, filter: Filter) -> Tensor:
    """What the last U inputs (batch, U, channels) add to the next U outputs."""
    size, kernel = x.shape[1], filter.taps
    if size > DIRECT_TILE:
        return convolve(x, filter, size, 2 * size, f"tile of {size}")
    step = torch.arange(size, device=x.device)
    lag = size + step[:, None] - step  # (output, input)
    taps = torch.where(lag < kernel.shape[1], kernel[:, lag.clamp(max=kernel.shape[1] - 1)], 0)
    return torch.einsum("coi,bic->boc", taps, x)


def _grown(x: Tensor, slots: int) -> Tensor:
    """With more slots (or cut, where the rest is void)."""
    return F.pad(x, (0, 0, 0, slots - x.shape[1]))


def bidirectional_convolution(
    x: Float[Tensor, "batch time channels"],
    k_forward: Float[Tensor, "channels forward_lags"] | Filter,
    k_reverse: Float[Tensor, "channels reverse_lags"] | Filter,
    skip: Float[Tensor, " channels"] | None = None,
    *,
    reverse_start: int = 1,
) -> Float[Tensor, "batch time channels"]:
    """Convolve each channel with a filter that reaches both ways; lags beyond its taps weigh nothing.

    Rows that end early must be zero from there on (a projection's bias makes them non-zero): then each is what it would
    be alone, up to its end.

    Args:
        k_forward: the filter at lags 0, 1, ...: the present and the past. A Filter may keep the transform of both.
        k_reverse: the filter at lags -reverse_start, -reverse_start - 1, ...: the future.
        skip: D, weight of the input itself.
        reverse_start: 1 in M2-BERT and S4, whose two filters share no lag; 0 in safari, which has both at the present.
    """
    if reverse_start not in (0, 1):
        raise UsageError(f"reverse_start must be 0 or 1, the published conventions, not {reverse_start}")
    ahead, back = (k if isinstance(k, Filter) else Filter(k) for k in (k_forward, k_reverse))
    dtype = dispatch.wide(x.dtype, ahead.taps.dtype, back.taps.dtype)
    with dispatch.full_precision(x):
        form = dispatch.choose("bidirectional_convolution", time=x.shape[1])
        wide = x.to(dtype)
        y = form(wide, _as_filter(ahead, dtype), _as_filter(back, dtype), reverse_start)
        return (y if skip is None else torch.addcmul(y, wide, skip.to(dtype))).to(x.dtype)


@dispatch.form("bidirectional_convolution", "reference")
def both_sums(x: Tensor, ahead: Filter, back: Filter, reverse_start: int) -> Tensor:
    """The sums over lags as they stand."""
    time, y = x.shape[1], torch.zeros_like(x)
    for lag in range(min(time, ahead.taps.shape[1])):
        y = y + F.pad(ahead.taps[:, lag] * x[:, : time - lag], (0, 0, lag, 0))
    for lag in range(reverse_start, min(time, reverse_start + back.taps.shape[1])):
        y = y + F.pad(back.taps[:, lag - reverse_start] * x[:, lag:], (0, 0, 0, lag))
    return y


@dispatch.form("bidirectional_convolution", "torch")
def by_one_fft(x: Tensor, ahead: Filter, back: Filter, reverse_start: int) -> Tensor:
    """One FFT: negative lags stand at the end of a circle that is long enough for neither side to meet the other."""
    time = x.shape[1]
    past, future = ahead.taps[:, :time], back.taps[:, : max(0, time - reverse_start)]
    size = fast_size(time + max(past.shape[1] - 1, future.shape[1] + reverse_start - 1, 0))

    def circle() -> Tensor:
        taps = F.pad(past, (0, size - past.shape[1]))
        if not future.shape[1]:
            return taps
        return taps + F.pad(future.flip(1), (size - future.shape[1], 0)).roll(1 - reverse_start, 1)

    known = ahead.transform(f"both sides from {reverse_start}", size, time, circle, back.taps)
    return circular(x, past if known is not None else circle(), size, 0, time, known)
