"""The convolution's kernel: the definition in float64 at any shape, with bias, activation and history."""

import pytest
import torch
from ops.forms import normal
from ops.native import kit
from torch import Tensor

from bestiary import UsageError, ops

pytestmark = kit.needed
SHAPES = [
    (1, 1, 1, 1),
    (2, 0, 5, 3),
    (2, 1, 5, 4),
    (2, 2, 17, 4),
    (1, 3, 16, 5),
    (3, 64, 20, 2),
    (2, 65, 40, 4),
    (1, 130, 7, 16),
    (9, 7, 64, 2),
    (1, 33, 130, 3),
    (2, 70, 260, 4),
    (1, 97, 150, 7),
]


def case(shape: tuple[int, ...]) -> list[Tensor]:
    """x, weight, bias, history"""
    B, T, C, K = shape
    torch.manual_seed(T + C)
    return [normal(B, T, C), normal(C, K), normal(C), normal(B, K - 1, C)]


def plain(x, weight, bias, state):
    return ops.short_convolution(x, weight, None, state=state)


def silu(x, weight, bias, state):
    return ops.short_convolution(x, weight, bias, activation="silu", state=state)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("op", [plain, silu])
def test_it_is_the_definition(op, shape: tuple[int, ...]) -> None:
    kit.check_kernel(op, case(shape))


def test_each_row_ends_at_its_length_whatever_padding_holds() -> None:
    x, weight, bias, state = case((5, 9, 20, 4))
    lengths = torch.tensor([0, 1, 2, 3, 9])
    real = (torch.arange(9) < lengths[:, None])[..., None]

    def op(x, weight, bias, state):
        y, state = ops.short_convolution(x, weight, bias, activation="silu", state=state, lengths=lengths)
        return torch.where(real, y, 0), state

    kit.check_kernel(op, [x, weight, bias, state])
    with ops.use("native"):
        clean = op(x.float(), weight.float(), bias.float(), state.float())
        dirty = op(torch.where(real, x, torch.nan).float(), weight.float(), bias.float(), state.float())
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty))


def test_the_default_dtype_changes_no_bit() -> None:
    kit.check_defaults(silu, case((2, 9, 5, 3)))


def test_a_second_derivative_is_refused() -> None:
    kit.check_second(silu, case((2, 9, 5, 3)))


def test_other_shapes_are_refused() -> None:
    x, weight, bias, before = (t.float() for t in case((2, 9, 5, 3)))
    arguments = (x, weight, bias, before, torch.tensor([9, 3]), True)
    kit.check_refusals(torch.ops.bestiary.short_convolution, arguments, free={(0, 1)})  # a segment may be of any length


def test_threads_and_layouts_change_no_bit() -> None:
    for shape in ((3, 200, 100, 4), (70, 3, 140, 3)):
        kit.check_threads(silu, case(shape))
        kit.check_layouts(silu, case(shape))


def test_one_row_or_many_give_the_same_bits() -> None:
    x, weight, bias, state = (t.float() for t in case((40, 3, 150, 4)))
    with ops.use("native"):
        together = silu(x, weight, bias, state)
        alone = [silu(x[i : i + 1], weight, bias, state[i : i + 1]) for i in range(40)]
    assert all(torch.equal(a, torch.cat(b)) for a, b in zip(together, zip(*alone)))


def test_nan_comes_out_where_it_goes_in() -> None:
    x, weight, bias, state = (t.float() for t in case((2, 40, 20, 4)))
    x[1, 38, 3] = torch.nan
    with ops.use("native"):
        y, after = silu(x, weight, bias, state)
    assert y[1, 38:, 3].isnan().all() and y.isnan().sum() == 2 and after.isnan().sum() == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_and_the_state_stays_in_fp32(dtype: torch.dtype) -> None:
    x, weight, bias, state = (t.float() for t in case((2, 40, 20, 4)))
    with ops.use("native"):
        y, after = silu(x.to(dtype), weight, bias, state)
    with ops.use("reference"):
        expected, exact = silu(*(t.double() for t in (x.to(dtype), weight, bias, state)))
    assert y.dtype == dtype and after.dtype == torch.float32
    assert torch.equal(after, exact.float())
    torch.testing.assert_close(y.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)


def test_many_taps_are_not_its_work() -> None:
    x, weight, bias, state = (t.float() for t in case((1, 9, 4, 17)))
    with ops.use("native"), pytest.raises(UsageError, match="more than 16 taps"):
        plain(x, weight, bias, state)
    assert plain(x, weight, bias, state)[0].isfinite().all()


def test_torch_knows_it_as_an_operator() -> None:
    x, weight, bias, state = (t.float().requires_grad_() for t in case((2, 9, 5, 4)))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    operator = torch.ops.bestiary.short_convolution.default
    torch.library.opcheck(operator, (x, weight, bias, state, None, True), test_utils=tests)


def test_it_compiles_for_any_length() -> None:
    def operator(x, weight, bias, state):
        return torch.ops.bestiary.short_convolution(x, weight, bias, state, None, True)

    kit.check_compiled(operator, [case((2, time, 20, 4)) for time in (9, 20, 33)])
