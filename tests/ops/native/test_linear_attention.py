"""The kernel of linear attention: the definition in float64, at any shape and decay, with bonus and normaliser."""

import math

import pytest
import torch
from ops.forms import KINDS, gates, normal, run
from ops.native import kit
from torch import Tensor

from bestiary import UsageError, ops

pytestmark = kit.needed
SHAPES = [  # batch, time, groups, heads, key_dim, value_dim
    (1, 1, 1, 1, 1, 1),
    (2, 2, 1, 3, 5, 3),
    (1, 3, 2, 2, 64, 64),
    (2, 0, 1, 1, 4, 4),
    (1, 32, 2, 4, 8, 16),
    (2, 33, 1, 9, 17, 7),
    (1, 65, 3, 3, 24, 112),
    (3, 2, 1, 2, 100, 33),
    (1, 70, 1, 2, 64, 64),
]
DECAYS = ["none", "constant", "per step", "per channel"]
EACH = [("none", "none"), *((decay, kind) for decay in DECAYS[1:] for kind in KINDS)]


def case(shape: tuple[int, ...], decay: str, kind: str) -> list[Tensor]:
    """q, k, v, state, and the log-decay if there is one.

    A constant one stands at every step: its gradient, a sum over steps that cancels, has no size to measure by.
    """
    B, T, G, H, K, V = shape
    torch.manual_seed(T + K)
    plain = [normal(B, T, G, K), normal(B, T, G, K), normal(B, T, H, V), normal(B, H, K, V)]
    if decay == "none":
        return plain
    if decay == "constant":
        return [*plain, gates(kind, H).expand(B, T, H).clone()]
    return [*plain, gates(kind, *((B, T, H) if decay == "per step" else (B, T, H, K)))]


def plain(q, k, v, state, g=None):
    return ops.linear_attention(q, k, v, g, state=state)


def with_bonus(q, k, v, state, u, g=None):
    return ops.linear_attention(q, k, v, g, bonus=u, scale=1.0, state=state)


def normalised(q, k, v, state, g=None):
    return ops.linear_attention(q, k, v, g, normalise=True, state=state)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("decay", "kind"), EACH)
def test_it_is_the_definition(decay: str, kind: str, shape: tuple[int, ...]) -> None:
    kit.check_kernel(plain, case(shape, decay, kind))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("decay", "kind"), EACH)
def test_it_is_the_definition_with_a_bonus(decay: str, kind: str, shape: tuple[int, ...]) -> None:
    q, k, v, state, *g = case(shape, decay, kind)
    kit.check_kernel(with_bonus, [q, k, v, state, normal(shape[3], shape[4]), *g])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("decay", "kind"), EACH)
def test_it_is_the_definition_with_a_normaliser(decay: str, kind: str, shape: tuple[int, ...]) -> None:
    q, k, v, state, *g = case(shape, decay, kind)
    state = torch.cat([state, state[..., :1].abs() + 0.1], dim=-1)
    kit.check_kernel(normalised, [q.abs() + 0.1, k.abs() + 0.1, v, state, *g], joint=True)


@pytest.mark.parametrize(("decay", "kind"), [("none", "none"), ("per channel", "mixed")])
def test_long_segments_stay_exact(decay: str, kind: str) -> None:
    kit.check_kernel(plain, case((1, 1500, 1, 1, 16, 16), decay, kind))


@pytest.mark.parametrize("half_life", [100, 200, 400])
def test_decays_near_one_are_not_rounded_step_by_step(half_life: int) -> None:
    """Powers of exp(g) in fp32 are wrong by up to 3e-8 for each step: 1e-5 at the last half-life."""
    q, k, v, state = case((1, 1500, 1, 1, 8, 8), "none", "none")
    g = torch.full((1, 1500, 1), -math.log(2) / half_life, dtype=torch.float64)
    kit.check_kernel(plain, [q, k, v, state, g])


def test_a_constant_decay_is_the_same_at_every_step() -> None:
    q, k, v, state, g = (x.float() for x in case((2, 40, 2, 2, 20, 24), "constant", "weak"))
    short = run(plain, [q, k, v, state, g[0, 0]], "native", torch.float32)
    for a, b in zip(short, run(plain, [q, k, v, state, g], "native", torch.float32)):
        assert torch.equal(a, b if a.shape == b.shape else b.sum((0, 1)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_step_without_gradients_is_the_step_with_them(kind: str) -> None:
    for op in (plain, normalised):
        for values in (64, 65, 3):
            inputs = [x.float().abs() for x in case((2, 1, 1, 2, 33, values), "per channel", kind)]
            inputs[-1] = -inputs[-1]
            if op is normalised:
                inputs[2] = inputs[2][..., :-1]
            with ops.use("native"):
                found = op(*inputs)
            for a, b in zip(found, run(op, inputs, "native", torch.float32)):
                torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("groups", [1, 3, 9])
def test_threads_and_layouts_change_no_bit(groups: int) -> None:
    for decay in DECAYS:
        inputs = case((3, 70, groups, 9, 20, 40), decay, "weak")
        kit.check_threads(plain, inputs)
        kit.check_layouts(plain, inputs)


def test_the_default_dtype_changes_no_bit_and_a_second_derivative_is_refused() -> None:
    for decay in DECAYS:
        inputs = case((2, 9, 1, 2, 5, 20), decay, "weak")
        kit.check_defaults(plain, inputs)
        kit.check_second(plain, inputs)


def test_other_shapes_are_refused() -> None:
    for decay in ("per step", "per channel"):
        q, k, v, state, g, u = (x.float() for x in (*case((2, 9, 1, 2, 5, 3), decay, "weak"), normal(2, 5)))
        kit.check_refusals(torch.ops.bestiary.linear_attention, (q, k, v, g, u, state, 1.0, False, 1e-6, True))


def test_heads_that_share_no_keys_evenly_are_refused() -> None:
    q, k, v, state = (x.float() for x in case((2, 9, 1, 3, 5, 3), "none", "none"))
    operator = torch.ops.bestiary.linear_attention
    with pytest.raises(UsageError, match="equally many"):
        operator(q.repeat(1, 1, 2, 1), k.repeat(1, 1, 2, 1), v, None, None, state, 0.5, False, 1e-6, False)


def test_nan_comes_out_where_it_goes_in() -> None:
    q, k, v, state, g = (x.float() for x in case((2, 40, 2, 2, 20, 24), "per channel", "weak"))
    v[1, 20, 1, 3] = torch.nan
    with ops.use("native"):
        o, state = plain(q, k, v, state, g)
    assert o[1, 20:, 1, 3].isnan().all() and state[1, 1, :, 3].isnan().all()
    assert o.isnan().sum() == 20 and state.isnan().sum() == 20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_and_the_state_stays_in_fp32(dtype: torch.dtype) -> None:
    q, k, v, state, g = (x.float() for x in case((2, 40, 2, 2, 20, 24), "per channel", "weak"))
    q, k, v, g = (x.to(dtype) for x in (q, k, v, g))
    with ops.use("native"):
        o, after = plain(q, k, v, state, g)
    with ops.use("reference"):
        expected, exact = plain(*(x.double() for x in (q, k, v, state, g)))
    assert o.dtype == dtype and after.dtype == torch.float32
    torch.testing.assert_close(after, exact.float(), rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(o.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)


def test_torch_knows_it_as_an_operator() -> None:
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    inputs = case((2, 9, 1, 2, 5, 3), "per step", "weak")
    q, k, v, state, g, u = (x.float().requires_grad_() for x in (*inputs, normal(2, 5)))
    operator = torch.ops.bestiary.linear_attention.default
    torch.library.opcheck(operator, (q, k, v, g, u, state, 0.5, False, 1e-6, True), test_utils=tests)
    wide = torch.cat([state, state[..., :1].abs()], dim=-1).detach().requires_grad_()
    torch.library.opcheck(operator, (q, k, v, None, None, wide, 0.5, True, 10.0, True), test_utils=tests)
