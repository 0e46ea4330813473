"""What the tests of the ops share: gates from none to -50 a step, and one form of an op against another."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bestiary import ops
from bestiary.conformance.tolerances import TOLERANCE

KINDS = ("none", "weak", "strong", "mixed")
LENGTHS = (0, 1, 2, 3, 5, 17, 64, 65, 130)


def gates(kind: str, *shape: int) -> Tensor:
    """Log-decays in float64: zero, in -1 ... 0, in -50 ... 0, or weak ones (-0.01) after strong ones."""
    g = -torch.rand(shape, dtype=torch.float64)
    if kind == "mixed":
        return torch.where(torch.rand(shape) < 0.3, 50 * g, 0.01 * g)
    return g * {"none": 0, "weak": 1, "strong": 50}[kind]


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def run(op: Callable[..., Any], inputs: Sequence[Tensor], form: str, dtype: torch.dtype) -> list[Tensor]:
    """Output, final state, and the gradients of a random function of both with respect to every input."""
    live = [x.detach().to(dtype).requires_grad_() for x in inputs]
    with ops.use(form):
        y, state = op(*live)
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(dtype) for x in (y, state)]
    loss = sum((x * w).sum() for x, w in zip((y, state), weights))
    found = torch.autograd.grad(loss, live, allow_unused=True)
    return [y, state, *(torch.zeros_like(x) if g is None else g for x, g in zip(live, found))]


def relative(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference, each tensor measured by its own largest entry; infinite where anything is not finite."""
    worst = 0.0
    for a, e in zip(actual, expected):
        if not torch.isfinite(a).all():
            return float("inf")
        if e.numel():
            worst = max(worst, ((a.double() - e.double()).abs().max() / (e.double().abs().max() + 1e-300)).item())
    return worst


def check_forms(op: Callable[..., Any], inputs: Sequence[Tensor], *, joint: bool = False) -> None:
    """The fast form is the definition, in float64 and in fp32 (against the float64 definition), gradients included.

    With `joint`, fp32 gradients are measured by the largest entry of all of them: where an output is a quotient, a
    gradient may be a small difference of large parts, which rounding hits with their size.
    """
    exact = run(op, inputs, "reference", torch.float64)
    assert relative(run(op, inputs, "torch", torch.float64), exact) < TOLERANCE["float64", "op"]
    rounded = [x.float() for x in inputs]
    exact = run(op, rounded, "reference", torch.float64)
    found = run(op, rounded, "torch", torch.float32)
    assert relative(found[:2], exact[:2]) < TOLERANCE["float32", "op"]
    if joint:
        found, exact = ([torch.cat([x.flatten() for x in side[2:]])] * 3 for side in (found, exact))
    assert relative(found[2:], exact[2:]) < TOLERANCE["float32", "gradient"]
