"""A program of the tests: compiles models by torch.compile, holds them against plain ones: compiled.py WHAT LAYOUT ...

It is a process of its own, since the runtime checks of shapes and types that tests run with cannot be traced.
"""

import functools
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from bestiary import LanguageModel, ModelConfig, ops
from bestiary.ops import dispatch
from bestiary.ops.wkv import recurrent, scanned


def small(layout: str, d_model: int = 32, time: int = 9) -> tuple[LanguageModel, Tensor]:
    return LanguageModel(ModelConfig(layout, d_model=d_model, vocab_size=50)), torch.randint(50, (2, time))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def same(model: LanguageModel, call: Callable[[], Tensor], backend: str = "aot_eager") -> None:
    """A function of a model and its gradients, compiled whole, are those of the plain one."""
    results = []
    for function in (call, torch.compile(call, fullgraph=True, backend=backend)):
        y = function()
        gradients = torch.autograd.grad(y.square().mean(), list(model.parameters()), allow_unused=True)
        results.append([y, *(g for g in gradients if g is not None)])
    for plain, compiled in zip(*results, strict=True):
        close(compiled, plain)


def loss(layout: str, backend: str = "aot_eager") -> None:
    """The loss, a target that does not count among them."""
    model, tokens = small(layout)
    targets = tokens.roll(-1, 1)
    targets[0, -1] = -1
    same(model, lambda: model.loss(tokens, targets)[0], backend)


def large(layout: str) -> None:
    """Sizes at which linear maps are products of oneDNN's."""
    model, tokens = small(layout, d_model=512, time=64)
    same(model, lambda: model(tokens)[0])


def rows(layout: str) -> None:
    """Padded rows that go on from a state; the state after them serves the plain model."""
    model, tokens = small(layout)
    lengths = torch.tensor([9, 5])
    with torch.no_grad():
        _, state = model(tokens[:, :4])
    same(model, lambda: model(tokens, state, lengths=lengths)[0])
    with torch.no_grad():
        states = [
            f(tokens, state, lengths=lengths)[1]
            for f in (model, torch.compile(model, fullgraph=True, backend="aot_eager"))
        ]
        plain, found = (model(tokens, after)[0] for after in states)
    close(found, plain)


def forms() -> None:
    """A form that is forced holds in compiled code, and ends with its context."""

    @torch.compile(fullgraph=True, backend="aot_eager")
    def which(x: Tensor) -> Tensor:
        form = dispatch.choose("wkv", time=9)
        return x + (1 if form is recurrent else 2 if form is scanned else 3)

    chosen = []
    for form in ("torch", "reference", "torch"):
        with ops.use(form):
            chosen.append(which(torch.zeros(())).item())
    assert chosen == [2, 1, 2] and which(torch.zeros(())).item() == 2


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, *layouts = sys.argv[1:]
    for layout in layouts:
        torch.manual_seed(0)
        print(what, layout, file=sys.stderr)
        {"loss": loss, "rows": rows, "large": large, "inductor": functools.partial(loss, backend="inductor")}[what](
            layout
        )
        torch._dynamo.reset()
    if what == "forms":
        forms()
    print("the same")
