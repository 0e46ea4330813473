"""Which form of an op runs, and why.

Every op has a recurrent definition ("reference") and a chunked or FFT form in plain PyTorch ("torch"); faster forms may
be added for some devices. All forms of an op compute the same function and take the same arguments.

    with bestiary.ops.use("reference"):   # override, for this context
        ...
    bestiary.ops.active()                 # what would run, and why
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import torch

from bestiary.errors import UsageError, unknown

_forms: dict[str, dict[str, Callable[..., Any]]] = {}
_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("forced_form", default=None)


def form(op: str, name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: registers a function as the form `name` of the op `op`."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        _forms.setdefault(op, {})[name] = function
        return function

    return add


def choose(op: str, *, time: int) -> Callable[..., Any]:
    """The function that computes `op` on a sequence of `time` steps."""
    return _forms[op][_choice(op, time)[0]]


def _choice(op: str, time: int) -> tuple[str, str]:
    forced = _forced.get()
    if forced is not None:
        if forced not in _forms[op]:
            raise UsageError(f"op {op} has no form {forced!r}, only {', '.join(sorted(_forms[op]))}")
        return forced, 'chosen by bestiary.ops.use("' + forced + '")'
    if time <= 1:
        return "reference", "a single step is the recurrence itself"
    return "torch", "plain PyTorch, any device"


@contextlib.contextmanager
def use(name: str) -> Iterator[None]:
    """Force one form of every op within the context: "reference" (the definitions) or "torch" (chunked, FFT)."""
    valid = {form for forms in _forms.values() for form in forms}
    if name not in valid:
        raise unknown("form of the ops", name, valid)
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def active(time: int = 1024) -> dict[str, dict[str, str]]:
    """For each op, the form that would run on a sequence of `time` steps, and the reason."""
    return {op: dict(zip(("form", "why"), _choice(op, time))) for op in sorted(_forms)}


def wide(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype in which recurrences compute and keep their state: the widest given, fp32 at least."""
    result = torch.float32
    for dtype in dtypes:
        result = torch.promote_types(result, dtype)
    return result


def full_precision(tensor: torch.Tensor) -> torch.autocast:
    """A context without autocast: recurrences compute in the dtype of their state, whatever surrounds them."""
    return torch.autocast(device_type=tensor.device.type, enabled=False)
