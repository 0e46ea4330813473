"""The recurrence's kernel: the definition in float64, at any shape and decay."""

import pytest
import torch
from ops.forms import KINDS, gates, normal
from ops.native import kit
from torch import Tensor

from bestiary import UsageError, ops

pytestmark = kit.needed
SHAPES = [(1, 1, 1), (2, 0, 5), (3, 2, 17), (2, 3, 16), (1, 100, 40), (2, 33, 100), (2, 9, 128), (3, 20, 300)]


def case(shape: tuple[int, ...], kind: str) -> list[Tensor]:
    """decay, write, state"""
    torch.manual_seed(shape[1])
    return [gates(kind, *shape).exp(), normal(*shape), normal(shape[0], *shape[2:])]


def op(decay, write, state):
    return ops.linear_recurrence(decay, write, state=state)


@pytest.mark.parametrize("shape", [*SHAPES, (2, 9, 3, 5)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_definition(kind: str, shape: tuple[int, ...]) -> None:
    kit.check_kernel(op, case(shape, kind))


def test_padding_takes_no_part_whatever_it_holds() -> None:
    inputs = case((4, 9, 20), "weak")
    lengths = torch.tensor([0, 1, 5, 9])
    real = (torch.arange(9) < lengths[:, None])[..., None]

    def padded(decay, write, state):
        h, state = ops.linear_recurrence(decay, write, state=state, lengths=lengths)
        return torch.where(real, h, 0), state

    kit.check_kernel(padded, inputs)
    decay, write, state = (x.float() for x in inputs)
    with ops.use("native"):
        clean = padded(decay, write, state)
        dirty = padded(*(torch.where(real, x, torch.nan) for x in (decay, write)), state)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty))


def test_the_default_dtype_changes_no_bit() -> None:
    kit.check_defaults(op, case((2, 9, 5), "weak"))


def test_a_second_derivative_is_refused() -> None:
    kit.check_second(op, case((2, 9, 5), "weak"))


def test_other_shapes_are_refused() -> None:
    decay, write, before = (x.float() for x in case((2, 9, 5), "weak"))
    kit.check_refusals(torch.ops.bestiary.linear_recurrence, (decay, write, before, torch.tensor([9, 3])))


def test_threads_and_layouts_change_no_bit() -> None:
    inputs = case((3, 200, 200), "mixed")
    kit.check_threads(op, inputs)
    kit.check_layouts(op, inputs)


def test_nan_comes_out_where_it_goes_in() -> None:
    decay, write, state = (x.float() for x in case((2, 40, 20), "weak"))
    write[1, 30, 3] = torch.nan
    with ops.use("native"):
        h, after = op(decay, write, state)
    assert h[1, 30:, 3].isnan().all() and h.isnan().sum() == 10 and after.isnan().sum() == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_and_the_result_is_fp32(dtype: torch.dtype) -> None:
    decay, write, state = (x.float() for x in case((2, 40, 20), "weak"))
    decay, write = decay.to(dtype), write.to(dtype)
    with ops.use("native"):
        found = op(decay, write, state)
    with ops.use("reference"):
        exact = op(*(x.double() for x in (decay, write, state)))
    for a, b in zip(found, exact):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b.float(), rtol=2e-6, atol=2e-6)


def test_a_decay_that_is_the_same_at_all_steps_may_be_a_view() -> None:
    decay, write, state = (x.float() for x in case((2, 9, 20), "weak"))
    decay = decay[:, :1].expand(-1, 9, -1)
    with ops.use("native"):
        assert torch.equal(op(decay, write, state)[0], op(decay.contiguous(), write, state)[0])


def test_complex_numbers_are_not_its_work() -> None:
    decay, write, state = (torch.randn(2, 3, 4, dtype=torch.complex64) for _ in range(3))
    with ops.use("native"), pytest.raises(UsageError, match="the kernel computes with real numbers"):
        op(decay, write, state[:, 0])
    assert op(decay, write, state[:, 0])[0].isfinite().all()


def test_torch_knows_it_as_an_operator() -> None:
    decay, write, state = (x.float().requires_grad_() for x in case((2, 9, 5), "weak"))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    operator = torch.ops.bestiary.linear_recurrence.default
    torch.library.opcheck(operator, (decay, write, state, None), test_utils=tests)


def test_it_compiles_for_any_length() -> None:
    def operator(decay, write, state):
        return torch.ops.bestiary.linear_recurrence(decay, write, state, None)

    kit.check_compiled(operator, [case((2, time, 20), "weak") for time in (9, 20, 33)])
