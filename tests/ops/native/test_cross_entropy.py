"""The kernel of the cross-entropy: the definition in float64, nats and the gradient in place of the logits."""

import pytest
import torch
from ops.forms import normal
from ops.native import kit
from torch import Tensor

from bestiary import UsageError, ops

pytestmark = kit.needed
SHAPES = [(1, 1), (3, 2), (5, 16), (4, 63), (4, 64), (7, 65), (3, 1000), (2, 50280)]


def case(shape: tuple[int, int], size: float) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, targets, one of them none, and weights."""
    torch.manual_seed(sum(shape))
    targets = torch.randint(shape[1], (shape[0],))
    targets[shape[0] // 2] = -100 if shape[0] > 1 else 0
    return (size * normal(*shape)).float(), targets, torch.rand(shape[0])


def run(
    form: str, dtype: torch.dtype, logits: Tensor, targets: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Nats, and the gradient; nats alone must be the same, and leave the logits as they are."""
    logits, kept = logits.to(dtype, copy=True), logits.to(dtype)
    weights = None if weights is None else weights.to(dtype)
    with ops.use(form):
        alone = ops.cross_entropy(logits, targets, weights)
        assert torch.equal(logits, kept)
        nats = ops.cross_entropy(logits, targets, weights, gradient=True)
    assert torch.equal(nats, alone)
    return nats, logits


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("size", [1e-3, 1.0, 20.0])
def test_it_is_the_definition(shape: tuple[int, int], size: float) -> None:
    logits, targets, weights = case(shape, size)
    for given in (weights, None):
        exact, found = (
            run(form, dtype, logits, targets, given)
            for form, dtype in (("reference", torch.float64), ("native", torch.float32))
        )
        # a row's largest gradient may be a small difference from one: it is measured by the weights
        for a, e, least in zip(found, exact, (1e-3, 1.0)):
            assert (a.double() - e).abs().max() <= kit.LIMIT * max(e.abs().max().item(), least)


@pytest.mark.parametrize("shape", [(1, 1), (5, 16), (7, 65)], ids=str)
def test_the_torch_form_is_the_definition(shape: tuple[int, int]) -> None:
    for given in (case(shape, 3.0), (*case(shape, 3.0)[:2], None)):
        exact, found = (run(form, torch.float64, *given) for form in ("reference", "torch"))
        for a, b in zip(found, exact):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_logits_of_any_size_give_numbers() -> None:
    logits = torch.tensor([[1e38, -1e38, 0.0], [-3e38, -3e38, -3e38], [0.0, -torch.inf, 1.0]])
    with ops.use("native"):
        nats = ops.cross_entropy(logits, torch.tensor([0, 1, 0]), gradient=True)
    torch.testing.assert_close(nats, torch.tensor([0.0, 1.0986123, 1.3132617]))
    torch.testing.assert_close(logits[1], torch.tensor([1 / 3, -2 / 3, 1 / 3]))
    assert logits.isfinite().all()


def test_one_thread_or_two_give_the_same_bits() -> None:
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(run("native", torch.float32, *case((40, 3000), 3.0)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_rows_may_lie_apart() -> None:
    logits, targets, weights = case((9, 50), 3.0)
    wide = torch.cat([logits, torch.full((9, 7), torch.nan)], 1)
    with ops.use("native"):
        nats = ops.cross_entropy(wide[:, :50], targets, weights, gradient=True)
    expected, gradient = run("native", torch.float32, logits, targets, weights)
    assert torch.equal(nats, expected) and torch.equal(wide[:, :50], gradient) and wide[:, 50:].isnan().all()


def test_nan_comes_out_where_it_goes_in() -> None:
    for column in (0, 30, 64):
        logits, targets, weights = case((9, 65), 3.0)
        logits[2, column] = torch.nan
        nats, gradient = run_once(logits, targets, weights)
        assert (
            nats[2].isnan() and nats.isnan().sum() == 1 and gradient[2].isnan().all() and gradient.isnan().sum() == 65
        )


def run_once(logits: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    with ops.use("native"):
        return ops.cross_entropy(logits, targets, weights, gradient=True), logits


def test_no_rows_are_no_trouble() -> None:
    nats, gradient = run_once(torch.empty(0, 5), torch.empty(0, dtype=torch.int64), torch.empty(0))
    assert nats.shape == (0,) and gradient.shape == (0, 5)


def test_a_target_beyond_the_vocabulary_is_refused() -> None:
    logits, targets, weights = case((4, 20), 1.0)
    targets[3] = 20
    with pytest.raises(UsageError, match="must be below 20"):
        run_once(logits, targets, weights)


def test_other_shapes_and_layouts_are_refused() -> None:
    logits, targets, weights = case((4, 20), 1.0)
    operator = torch.ops.bestiary.cross_entropy
    kit.check_refusals(operator, (logits, targets, weights, True), free={(0, 1)})  # the vocabulary is the logits' own
    with pytest.raises(UsageError, match="in one piece"):
        operator(logits.t().contiguous().t(), targets, weights, True)


def test_the_default_dtype_changes_no_bit() -> None:
    given, results = case((4, 20), 1.0), []
    before = torch.get_default_dtype()
    try:
        for dtype in (torch.float32, torch.float64):
            torch.set_default_dtype(dtype)
            results.append(run("native", torch.float32, *given))
    finally:
        torch.set_default_dtype(before)
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_torch_knows_it_as_an_operator() -> None:
    logits, targets, weights = case((4, 20), 1.0)
    tests = ("test_schema", "test_faketensor")
    for arguments in ((logits, targets, weights, True), (logits, targets, None, False)):
        torch.library.opcheck(torch.ops.bestiary.cross_entropy.default, arguments, test_utils=tests)


@pytest.mark.parametrize("form", ["native", "torch", "reference"])
def test_rows_that_share_their_memory_take_no_gradient(form: str) -> None:
    targets = torch.tensor([0, 1, 2, 3])
    row, slid = torch.randn(7).expand(4, 7), torch.randn(20).as_strided((4, 7), (3, 1))
    with ops.use(form):
        for logits in (row, slid):
            before = logits.clone()
            with pytest.raises(UsageError, match="rows of logits that share memory cannot become their gradient"):
                ops.cross_entropy(logits, targets, gradient=True)
            assert torch.equal(logits, before)
            wanted = torch.nn.functional.cross_entropy(before, targets, reduction="none")
            torch.testing.assert_close(ops.cross_entropy(logits, targets), wanted)
