"""The linear map: torch's own in every respect, also by the operator that calls oneDNN, which large products take."""

import sys
from types import SimpleNamespace

import pytest
import torch
from ops.native import kit
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from bestiary import ops
from bestiary.mixers.parts import Linear
from bestiary.models.loss import linear_cross_entropy

MODULE = sys.modules["bestiary.ops.linear"]
OPERATOR = torch.ops.bestiary.linear.default
LARGE = (64, 1024, 1024)
"""Rows, inputs, outputs of a product that oneDNN is used for."""
needed = pytest.mark.skipif(MODULE.onednn()[0] is None, reason=MODULE.onednn()[1])


class Seen(TorchDispatchMode):
    """Within it, how often our operator runs is counted."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is OPERATOR
        return func(*args, **(kwargs or {}))


def case(rows: int, inputs: int, outputs: int) -> list[Tensor]:
    """x, weight, bias."""
    return [torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(outputs)]


def spread(tensor: Tensor) -> Tensor:
    """The same numbers, none beside its neighbour."""
    return torch.stack([tensor, tensor + 1], dim=-1)[..., 0]


def turned(tensor: Tensor) -> Tensor:
    """The same numbers, column after column."""
    return tensor.mT.contiguous().mT


def check(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """Value and gradients are off the float64 ones by at most what sums of so many rounded products may be."""
    live = [t.detach().requires_grad_() for t in (x, weight, bias) if t is not None]
    y = OPERATOR(*live, *[None] * (3 - len(live)))
    dy = torch.randn_like(y)
    found = [y, *torch.autograd.grad(y, live, dy)]
    wide, flat = [t.detach().double() for t in live], torch.atleast_2d(dy.double()).flatten(0, -2)
    rows = torch.atleast_2d(wide[0]).flatten(0, -2)

    def products(x: Tensor, w: Tensor, dy: Tensor, b: Tensor | None) -> list[Tensor]:
        return [x @ w.T + (0 if b is None else b), dy @ w, dy.T @ x, *([] if b is None else [dy.sum(0)])]

    b = wide[2] if bias is not None else None
    exact = products(rows, wide[1], flat, b)
    sizes = products(rows.abs(), wide[1].abs(), flat.abs(), None if b is None else b.abs())
    terms = [rows.shape[1] + 1, len(wide[1]), len(rows), len(rows)]
    assert found[0].shape == (*x.shape[:-1], len(weight)) and found[1].shape == x.shape
    for a, b, size, many in zip(found, exact, sizes, terms):
        assert a.dtype == torch.float32
        assert ((a.double().reshape(b.shape) - b).abs() <= (many + 1) * 2**-24 * size).all()


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1), (1, 5, 3), (3, 1, 7), (7, 3, 1), (2, 64, 80), (33, 17, 65), (100, 300, 48), (200, 48, 300), LARGE],
    ids=str,
)
def test_it_is_the_product(shape: tuple[int, int, int], biased: bool) -> None:
    x, weight, bias = case(*shape)
    check(x, weight, bias if biased else None)


@pytest.mark.parametrize(
    "layout", [spread, turned, lambda t: F.pad(t, (0, 3))[..., :-3]], ids=["spread", "turned", "cut"]
)
def test_memory_may_lie_as_it_likes(layout) -> None:
    x, weight, bias = case(70, 40, 90)
    check(layout(x), weight, bias)
    check(x, layout(weight), bias)
    check(layout(x), layout(weight), spread(bias))


def test_any_number_of_axes_and_repeated_numbers() -> None:
    _, weight, bias = case(1, 6, 9)
    check(torch.randn(6), weight, bias)
    check(torch.randn(2, 3, 5, 6), weight, bias)
    check(torch.randn(5, 2, 6).transpose(0, 1), weight)
    check(torch.randn(1, 1).expand(4, 6), weight, torch.randn(1).expand(9))


@pytest.mark.parametrize("shape", [(0, 6, 9), (4, 0, 9), (4, 6, 0)], ids=str)
def test_nothing_is_no_trouble(shape: tuple[int, int, int]) -> None:
    check(*case(*shape))


def test_only_asked_gradients_are_formed() -> None:
    for wanted in range(3):
        inputs = [t.requires_grad_(i == wanted) for i, t in enumerate(case(*LARGE))]
        found, expected = (
            torch.autograd.grad(f(*inputs).square().sum(), inputs[wanted])[0] for f in (OPERATOR, F.linear)
        )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_second_derivatives_are_torchs_own() -> None:
    def second(f, dtype: torch.dtype) -> tuple[Tensor, ...]:
        inputs = [t.to(dtype).requires_grad_() for t in numbers]
        first = torch.autograd.grad(f(*inputs).tanh().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), inputs)

    numbers = [0.1 * t for t in case(9, 20, 30)]
    for a, b in zip(second(OPERATOR, torch.float32), second(F.linear, torch.float64)):
        assert (a - b).abs().max() < 1e-6 * b.abs().max()


def test_nan_stays_in_its_row() -> None:
    x, weight, _ = case(70, 40, 90)
    x[30, 3] = torch.nan
    y = OPERATOR(x, weight, None)
    assert y[30].isnan().all() and y.isnan().sum() == 90


@needed
def test_large_products_take_it() -> None:
    x, weight, bias = case(*LARGE)
    with Seen() as seen:
        y = ops.linear(x[None], weight, bias)
        torch.testing.assert_close(y[0], F.linear(x, weight, bias), rtol=1e-4, atol=1e-4)
        ops.linear(x.expand(2, *x.shape), weight)
        with ops.use("native"):
            ops.linear(x, nn.Parameter(weight))
    assert seen.count == 3


def test_all_else_is_left_to_torch() -> None:
    x, weight, bias = case(*LARGE)

    def autocast(*given: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return ops.linear(*given)

    def forced(*given: Tensor) -> Tensor:
        with ops.use("torch"):
            return ops.linear(*given)

    def half(f):
        return lambda *given: f(*(t.bfloat16() for t in given))

    with Seen() as seen:
        assert torch.equal(ops.linear(x[:40], weight, bias), F.linear(x[:40], weight, bias))
        assert torch.equal(ops.linear(x[:, :512], weight[:, :512]), F.linear(x[:, :512], weight[:, :512]))
        assert torch.equal(forced(x, weight, bias), F.linear(x, weight, bias))
        assert torch.equal(half(ops.linear)(x, weight, bias), half(F.linear)(x, weight, bias))
        assert torch.equal(autocast(x, weight, bias), half(F.linear)(x, weight, bias))
        assert ops.linear(x.double(), weight.double()).dtype == torch.float64
        assert ops.linear(x.to("meta"), weight.to("meta")).shape == (64, 1024)
        vmapped = torch.vmap(ops.linear, (0, None))(x.expand(2, *x.shape), weight)
        slope = torch.func.grad(lambda w: ops.linear(x, w).sum())(weight)
        _, moved = torch.func.jvp(lambda x: ops.linear(x, weight), (x,), (x,))
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(ops.linear(forward_ad.make_dual(x, x), weight)).tangent
    assert seen.count == 0
    y = F.linear(x, weight)
    for found, expected in ((vmapped[1], y), (slope, x.sum(0).expand(1024, -1)), (moved, y), (dual, y)):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_torchs_own_error() -> None:
    x, weight, _ = case(*LARGE)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        getattr(ops.linear, "__wrapped__", ops.linear)(x, weight[:, :-1])  # below the annotations, which tests enforce


def test_torch_knows_it_as_an_operator() -> None:
    x, weight, bias = (t.requires_grad_() for t in case(6, 5, 7))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for arguments in ((x, weight, bias), (x[None], weight, None), (x, weight.detach(), None)):
        torch.library.opcheck(OPERATOR, arguments, test_utils=tests)


@needed
def test_compiled_code_takes_it_at_any_length() -> None:
    whole = torch.compile(MODULE.linear.__wrapped__, fullgraph=True, dynamic=True, backend="aot_eager")
    _, weight, bias = (t.requires_grad_() for t in case(*LARGE))
    for rows in (64, 100, 3):
        x = torch.randn(rows, 1024, requires_grad=True)
        plain, compiled = (
            torch.autograd.grad(f(x, weight, bias).square().sum(), (x, weight, bias)) for f in (ops.linear, whole)
        )
        assert all(torch.equal(a, b) for a, b in zip(plain, compiled))


def test_its_products_are_counted() -> None:
    x, weight, _ = (t.requires_grad_() for t in case(64, 20, 30))
    with FlopCounterMode(display=False) as counter:
        OPERATOR(x, weight, None).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 64 * 20 * 30


def test_the_module_is_torchs_own() -> None:
    torch.manual_seed(1)
    ours = Linear(1024, 1024)
    torch.manual_seed(1)
    theirs = nn.Linear(1024, 1024)
    assert isinstance(ours, nn.Linear) and repr(ours) == repr(theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values()))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert Linear(8, 4, device="meta")(torch.empty(2, 8, device="meta")).shape == (2, 4)


def test_the_module_takes_other_weights_and_computes_twice_for_memory() -> None:
    module, x = Linear(1024, 1024, bias=False), torch.randn(64, 1024, requires_grad=True)
    other = torch.randn(1024, 1024, requires_grad=True)

    def called(x: Tensor) -> Tensor:
        return torch.func.functional_call(module, {"weight": other}, (x,))

    plain = torch.autograd.grad(F.linear(x, other).square().sum(), (x, other))
    for y in (called(x), checkpoint(called, x, use_reentrant=False)):
        for a, b in zip(torch.autograd.grad(y.square().sum(), (x, other)), plain):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


@needed
def test_a_head_takes_it() -> None:
    hidden, head, targets = 0.1 * torch.randn(100, 64), torch.randn(20000, 64), torch.randint(20000, (100,))
    results = []
    for dtype in (torch.float32, torch.float64):
        live = [t.to(dtype).requires_grad_() for t in (hidden, head)]
        with Seen() as seen:
            loss = linear_cross_entropy(*live, targets)
        assert seen.count == (dtype == torch.float32)
        results.append([loss, *torch.autograd.grad(loss, live)])
    for a, b in zip(*results):
        assert (a - b).abs().max() < 2e-6 * b.abs().max()


def test_it_says_why_it_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def why(*change: object) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(*change)
            found, reason = MODULE.onednn.__wrapped__()
        assert found is None
        return reason

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": "AMD EPYC"}, raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.delenv("BESTIARY_KERNELS", raising=False)
    assert "AMD" in why(torch.cpu, "get_capabilities", lambda: {"cpu_name": "Intel Xeon"})
    assert "AVX-512" in why(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert "does not tell" in why(torch.cpu, "get_capabilities", dict)
    assert "has not the operator" in why(torch.ops.mkldnn, "_linear_pointwise", None)
    wrong = SimpleNamespace(default=lambda x, w, *_: x @ w.T + 1)
    assert "does not compute" in why(torch.ops.mkldnn, "_linear_pointwise", wrong)
    monkeypatch.setenv("BESTIARY_KERNELS", "off")
    assert MODULE.onednn.__wrapped__() == (None, "BESTIARY_KERNELS=off")


def test_doctor_names_it() -> None:
    found = ops.active()["linear"]
    assert found["form"] == ("torch" if MODULE.onednn()[0] is None else "onednn")
    code = "import bestiary; print(bestiary.ops.active()['linear']['form'])"
    assert kit.in_process(code, BESTIARY_KERNELS="off") == "torch"
