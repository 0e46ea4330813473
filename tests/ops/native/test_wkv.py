"""RWKV-4's kernel: the definition in float64, for any keys, decays and bonuses, with the past as a triple of sums."""

import pytest
import torch
from ops.forms import normal, relative, run
from ops.native import kit
from torch import Tensor

from bestiary import ops
from bestiary.ops.wkv import WKVState

pytestmark = kit.needed
SHAPES = [(2, 0, 5), (2, 3, 17), (3, 16, 16), (1, 33, 70), (2, 100, 130)]


def case(shape: tuple[int, ...], size: float, decay: float) -> list[Tensor]:
    """Keys of that size, log-decays down to -decay, values, bonuses, and a past that an earlier segment left."""
    B, T, C = shape
    torch.manual_seed(T + C)
    w = -decay * torch.rand(C, dtype=torch.float64)
    with ops.use("reference"):
        _, past = ops.wkv(size / 3 * normal(B, 4, C), normal(B, 4, C), w, normal(C))
    return [size / 3 * normal(B, T, C), normal(B, T, C), w, normal(C), *past]


def later(k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: WKVState, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """The output, and that of three more steps: the state is in units of its own, what it does is what counts."""
    y, state = ops.wkv(k, v, w, u, state=state, lengths=lengths)
    if lengths is not None:
        y = torch.where((torch.arange(k.shape[1]) < lengths[:, None])[..., None], y, 0)
    ahead = torch.linspace(-1, 1, k.shape[0] * 3 * k.shape[2], dtype=torch.float32).reshape(len(k), 3, -1).to(k.dtype)
    return y, ops.wkv(ahead, ahead.flip(1), w, u, state=state)[0]


def op(k, v, w, u, num, den, top):
    return later(k, v, w, u, WKVState(num, den, top), None)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("size", [1.0, 10.0, 40.0])
@pytest.mark.parametrize("decay", [0.0, 1.0, 50.0])
def test_it_is_the_definition(shape: tuple[int, ...], size: float, decay: float) -> None:
    kit.check_kernel(op, case(shape, size, decay))


def check_jointly(inputs: list[Tensor]) -> None:
    """As check_kernel, but gradients are measured by the largest of all: some are small differences of large parts."""
    inputs = [x.float() for x in inputs]
    exact, found = run(op, inputs, "reference", torch.float64), run(op, inputs, "native", torch.float32)
    assert relative(found[:2], exact[:2]) < kit.LIMIT
    assert relative(*([torch.cat([x.flatten() for x in side[2:]])] for side in (found, exact))) < kit.LIMIT


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("size", [1.0, 10.0, 40.0])
def test_so_it_is_for_a_few_channels_and_a_step(shape: tuple[int, ...], size: float) -> None:
    check_jointly(case(shape, size, 1.0))


@pytest.mark.parametrize("bonus", [-90.0, -25.0, 25.0, 90.0])
def test_any_bonus_and_decay(bonus: float) -> None:
    k, v, w, u, *past = case((2, 50, 40), 10.0, 150.0)
    check_jointly([k, v, w, u + bonus, *past])


@pytest.mark.parametrize("form", ["native", "reference"])
def test_a_key_counts_however_far_below_the_past_it_is(form: str) -> None:
    """e^90 and then e^-5: after a decay of e^-100 the second is by far the larger."""
    k, v = torch.tensor([90.0, -5.0, -5.0]).reshape(1, 3, 1), torch.tensor([7.0, 1.0, 3.0]).reshape(1, 3, 1)
    with ops.use(form):
        y, _ = ops.wkv(k, v, torch.tensor([-100.0]), torch.tensor([0.0]))
    weights = torch.tensor([-10.0, -5.0, -5.0]).exp()
    last = (weights * v[0, :, 0]).sum() / weights.sum()
    torch.testing.assert_close(y[0, :, 0], torch.stack([v[0, 0, 0], v[0, 0, 0], last]), rtol=1e-6, atol=0)


def test_rows_end_at_their_lengths_whatever_padding_holds() -> None:
    k, v, w, u, *past = case((6, 40, 20), 10.0, 1.0)
    lengths = torch.tensor([0, 1, 2, 3, 33, 40])
    real = (torch.arange(40) < lengths[:, None])[..., None]

    def padded(k, v, w, u, num, den, top):
        return later(k, v, w, u, WKVState(num, den, top), lengths)

    kit.check_kernel(padded, [k, v, w, u, *past])
    dirty = [torch.where(real, x, torch.nan) for x in (k, v)]
    clean, dirty = (run(padded, [*given, w, u, *past], "native", torch.float32) for given in ((k, v), dirty))
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty))
    with ops.use("native"):
        before = WKVState(*(x.float() for x in past))
        _, after = ops.wkv(*(x.float() for x in (k, v, w, u)), state=before, lengths=lengths)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(before, after))


@pytest.mark.parametrize("decay", [0.001, 0.1, 50.0])
def test_many_single_steps_stay_exact_and_the_sums_near_one(decay: float) -> None:
    """What a step leaves is what the definition leaves, also where keys fade while the past does."""
    torch.manual_seed(0)
    k, v, w, u = torch.randn(1, 2000, 24), torch.randn(1, 2000, 24), -decay * torch.rand(24), torch.randn(24)
    k = k - torch.linspace(0, 60, 2000)[:, None]
    state, outputs = ops.empty_wkv(1, 24), []
    with ops.use("native"):
        for k_t, v_t in zip(k.split(1, 1), v.split(1, 1)):
            y, state = ops.wkv(k_t, v_t, w, u, state=state)
            outputs.append(y)
    with ops.use("reference"):
        expected, exact = ops.wkv(*(x.double() for x in (k, v, w, u)))
    # fp32 rounds the factor of each step: its errors add up over the steps that count
    torch.testing.assert_close(torch.cat(outputs, 1).double(), expected, rtol=0, atol=2e-6 if decay > 0.01 else 2e-5)
    assert (state.den > 5e-6).all() and (state.den < 1e6).all() and torch.equal(state.max, state.max.round())
    torch.testing.assert_close(state.den.double().log() + state.max, exact.den.log() + exact.max, rtol=0, atol=1e-4)


def test_threads_and_layouts_change_no_bit() -> None:
    for size in (1.0, 20.0):
        inputs = case((3, 100, 200), size, 1.0)
        kit.check_threads(op, inputs)
        kit.check_layouts(op, inputs)


def test_a_lane_that_needs_care_changes_no_bit_of_its_neighbours() -> None:
    k, v, w, u, *past = (x.float() for x in case((2, 50, 64), 1.0, 1.0))
    wild = k.clone()
    wild[0, 20:, 7] += 40
    with ops.use("native"):
        calm, stirred = (op(x, v, w, u, *past) for x in (k, wild))
    others = torch.arange(64) != 7
    assert all(torch.equal(a[..., others], b[..., others]) for a, b in zip(calm, stirred))


def test_nan_comes_out_where_it_goes_in() -> None:
    k, v, w, u, *past = (x.float() for x in case((2, 40, 20), 10.0, 1.0))
    for which in (k, v):
        kept = which[1, 30, 3].clone()
        which[1, 30, 3] = torch.nan
        with ops.use("native"):
            y, state = ops.wkv(k, v, w, u, state=WKVState(*past))
        assert y[1, 30:, 3].isnan().all() and y.isnan().sum() == 10 and state.num.isnan().sum() == 1
        which[1, 30, 3] = kept


def test_the_default_dtype_changes_no_bit() -> None:
    kit.check_defaults(op, case((2, 9, 20), 3.0, 1.0))


def test_a_second_derivative_is_refused() -> None:
    kit.check_second(op, case((2, 9, 20), 3.0, 1.0))


def test_other_shapes_are_refused() -> None:
    arguments = (*(x.float() for x in case((2, 9, 5), 3.0, 1.0)), torch.tensor([9, 3]), True)
    kit.check_refusals(torch.ops.bestiary.wkv, arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_and_the_state_stays_in_fp32(dtype: torch.dtype) -> None:
    k, v, w, u, *past = (x.float() for x in case((2, 40, 20), 3.0, 1.0))
    k, v = k.to(dtype), v.to(dtype)
    with ops.use("native"):
        y, after = ops.wkv(k, v, w, u, state=WKVState(*past))
    with ops.use("reference"):
        expected, exact = ops.wkv(*(x.double() for x in (k, v, w, u)), state=WKVState(*(x.double() for x in past)))
    assert y.dtype == dtype and after.num.dtype == torch.float32
    torch.testing.assert_close((after.num / after.den).double(), exact.num / exact.den, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(y.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)


def test_torch_knows_it_as_an_operator() -> None:
    k, v, w, u, *past = (x.float().requires_grad_() for x in case((2, 19, 5), 3.0, 1.0))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(torch.ops.bestiary.wkv.default, (k, v, w, u, *past, None, True), test_utils=tests)


def test_it_compiles_for_any_length() -> None:
    def operator(k, v, w, u, num, den, top):
        y, num, den, _, _ = torch.ops.bestiary.wkv(k, v, w, u, num, den, top, None, True)
        return y, num / den

    kit.check_compiled(operator, [case((2, time, 20), 3.0, 1.0) for time in (9, 20, 33)])
