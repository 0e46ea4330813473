"""What a function of tensors asked of torch, call by call, with all values."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

BLANK = {"zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty"}
"""What takes a tensor for its shape alone."""
READERS = {Tensor.tolist, Tensor.numpy, Tensor.__array__}


class Call(NamedTuple):
    """One operator with what it was given and what it returned."""

    name: str
    mutates: bool
    tells: bool  # whether Python learns numbers of tensors from it
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any


class Trace(TorchDispatchMode):
    """Within it, every operator of torch is noted in `calls`; those that operators of ours use inside are not."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        mutates = func._schema.is_mutable
        tells = torch.Tag.dynamic_output_shape in func.tags or not (mutates or tensors(result))
        self.calls.append(Call(func._opname, mutates, tells, args, kwargs, result))
        return result

    def told(self, inputs: Iterable[Tensor]) -> str | None:
        """The first operator by which Python learned numbers that depend on these tensors; None for none."""
        depend = {storage(x) for x in inputs}
        for call in self.calls:
            given, made = tensors((call.args, call.kwargs)), tensors(call.result)
            if call.name in BLANK or not any(storage(x) in depend for x in given):
                continue
            chosen = tensors(call.args[1]) if call.name == "index" else given  # constants choose what they always do
            if call.tells and any(storage(x) in depend for x in chosen):
                return call.name
            depend |= {storage(x) for x in made + (given if call.mutates else [])}
        return None

    def needed(self, results: Iterable[Tensor]) -> list[Call]:
        """The calls that these results depend on, in order."""
        wanted, kept = {storage(result) for result in results}, list[Call]()
        for call in reversed(self.calls):
            given, made = tensors((call.args, call.kwargs)), tensors(call.result)
            if any(storage(x) in wanted for x in (given if call.mutates else []) + made):
                wanted |= {storage(x) for x in given}
                kept.append(call)
        return kept[::-1]


class Reads(TorchFunctionMode):
    """Within it, a trace also notes how Python reads numbers past all operators."""

    def __init__(self, trace: Trace):
        super().__init__()
        self.trace = trace

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        if func in READERS:
            self.trace.calls.append(Call(func.__name__, False, True, args, {}, None))
        return func(*args, **(kwargs or {}))


def storage(tensor: Tensor) -> int:
    """What tells one piece of memory from another."""
    return tensor.untyped_storage()._cdata


def tensors(value: Any) -> list[Tensor]:
    """All tensors in lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return tensors(list(value.values()))
    return [x for part in value for x in tensors(part)] if isinstance(value, (list, tuple)) else []
