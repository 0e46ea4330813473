"""What a mixer or a model remembers, as a value.

A state is a (nested) NamedTuple of tensors with the batch first, so one function each counts its bytes, forks it,
selects rows, stacks sessions, saves and loads it, whatever the mixer. A KV cache is a state like any other.

Tensors whose second dimension grows with time are addressed from its start (row b uses its first `position[b]`
entries), so that `stack` may join rows of different lengths by zero padding at the end.
"""

import contextlib
import contextvars
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bestiary.errors import BestiaryError, UsageError

SCHEMA = 1
State = Any  # a NamedTuple of tensors, tuples and further states
T = TypeVar("T")

_types: dict[str, type] = {}
_in_place: contextvars.ContextVar[bool] = contextvars.ContextVar("in_place", default=False)


def register(cls: type[T]) -> type[T]:
    """Class decorator: makes a NamedTuple a state type that `load` can rebuild."""
    if not hasattr(cls, "_fields"):
        raise UsageError(f"a state type must be a NamedTuple, {cls.__name__} is not")
    known = _types.setdefault(cls.__name__, cls)
    if known is not cls and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise UsageError(f"a state type named {cls.__name__} exists already in {known.__module__}; choose another name")
    _types[cls.__name__] = cls
    return cls


@register
class Empty(NamedTuple):
    """The state of a part that remembers nothing (note that an empty tuple is false: test `state is None`)."""


def map_tensors(function: Callable[..., Tensor], state: State, *others: State) -> State:
    """Apply a function to each tensor of a state (and to the tensors at the same places of further states)."""
    if isinstance(state, Tensor):
        return function(state, *others)
    if not isinstance(state, tuple):
        raise UsageError(f"a state is made of tensors and tuples, not of {type(state).__name__}")
    parts = [map_tensors(function, part, *(other[i] for other in others)) for i, part in enumerate(state)]
    return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)


def tensors(state: State) -> list[Tensor]:
    """All tensors of a state, in order."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(note, state)
    return found


def nbytes(state: State) -> int:
    """Size of all tensors of a state, in bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors(state))


def fork(state: State) -> State:
    """An independent copy: what happens to one does not touch the other. Gradients flow through."""
    return map_tensors(torch.clone, state)


def detach(state: State) -> State:
    """The same values, cut from the graph that made them (truncated back-propagation)."""
    return map_tensors(torch.Tensor.detach, state)


def to(state: State, device: torch.device | str) -> State:
    """The state on another device."""
    return map_tensors(lambda tensor: tensor.to(device), state)


def select(state: State, rows: int | slice | Sequence[int] | Tensor) -> State:
    """The given rows of the batch as a state of their own; an int gives a batch of one."""
    if isinstance(rows, slice):
        return map_tensors(lambda tensor: tensor[rows].clone(), state)
    index = torch.as_tensor(rows, dtype=torch.int64).reshape(-1)
    return map_tensors(lambda tensor: tensor[index.to(tensor.device)], state)


def stack(states: Sequence[State]) -> State:
    """Join the rows of several states into one batch; caches of different lengths are zero-padded at their end."""
    if not states:
        raise UsageError("stack needs at least one state")

    def join(*parts: Tensor) -> Tensor:
        if len({part.ndim for part in parts}) > 1:
            raise UsageError(f"cannot stack tensors of shapes {[tuple(part.shape) for part in parts]}")
        target = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts))]
        padded = []
        for part in parts:
            padding = [n for size, want in zip(reversed(part.shape[1:]), reversed(target)) for n in (0, want - size)]
            padded.append(torch.nn.functional.pad(part, padding) if any(padding) else part)
        return torch.cat(padded)

    return map_tensors(join, *states)


@contextlib.contextmanager
def in_place(allowed: bool = True) -> Iterator[None]:
    """Within it, mixers may write into the states they are given (generation owns its state and wants no copies)."""
    token = _in_place.set(allowed)
    try:
        yield
    finally:
        _in_place.reset(token)


def may_write() -> bool:
    """Whether the caller has given states away (see `in_place`); never while recording gradients or compiling."""
    return not torch.compiler.is_compiling() and not torch.is_grad_enabled() and _in_place.get()


def save(state: State, path: str | Path, *, model: Any = None) -> None:
    """Write a state to a safetensors file, atomically.

    With `model`, the file also carries the mixers' names and the model's fingerprint, which `load` then checks.
    """
    flat: dict[str, Tensor] = {}
    structure = _describe(state, "state", flat)
    metadata = {"schema": str(SCHEMA), "structure": json.dumps(structure)}
    if model is not None:
        metadata |= {"mixers": json.dumps(model.mixer_names()), "fingerprint": model.fingerprint()}
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    os.close(handle)
    try:
        # safetensors wants each tensor to own its memory
        save_file(
            {name: tensor.detach().cpu().contiguous().clone() for name, tensor in flat.items()}, temporary, metadata
        )
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load(path: str | Path, *, device: torch.device | str = "cpu", model: Any = None) -> State:
    """Read a state that `save` wrote. With `model`, refuse a state that another model made.

    Raises:
        BestiaryError: the file is no state file, is damaged, or belongs to another model.
    """
    try:
        with safe_open(str(path), framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            if metadata.get("schema") != str(SCHEMA):
                raise BestiaryError(f"{path}: state schema {metadata.get('schema')!r}, this version reads {SCHEMA}")
            if model is not None and metadata.get("fingerprint") != model.fingerprint():
                raise BestiaryError(
                    f"{path} was saved by another model: its mixers are {metadata.get('mixers', 'not recorded')}, "
                    f"its fingerprint is {metadata.get('fingerprint', 'not recorded')}, not {model.fingerprint()}"
                )
            names = set(file.keys())
            return _rebuild(json.loads(metadata["structure"]), "state", file, names)
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError, TypeError) as error:
        raise BestiaryError(f"{path} is not a readable state file: {error}") from error


def _describe(state: State, name: str, flat: dict[str, Tensor]) -> Any:
    """JSON form of a state's structure; collects the tensors under dotted names."""
    if isinstance(state, Tensor):
        flat[name] = state
        return "tensor"
    if isinstance(state, tuple) and hasattr(state, "_fields"):
        if _types.get(type(state).__name__) is not type(state):
            raise UsageError(f"{type(state).__name__} is not registered: decorate it with @bestiary.state.register")
        parts = {field: _describe(part, f"{name}.{field}", flat) for field, part in zip(state._fields, state)}
        return {"type": type(state).__name__, "fields": parts}
    if isinstance(state, tuple):
        return [_describe(part, f"{name}.{i}", flat) for i, part in enumerate(state)]
    raise UsageError(f"a state is made of tensors and tuples, not of {type(state).__name__}")


def _rebuild(structure: Any, name: str, file: Any, names: set[str]) -> State:
    if structure == "tensor":
        if name not in names:
            raise BestiaryError(f"the state file lacks the tensor {name}")
        return file.get_tensor(name).clone()  # aligned memory: a product is the same to the last bit
    if isinstance(structure, list):
        return tuple(_rebuild(part, f"{name}.{i}", file, names) for i, part in enumerate(structure))
    cls = _types.get(structure["type"])
    if cls is None:
        raise BestiaryError(
            f"the state file holds a {structure['type']}, which is not registered; import its mixer first"
        )
    fields = structure["fields"]
    if set(fields) != set(cls._fields):  # type: ignore[attr-defined]
        raise BestiaryError(f"the state file's {structure['type']} has fields {sorted(fields)}, expected {cls._fields}")  # type: ignore[attr-defined]
    return cls(**{field: _rebuild(part, f"{name}.{field}", file, names) for field, part in fields.items()})
