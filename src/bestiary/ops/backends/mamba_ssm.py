"""mamba-ssm's selective scan (arXiv:2312.00752), which starts from zero and gives its last state no gradient.

We want both, and a few more steps give them, exactly. With N numbers of state a channel, N steps before the segment
write the initial state: step i has B = e_i, a dt so small that exp(dt A) is 1, and a u so large that dt u is h_0[i]; dt
is a power of two, so that no digit is lost. N steps after it, with dt = 0 and C = e_i, read the last state as outputs.
"""

import importlib
from typing import Any

import torch
from torch import Tensor

from bestiary.ops.backends.backend import Backend, Library

MOST_STATES, MOST_STEPS = 256, 1 << 15
INSTANT = 2.0**-60
"""dt of a step that takes no time: exp(dt A) is 1 down to A = -2^35, and states up to 2^67 stay finite over it."""


def _lacks() -> str | None:
    """Since 2026 the package is built without the kernels for Mamba-1 unless asked otherwise."""
    interface = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
    if getattr(interface, "selective_scan_cuda", None) is None:
        return "mamba-ssm was built without its selective scan: install it with MAMBA_KEEP_CUDA_BUILD=TRUE"
    return None


LIBRARY = Library("mamba_ssm", "mamba-ssm", (2, 0), _lacks)


# selective_scan: (u, dt, A, B, C, state, rule); dt after softplus, 0 at padding


def _not_scan(
    dtype: torch.dtype, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, rule: Any = None
) -> str | None:
    if rule is not None:
        return "it discretises by euler alone"
    if A.shape[1] > MOST_STATES:
        return f"it takes at most {MOST_STATES} numbers of state a channel"
    if u.shape[1] > MOST_STEPS:  # its issue 1015: wrong numbers, silently, from about 61 thousand steps on
        return f"it is not asked for more than {MOST_STEPS} steps, its indices being of 32 bits"
    return None


def _scan(
    function: Any,
    dtype: torch.dtype,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    rule: Any = None,
) -> tuple[Tensor, Tensor]:
    """All in fp32 and with time last, (batch, channels, time), as it wants it."""
    batch, states = u.shape[0], A.shape[1]
    unit = torch.eye(states, dtype=B.dtype, device=B.device).expand(batch, states, states)
    nothing, still = torch.zeros_like(unit), dt.new_zeros(batch, states, dt.shape[2])
    parts = {
        "u": torch.cat([state.mT / INSTANT, u, still], dim=1),
        "delta": torch.cat([torch.full_like(still, INSTANT), dt, still], dim=1),
        "B": torch.cat([unit, B, nothing], dim=1),
        "C": torch.cat([nothing, C, unit], dim=1),
    }
    y = function(A=A.contiguous(), **{name: part.mT.contiguous() for name, part in parts.items()})
    return y[..., states:-states].mT, y[..., -states:]


BACKENDS = {
    "selective_scan": (Backend(LIBRARY, "mamba_ssm.ops.selective_scan_interface.selective_scan_fn", _not_scan, _scan),),
}
