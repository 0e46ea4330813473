"""Other libraries' functions get what they want and give what we want, and run only where they were found right.

The libraries are stand-ins here (fakes.py): layout, scale, form of decay and state are proved, not their kernels.
"""

import importlib
import json
import subprocess
import sys

import pytest
import torch
from ops.backends import fakes
from ops.backends.fakes import libraries  # noqa: F401  (a fixture)
from ops.forms import relative

from bestiary import UsageError, mixers, ops
from bestiary.cli.doctor import main as doctor
from bestiary.ops import backends, dispatch
from bestiary.ops.backends import check, record
from bestiary.ops.wkv import WKVState

CPU = torch.device("cpu")
ALL = [(op, backend) for op, able in backends.TABLE.items() for backend in able]
named = pytest.mark.parametrize(("op", "backend"), ALL, ids=[backend.function.split(".")[-1] for _, backend in ALL])


def arguments(op: str, backend: backends.Backend, time: int, kind: str) -> list:
    """What the forms of an op get, in float64, for one case of the check."""
    seen = {}
    call, inputs = check.CASES[op](
        check._Draw(torch.Generator().manual_seed(1), time, kind), backend.function.split(".")[-1]
    )
    reference = dispatch._forms[op]["reference"]

    def spy(*given):
        seen["given"] = given
        return reference(*given)

    dispatch._forms[op]["reference"] = spy
    try:
        with ops.use("reference"):
            call(**inputs)
    finally:
        dispatch._forms[op]["reference"] = reference
    return list(seen["given"])


def flat(value) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else [x for part in value for x in flat(part)]


def results(function, given: list) -> list[torch.Tensor]:
    """Outputs, and gradients of a random function of them, of a form of an op."""
    live = [x.detach().requires_grad_() if isinstance(x, torch.Tensor) else x for x in given]
    live = [WKVState(*(y.detach().requires_grad_() for y in x)) if isinstance(x, WKVState) else x for x in live]
    outputs = function(*live)
    if isinstance(outputs, tuple) and isinstance(outputs[1], WKVState):  # its reference exponent is free to choose
        state = outputs[1]
        outputs = (outputs[0], state.num / state.den, state.den.log() + state.max)
    outputs, generator = flat(outputs), torch.Generator().manual_seed(3)
    loss = sum((x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum() for x in outputs)
    inputs = [x for x in flat([x for x in live if x is not None])]
    gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [*outputs, *(torch.zeros_like(x) if g is None else g for x, g in zip(inputs, gradients))]


@named
@pytest.mark.parametrize("kind", check.GATES)
@pytest.mark.parametrize("time", [1, 3, 64])
def test_arguments_are_mapped_to_the_same_function(op, backend, time, kind, libraries) -> None:  # noqa: F811
    """In float64 to the last digits: outputs, final states, gradients of every argument, from a state beside zero."""
    given = arguments(op, backend, time, kind)
    found = results(lambda *x: backend(torch.float64, *x), given)
    assert relative(found, results(dispatch._forms[op]["reference"], given)) < 1e-10
    assert set(fakes.CALLS) == {backend.function.split(".")[-1]}


@pytest.mark.parametrize("shape", [(), (4,), (2, 5, 4)], ids=["no gate", "a gate a head", "a gate a head and step"])
def test_gates_of_any_shape_reach_a_function_with_a_bonus(shape, libraries) -> None:  # noqa: F811
    q, k, v = (torch.randn(2, 5, 4, 8, dtype=torch.float64) for _ in range(3))
    g = -torch.rand(shape, dtype=torch.float64) if shape else None
    given = [q, k, v, g, torch.randn(4, 8, dtype=torch.float64), torch.randn(2, 4, 8, 8, dtype=torch.float64)]
    backend = backends.TABLE["linear_attention"][2]
    found = results(lambda *x: backend(torch.float64, *x), given)
    assert relative(found, results(dispatch._forms["linear_attention"]["reference"], given)) < 1e-10


@named
def test_the_check_finds_right_functions_right(op, backend, libraries) -> None:  # noqa: F811
    for dtype in (torch.float32, torch.bfloat16):
        finding = check.check(op, backend, CPU, dtype)
        refused = backend.function.endswith("chunk_dplr_delta_rule") and dtype == torch.float32
        assert finding.verdict == ("refused" if refused else "ok"), finding
