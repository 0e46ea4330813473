"""Holds other libraries' functions against our definitions, on the user's own GPU: `bestiary doctor --check-backend`.

Each function runs in each dtype on random segments of several lengths, with weak gates and strong ones, going on from
a state. Its outputs, final states, and the gradients of a random function of both with respect to every input are
compared with those of the definition in float64, of the same inputs.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bestiary.errors import UsageError
from bestiary.ops import backends, dispatch, linear_attention, selective_scan, short_convolution
from bestiary.ops.backends import record
from bestiary.ops.backends.backend import DTYPES, Backend
from bestiary.ops.delta_rule import delta_rule, dplr
from bestiary.ops.wkv import WKVState, wkv

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""Largest difference over largest entry, of any tensor. In fp32, kernels may multiply in TF32, of 10 binary digits."""

DIMS = {1: (64, 64), 2: (64, 64), 3: (32, 64), 64: (64, 65), 130: (128, 128)}
"""For each length of a segment, the channels of a head's keys and values; 65 is 64 with a normaliser."""
GATES = ("none", "weak", "strong", "mixed")
BATCH, HEADS = 2, 4
WIDE = ("state", "num", "den", "log_decay", "w", "A")
"""Inputs that are never narrower than fp32: states, and decays as mixers compute them."""

Call = Callable[..., tuple[Tensor, Any]]


class Finding(NamedTuple):
    """What came of one function in one dtype.

    Args:
        verdict: "ok", "wrong" (other numbers than ours), "refused" (it takes no such tensors) or "failed" (it raised).
        detail: numbers, or the reason.
    """

    function: str
    dtype: str
    verdict: str
    detail: str


def run(device: torch.device) -> Iterator[Finding]:
    """Check all functions of the libraries that are there, one by one, adding each finding to the record."""
    for op, able in backends.TABLE.items():
        for backend in able:
            if backend.library.missing() is None:
                for dtype in DTYPES:
                    finding = check(op, backend, device, dtype)
                    entry = {"verdict": finding.verdict, "detail": finding.detail}
                    record.add({record.key(backend, device, dtype): entry})
                    yield finding


def check(op: str, backend: Backend, device: torch.device, dtype: torch.dtype) -> Finding:
    """Hold one function against our definition in one dtype."""
    name = str(dtype).removeprefix("torch.")
    try:
        worst, where = compare(op, backend, device, dtype)
    except UsageError as error:
        return Finding(backend.function, name, "refused", str(error).rpartition(f"{backend.function}: ")[2])
    except Exception as error:  # whatever a kernel does, it must end as a line of the table
        return Finding(backend.function, name, "failed", f"{type(error).__name__}: {error}".partition("\n")[0])
    verdict = "ok" if worst <= TOLERANCE[dtype] else "wrong"
    return Finding(backend.function, name, verdict, f"error {worst:.1e} of {TOLERANCE[dtype]:.0e} allowed, in {where}")


def compare(op: str, backend: Backend, device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """The largest error of one function in one dtype, NaN where there is NaN, and where it was."""
    worst, where = 0.0, "nothing"
    generator = torch.Generator().manual_seed(0)
    for time in DIMS:
        for kind in GATES:
            call, inputs = CASES[op](_Draw(generator, time, kind), backend.function.rpartition(".")[2])
            # rounded before, so that both sides get the same numbers
            inputs = {n: x.to(torch.float32 if n in WIDE else dtype).to(device) for n, x in inputs.items()}
            found = _results(call, inputs, backend.library.name, dtype)
            expected = _results(call, {n: x.double() for n, x in inputs.items()}, "reference", dtype)
            for part, wanted in expected.items():
                error = _error(found[part], wanted)
                if not math.isnan(worst) and not error <= worst:  # NaN is worse than anything
                    worst, where = error, f"{part}, {time} steps, gates {kind}"
    return worst, where


def _results(call: Call, inputs: dict[str, Tensor], form: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Outputs and gradients by name; the gradients that come in are numbers of `dtype`."""
    live = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    with dispatch.use(form):
        y, state = call(**live)
    if isinstance(state, WKVState):  # its parts depend on a reference that is free to choose: these do not
        outputs = {"output": y, "mean of the past": state.num / state.den, "its weight": state.den.log() + state.max}
    else:
        outputs = {"output": y, "state": state}
    generator, loss = torch.Generator().manual_seed(7), torch.zeros((), dtype=torch.float64, device=y.device)
    for x in outputs.values():
        weights = torch.randn(x.shape, generator=generator).to(dtype).to(x.device)
        loss = loss + (x.double() * weights.double()).sum()
    gradients = torch.autograd.grad(loss, list(live.values()), allow_unused=True)
    return outputs | {
        f"gradient of {name}": torch.zeros_like(x) if gradient is None else gradient
        for (name, x), gradient in zip(live.items(), gradients)
    }


def _error(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest entry."""
    return ((found.double() - expected).abs().max() / (expected.abs().max() + 1e-12)).item()


class _Draw(NamedTuple):
    """Random inputs of one case, on the CPU, in float64."""

    generator: torch.Generator
    time: int
    kind: str

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def gates(self, *shape: int) -> Tensor:
        """Log-decays: zero, in -1 ... 0, in -50 ... 0, or weak ones (-0.01) after strong ones."""
        g = -self.uniform(*shape)
        if self.kind == "mixed":
            return torch.where(self.uniform(*shape) < 0.3, 50 * g, 0.01 * g)
        return g * {"none": 0, "weak": 1, "strong": 50}[self.kind]

    def heads(self, channels: int, heads: int = HEADS) -> Tensor:
        return self.normal(BATCH, self.time, heads, channels)


def _linear_attention(draw: _Draw, function: str) -> tuple[Call, dict[str, Tensor]]:
    key_dim, value_dim = DIMS[draw.time]
    by_head = function == "chunk_simple_gla"
    groups = HEADS // 2 if by_head and draw.kind == "weak" else HEADS
    inputs = {"q": draw.heads(key_dim, groups), "k": draw.heads(key_dim, groups), "v": draw.heads(value_dim)}
    inputs["state"] = draw.normal(BATCH, HEADS, key_dim, value_dim)
    if not (by_head and draw.kind == "none"):
        inputs["log_decay"] = draw.gates(BATCH, draw.time, HEADS, *(() if by_head else (key_dim,)))
    if function == "chunk_rwkv6":
        inputs["bonus"] = draw.normal(HEADS, key_dim)
    return linear_attention, inputs


def _delta_rule(draw: _Draw, function: str) -> tuple[Call, dict[str, Tensor]]:
    key_dim, value_dim = DIMS[draw.time]
    inputs = {"q": draw.heads(key_dim), "k": F.normalize(draw.heads(key_dim), dim=-1), "v": draw.heads(value_dim)}
    inputs["beta"] = 2 * draw.uniform(BATCH, draw.time, HEADS)  # negative eigenvalues too
    by_channel = (key_dim,) if function == "chunk_kda" else ()
    inputs["log_decay"] = draw.gates(BATCH, draw.time, HEADS, *by_channel)
    return delta_rule, inputs | {"state": draw.normal(BATCH, HEADS, key_dim, value_dim)}


def _dplr(draw: _Draw, function: str) -> tuple[Call, dict[str, Tensor]]:
    key_dim, value_dim = DIMS[draw.time]
    kappa = F.normalize(draw.heads(key_dim), dim=-1)
    inputs = {"r": draw.heads(key_dim), "w": draw.gates(BATCH, draw.time, HEADS, key_dim), "k": draw.heads(key_dim)}
    inputs |= {"v": draw.heads(value_dim), "a": -kappa, "b": kappa * draw.uniform(*kappa.shape)}
    return dplr, inputs | {"state": draw.normal(BATCH, HEADS, key_dim, value_dim)}


def _selective_scan(draw: _Draw, function: str) -> tuple[Call, dict[str, Tensor]]:
    channels, states = DIMS[draw.time][0], 16
    inputs = {"u": draw.normal(BATCH, draw.time, channels), "dt": 1e-3 - draw.gates(BATCH, draw.time, channels)}
    inputs |= {"A": -draw.uniform(channels, states) - 0.01}
    inputs |= {name: draw.normal(BATCH, draw.time, states) for name in ("B", "C")}
    return selective_scan, inputs | {"state": draw.normal(BATCH, channels, states)}


def _short_convolution(draw: _Draw, function: str) -> tuple[Call, dict[str, Tensor]]:
    channels, taps = DIMS[draw.time][0], {"none": 2, "weak": 3, "strong": 4, "mixed": 4}[draw.kind]
    inputs = {"x": draw.normal(BATCH, draw.time, channels), "weight": draw.normal(channels, taps)}
    return short_convolution, inputs | {"state": draw.normal(BATCH, taps - 1, channels)}


def _wkv(draw: _Draw, function: str) -> tuple[Call, dict[str, Tensor]]:
    channels = DIMS[draw.time][0]
    reference = (10 * draw.normal(BATCH, channels)).round()

    def call(num: Tensor, den: Tensor, **inputs: Tensor) -> tuple[Tensor, WKVState]:
        return wkv(**inputs, state=WKVState(num, den, reference.to(num)))

    inputs = {name: draw.normal(BATCH, draw.time, channels) for name in ("k", "v")}
    inputs |= {"w": draw.gates(channels) - 1e-3, "u": draw.normal(channels)}
    return call, inputs | {"num": draw.normal(BATCH, channels), "den": draw.uniform(BATCH, channels) + 0.1}


CASES: dict[str, Callable[[_Draw, str], tuple[Call, dict[str, Tensor]]]] = {
    "linear_attention": _linear_attention,
    "delta_rule": _delta_rule,
    "dplr": _dplr,
    "selective_scan": _selective_scan,
    "short_convolution": _short_convolution,
    "wkv": _wkv,
}
