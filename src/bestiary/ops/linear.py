"""The linear map y = x W^T + b, its large products in fp32 by the faster of the two libraries that torch has for them.

torch multiplies fp32 matrices by MKL. oneDNN, which it has for other dtypes, is faster on AMD's processors with AVX-512
at x W^T and at x's gradient dy W, but not at W's, dy^T x. The operator of torch that calls it belongs to what its
compiler makes: it may change, and so is tried once before it is used.
"""

import functools
import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import flop_counter

from bestiary.ops import dispatch
from bestiary.ops.native import library

ROWS = 48
"""Rows below which oneDNN is not always faster: steps of decoding are left alone."""
PRODUCTS = 1 << 26
"""Multiplications below which the time that a call of our operator takes beside them is more than what it gains."""

torch.library.define("bestiary::linear", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


def linear(
    x: Float[Tensor, "*batch inputs"],
    weight: Float[Tensor, "outputs inputs"],
    bias: Float[Tensor, " outputs"] | None = None,
) -> Float[Tensor, "*batch outputs"]:
    """x W^T + b, as torch.nn.functional.linear has it in all other respects: dtypes, autocast, derivatives."""
    large = x.numel() * weight.shape[0] >= PRODUCTS and x.numel() >= ROWS * x.shape[-1]
    if large and _plain(x, weight, bias) and dispatch.forced_form() in (None, "native") and _usable():
        return torch.ops.bestiary.linear(x, weight, bias)
    return F.linear(x, weight, bias)


@functools.cache
def onednn() -> tuple[Any, str]:
    """oneDNN's product (x, weight, bias), None where MKL's is as good or it cannot be had; and why."""
    if library.selected() in ("off", "0", "avx2"):
        return None, f"{library.VARIABLE}={library.selected()}"
    try:
        processor = str(torch.cpu.get_capabilities()["cpu_name"])
    except (AttributeError, KeyError):
        return None, "this version of torch does not tell the processor's name"
    if "AMD" not in processor or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return None, "oneDNN is known to be faster than MKL on AMD's processors with AVX-512 alone"
    try:
        operator = torch.ops.mkldnn._linear_pointwise.default
        generator = torch.Generator().manual_seed(0)
        x, weight = (torch.randn(n, 64, generator=generator, dtype=torch.float32, device="cpu") for n in (80, 48))
        right = all(
            torch.allclose(operator(a, b, None, "none", [], ""), a @ b.T, rtol=1e-4, atol=1e-4)
            for a, b in ((x, weight), (x[:, :48], weight.T[:48]), (x[:, :48], weight.T.contiguous()[:48]))
        )
    except (AttributeError, RuntimeError) as error:
        return None, f"this version of torch has not the operator of oneDNN that is known: {error}"
    if not right:
        return None, "oneDNN's operator does not compute a product in this version of torch"
    return lambda x, weight, bias: operator(x, weight, bias, "none", [], ""), (
        f"large products in fp32 by oneDNN, here faster than MKL ({processor}); else plain PyTorch"
    )


dispatch.has_kernel("linear", "onednn", onednn)
for name in ("reference", "torch"):
    dispatch.form("linear", name)(F.linear)


@torch.compiler.assume_constant_result
def _usable() -> bool:
    return onednn()[0] is not None


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether all are tensors of fp32 on the CPU, with nothing around them that our operator does not know."""
    return (
        all(
            type(t) in (Tensor, nn.Parameter) and t.dtype == torch.float32 and t.device.type == "cpu"
            for t in ((x, weight) if bias is None else (x, weight, bias))
        )
        and weight.ndim == 2
        and x.shape[-1] == weight.shape[1]
        and not torch.is_autocast_enabled("cpu")
        and dispatch.transformed() is None
    )


def _rows(x: Tensor) -> Tensor:
    return torch.atleast_2d(x).flatten(0, -2)


@torch.library.impl("bestiary::linear", "CPU")
def _multiply(x, weight, bias):
    product, _ = onednn()
    if product is None or x.numel() == 0 or weight.numel() == 0:
        return F.linear(x, weight, bias)
    return product(x, weight, None if bias is None else bias.contiguous())  # it reads no strides of a bias


@torch.library.register_fake("bestiary::linear")
def _(x, weight, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    (x, weight), (for_x, for_weight, for_bias) = ctx.saved_tensors, ctx.needs_input_grad
    rows = _rows(dy)
    dx = torch.ops.bestiary.linear(dy, weight.T, None) if for_x else None
    return dx, rows.T @ _rows(x) if for_weight else None, rows.sum(0) if for_bias else None


torch.library.register_autograd("bestiary::linear", _differentiate, setup_context=_setup)


@flop_counter.register_flop_formula(torch.ops.bestiary.linear)
def _flops(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * weight[0]
