"""Convolutions block by block: every block, row and gradient; what a filter keeps, and when it no longer does."""

import pytest
import torch
from ops.forms import normal
from ops.native.kit import in_process
from torch import Tensor

from bestiary import ops
from bestiary.ops import fft_convolution
from bestiary.ops.fft_convolution import CHANNELS, Filter, circular, convolve, fast_size


def on_a_circle(x: Tensor, kernel: Tensor, size: int, first: int, last: int) -> Tensor:
    """As the sums stand."""
    place = (torch.arange(size)[:, None] - torch.arange(size)) % size
    wide = torch.nn.functional.pad(kernel, (0, size - kernel.shape[1]))[:, place]  # (channels, output, input)
    return torch.einsum("cts,bsc->btc", wide[:, first:last, : x.shape[1]], x)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if transforms were long, so that there are several blocks of channels and of rows."""
    monkeypatch.setattr(fft_convolution, "NUMBERS", 0)


@pytest.mark.parametrize("channels", [1, CHANNELS - 1, CHANNELS, 2 * CHANNELS + 3])
@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("circle", [(11, 16, 16, 0, 11), (5, 7, 18, 3, 9), (4, 12, 12, 12 - 5, 12), (6, 1, 6, 2, 6)])
def test_values_and_gradients_on_a_circle(batch: int, channels: int, circle: tuple[int, ...]) -> None:
    time, taps, size, first, last = circle
    torch.manual_seed(0)
    x, kernel = normal(batch, time, channels).requires_grad_(), normal(channels, taps).requires_grad_()
    found, wanted = circular(x, kernel, size, first, last), on_a_circle(x, kernel, size, first, last)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    weight = normal(*found.shape)
    for inputs in ((x, kernel), (x,), (kernel,)):  # each gradient alone, too
        a = torch.autograd.grad((found * weight).sum(), inputs, retain_graph=True)
        b = torch.autograd.grad((wanted * weight).sum(), inputs, retain_graph=True)
        for one, other in zip(a, b):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


def test_only_what_needs_a_gradient_gets_one() -> None:
    x, kernel = normal(2, 9, 3), normal(3, 9)
    for needs_x, needs_kernel in ((True, False), (False, True)):
        live = (x.clone().requires_grad_(needs_x), kernel.clone().requires_grad_(needs_kernel))
        convolve(*live, 0).sum().backward()
        assert [tensor.grad is not None for tensor in live] == [needs_x, needs_kernel]


def test_second_derivatives() -> None:
    torch.manual_seed(0)
    x, kernel = normal(2, 6, 3).requires_grad_(), normal(3, 4).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x, kernel: convolve(x, kernel, 2), (x, kernel))


def test_compiled_code_and_blocks_agree() -> None:
    code = """
import torch
from bestiary.ops.fft_convolution import Filter, convolve
x, kernel = (torch.randn(*n, dtype=torch.float64, requires_grad=True) for n in ((2, 20, 37), (37, 20)))
def both(x, kernel):
    return convolve(x, Filter(kernel, keeps=True), 3, use="a")
found, wanted = torch.compile(both, backend="aot_eager", fullgraph=True)(x, kernel), both(x, kernel)
torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
a, b = (torch.autograd.grad(y.square().sum(), (x, kernel)) for y in (found, wanted))
torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
with torch.no_grad():
    torch.testing.assert_close(torch.compile(both, backend="aot_eager", fullgraph=True)(x, kernel), wanted)
print("agree")
"""
    assert in_process(code) == "agree"  # the checks of annotations here cannot be compiled


def test_sizes_are_near_and_of_small_factors() -> None:
    for n in [*range(1, 300), 1000, 1537, 2047, 2048, 2049, 70000]:
        size, rest = fast_size(n), fast_size(n)
        assert n <= size <= max(1.26 * n, n + 8)
        for factor in (2, 3, 5, 7):
            while rest % factor == 0:
                rest //= factor
        assert rest == 1 and (size == 1 or size % 2 == 0)


def test_no_transform_as_large_as_the_whole_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    rfft = torch.fft.rfft

    def noted(*arguments, **options) -> Tensor:
        made.append(rfft(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(torch.fft, "rfft", noted)
    x, kernel = torch.randn(3, 40, 5 * CHANNELS).requires_grad_(), torch.randn(5 * CHANNELS, 40).requires_grad_()
    convolve(x, kernel, 0).sum().backward()
    assert max(transform.numel() for transform in made) <= fft_convolution.ROWS * (fast_size(79) // 2 + 1)


@pytest.mark.parametrize("l_max", [40, 300])
def test_segments_windows_and_tiles_with_kept_transforms_are_those_without(l_max: int) -> None:
    """Segments of many lengths, some of which share a size but not a cut; steps through windows and tiles."""
    torch.manual_seed(0)
    x, filter = normal(2, 700, 5), Filter(normal(5, l_max), keeps=True)
    with torch.no_grad():
        for _ in range(2):
            past = plain = None
            for a, b in [(0, 33), (33, 70), (70, 71), *((t, t + 1) for t in range(71, 360)), (360, 460), (460, 560)]:
                y, past = ops.long_convolution(x[:, a:b], filter, state=past)
                wanted, plain = ops.long_convolution(x[:, a:b], filter.taps, state=plain)
                torch.testing.assert_close(y, wanted, rtol=0, atol=1e-12)
        for length in (200, 201, 202, 230, 231):
            y, _ = ops.long_convolution(x[:, :length], filter)
            torch.testing.assert_close(y, ops.long_convolution(x[:, :length], filter.taps)[0], rtol=0, atol=1e-12)
    assert filter.nbytes > 0


def test_two_sided_filters_with_kept_transforms_are_those_without() -> None:
    torch.manual_seed(0)
    x, ahead, back = normal(2, 50, 5), Filter(normal(5, 40), keeps=True), Filter(normal(5, 60), keeps=True)
    other = Filter(normal(5, 60))
    with torch.no_grad():
        for time, reverse, start in [(50, back, 1), (49, back, 1), (50, other, 1), (50, other, 0), (50, back, 1)]:
            found = ops.bidirectional_convolution(x[:, :time], ahead, reverse, reverse_start=start)
            wanted = ops.bidirectional_convolution(x[:, :time], ahead.taps, reverse.taps, reverse_start=start)
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    assert ahead.nbytes > 0


def test_transforms_are_taken_once_for_the_same_and_again_for_changed_taps() -> None:
    filter, x = Filter(normal(3, 16), keeps=True), normal(1, 16, 3)

    def kept() -> int:
        (_, transform, _) = filter._kept["segment"]
        return id(transform)

    with torch.no_grad():
        ops.long_convolution(x, filter)
        first = kept()
        ops.long_convolution(normal(2, 16, 3), filter)
        assert kept() == first
        filter.taps.mul_(2)
        y, _ = ops.long_convolution(x, filter)
        torch.testing.assert_close(y, ops.long_convolution(x, filter.taps)[0], rtol=0, atol=1e-12)


def test_nothing_is_kept_with_gradients_or_beyond_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    filter, x = Filter(normal(3, 16), keeps=True), normal(1, 16, 3)
    ops.long_convolution(x.requires_grad_(), filter)
    assert filter.nbytes == 0
    monkeypatch.setattr(fft_convolution, "MOST_KEPT", 100)
    with torch.no_grad():
        ops.long_convolution(x, filter)
    assert filter.nbytes == 0
