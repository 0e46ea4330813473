"""Kernels of other libraries behind our ops on a GPU: fla-core, mamba-ssm and causal-conv1d, where they are installed.

An op asks `route` for its form. A library's function runs in its place where the tensors are on a GPU, the function
takes them, and the record of `bestiary doctor --check-backend` says that its outputs and gradients were ours on this
GPU, with these versions, in this dtype. Libraries are imported when they are first called, never before.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bestiary.errors import UsageError
from bestiary.ops.backends import backend as parts
from bestiary.ops.backends import causal_conv1d, fla, mamba_ssm, record
from bestiary.ops.backends.backend import Backend, Library

LIBRARIES: dict[str, Library] = {module.LIBRARY.name: module.LIBRARY for module in (fla, mamba_ssm, causal_conv1d)}
TABLE: dict[str, tuple[Backend, ...]] = {**fla.BACKENDS, **mamba_ssm.BACKENDS, **causal_conv1d.BACKENDS}
"""For each op, the functions that may compute it, in the order in which they are asked."""


def route(op: str, own: Callable[..., Any], like: Tensor, forced: str | None) -> Callable[..., Any]:
    """A form of `op` that runs a library's function where one may and can, and `own` elsewhere.

    Args:
        like: tells the device and the dtype of the caller, inputs being widened for the forms.
        forced: the library that must run, where it has functions for this op; None for what the record allows.
    """
    able = [backend for backend in TABLE.get(op, ()) if forced in (None, backend.library.name)]
    if not able or not like.numel() or (forced is None and like.device.type not in parts.DEVICES):
        return own

    def run(*arguments: Any) -> Any:
        reasons = []
        for backend in able:
            why_not = None if forced else record.why_not(backend, like.device, like.dtype)
            why_not = why_not or backend.why_not(like, arguments)
            if why_not is None:
                return backend(like.dtype, *arguments)
            reasons.append(f"{backend.function}: {why_not}")
        if forced:
            raise UsageError(f"op {op} cannot run by {forced} here: {'; '.join(reasons)}")
        return own(*arguments)

    return run


def standing(device: torch.device) -> dict[str, str]:
    """For each function of the libraries that are installed: its op, and whether each dtype uses it, or why not."""
    found = {}
    for op, able in TABLE.items():
        for backend in able:
            if backend.library.version() is None:
                continue
            by_reason: dict[str, list[str]] = {}
            for dtype in parts.DTYPES:
                reason = record.why_not(backend, device, dtype) or "used"
                by_reason.setdefault(reason, []).append(str(dtype).removeprefix("torch."))
            told = [f"{', '.join(dtypes)} {reason}" for reason, dtypes in by_reason.items()]
            found[backend.function] = f"{op}: {'; '.join(told)}"
    return found
