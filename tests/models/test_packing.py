"""A packed model computes what the model does, within the rounding of its weights; matrices come back as packed."""

import types
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ops.native.kit import in_process, needed
from torch import Tensor, nn

import bestiary
from bestiary import LanguageModel, ModelConfig, UsageError
from bestiary.models import packing
from bestiary.ops.native.matvec import FORMATS, PackedMatrix, rounds_inputs

pytestmark = needed
CAUSAL = [name for name in bestiary.mixers.names() if bestiary.mixers.get(name).causal]
ROUNDING = {"fp32": 0.0, "bf16": 2**-8, "int8": 1 / 254, "int4": 1 / 8}
"""Largest error of a weight: of bf16 as a share of itself, of the others of the largest in its group or row.

In int4 the largest becomes -8 steps; what lies opposite to it ends at 7, an eighth earlier."""


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (3, 5), (16, 32), (50, 70), (33, 1001)])
def test_products_are_those_of_the_rounded_matrix_for_few_rows_and_many(form: str, outputs: int, inputs: int) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(outputs, inputs), torch.randn(outputs)
    matrix = PackedMatrix(weight, form, bias)
    rounded = matrix.rows(0, outputs)
    for rows in (0, 1, 2, 3, 4, 7, 8, 13, 16, 17, 32, 70):
        x = torch.randn(rows, inputs)
        y = matrix.multiply(x)
        given = x.bfloat16() if form == "bf16" and rows >= 16 and rounds_inputs() else x
        expected = given.double() @ rounded.double().T + bias.double()
        if rows:
            assert (y - expected).abs().max() <= 2**-22 * inputs**0.5 * max(1.0, expected.abs().max().item())
    assert torch.equal(matrix.rows(outputs - 1, 1), rounded[-1:])


@pytest.mark.parametrize("form", FORMATS)
def test_weights_are_rounded_to_the_nearest(form: str) -> None:
    torch.manual_seed(1)
    weight = torch.randn(40, 96) * torch.logspace(-3, 3, 40)[:, None]
    rounded = PackedMatrix(weight, form).rows(0, 40)
    off = (rounded - weight).abs()
    if form == "int4":
        largest = weight.unflatten(1, (-1, 32)).abs().amax(-1, keepdim=True).expand(-1, -1, 32).flatten(1)
    else:
        largest = weight.abs() if form == "bf16" else weight.abs().amax(1, keepdim=True)
    assert (off <= ROUNDING[form] * 1.01 * largest + 1e-30).all()
    assert torch.equal(PackedMatrix(torch.zeros(3, 7), form).rows(0, 3), torch.zeros(3, 7))


def test_rows_that_are_not_there_are_refused() -> None:
    matrix = PackedMatrix(torch.randn(5, 4), "fp32")
    with pytest.raises(UsageError, match=r"rows 4\.\.6 are not among the 5"):
        matrix.rows(4, 2)
    with pytest.raises(UsageError, match="unknown format of packed weights 'int3'"):
        PackedMatrix(torch.randn(5, 4), "int3")


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_no_number_makes_its_output_none_and_no_other(form: str, bad: float) -> None:
    weight = torch.randn(20, 70)
    weight[3, 5] = weight[18, 69] = bad
    matrix, other = PackedMatrix(weight, form), torch.arange(20) != 3
    other[18] = False
    for rows in (1, 3, 8, 20):
        y = matrix.multiply(torch.randn(rows, 70))
        assert not y[:, ~other].isfinite().any() and y[:, other].isfinite().all()
        assert bad == bad or y[:, ~other].isnan().all()
    kept = matrix.rows(0, 20)
    assert kept[other].isfinite().all() and not kept[3, 5].isfinite() and not kept[18, 69].isfinite()


@pytest.mark.parametrize("form", FORMATS)
def test_any_rows_come_in_one_call_in_their_order(form: str) -> None:
    matrix = PackedMatrix(torch.randn(50, 37), form)
    which = torch.randint(50, (3, 100))
    assert torch.equal(matrix.gather(which), matrix.rows(0, 50)[which])
    for strided in (which.t().int(), which.t(), which[:, 3], which[0, ::2]):
        assert torch.equal(matrix.gather(strided), matrix.rows(0, 50)[strided])
    assert matrix.gather(which[:0]).shape == (0, 100, 37)
    for wrong in (-1, 50):
        with pytest.raises(UsageError, match=f"row {wrong} is not among the 50 of this matrix"):
            matrix.gather(torch.tensor([3, wrong]))


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
def test_nothing_gives_nothing_as_in_the_model_itself(shape: tuple[int, int]) -> None:
    model = LanguageModel(ModelConfig("gla attention", 32, vocab_size=40)).eval()
    fast, tokens = model.packed("int8"), torch.zeros(shape, dtype=torch.long)
    with torch.no_grad():
        (found, state), (expected, wanted) = fast(tokens), model(tokens)
        assert found.shape == expected.shape
        if shape[1]:
            assert fast.step(tokens[:, 0], state)[0].shape == model.step(tokens[:, 0], wanted)[0].shape


def test_tokens_that_are_no_integers_are_refused_without_run_time_annotations_too() -> None:
    code = (
        "import torch; from bestiary import *\n"
        "fast = LanguageModel(ModelConfig('gla', 32)).eval().packed('int8')\n"
        "for dtype in (torch.bool, torch.float32):\n"
        "    try: fast(torch.ones(1, 3, dtype=dtype))\n"
        "    except UsageError as error: print(error)"
    )
    expected = [f"rows are named by whole numbers, not by torch.{dtype}" for dtype in ("bool", "float32")]
    assert in_process(code).splitlines() == expected


@pytest.mark.parametrize("name", CAUSAL)
def test_every_mixer_computes_the_same_packed(name: str) -> None:
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(f"{name}*2", 32, vocab_size=40)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    tokens = torch.randint(40, (2, 40))
    fast = model.packed("fp32")
    with torch.no_grad():
        expected, after = model(tokens)
        found, state = fast(tokens)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5 * expected.abs().max().item())
        step, _ = fast.step(tokens[:, 0], state)
        wanted, _ = model.step(tokens[:, 0], after)
    torch.testing.assert_close(step, wanted, rtol=1e-4, atol=2e-5 * expected.abs().max().item())


@pytest.mark.parametrize("name", CAUSAL)
def test_a_packed_model_shares_nothing_with_the_one_it_was_made_of(name: str) -> None:
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(f"{name}*2", 32, vocab_size=40)).eval()
    model.blocks[0].register_buffer("extra", torch.ones(3))
    tokens, calls = torch.randint(40, (2, 40)), []
    fast = model.packed("fp32")
    with torch.no_grad():
        expected, state = fast(tokens)
        step = fast.step(tokens[:, 0], state)[0]
        for module in model.modules():
            module.register_forward_hook(lambda *_: calls.append(1))
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
        assert torch.equal(fast(tokens)[0], expected)
        assert torch.equal(fast.step(tokens[:, 0], state)[0], step)
    assert not calls
    assert torch.equal(fast.blocks[0].extra, torch.ones(3))


def test_what_is_shared_within_a_model_is_shared_within_the_packed_one() -> None:
    model = LanguageModel(ModelConfig("gla attention", 32, vocab_size=40))
    model.blocks[1].norm.weight = model.blocks[0].norm.weight
    extra = torch.ones(3)
    for block in model.blocks:
        block.register_buffer("extra", extra)
    fast = model.packed("fp32")
    assert fast.blocks[0].norm.weight is fast.blocks[1].norm.weight
    assert fast.blocks[0].extra is fast.blocks[1].extra


@pytest.mark.parametrize("tied", [True, False])
def test_rounded_models_are_the_models_of_the_rounded_weights(tied: bool) -> None:
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig("mamba gla attention", 64, vocab_size=50, tie_embeddings=tied)).eval()
    tokens = torch.randint(50, (1, 12))  # of 16 on, bf16 products may round their inputs as well
    for form in FORMATS:
        fast = model.packed(form)
        rounded = LanguageModel(model.config).eval()
        rounded.load_state_dict(model.state_dict())
        modules = {name.replace(".block.", "."): module for name, module in fast.named_modules()}
        with torch.no_grad():
            for name, module in rounded.named_modules():
                if isinstance(modules[name], (packing.PackedLinear, packing.PackedEmbedding)):
                    module.weight.copy_(modules[name].matrix.rows(0, module.weight.shape[0]))
            torch.testing.assert_close(fast(tokens)[0], rounded(tokens)[0], rtol=1e-4, atol=1e-5)
        assert fast.generate([[1, 2, 3]], max_new_tokens=5) == rounded.generate([[1, 2, 3]], max_new_tokens=5)
    sizes = [packing.nbytes(model.packed(form)) for form in FORMATS]
    assert sizes == sorted(sizes, reverse=True) and sizes[3] < 0.5 * sizes[0]


class _Adapted(nn.Linear):
    """A linear map of its own forward pass, as adapters make them."""

    def __init__(self, base: nn.Linear):
        super().__init__(base.in_features, base.out_features, base.bias is not None)
        self.weight, self.bias = base.weight, base.bias
        self.up = nn.Parameter(torch.randn(base.out_features, 3))
        self.down = nn.Parameter(torch.randn(3, base.in_features))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.down.T @ self.up.T


class _Beside(nn.Module):
    """A linear map with another beside it: the map itself can be packed."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base, self.other = base, nn.Linear(base.in_features, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.other(x)


class _Doubled(nn.Embedding):
    def forward(self, tokens: Tensor) -> Tensor:
        return 2 * super().forward(tokens)


def _hooked(linear: nn.Linear) -> nn.Linear:
    linear.register_forward_hook(lambda module, given, y: 2 * y)
    return linear


def _hooked_before(linear: nn.Linear) -> nn.Linear:
    linear.register_forward_pre_hook(lambda module, given: (given[0] + 1,))
    return linear


def _own_forward(linear: nn.Linear) -> nn.Linear:
    linear.forward = types.MethodType(lambda self, x: 3 * nn.functional.linear(x, self.weight), linear)
    return linear


@pytest.mark.parametrize(
    "change",
    [_Adapted, _hooked, _hooked_before, _own_forward, nn.utils.parametrizations.weight_norm, nn.utils.weight_norm],
    ids=lambda change: change.__name__.strip("_"),
)
@pytest.mark.parametrize("where", ["mixer", "head", "tied"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def test_what_replaced_or_wrapped_a_linear_map_is_taken_as_it_is_and_said(
    change: Callable[[nn.Linear], nn.Linear], where: str
) -> None:
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig("attention", 32, vocab_size=40, tie_embeddings=where == "tied")).eval()
    owner, name = (model.blocks[0].mixer, "out") if where == "mixer" else (model, "head")
    setattr(owner, name, change(getattr(owner, name)))
    tokens = torch.randint(40, (2, 12))
    full = "blocks.0.mixer.out" if where == "mixer" else "head"
    with pytest.warns(UserWarning, match=f"{full} is not packed"):
        fast = model.packed("fp32")
    with torch.no_grad():
        expected, after = model(tokens)
        torch.testing.assert_close(fast(tokens)[0], expected, rtol=1e-4, atol=2e-5 * expected.abs().max().item())
        found, wanted = (net.step(tokens[:, 0], after)[0] for net in (fast, model))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-5 * expected.abs().max().item())
        for parameter in model.parameters():
            parameter.zero_()
        torch.testing.assert_close(fast(tokens)[0], expected, rtol=1e-4, atol=2e-5 * expected.abs().max().item())


@pytest.mark.parametrize("tied", [True, False])
def test_another_embedding_is_taken_as_it_is_and_said(tied: bool) -> None:
    model = LanguageModel(ModelConfig("gla", 32, vocab_size=40, tie_embeddings=tied)).eval()
    table, model.embedding = model.embedding, _Doubled(40, 32)
    model.embedding.weight = table.weight
    tokens = torch.randint(40, (2, 12))
    with pytest.warns(UserWarning, match="embedding is not packed"):
        fast = model.packed("fp32")
    with torch.no_grad():
        expected = model(tokens)[0]
        torch.testing.assert_close(fast(tokens)[0], expected, rtol=1e-4, atol=2e-5 * expected.abs().max().item())


def test_a_linear_map_within_a_wrapper_is_packed() -> None:
    model = LanguageModel(ModelConfig("attention", 32, vocab_size=40)).eval()
    model.blocks[0].mixer.out = _Beside(model.blocks[0].mixer.out)
    tokens = torch.randint(40, (2, 12))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast = model.packed("fp32")
    assert isinstance(fast.blocks[0].mixer.out.base, packing.PackedLinear)
    with torch.no_grad():
        torch.testing.assert_close(fast(tokens)[0], model(tokens)[0], rtol=1e-4, atol=1e-5)


def test_a_packed_head_tells_the_loss_of_each_token() -> None:
    model = LanguageModel(ModelConfig("gla", 32, vocab_size=40, logit_cap=3.0)).eval()
    tokens = torch.randint(40, (1, 300))
    fast = model.packed("fp32")
    with torch.no_grad():
        for net in (model, fast):
            hidden = net.hidden(tokens[:, :-1])[0].flatten(0, 1)
            nats = net.head.nats(hidden, tokens[0, 1:])
            expected = torch.nn.functional.cross_entropy(model(tokens[:, :-1])[0][0], tokens[0, 1:], reduction="none")
            torch.testing.assert_close(nats, expected, rtol=1e-4, atol=1e-4)


def test_a_packed_model_says_that_it_is_neither_trained_nor_saved_nor_packed_again(tmp_path: Path) -> None:
    model = LanguageModel(ModelConfig("gla mamba", 32))
    fast, tokens = model.packed("int8"), torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(UsageError, match="a packed model cannot be saved"):
        bestiary.save(fast, None, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    with pytest.raises(UsageError, match="a packed model cannot be trained"):
        fast.loss(tokens, tokens)
    with pytest.raises(UsageError, match="is packed already"):
        fast.packed("int4")
    assert model.loss(tokens, tokens)[0].requires_grad  # the model itself is as it was


def test_the_default_dtype_changes_no_bit_of_a_packed_model() -> None:
    model = LanguageModel(ModelConfig("mamba attention", 32)).eval()
    tokens = torch.randint(256, (1, 40))
    expected = model.packed("int8").generate(tokens, max_new_tokens=3)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(model.packed("int8").generate(tokens, max_new_tokens=3), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_state_of_other_rows_is_refused_without_run_time_annotations_too() -> None:
    code = (
        "import torch; from bestiary import *\n"
        "fast = LanguageModel(ModelConfig('mamba*2', 32)).eval().packed('int8')\n"
        "try: fast.step(torch.zeros(3, dtype=torch.long), fast.initial_state(2))\n"
        "except UsageError as error: print(error)"
    )
    assert in_process(code) == "layer 0: a tensor of its state must be of shape (3, 3, 64), not (2, 3, 64)"


def test_without_kernels_packing_says_what_is_missing() -> None:
    code = (
        "from bestiary import *\n"
        "try: LanguageModel(ModelConfig('gla', 32)).packed()\n"
        "except UsageError as error: print(error)"
    )
    assert "packed weights need the compiled kernels" in in_process(code, BESTIARY_KERNELS="off")


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_packed_while_it_is_loaded_is_what_is_packed_afterwards(tied: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    shared = "attention{channel=moe, share=a}"
    layout = f"mamba {shared} hyena {shared}"
    model = LanguageModel(ModelConfig(layout, 64, vocab_size=50, tie_embeddings=tied)).eval()
    bestiary.save(model, None, tmp_path / "model")
    tokens = torch.randint(50, (1, 20))
    for form in ("fp32", "int8"):
        with torch.no_grad():
            expected = model.packed(form)(tokens)[0]
            assert torch.equal(bestiary.load(tmp_path / "model", weights=form)[0](tokens)[0], expected)


def test_packing_while_loading_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    """The whole model is 4 times the packed one; reading and packing stays near the latter."""
    folder = tmp_path / "model"
    bestiary.save(LanguageModel(ModelConfig("attention*8", 1024)), None, folder)
    peak = "print(packing.nbytes(model), 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    start = "import resource, bestiary; from bestiary.models import packing; model = bestiary.LanguageModel("
    _, empty = map(int, in_process(f"{start}bestiary.ModelConfig('gru', 32)); {peak}").split())
    load = f"{start}bestiary.ModelConfig('gru', 32)); model, _ = bestiary.load({str(folder)!r}, weights='int8'); {peak}"
    size, loaded = map(int, in_process(load).split())
    assert 90e6 < size < 110e6 and loaded - empty < 1.6 * size


@pytest.mark.slow
def test_stripedhyena_7b_decodes_in_six_gigabytes() -> None:
    """The full shape with random weights, in int4."""
    code = """
import resource, torch
from bestiary import LanguageModel
from bestiary.models import packing, presets
with torch.device("meta"):
    skeleton = LanguageModel(presets.get("stripedhyena-7b"))
shapes = {name: parameter.shape for name, parameter in skeleton.named_parameters()}
read = lambda name: torch.rand(shapes[name]) if ".filter." in name else torch.randn(shapes[name]) / 50
model = packing.packed(skeleton, "int4", read)
tokens = model.generate([[1, 2, 3]], max_new_tokens=3)
print(len(tokens[0]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
    count, peak = map(int, in_process(code).split())
    assert count == 6 and peak < 6e9
