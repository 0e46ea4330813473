"""The selective scan of Mamba (Gu & Dao 2023, arXiv:2312.00752): a diagonal SSM with input-dependent parts.

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t            per channel, h_t in R^N; A < 0   (Mamba's rule, "euler")
    h_t = A_bar h_{t-1} + B_bar u_t                     A_bar, B_bar from dt_t, A and B_t by another rule of ssm.py
    y_t = C_t . h_t + D u_t
    y_t = y_t * silu(z_t)                               where a gate z is given

dt passes through softplus(dt + dt_bias) first where asked. A (batch, time, channels, N) tensor is never held: the fast
form keeps the state at the start of each chunk and computes the rest anew in the backward pass.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from bestiary.errors import unknown
from bestiary.ops import dispatch, ssm
from bestiary.ops.native.selective_scan import selective_scan as kernel

dispatch.has_kernel("selective_scan")
Rule = Callable[[Tensor], tuple[Tensor, Tensor]]
CHUNK_BYTES = 1 << 20
"""Size of a chunk's states: what the second-level cache of a core holds."""


def selective_scan(
    u: Float[Tensor, "batch time channels"],
    dt: Float[Tensor, "batch time channels"],
    A: Float[Tensor, "channels d_state"],
    B: Float[Tensor, "batch time d_state"],
    C: Float[Tensor, "batch time d_state"],
    D: Float[Tensor, " channels"] | None = None,
    *,
    z: Float[Tensor, "batch time channels"] | None = None,
    dt_bias: Float[Tensor, " channels"] | None = None,
    dt_softplus: bool = False,
    discretisation: str = "euler",
    intervals: Float[Tensor, "batch time"] | None = None,
    state: Float[Tensor, "batch channels d_state"] | None = None,
    lengths: Int[Tensor, " batch"] | None = None,
) -> tuple[Float[Tensor, "batch time channels"], Float[Tensor, "batch channels d_state"]]:
    """Scan a segment; returns (y, state), y in u's dtype and the state in its own, fp32 or wider.

    Args:
        A: negative.
        D: weight of the input itself in the output; None for none.
        z: a gate; y is multiplied by silu(z).
        dt_bias: added to dt before softplus or use.
        dt_softplus: pass dt through softplus.
        discretisation: "euler" (A_bar = exp(dt A), B_bar = dt B, as Mamba has it), "zoh" or "bilinear".
        intervals: factor of the step sizes, the time that passes before each step; None where all are 1.
        state: h before this segment; None for zeros.
        lengths: real steps of each row of a right-padded batch; padding takes no time, and y there means nothing.
    """
    if discretisation not in ("euler", *ssm.RULES):
        raise unknown("discretisation", discretisation, ("euler", *ssm.RULES))
    if state is None:
        shape = (*u.shape[::2], A.shape[1])
        state = torch.zeros(shape, dtype=dispatch.wide(u.dtype, A.dtype), device=u.device)
    dtype = state.dtype
    why_not = None
    if discretisation != "euler":
        why_not = f"the kernel discretises by euler, not by {discretisation}"
    elif intervals is not None and intervals.requires_grad:
        why_not = "the kernel has no gradient for intervals"
    if dispatch.compiled("selective_scan", state, why_not=why_not):
        D, dt_bias, z, intervals = (None if x is None else x.to(dtype) for x in (D, dt_bias, z, intervals))
        parts = (x.to(dtype) for x in (u, dt, A, B, C))
        y, state = kernel(tuple(parts), (D, dt_bias, z, intervals), lengths, state, dt_softplus)
        return y.to(u.dtype), state
    with dispatch.full_precision(u):
        wide, step = u.to(dtype), dt.to(dtype)
        if dt_bias is not None:
            step = step + dt_bias.to(dtype)
        if dt_softplus:
            step = F.softplus(step)
        if intervals is not None:
            step = step * intervals.to(dtype)[..., None]
        if lengths is not None:
            real = (torch.arange(u.shape[1], device=u.device) < lengths[:, None])[..., None]
            step = torch.where(real, step, 0)
        scan = dispatch.choose("selective_scan", time=u.shape[1], like=u)
        y, state = scan(wide, step, A.to(dtype), B.to(dtype), C.to(dtype), state, ssm.RULES.get(discretisation))
        if D is not None:
            y = torch.addcmul(y, wide, D.to(dtype))
        if z is not None:
            y = y * F.silu(z.to(dtype))
        return y.to(u.dtype), state


@dispatch.form("selective_scan", "reference")
def recurrent(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, rule: Rule | None = None
) -> tuple[Tensor, Tensor]:
    """Step through time, as the equation reads; without a rule, Mamba's."""
    outputs = []
    for u_t, dt_t, B_t, C_t in zip(*(x.unbind(1) for x in (u, dt, B, C))):
        write, decay = (dt_t * u_t)[..., None] * B_t[:, None], dt_t[..., None] * A
        if rule is None:
            decay = decay.exp()
        else:
            decay, gain = rule(decay)
            write = gain * write
        state = decay * state + write
        outputs.append((state @ C_t[..., None])[..., 0])
    return (torch.stack(outputs, dim=1) if outputs else torch.zeros_like(u)), state


@dispatch.form("selective_scan", "torch", own_backward=True)
def chunked(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, rule: Rule | None = None
) -> tuple[Tensor, Tensor]:
    """A chunk of states at a time, within the cache."""
    return _Scan.apply(u, dt, A, B, C, state, rule)


class _Scan(torch.autograd.Function):
    """Inside, time comes first and channels last: each step is contiguous, arithmetic runs along the channels."""

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, rule: Rule | None
    ) -> tuple[Tensor, Tensor]:
        ctx.rule, chunk = rule, _chunk_steps(state)
        u, dt, B, C = (x.transpose(0, 1).contiguous() for x in (u, dt, B, C))
        A, state = A.t().contiguous(), state.transpose(1, 2).contiguous()
        starts, y = [state], torch.empty_like(u)
        for i in range(0, len(u), chunk):
            part = slice(i, i + chunk)
            factors = _factors(dt[part, :, None] * A, rule)
            states = _states(factors, (dt[part] * u[part])[:, :, None], B[part, ..., None], starts[-1])
            torch.matmul(C[part, :, None], states[1:], out=y[part, :, None])
            starts.append(states[-1].clone())
        ctx.save_for_backward(u, dt, A, B, C, *starts[:-1])
        return y.transpose(0, 1), starts[-1].transpose(1, 2).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        u, dt, A, B, C, *starts = ctx.saved_tensors
        rule, chunk, grad_y = ctx.rule, _chunk_steps(grad_state), grad_y.transpose(0, 1).contiguous()
        grads = {name: torch.empty_like(x) for name, x in (("u", u), ("dt", dt), ("B", B), ("C", C))}
        grad_A, grad_h = torch.zeros_like(A), grad_state.transpose(1, 2).contiguous()
        for index in reversed(range(len(starts))):
            part = slice(index * chunk, (index + 1) * chunk)
            step, out, write = dt[part], grad_y[part], dt[part] * u[part]
            x = step[:, :, None] * A
            with torch.set_grad_enabled(rule is not None):  # autograd differentiates a rule, a chunk at a time
                factors = _factors(x if rule is None else x.requires_grad_(), rule)
            decays, *gains = (factor.detach() for factor in factors)
            states = _states((decays, *gains), write[:, :, None], B[part, ..., None], starts[index])
            torch.matmul(states[1:], out[..., None], out=grads["C"][part, ..., None])
            flow = C[part, ..., None] * out[:, :, None]  # becomes the gradient of h_t, then the one of dt * A
            for here, decay in zip(reversed(flow.unbind()), reversed(decays.unbind())):
                here.add_(grad_h)
                grad_h = decay * here
            arriving = flow * gains[0] if gains else flow
            written = torch.matmul(B[part, :, None], arriving)[:, :, 0]  # gradient of dt * u
            torch.matmul(arriving, write[..., None], out=grads["B"][part, ..., None])
            if rule is None:
                flow.mul_(decays).mul_(states[:-1])
            else:
                of_gains = flow * B[part, ..., None] * write[:, :, None]
                flow = torch.autograd.grad(factors, x, (flow * states[:-1], of_gains))[0]
            torch.mul(written, step, out=grads["u"][part])
            torch.addcmul((flow * A).sum(2), written, u[part], out=grads["dt"][part])
            grad_A += flow.mul_(step[:, :, None]).sum((0, 1))
        back = {name: grad.transpose(0, 1) for name, grad in grads.items()}
        return back["u"], back["dt"], grad_A.t(), back["B"], back["C"], grad_h.transpose(1, 2), None


def _factors(x: Tensor, rule: Rule | None) -> tuple[Tensor, ...]:
    """A_bar, and by a rule also B_bar / (dt B), which else is 1, from x = dt A; overwrites x."""
    return (x.exp_(),) if rule is None else rule(x)


def _states(factors: tuple[Tensor, ...], written: Tensor, B: Tensor, start: Tensor) -> Tensor:
    """h before and after each step of a chunk, (time + 1, batch, N, channels)."""
    decays, *gains = factors
    states = start.new_empty(len(decays) + 1, *start.shape)
    states[0] = start
    torch.mul(B, written, out=states[1:])
    for gain in gains:
        states[1:].mul_(gain)
    for before, after, decay in zip(states.unbind(), states.unbind()[1:], decays.unbind()):
        after.addcmul_(decay, before)
    return states


def _chunk_steps(state: Tensor) -> int:
    return max(4, min(64, CHUNK_BYTES // max(1, state.numel() * state.element_size())))
