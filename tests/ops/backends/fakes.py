"""Stand-ins for fla-core, mamba-ssm and causal-conv1d: their signatures and conventions, computed from the equations.

Each steps through time by itself, knows nothing of our ops, and insists on the shapes, dtypes and memory layouts on
which the kernels insist. They compute in the dtype of the states they are given.
"""

import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from bestiary.ops import dispatch
from bestiary.ops.backends import backend, record

CALLS: list[str] = []
"""Names of the functions that were called, in order."""


# fmt: off


def chunk_simple_gla(
    q, k, v, g=None, g_gamma=None, scale=None, initial_state=None, output_final_state=False, state_v_first=False,
    cu_seqlens=None, cu_seqlens_cpu=None, **kwargs,
):
    CALLS.append("chunk_simple_gla")
    assert g_gamma is None and (g is None or g.shape == v.shape[:3]) and not kwargs
    decay = torch.zeros(*v.shape[:3], 1) if g is None else g[..., None]
    return _linear(q, k, v, decay, None, scale, initial_state, output_final_state, state_v_first, cu_seqlens, kwargs)


def chunk_gla(
    q, k, v, g, scale=None, initial_state=None, output_final_state=False, state_v_first=False, cu_seqlens=None,
    cu_seqlens_cpu=None,
):
    CALLS.append("chunk_gla")
    assert q.shape == k.shape == g.shape
    return _linear(q, k, v, g, None, scale, initial_state, output_final_state, state_v_first, cu_seqlens, {})


def chunk_rwkv6(
    r, k, v, w, u, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None, cu_seqlens_cpu=None,
    **kwargs,
):
    CALLS.append("chunk_rwkv6")
    assert r.shape == k.shape == w.shape and u.shape == k.shape[2:]
    return _linear(r, k, v, w, u, scale, initial_state, output_final_state, False, cu_seqlens, kwargs)


def chunk_gated_delta_rule(
    q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False,
    use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, state_v_first=False, cu_seqlens=None,
    cu_seqlens_cpu=None, chunk_indices=None, cp_context=None, **kwargs,
):
    CALLS.append("chunk_gated_delta_rule")
    assert g.shape == beta.shape == v.shape[:3]
    assert not (use_qk_l2norm_in_kernel or use_beta_sigmoid_in_kernel or allow_neg_eigval or kwargs)
    return _delta(q, k, v, g[..., None], beta, scale, initial_state, output_final_state, state_v_first, cu_seqlens)


def chunk_kda(
    q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False,
    use_gate_in_kernel=False, use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, safe_gate=False,
    lower_bound=None, disable_recompute=False, return_intermediate_states=False, state_v_first=False,
    cu_seqlens=None, cu_seqlens_cpu=None, cp_context=None, use_graph=False, max_num_seqs=None, **kwargs,
):
    CALLS.append("chunk_kda")
    assert g.shape == (*v.shape[:3], k.shape[3]) and beta.shape == v.shape[:3] and k.shape[3] <= 256
    assert not (use_qk_l2norm_in_kernel or use_gate_in_kernel or use_beta_sigmoid_in_kernel or safe_gate or kwargs)
    return _delta(q, k, v, g, beta, scale, initial_state, output_final_state, state_v_first, cu_seqlens)


def chunk_dplr_delta_rule(
    q, k, v, a, b, gk, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None,
    cu_seqlens_cpu=None, safe_gate=False, chunk_size=None, disable_recompute=False, cp_context=None,
    lower_bound=None, **kwargs,
):
    """S <- diag(exp(gk)) S + b (a^T S) + k v^T,  o = scale q^T S."""
    CALLS.append("chunk_dplr_delta_rule")
    assert q.shape == k.shape == a.shape == b.shape == gk.shape and not (kwargs or safe_gate)
    S, wide, scale = _start(q, k, v, scale, initial_state, output_final_state, False, cu_seqlens)
    outputs = []
    for t in range(q.shape[1]):
        qt, kt, vt, at, bt = (x[:, t].to(wide) for x in (q, k, v, a, b))
        S = gk[:, t].to(wide).exp().unsqueeze(-1) * S + bt.unsqueeze(-1) * (at.unsqueeze(-2) @ S) + _outer(kt, vt)
        outputs.append(scale * (qt.unsqueeze(-2) @ S).squeeze(-2))
    return torch.stack(outputs, 1).to(q.dtype), S


def fused_recurrent_rwkv4(w, u, k, v, state):
    """w is the raw parameter, the log-decay being -exp(w); state (B, 3, 1, C): numerator, denominator, exponent."""
    CALLS.append("fused_recurrent_rwkv4")
    assert state.shape == (k.shape[0], 3, 1, k.shape[2]) and w.shape == u.shape == k.shape[2:]
    a, b, m = state[:, 0, 0], state[:, 1, 0], state[:, 2, 0]
    outputs = []
    for t in range(k.shape[1]):
        tau = torch.maximum(u + k[:, t], m)
        old, new = (m - tau).exp(), (u + k[:, t] - tau).exp()
        outputs.append((old * a + new * v[:, t]) / (old * b + new))
        top = torch.maximum(m - w.exp(), k[:, t])
        old, new = (m - w.exp() - top).exp(), (k[:, t] - top).exp()
        a, b, m = old * a + new * v[:, t], old * b + new, top
    return torch.stack(outputs, 1), torch.stack((a, b, m), 1).unsqueeze(2)


def selective_scan_fn(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False,
):
    """From zero, time last; the last state has no gradient, as in the kernel."""
    CALLS.append("selective_scan_fn")
    assert u.shape == delta.shape and u.shape[1] == A.shape[0] and B.shape == C.shape
    assert B.shape == (u.shape[0], A.shape[1], u.shape[2]) and u.dtype == delta.dtype == B.dtype == C.dtype
    assert D is None and z is None and delta_bias is None and not delta_softplus
    h, outputs = torch.zeros(*u.shape[:2], A.shape[1], dtype=A.dtype), []
    for t in range(u.shape[2]):
        h = torch.exp(delta[:, :, t, None] * A) * h + (delta[:, :, t] * u[:, :, t])[..., None] * B[:, None, :, t]
        outputs.append((h * C[:, None, :, t]).sum(-1))
    y = torch.stack(outputs, -1)
    return (y, h.detach()) if return_last_state else y


def causal_conv1d_fn(
    x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False, final_states_out=None,
    activation=None,
):
    CALLS.append("causal_conv1d_fn")
    channels, taps = weight.shape
    assert 2 <= taps <= 4 and channels % 8 == 0 and seq_idx is None and not return_final_states
    for z in (x, initial_states):  # channels last in memory
        assert z.stride(1) == 1 and z.stride(0) % 8 == 0 and z.stride(2) % 8 == 0
    assert initial_states.shape == (x.shape[0], channels, taps - 1) and initial_states.dtype == x.dtype
    joined = torch.cat((initial_states, x), -1).to(weight.dtype)
    y = F.conv1d(joined, weight.unsqueeze(1), bias, groups=channels).to(x.dtype)
    y = y.transpose(1, 2).contiguous().transpose(1, 2)
    return F.silu(y) if activation in ("silu", "swish") else y


# fmt: on


def _start(q, k, v, scale, initial_state, output_final_state, state_v_first, cu_seqlens):
    assert q.dtype == k.dtype == v.dtype and q.shape == k.shape and q.shape[:3] == v.shape[:3]
    assert cu_seqlens is None and not state_v_first and output_final_state
    assert initial_state.shape == (q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    assert initial_state.dtype == torch.promote_types(q.dtype, torch.float32)
    return initial_state, initial_state.dtype, q.shape[-1] ** -0.5 if scale is None else scale


def _outer(k, v):
    return k.unsqueeze(-1) * v.unsqueeze(-2)


def _linear(q, k, v, g, u, scale, initial_state, output_final_state, state_v_first, cu_seqlens, kwargs):
    """S <- diag(exp(g)) S + k v^T,  o = scale q^T S;  with a bonus, o = scale q^T (S_before + diag(u) k v^T)."""
    assert not kwargs
    S, wide, scale = _start(q, k, v, scale, initial_state, output_final_state, state_v_first, cu_seqlens)
    outputs = []
    for t in range(q.shape[1]):
        qt, kt, vt = (x[:, t].to(wide) for x in (q, k, v))
        before, S = S, g[:, t].to(wide).exp().unsqueeze(-1) * S + _outer(kt, vt)
        seen = S if u is None else before + _outer(u.to(wide) * kt, vt)
        outputs.append(scale * (qt.unsqueeze(-2) @ seen).squeeze(-2))
    return torch.stack(outputs, 1).to(q.dtype), S


def _delta(q, k, v, g, beta, scale, initial_state, output_final_state, state_v_first, cu_seqlens):
    """S <- diag(exp(g)) S;  S <- S + k (beta (v - S^T k))^T;  o = scale q^T S."""
    S, wide, scale = _start(q, k, v, scale, initial_state, output_final_state, state_v_first, cu_seqlens)
    outputs = []
    for t in range(q.shape[1]):
        qt, kt, vt = (x[:, t].to(wide) for x in (q, k, v))
        S = g[:, t].to(wide).exp().unsqueeze(-1) * S
        S = S + _outer(kt, beta[:, t].to(wide).unsqueeze(-1) * (vt - (kt.unsqueeze(-2) @ S).squeeze(-2)))
        outputs.append(scale * (qt.unsqueeze(-2) @ S).squeeze(-2))
    return torch.stack(outputs, 1).to(q.dtype), S


MODULES: dict[str, dict[str, Any]] = {
    "fla": {},
    "fla.ops": {},
    "fla.ops.simple_gla": {"chunk_simple_gla": chunk_simple_gla},
    "fla.ops.gla": {"chunk_gla": chunk_gla},
    "fla.ops.rwkv6": {"chunk_rwkv6": chunk_rwkv6},
    "fla.ops.gated_delta_rule": {"chunk_gated_delta_rule": chunk_gated_delta_rule},
    "fla.ops.kda": {"chunk_kda": chunk_kda},
    "fla.ops.generalized_delta_rule": {"chunk_dplr_delta_rule": chunk_dplr_delta_rule},
    "fla.ops.rwkv4": {"fused_recurrent_rwkv4": fused_recurrent_rwkv4},
    "mamba_ssm": {},
    "mamba_ssm.ops": {},
    "mamba_ssm.ops.selective_scan_interface": {
        "selective_scan_fn": selective_scan_fn,
        "selective_scan_cuda": object(),
    },
    "causal_conv1d": {},
    "causal_conv1d.causal_conv1d_interface": {"causal_conv1d_fn": causal_conv1d_fn},
}
VERSIONS = {"fla-core": "0.6.0", "mamba-ssm": "2.3.2.post1", "causal-conv1d": "1.6.1"}


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[dict[str, str]]:
    """The stand-ins in place of the libraries, the CPU in that of a GPU, an empty record; yields the versions."""
    versions = dict(VERSIONS)
    for name, content in MODULES.items():
        module = types.ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    version_of: Callable[[str], str | None] = versions.get
    monkeypatch.setattr(backend, "version_of", version_of)
    monkeypatch.setattr(backend, "DEVICES", ("cpu",))
    monkeypatch.setattr(dispatch, "compiled", lambda *_, **__: False)  # a GPU has none of our kernels
    monkeypatch.setenv("BESTIARY_CACHE", str(tmp_path))
    backend._import_error.cache_clear()
    record._read.cache_clear()
    CALLS.clear()
    yield versions
    backend._import_error.cache_clear()
    record._read.cache_clear()
