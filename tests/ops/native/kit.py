"""What the tests of the compiled kernels share: a kernel against the definition in float64, values and gradients."""

import os
import subprocess
import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any

import pytest
import torch
from ops.forms import relative, run
from torch import Tensor

from bestiary import UsageError, ops
from bestiary.ops.native import load

LIMIT = 2e-6
"""Largest error of a kernel, as a share of the largest entry of each result."""

needed = pytest.mark.skipif(load()[0] is None, reason=f"no compiled kernels: {load()[1]}")


def check_kernel(
    op: Callable[..., Any], inputs: Sequence[Tensor], *, limit: float = LIMIT, joint: bool = False
) -> None:
    """The kernel is the float64 definition, output, state and every gradient, on inputs that fp32 holds exactly.

    With `joint`, gradients are measured by the largest entry of all of them (see check_forms).
    """
    rounded = [x.float() for x in inputs]
    exact = run(op, rounded, "reference", torch.float64)
    found = run(op, rounded, "native", torch.float32)
    if joint:
        found, exact = ([*side[:2], torch.cat([x.flatten() for x in side[2:]])] for side in (found, exact))
    assert relative(found, exact) < limit


def check_threads(op: Callable[..., Any], inputs: Sequence[Tensor]) -> None:
    """One thread and two give the same bits."""
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(run(op, [x.float() for x in inputs], "native", torch.float32))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results))


def _layouts(x: Tensor) -> dict[str, Tensor]:
    """The same numbers laid otherwise. Kernels read the first four as they lie; of the last, a copy is made first."""
    beside = torch.cat([x, torch.full_like(x, float("nan"))], dim=-1)[..., : x.shape[-1]] if x.ndim else x
    later = torch.cat([x.new_full((3,), float("nan")), x.flatten()])[3:].view(x.shape)
    swapped = {i: x.transpose(i, i + 1).contiguous().transpose(i, i + 1) if x.ndim > i + 2 else x for i in (0, 1)}
    spread = torch.stack([x, x + 1], dim=-1)[..., 0]
    return {"beside": beside, "later": later, "first two": swapped[0], "second two": swapped[1], "spread": spread}


def check_layouts(op: Callable[..., Any], inputs: Sequence[Tensor]) -> None:
    """Inputs that do not lie in one piece give the same bits as copies that do."""
    plain = [x.float().contiguous() for x in inputs]
    expected = run(op, plain, "native", torch.float32)
    for name in _layouts(plain[0]):
        laid = [_layouts(x)[name] for x in plain]
        moved = any(x.stride() != y.stride() for x, y in zip(laid, plain))
        assert moved or name == "later" or (name == "second two" and all(x.ndim < 4 for x in plain)), name
        for a, b in zip(run(op, laid, "native", torch.float32), expected):
            assert torch.equal(a, b), name


def check_defaults(op: Callable[..., Any], inputs: Sequence[Tensor]) -> None:
    """No bit depends on the dtype that torch gives to new tensors."""
    results = []
    before = torch.get_default_dtype()
    try:
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            torch.set_default_dtype(dtype)
            results.append(run(op, [x.float() for x in inputs], "native", torch.float32))
    finally:
        torch.set_default_dtype(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def check_refusals(
    operator: Callable[..., Any], arguments: Sequence[Any], *, free: Collection[tuple[int, int]] = ()
) -> None:
    """A tensor of another shape than the kernel would read is one clear error, whichever it is; so is another dtype.

    Args:
        operator: the one of torch, below the annotations of our functions, which tests enforce and users do not.
        free: arguments and axes whose size is their own.
    """
    for i, tensor in enumerate(arguments):
        if not isinstance(tensor, Tensor):
            continue
        for axis in range(tensor.ndim):
            wrong = tensor.narrow(axis, 0, tensor.shape[axis] - 1)
            if (i, axis) not in free:
                with pytest.raises(UsageError, match="must be of shape"):
                    operator(*arguments[:i], wrong, *arguments[i + 1 :])
        if tensor.is_floating_point():
            with pytest.raises(TypeError, match="kernels read fp32"):
                operator(*arguments[:i], tensor.double(), *arguments[i + 1 :])


def check_second(op: Callable[..., Any], inputs: Sequence[Tensor]) -> None:
    """A second derivative is a clear error, not a wrong number."""
    live = [x.float().requires_grad_() for x in inputs]
    with ops.use("native"):
        y, _ = op(*live)
    gradients = torch.autograd.grad(y.square().sum(), live, create_graph=True, allow_unused=True)
    with pytest.raises(UsageError, match="has no second derivative"):
        torch.autograd.grad(sum(g.square().sum() for g in gradients if g is not None), live)


def check_compiled(op: Callable[..., Any], cases: Sequence[Sequence[Tensor]]) -> None:
    """torch.compile takes it whole, at any shape, and changes no bit; code is generated for none of it."""
    whole = torch.compile(op, fullgraph=True, dynamic=True, backend="aot_eager")
    for inputs in cases:
        plain, compiled = (run(f, inputs, "native", torch.float32) for f in (op, whole))
        assert all(torch.equal(a, b) for a, b in zip(plain, compiled))


def in_process(code: str, **environment: str) -> str:
    """What a Python of its own prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
