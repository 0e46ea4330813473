"""A state-space model with many inputs and outputs and one diagonal state (LRU, arXiv:2303.06349; S5, 2208.04933).

h_t = a_t h_{t-1} + b_t (B u_t),   y_t = Re(C h_t) + D u_t        a, b: a complex number a state
y = K * u,   K_l = Re(C diag(a^l b) B)                            the same as a convolution, where a and b are fixed
"""

import torch
from jaxtyping import Complex, Float, Int, Num
from torch import Tensor

from bestiary.ops import dispatch
from bestiary.ops.linear_recurrence import linear_recurrence
from bestiary.ops.ssm import powers

PIECE = 2048
"""Steps whose states are held together where no gradients are recorded."""


def mimo_ssm(
    u: Float[Tensor, "batch time inputs"],
    decay: Num[Tensor, "*fixed states"],
    B: Complex[Tensor, "states inputs"],
    C: Complex[Tensor, "outputs states"],
    D: Float[Tensor, " outputs"] | None = None,
    *,
    gain: Num[Tensor, "*fixed states"] | None = None,
    state: Float[Tensor, "batch states 2"] | None = None,
    lengths: Int[Tensor, " batch"] | None = None,
) -> tuple[Float[Tensor, "batch time outputs"], Float[Tensor, "batch states 2"]]:
    """Run a segment; returns (y, state), y in u's dtype.

    Args:
        decay: a, (states,) or (batch, time, states).
        gain: b, of the same shape as decay; None for 1.
        D: weight of the input itself; there are as many outputs as inputs then.
        state: h before this segment, real and imaginary parts, fp32 or wider; None for zeros.
        lengths: real steps of each row of a right-padded batch; padding leaves h as it is.
    """
    if state is None:
        dtype = dispatch.wide(u.dtype, B.real.dtype)
        state = torch.zeros(u.shape[0], B.shape[0], 2, dtype=dtype, device=u.device)
    to = torch.promote_types(torch.complex64, state.dtype)
    with dispatch.full_precision(u):
        wide, decay, B, C = u.to(state.dtype), decay.to(to), B.to(to), C.to(to)
        if gain is not None and gain.ndim == 1:
            B, gain = gain.to(to)[:, None] * B, None
        writes = torch.view_as_real(B).movedim(2, 1).flatten(0, 1)  # (2 states, inputs): real products throughout
        reads = torch.stack([C.real, -C.imag], dim=-1).flatten(-2)
        h, outputs = torch.view_as_complex(state.contiguous()), []
        for start in range(0, max(1, u.shape[1]), PIECE):
            part = slice(start, start + PIECE)
            write = torch.view_as_complex((wide[:, part] @ writes.mT).unflatten(-1, (-1, 2)))
            if gain is not None:
                write = gain[:, part].to(to) * write
            steps = (decay if decay.ndim == 1 else decay[:, part]).expand_as(write)
            rest = None if lengths is None else (lengths - start).clamp(0, write.shape[1])
            found, h = linear_recurrence(steps, write, state=h, lengths=rest)
            outputs.append(torch.view_as_real(found).flatten(-2) @ reads.mT)
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        return (y if D is None else y + D.to(y.dtype) * wide).to(u.dtype), torch.view_as_real(h)


def impulse_response(
    decay: Complex[Tensor, " states"],
    B: Complex[Tensor, "states inputs"],
    C: Complex[Tensor, "outputs states"],
    length: int,
    *,
    gain: Num[Tensor, " states"] | None = None,
) -> Float[Tensor, "length outputs inputs"]:
    """K_l for l < length: the kernel of the convolution that `mimo_ssm` is, D aside."""
    weights = powers(decay, length) if gain is None else powers(decay, length) * gain[:, None]
    return torch.einsum("on,nl,ni->loi", C, weights, B).real
