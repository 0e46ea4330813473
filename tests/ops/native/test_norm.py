"""The norm's kernel: the definition in float64, plain, weighed and gated on either side."""

import pytest
import torch
from ops.forms import normal, run
from ops.native import kit
from torch import Tensor

from bestiary import UsageError, ops

pytestmark = kit.needed
SHAPES = [(3, 2), (2, 5, 3), (70, 16), (2, 65, 24), (1, 3, 100), (9, 768)]
EPS = 1e-5


def case(shape: tuple[int, ...], *, groups: int = 0) -> list[Tensor]:
    """x, gate, weight."""
    torch.manual_seed(sum(shape))
    return [normal(*shape), 2 * normal(*shape), normal(*([groups] if groups else []), shape[-1])]


def plain(x, gate, weight):
    y = ops.rms_norm(x, weight, eps=EPS)
    return y, y[..., :1]


def unweighed(x, gate, weight):
    y = ops.rms_norm(x, eps=EPS)
    return y, y[..., :1]


def before(x, gate, weight):
    y = ops.rms_norm(x, weight, eps=EPS, gate=gate, gate_first=True)
    return y, y[..., :1]


def after(x, gate, weight):
    y = ops.rms_norm(x, weight, eps=EPS, gate=gate)
    return y, y[..., :1]


FORMS = [plain, unweighed, before, after]


@pytest.mark.parametrize("op", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_definition(op, shape: tuple[int, ...]) -> None:
    kit.check_kernel(op, case(shape))


@pytest.mark.parametrize("op", FORMS)
@pytest.mark.parametrize("size", [1e-12, 1e-3, 1e3, 1e12])
def test_so_it_is_for_large_and_small_numbers(op, size: float) -> None:
    x, gate, weight = case((5, 7, 40))
    kit.check_kernel(op, [size * x, gate, weight])


@pytest.mark.parametrize("op", FORMS)
@pytest.mark.parametrize("groups", [1, 2, 3, 80])
def test_groups_take_their_weights_in_turn(op, groups: int) -> None:
    kit.check_kernel(op, case((2, 33, groups, 20), groups=groups))


@pytest.mark.parametrize("op", FORMS)
@pytest.mark.parametrize("groups", [0, 1, 3])
def test_the_torch_form_is_the_definition(op, groups: int) -> None:
    inputs = case((2, 5, max(groups, 1), 20), groups=groups)
    found, exact = (run(op, inputs, form, torch.float64) for form in ("torch", "reference"))
    for a, b in zip(found, exact):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_single_channel_is_its_sign() -> None:
    x, gate, weight = (t.float() for t in case((9, 1)))
    with ops.use("native"):
        y, _ = plain(x, gate, weight)
    torch.testing.assert_close(y, x * (x.square() + EPS).rsqrt() * weight, rtol=2e-6, atol=0)


def test_many_rows_stay_exact() -> None:
    kit.check_kernel(after, case((4096, 20)))


def test_no_rows_are_no_trouble() -> None:
    for op in FORMS:
        assert run(op, case((2, 0, 5)), "native", torch.float32)[0].shape == (2, 0, 5)


def test_the_default_dtype_changes_no_bit() -> None:
    for op in FORMS:
        kit.check_defaults(op, case((2, 9, 5)))


def test_a_second_derivative_is_refused() -> None:
    kit.check_second(before, case((2, 9, 5)))


def test_other_shapes_are_refused() -> None:
    x, gate, weight = (t.float() for t in case((6, 5), groups=2))
    kit.check_refusals(torch.ops.bestiary.rms_norm, (x, weight, gate, EPS, True), free={(1, 0)})  # groups may be fewer


def test_threads_and_layouts_change_no_bit() -> None:
    for op in FORMS:
        inputs = case((3, 100, 2, 140), groups=2)
        kit.check_threads(op, inputs)
        kit.check_layouts(op, inputs)


def test_a_part_of_wider_rows_is_read_where_it_lies() -> None:
    wide = torch.randn(3, 40, 100)
    for op in FORMS:
        parts = wide[..., :20], wide[..., 50:70], torch.ones(20)
        for a, b in zip(
            run(op, parts, "native", torch.float32),
            run(op, [t.contiguous() for t in parts], "native", torch.float32),
        ):
            assert torch.equal(a, b)


def test_nan_comes_out_where_it_goes_in() -> None:
    for op in FORMS:
        x, gate, weight = (t.float() for t in case((2, 40, 20)))
        x[1, 30, 3] = torch.nan
        with ops.use("native"):
            y, _ = op(x, gate, weight)
        assert y[1, 30].isnan().all() and y.isnan().sum() == 20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read(dtype: torch.dtype) -> None:
    for op in FORMS:
        x, gate, weight = (t.to(dtype) for t in case((2, 40, 20)))
        with ops.use("native"):
            y, _ = op(x, gate, weight)
        with ops.use("reference"):
            expected, _ = op(x.double(), gate.double(), weight.double())
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-4)


def test_torch_knows_it_as_an_operator() -> None:
    x, gate, weight = (t.float().requires_grad_() for t in case((6, 5), groups=2))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    for arguments in ((x, weight, gate, EPS, True), (x, None, gate, EPS, False), (x, weight, None, EPS, False)):
        torch.library.opcheck(torch.ops.bestiary.rms_norm.default, arguments, test_utils=tests)


def test_it_compiles_for_any_length() -> None:
    def operator(x, gate, weight):
        y, _ = torch.ops.bestiary.rms_norm(x, weight[None], gate, EPS, True)
        return y, y[:, :1]

    kit.check_compiled(operator, [case((rows, 20)) for rows in (9, 20, 33)])


@pytest.mark.parametrize("form", ["native", "torch", "reference"])
def test_a_weight_that_does_not_fit_is_refused_by_every_form(form: str) -> None:
    x = torch.randn(4, 6, 32)
    with ops.use(form):
        for weight in (torch.randn(3, 32), torch.randn(4, 1, 32)):
            with pytest.raises(UsageError, match=r"rms_norm: weight must be of shape .*, not"):
                ops.rms_norm(x, weight, eps=1e-5)
        assert ops.rms_norm(x, torch.randn(1, 32), eps=1e-5).shape == x.shape
        if form != "native":
            assert ops.rms_norm(x[..., :0], eps=1e-5).shape == (4, 6, 0)
        else:
            with pytest.raises(UsageError, match="no compiled form here: there are no channels"):
                ops.rms_norm(x[..., :0], eps=1e-5)
