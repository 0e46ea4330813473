"""The scan's kernel: the definition in float64, at any shape and gate, with all that is fused into it."""

import pytest
import torch
from ops.forms import KINDS, gates, normal
from ops.native import kit

from bestiary import ops

pytestmark = kit.needed
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 3), (1, 32, 16, 16), (2, 33, 17, 7), (1, 65, 40, 24), (3, 2, 100, 2), (1, 70, 32, 64)]


def case(shape: tuple[int, ...], kind: str, *, gated: bool) -> list[torch.Tensor]:
    """u, dt, A, B, C, state; and D, z, bias where gated: then dt is what goes into the softplus."""
    B, T, C, N = shape
    torch.manual_seed(T + C)
    dt = 3 * normal(B, T, C) if gated else -gates(kind, B, T, C)
    A = -torch.exp(normal(C, N)) if gated else -torch.rand(C, N, dtype=torch.float64)
    plain = [normal(B, T, C), dt, A, normal(B, T, N), normal(B, T, N), normal(B, C, N)]
    return [*plain, normal(C), normal(B, T, C), normal(C)] if gated else plain


def plain(u, dt, A, B, C, state):
    return ops.selective_scan(u, dt, A, B, C, state=state)


def gated(u, dt, A, B, C, state, D, z, bias):
    return ops.selective_scan(u, dt, A, B, C, D, z=z, dt_bias=bias, dt_softplus=True, state=state)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_definition(shape: tuple[int, ...], kind: str) -> None:
    kit.check_kernel(plain, case(shape, kind, gated=False))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_definition_with_all_that_is_fused(shape: tuple[int, ...]) -> None:
    kit.check_kernel(gated, case(shape, "", gated=True))


def test_a_length_beyond_the_end_is_the_end() -> None:
    u, dt, A, B, C, state = (x.float() for x in case((2, 9, 6, 3), "weak", gated=False))
    with ops.use("native"):
        y, after = ops.selective_scan(u, dt, A, B, C, state=state, lengths=torch.tensor([9, 1 << 40]))
        expected = plain(u, dt, A, B, C, state)
    assert torch.equal(y, expected[0]) and torch.equal(after, expected[1])


@pytest.mark.parametrize("softplus", [True, False])
def test_padding_takes_no_time_and_intervals_stretch_it(softplus: bool) -> None:
    *inputs, state = case((4, 37, 20, 16), "mixed", gated=False)
    lengths, intervals = torch.tensor([0, 1, 33, 37]), 2 * torch.rand(4, 37, dtype=torch.float64)
    real = (torch.arange(37) < lengths[:, None])[..., None]

    def op(u, dt, A, B, C, state):
        y, state = ops.selective_scan(
            u,
            dt,
            A,
            B,
            C,
            dt_softplus=softplus,
            state=state,
            lengths=lengths,
            intervals=intervals.to(u.dtype).float().to(u.dtype),
        )
        return torch.where(real, y, 0), state

    kit.check_kernel(op, [*inputs, state])
    nan = [torch.where(real, x, torch.nan) if x.shape[:2] == (4, 37) else x for x in inputs]
    with ops.use("native"):
        clean, dirty = (op(*(x.float() for x in (*given, state))) for given in (inputs, nan))
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty))


def test_the_default_dtype_changes_no_bit() -> None:
    kit.check_defaults(gated, case((2, 9, 6, 3), "", gated=True))


def test_a_second_derivative_is_refused() -> None:
    kit.check_second(gated, case((2, 9, 6, 3), "", gated=True))


def test_other_shapes_are_refused() -> None:
    u, dt, A, B, C, before, D, z, bias = (x.float() for x in case((2, 9, 6, 3), "", gated=True))
    gaps, lengths = torch.rand(2, 9), torch.tensor([9, 3])
    arguments = (u, dt, A, B, C, D, bias, z, gaps, lengths, before, True, False)
    kit.check_refusals(torch.ops.bestiary.selective_scan, arguments)


def test_threads_and_layouts_change_no_bit() -> None:
    inputs = case((3, 100, 200, 16), "", gated=True)
    kit.check_threads(gated, inputs)
    kit.check_layouts(gated, inputs)


def test_nan_comes_out_where_it_goes_in() -> None:
    inputs = [x.float() for x in case((2, 40, 20, 4), "weak", gated=False)]
    inputs[0][1, 20, 3] = torch.nan
    with ops.use("native"):
        y, state = plain(*inputs)
    assert y[1, 20:, 3].isnan().all() and state[1, 3].isnan().all()
    assert y.isnan().sum() == 20 and state.isnan().sum() == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_and_the_state_stays_in_fp32(dtype: torch.dtype) -> None:
    u, dt, A, B, C, state = (x.float() for x in case((2, 40, 20, 16), "weak", gated=False))
    u, dt, B, C = (x.to(dtype) for x in (u, dt, B, C))
    with ops.use("native"):
        y, after = plain(u, dt, A, B, C, state)
    with ops.use("reference"):
        expected, exact = plain(*(x.double() for x in (u, dt, A, B, C, state)))
    assert y.dtype == dtype and after.dtype == torch.float32
    torch.testing.assert_close(after, exact.float(), rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(y.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)


def test_torch_knows_it_as_an_operator() -> None:
    u, dt, A, B, C, before, D, z, bias = (x.float().requires_grad_() for x in case((2, 9, 5, 3), "", gated=True))
    arguments = (u, dt, A, B, C, D, bias, z, None, None, before, True, True)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(torch.ops.bestiary.selective_scan.default, arguments, test_utils=tests)
