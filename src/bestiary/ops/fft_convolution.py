"""Convolution of many channels, each with a filter of its own, by FFT.

On a CPU, a block of channels goes all the way, forth, product and back, before the next one begins: its transforms stay
in the cache, and none as large as the whole exist. Gradients go the same way. In inference, a Filter keeps transforms.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Complex, Float
from torch import Tensor
from torch.nn import functional as F

CHANNELS, ROWS, NUMBERS = 32, 64, 1 << 16
"""Of a block on a CPU: least channels and transforms, or more of both, up to so many numbers where they are short.

Fewer than 16 transforms at once would not repay the library's preparations for each call.
"""
MOST_KEPT = 1 << 26
"""Bytes of the largest transform that a filter keeps."""


class Filter:
    """Taps whose Fourier transforms are kept, for a filter that comes back at every call.

    One transform for each use is there: of a segment, of a window, of each size of tile.

    Args:
        taps: k_0 first.
        keeps: whether to keep anything; whoever says so makes a new Filter when the taps change.
    """

    def __init__(self, taps: Float[Tensor, "channels l_max"], *, keeps: bool = False):
        self.taps, self.keeps = taps, keeps
        self._kept: dict[str, tuple[Any, Tensor, tuple[Tensor, ...]]] = {}

    def transform(
        self, use: str, size: int, cut: int, taps: Callable[[], Tensor], *others: Tensor
    ) -> Complex[Tensor, "channels frequencies"] | None:
        """The transform of `taps()` at a size; None where none is kept.

        Args:
            cut: where the taps are cut off.
            others: tensors of which `taps()` are made beside this filter's.
        """
        if not self.keeps or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        if self.taps.shape[0] * (size + 2) * self.taps.element_size() > MOST_KEPT:
            return None
        made_of = (self.taps, *others)
        key = (size, cut, *((id(t), None if t.is_inference() else t._version) for t in made_of))
        found = self._kept.get(use)
        if found is None or found[0] != key:
            found = self._kept[use] = (key, torch.fft.rfft(taps(), n=size), made_of)  # held: their ids stay theirs
        return found[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the transforms that are kept."""
        return sum(transform.nbytes for _, transform, _ in self._kept.values())


def convolve(
    x: Float[Tensor, "batch inputs channels"],
    filter: Filter | Float[Tensor, "channels taps"],
    first: int,
    last: int | None = None,
    use: str = "",
) -> Float[Tensor, "batch outputs channels"]:
    """Outputs first, ..., last - 1 of the causal convolution, by FFT; until the end of x by default.

    Args:
        use: what for, as a Filter keeps its transforms by their use.
    """
    inputs = x.shape[1]
    last = inputs if last is None else last
    filter = filter if isinstance(filter, Filter) else Filter(filter)
    kernel = filter.taps[:, :last]
    # a circular convolution spoils its first taps-1 outputs, of which `first` are dropped anyway
    size = fast_size(max(last, inputs - first + kernel.shape[1] - 1))
    return circular(x, kernel, size, first, last, filter.transform(use, size, kernel.shape[1], lambda: kernel))


def fast_size(n: int) -> int:
    """The next power of two, or 9, 10, 12 or 14 sixteenths of it: about as fast a number, and nearer."""
    power = 1 << max(0, n - 1).bit_length()
    return next((part for k in (9, 10, 12, 14) if power >= 32 and (part := power // 16 * k) >= n), power)


def circular(
    x: Float[Tensor, "batch inputs channels"],
    kernel: Float[Tensor, "channels taps"],
    size: int,
    first: int,
    last: int,
    transform: Complex[Tensor, "channels frequencies"] | None = None,
) -> Float[Tensor, "batch outputs channels"]:
    """Outputs first, ..., last - 1 of the convolution on a circle of `size` places, on which x stands at 0, 1, ...

    Args:
        kernel: at most `size` taps.
        transform: of the kernel, where it is known; without gradients alone.
    """
    if not x.numel() or first == last:  # FFTs refuse empty ones
        return x.new_zeros(x.shape[0], last - first, x.shape[2])
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return _at_once(x, kernel, size, first, last, transform)
    if torch.is_grad_enabled() and (x.requires_grad or kernel.requires_grad):
        return _Circular.apply(x, kernel, size, first, last)
    return _blockwise(x, kernel, size, first, last, transform)


def _at_once(x: Tensor, kernel: Tensor, size: int, first: int, last: int, transform: Tensor | None = None) -> Tensor:
    """All channels in one transform."""
    transform = torch.fft.rfft(kernel, n=size) if transform is None else transform
    return torch.fft.irfft(torch.fft.rfft(x.mT, n=size) * transform, n=size)[..., first:last].mT


def _blocks(batch: int, channels: int, size: int) -> Iterator[tuple[slice, list[slice]]]:
    """Blocks of channels, and of rows for each."""
    width = min(channels, max(CHANNELS, NUMBERS // size))
    rows = max(1, max(ROWS, NUMBERS // size) // width)
    for c in range(0, channels, width):
        yield slice(c, c + width), [slice(b, b + rows) for b in range(0, batch, rows)]


def _blockwise(x: Tensor, kernel: Tensor, size: int, first: int, last: int, transform: Tensor | None) -> Tensor:
    """Block after block."""
    y = x.new_empty(x.shape[0], last - first, x.shape[2])
    for part, blocks in _blocks(x.shape[0], x.shape[2], size):
        weights = torch.fft.rfft(kernel[part], n=size) if transform is None else transform[part]
        for rows in blocks:
            spectrum = torch.fft.rfft(x[rows, :, part].mT, n=size).mul_(weights)
            y[rows, :, part] = torch.fft.irfft(spectrum, n=size)[..., first:last].mT
    return y


class _Circular(torch.autograd.Function):
    """The blocks with their gradients: correlations on the same circle. Only the inputs are saved."""

    @staticmethod
    def forward(x: Tensor, kernel: Tensor, size: int, first: int, last: int) -> Tensor:
        return _blockwise(x, kernel, size, first, last, None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.circle = inputs[2:]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x, kernel), needs = ctx.saved_tensors, ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():  # for a second derivative: as autograd knows it
            wanted = [tensor for tensor, need in zip((x, kernel), needs) if need]
            y = _at_once(x, kernel, *ctx.circle)
            found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
            return *(next(found) if need else None for need in needs), None, None, None
        return *_gradients(x, kernel, dy, *ctx.circle, *needs), None, None, None


def _gradients(
    x: Tensor, kernel: Tensor, dy: Tensor, size: int, first: int, last: int, need_x: bool, need_kernel: bool
) -> tuple[Tensor | None, Tensor | None]:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else None
    dkernel = torch.empty_like(kernel, memory_format=torch.contiguous_format) if need_kernel else None
    for part, blocks in _blocks(x.shape[0], x.shape[2], size):
        weights = torch.fft.rfft(kernel[part], n=size).conj() if need_x else None
        total: Tensor | None = None
        for rows in blocks:
            flow = torch.fft.rfft(F.pad(dy[rows, :, part].mT, (first, size - last)), n=size)
            if need_kernel:
                shared = torch.fft.rfft(x[rows, :, part].mT, n=size).conj().mul(flow).sum(0)
                total = shared if total is None else total.add_(shared)
            if dx is not None and weights is not None:
                dx[rows, :, part] = torch.fft.irfft(flow.mul_(weights), n=size)[..., : x.shape[1]].mT
        if dkernel is not None and total is not None:
            dkernel[part] = torch.fft.irfft(total, n=size)[:, : kernel.shape[1]]
    return dx, dkernel
