"""Forward-mode derivatives and the transforms of torch.func do not reach into kernels: plain PyTorch runs then."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ops.native.kit import in_process, needed
from torch import Tensor
from torch.autograd import forward_ad

from bestiary import UsageError, ops

pytestmark = needed
B, T, H, K, V, C, N = 2, 9, 2, 4, 3, 5, 3


def _unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=-1)


def _cases() -> dict[str, tuple[Callable[..., Any], list[Tensor]]]:
    q, k, v, z = (torch.randn(B, T, H, n) for n in (K, K, V, K))
    x, gate = torch.randn(B, T, C), torch.randn(B, T, C)
    w = (torch.randn(C), torch.rand(C))
    return {
        "linear_attention": (ops.linear_attention, [q, k, v, -torch.rand(B, T, H)]),
        "delta_rule": (ops.delta_rule, [q, _unit(k), v, torch.rand(B, T, H), -torch.rand(B, T, H)]),
        "dplr": (ops.dplr, [q, -torch.rand(B, T, H, K), k, v, -_unit(z), 0.5 * _unit(z)]),
        "selective_scan": (
            ops.selective_scan,
            [x, torch.rand(B, T, C), -torch.rand(C, N), torch.randn(B, T, N), torch.randn(B, T, N)],
        ),
        "wkv": (lambda k, v: ops.wkv(k, v, *w), [x, gate]),
        "linear_recurrence": (ops.linear_recurrence, [torch.rand(B, T, C), x]),
        "short_convolution": (ops.short_convolution, [x, torch.randn(C, 4)]),
        "rms_norm": (lambda *parts: (ops.rms_norm(parts[0], eps=1e-5, gate=parts[1]),), list(torch.randn(2, 90, 80))),
    }


@pytest.mark.parametrize("name", _cases())
def test_derivatives_of_every_mode_are_those_of_the_definition(name: str) -> None:
    op, inputs = _cases()[name]

    def f(*parts: Tensor) -> Tensor:
        return op(*parts)[0]

    directions = [torch.randn_like(x) for x in inputs]
    with ops.use("reference"):
        _, expected = torch.func.jvp(f, (*inputs,), (*directions,))
        gradient = torch.func.grad(lambda *parts: f(*parts).square().sum())(*inputs)
    assert expected.abs().max() > 0
    torch.testing.assert_close(torch.func.jvp(f, (*inputs,), (*directions,))[1], expected)
    torch.testing.assert_close(torch.func.grad(lambda *parts: f(*parts).square().sum())(*inputs), gradient)
    with forward_ad.dual_level():
        y = f(*(forward_ad.make_dual(x, d) for x, d in zip(inputs, directions)))
        torch.testing.assert_close(forward_ad.unpack_dual(y).tangent, expected)
        with ops.use("native"), pytest.raises(UsageError, match="no compiled form here: kernels have no forward-mode"):
            f(*inputs)
    batched = torch.vmap(f)(*(torch.stack([x, x]) for x in inputs))
    torch.testing.assert_close(batched[1], f(*inputs), rtol=1e-4, atol=1e-5)
    with ops.use("native"), pytest.raises(UsageError, match=r"transforms of torch\.func do not reach into kernels"):
        torch.vmap(f)(*(torch.stack([x, x]) for x in inputs))


def test_compiled_code_asks_anew() -> None:
    """The kernel runs outside a transform, plain PyTorch within, from the same compiled function."""
    code = """
import torch
from torch.autograd import forward_ad
from bestiary import ops
x, t = torch.randn(90, 80), torch.randn(90, 80)
norm = lambda x: ops.rms_norm(x, eps=1e-5)
plain, made = norm(x), torch.compile(norm, fullgraph=True, backend="aot_eager")
with ops.use("torch"):
    expected, slope = torch.func.jvp(norm, (x,), (t,))[1], torch.func.grad(lambda x: norm(x).square().sum())(x)
for _ in range(2):
    assert torch.equal(made(x), plain)
    with forward_ad.dual_level():
        torch.testing.assert_close(forward_ad.unpack_dual(made(forward_ad.make_dual(x, t))).tangent, expected)
inside = torch.compile(lambda x, t: torch.func.jvp(norm, (x,), (t,))[1], fullgraph=True, backend="aot_eager")
torch.testing.assert_close(inside(x, t), expected)
inside = torch.compile(torch.func.grad(lambda x: norm(x).square().sum()), fullgraph=True, backend="aot_eager")
torch.testing.assert_close(inside(x), slope)
print("done")
"""
    assert in_process(code).endswith("done")
