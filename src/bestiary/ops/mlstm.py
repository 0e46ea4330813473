"""The matrix memory of xLSTM (Beck et al. 2024, arXiv:2405.04517): linear attention whose writes weigh exp(i).

    C_t = f_t C_{t-1} + e^{i_t} k_t v_t^T            f_t = exp(log_forget), e^{i_t} = exp(log_input)
    n_t = f_t n_{t-1} + e^{i_t} k_t
    h_t = C_t^T q_t / max(|n_t . q_t|, 1)

e^{i} overflows, so memory and normaliser are kept in units of e^{m_t}, m_t = max(log f_t + m_{t-1}, i_t): what counts
is C e^m and n e^m. In these units a memory decays by exp(log f_t + m_{t-1} - m_t) and a write weighs exp(i_t - m_t),
both at most 1. Given all m, which a scan finds, this is ops.linear_attention; n is the memory of a value that is always
1. Results do not depend on m, so that it is a constant to gradients.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from bestiary import state as states
from bestiary.ops import dispatch
from bestiary.ops.linear_attention import linear_attention

SMALLEST = -1e38
"""The exponent of an empty memory: finite, since -inf - -inf is NaN."""
FLOOR = 1e-6
"""Least |n . q|, in units of e^m: below is rounding, and nothing but rounding where all products q . k vanish."""


@states.register
class MLSTMState(NamedTuple):
    """The memory, its last column the normaliser, in units of e^max."""

    memory: Float[Tensor, "batch heads key_dim value_dim_plus_1"]
    max: Float[Tensor, "batch heads"]


def mlstm(
    q: Float[Tensor, "batch time heads key_dim"],
    k: Float[Tensor, "batch time heads key_dim"],
    v: Float[Tensor, "batch time heads value_dim"],
    log_input: Float[Tensor, "batch time heads"],
    log_forget: Float[Tensor, "batch time heads"],
    *,
    scale: float | None = None,
    state: MLSTMState | None = None,
    lengths: Int[Tensor, " batch"] | None = None,
) -> tuple[Float[Tensor, "batch time heads value_dim"], MLSTMState]:
    """Write with exponential weights, read a bounded average; returns (h, state), h in v's dtype.

    Args:
        log_input: i, any number.
        log_forget: logsigmoid of a gate, or any number (an exponential forget gate).
        scale: of the queries, in h and in the normaliser; None for key_dim ** -0.5.
        state: the past, fp32 or wider; None for none.
        lengths: real steps of each row of a right-padded batch; only these enter the state.
    """
    if state is None:
        sizes = k.shape[0], k.shape[2], k.shape[3], v.shape[3]
        state = empty_mlstm(*sizes, dtype=dispatch.wide(q.dtype, k.dtype, v.dtype), device=v.device)
    scale = k.shape[3] ** -0.5 if scale is None else scale
    dtype = state.memory.dtype
    with dispatch.full_precision(v):
        q, k, values, i, f = (x.to(dtype) for x in (q * scale, k, F.pad(v, (0, 1), value=1.0), log_input, log_forget))
        if lengths is not None:
            real = (torch.arange(k.shape[1], device=k.device) < lengths[:, None])[..., None]
            k, i, f = torch.where(real[..., None], k, 0), torch.where(real, i, SMALLEST), torch.where(real, f, 0)
        read, exponents, state = dispatch.choose("mlstm", time=k.shape[1])(q, k, values, i, f, state)
        # |n . q| e^m against 1, all divided by e^m or, where m is negative, by 1: no exponent is positive
        unit, one = exponents.clamp(max=0).exp()[..., None], (-exponents.clamp(min=0)).exp()[..., None]
        norm = torch.maximum(read[..., -1:].abs() * unit, one.clamp(min=FLOOR))
        return (read[..., :-1] * unit / norm).to(v.dtype), state


def empty_mlstm(
    batch: int,
    heads: int,
    key_dim: int,
    value_dim: int,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> MLSTMState:
    """The state before the first step."""
    memory = torch.zeros(batch, heads, key_dim, value_dim + 1, dtype=dtype, device=device)
    return MLSTMState(memory, torch.full((batch, heads), SMALLEST, dtype=dtype, device=device))


@dispatch.form("mlstm", "reference")
def recurrent(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, state: MLSTMState
) -> tuple[Tensor, Tensor, MLSTMState]:
    """Step through time; returns what is read, the exponents m of its units, and the state."""
    memory, m = state
    found, exponents = [torch.zeros_like(v[:, :0])], [i[:, :0]]
    for q_t, k_t, v_t, i_t, f_t in zip(*(x.unbind(1) for x in (q, k, v, i, f))):
        before, m = m, torch.maximum(f_t + m, i_t).detach()
        # f - (m - before), not f + before - m: what m lost to rounding is then in the decay
        kept, weight = (f_t - (m - before)).exp(), (i_t - m).exp()
        memory = kept[..., None, None] * memory + (weight[..., None] * k_t)[..., None] * v_t[..., None, :]
        found.append(torch.einsum("bhk,bhkv->bhv", q_t, memory)[:, None])
        exponents.append(m[:, None])
    return torch.cat(found, dim=1), torch.cat(exponents, dim=1), MLSTMState(memory, m)


@dispatch.form("mlstm", "torch")
def chunked(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, state: MLSTMState
) -> tuple[Tensor, Tensor, MLSTMState]:
    """All exponents at once, then linear attention with the decays and weights that follow from them."""
    exponents = running_max(f.detach(), i.detach(), state.max)
    before, m = exponents[:, :-1], exponents[:, 1:]
    weighted = k * (i - m).exp()[..., None]
    read, memory = linear_attention(q, weighted, v, f - (m - before), scale=1.0, state=state.memory)
    return read, m, MLSTMState(memory, exponents[:, -1])


def running_max(
    decay: Float[Tensor, "batch time heads"],
    value: Float[Tensor, "batch time heads"],
    start: Float[Tensor, "batch heads"],
) -> Float[Tensor, "batch time_plus_1 heads"]:
    """m_0 = start, m_t = max(decay_t + m_{t-1}, value_t), for all t in log2(time) passes.

    After a pass with span n, m_t covers the last 2n steps and `total` is the sum of their decays. (The running maximum
    of value_t - (decay_1 + ... + decay_t) would be one pass, but loses weak decays to strong ones.)
    """
    m, total, span = torch.cat([start[:, None], value], dim=1), F.pad(decay, (0, 0, 1, 0)), 1
    while span < m.shape[1]:
        later = torch.maximum(m[:, span:], total[:, span:] + m[:, :-span])
        m = torch.cat([m[:, :span], later], dim=1)
        total = torch.cat([total[:, :span], total[:, span:] + total[:, :-span]], dim=1)
        span *= 2
    return m
