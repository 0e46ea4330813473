"""The RMS norm (Zhang & Sennrich 2019, arXiv:1910.07467), with a weight and a gate.

y = w h / sqrt(mean(h^2) + eps)                h = x, or x silu(g) where the gate comes first (Mamba-2)
y = w h / sqrt(mean(h^2) + eps) silu(g)        where it comes last (GLA, the gated delta net)
"""

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from bestiary.ops import dispatch
from bestiary.ops.native import traced
from bestiary.ops.native.library import check_shapes
from bestiary.ops.native.norm import rms_norm as kernel

dispatch.has_kernel("rms_norm")
FEW = 1 << 16
"""Numbers below which a call of the kernel takes longer than torch's operators."""


def rms_norm(
    x: Float[Tensor, "*batch channels"],
    weight: Float[Tensor, "*groups channels"] | None = None,
    *,
    eps: float,
    gate: Float[Tensor, "*batch channels"] | None = None,
    gate_first: bool = False,
) -> Float[Tensor, "*batch channels"]:
    """Each row of channels with a mean square of one, weighed and gated; in x's dtype, computed in fp32 at least.

    Args:
        weight: (channels,), or (groups, channels) where the axis before the last is one of groups; None for ones.
        gate: of x's shape, before its SiLU.
        gate_first: whether the gate is applied before the norm.
    """
    if weight is not None:
        one = weight.ndim > 1 and weight.shape[:-1].numel() == 1  # a group alone is that of all
        shape = (*weight.shape[:-1], x.shape[-1]) if one else x.shape[-weight.ndim :]
        check_shapes("rms_norm", ("weight", weight, tuple(shape)))
    check_shapes("rms_norm", ("gate", gate, tuple(x.shape)))
    dtype = dispatch.wide(x.dtype, x.dtype if weight is None else weight.dtype)
    wide, scales, gates = x.to(dtype), *(t if t is None else t.to(dtype) for t in (weight, gate))
    none = None if x.shape[-1] else "there are no channels"
    if not traced.active() and dispatch.compiled("rms_norm", wide, why_not=none, worth=x.numel() >= FEW):
        scales = None if scales is None else scales.reshape(-1, x.shape[-1])
        return kernel(wide, scales, gates, eps, gate_first).to(x.dtype)
    return dispatch.choose("rms_norm", time=x.numel())(wide, scales, gates, eps, gate_first).to(x.dtype)


@dispatch.form("rms_norm", "reference")
def definition(x: Tensor, weight: Tensor | None, gate: Tensor | None, eps: float, gate_first: bool) -> Tensor:
    """The equation."""
    h = x if gate is None or not gate_first else x * F.silu(gate)
    y = h * (h.square().mean(-1, keepdim=True) + eps).rsqrt()
    y = y if weight is None else weight * y
    return y if gate is None or gate_first else y * F.silu(gate)


@dispatch.form("rms_norm", "torch")
def fused(x: Tensor, weight: Tensor | None, gate: Tensor | None, eps: float, gate_first: bool) -> Tensor:
    """By torch's norm, one kernel on GPUs."""
    h = x if gate is None or not gate_first else x * F.silu(gate)
    one = weight is not None and weight.ndim == 1
    y = F.rms_norm(h, x.shape[-1:], weight if one else None, eps)
    y = y if weight is None or one else y * weight
    return y if gate is None or gate_first else y * F.silu(gate)
