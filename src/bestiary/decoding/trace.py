"""What a function of tensors asked of torch, call by call, with all values."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Call(NamedTuple):
    """One operator with what it was given and what it returned."""

    name: str
    mutates: bool
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
        self.calls.append(Call(func._opname, func._schema.is_mutable, args, kwargs, result))
        return result

    def needed(self, results: Iterable[Tensor]) -> list[Call]:
        """The calls that these results depend on, in order."""
        wanted, kept = {storage(result) for result in results}, list[Call]()
        for call in reversed(self.calls):
            given, made = tensors((call.args, call.kwargs)), tensors(call.result)
            if any(storage(x) in wanted for x in (given if call.mutates else []) + made):
                wanted |= {storage(x) for x in given}
                kept.append(call)
        return kept[::-1]


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
