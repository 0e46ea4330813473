"""Which form of an op runs, and why.

Every op has a recurrent definition ("reference") and a chunked or FFT form in plain PyTorch ("torch"). Some have a
compiled kernel as well ("native"), which runs wherever it can: in fp32 and half precision on the CPU. On a GPU,
functions of other libraries ("fla", "mamba_ssm", "causal_conv1d") run in place of the second, where `bestiary doctor
--check-backend` has found that they compute the same (see bestiary.ops.backends). All forms of an op compute the same
function.

    with bestiary.ops.use("reference"):   # override, for this context
        ...
    bestiary.ops.active()                 # what would run, and why
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.autograd import forward_ad

from bestiary.errors import UsageError, unknown
from bestiary.ops import backends
from bestiary.ops.native import library

_NATIVE = "native"
_compiled: dict[str, tuple[str, Callable[[], tuple[Any, str]]]] = {}
_forms: dict[str, dict[str, Callable[..., Any]]] = {}
_own_backward: set[tuple[str, str]] = set()
_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("forced_form", default=None)
_forced_last: str | None = None
"""What `use` last set or restored, in any thread: torch.compile reads no context variable, but guards this."""


def form(op: str, name: str, *, own_backward: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: registers a function as the form `name` of the op `op`.

    Args:
        own_backward: whether it has a backward pass of its own, which transforms of torch.func and forward-mode
            derivatives do not pass: the definition takes its place there.
    """

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        _forms.setdefault(op, {})[name] = function
        if own_backward:
            _own_backward.add((op, name))
        return function

    return add


def choose(op: str, *, time: int, like: torch.Tensor | None = None) -> Callable[..., Any]:
    """The function that computes `op` on a sequence of `time` steps, where no kernel does.

    Args:
        like: a tensor with the device and the dtype of the caller, by which another library's function is chosen; None
            where the op has none, or must not use it. Code that torch.compile traces never does: it cannot trace them.
    """
    name, forced = _choice(op, time, kernels=False)[0], forced_form()
    if forced is None and (op, name) in _own_backward and transformed() is not None:
        name = "reference"
    own = _forms[op][name]
    if (
        like is None
        or torch.compiler.is_compiling()
        or not (forced in backends.LIBRARIES or (forced is None and time > 1))
    ):
        return own
    return backends.route(op, own, like, forced)


def has_kernel(op: str, name: str = _NATIVE, load: Callable[[], tuple[Any, str]] | None = None) -> None:
    """Registers that an op has a compiled kernel, which it asks `compiled` about.

    Args:
        name: what the form is called, where the kernel is not one of ours.
        load: gives that kernel, or None, and why.
    """
    _compiled[op] = name, load or _ours


def _ours() -> tuple[Any, str]:
    found, why = library.load()
    return found, f"{why}; for fp32 and half precision on the CPU, else plain PyTorch"


def compiled(op: str, *tensors: torch.Tensor | None, why_not: str | None = None, worth: bool = True) -> bool:
    """Whether the compiled kernel of an op is to run on these tensors.

    Args:
        why_not: what speaks against it beside the tensors: options that the kernel does not know.
        worth: whether it is the faster one here; `use("native")` takes it anyway.

    Raises UsageError where `use("native")` forces it and it cannot run.
    """
    forced = forced_form()
    if forced not in (None, _NATIVE):
        return False
    why_not = why_not or transformed() or library.refuses(*tensors)
    if forced == _NATIVE and why_not is not None:
        raise UsageError(f"op {op} has no compiled form here: {why_not}")
    return why_not is None and (worth or forced == _NATIVE)


@torch.compiler.assume_constant_result
def transformed() -> str | None:
    """Why no kernel may run whatever the tensors are: kernels know reverse-mode derivatives alone.

    A forward-mode derivative through one would be zero without a word. Code made by torch.compile asks anew: it guards
    what this reads.
    """
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "transforms of torch.func do not reach into kernels"
    if forward_ad._current_level >= 0:
        return "kernels have no forward-mode derivatives"
    return None


def forced_form() -> str | None:
    """The form that `use` forces here, None for none."""
    return _forced_last if torch.compiler.is_compiling() else _forced.get()


def _choice(op: str, time: int, *, kernels: bool = True) -> tuple[str, str]:
    forced = forced_form()
    if kernels and op in _compiled and forced in (None, _NATIVE):
        name, load = _compiled[op]
        found, why = load()
        if found is not None:
            return name, why
    if forced in backends.LIBRARIES and kernels and any(b.library.name == forced for b in backends.TABLE.get(op, ())):
        return forced, 'chosen by bestiary.ops.use("' + forced + '")'
    if forced == _NATIVE or forced in backends.LIBRARIES:
        forced = None  # ops without a kernel run as ever
    if forced is not None:
        if forced not in _forms[op]:
            raise UsageError(f"op {op} has no form {forced!r}, only {', '.join(sorted(_forms[op]))}")
        return forced, 'chosen by bestiary.ops.use("' + forced + '")'
    if time <= 1:
        return "reference", "a single step is the recurrence itself"
    return "torch", "plain PyTorch, any device"


@contextlib.contextmanager
def use(name: str | None) -> Iterator[None]:
    """Force one form of every op within the context: "reference" (definitions), "torch" (chunked, FFT) or "native".

    The last forces the compiled kernels on ops that have one: what they cannot compute is then a UsageError. So do
    "fla", "mamba_ssm" and "causal_conv1d" with the functions of these libraries, also with unchecked ones. None lets
    the ops choose again.
    """
    valid = {form for forms in _forms.values() for form in forms} | {_NATIVE, *backends.LIBRARIES}
    if name is not None and name not in valid:
        raise unknown("form of the ops", name, valid)
    global _forced_last
    token = _forced.set(name)
    _forced_last = name
    try:
        yield
    finally:
        _forced.reset(token)
        _forced_last = _forced.get()


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
