"""How our parameters are made of the tensors of a published layout, and back.

A Key joins some of our names to some of theirs by a Form: two functions, each the other's inverse. What shapes their
tensors must have follows from ours by the form, so that a mis-shaped one is found before anything is read.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Tensors = list[Tensor]


@dataclass(frozen=True)
class Form:
    """`read` makes our tensors of theirs; `write` is its inverse."""

    read: Callable[[Tensors], Tensors]
    write: Callable[[Tensors], Tensors]


SAME = Form(lambda tensors: tensors, lambda tensors: tensors)
CHANNELS = Form(  # weights of a depthwise convolution: (channels, 1, taps) there, (channels, taps) here
    lambda tensors: [tensor.squeeze(1) for tensor in tensors],
    lambda tensors: [tensor.unsqueeze(1) for tensor in tensors],
)
FROM_ONE = Form(  # weights of a norm that are stored as their distance from one
    lambda tensors: [tensor + 1 for tensor in tensors], lambda tensors: [tensor - 1 for tensor in tensors]
)


def blocks(count: int) -> Form:
    """Vectors that are stored as a matrix with a row a block."""
    return Form(
        lambda tensors: [tensor.flatten() for tensor in tensors],
        lambda tensors: [tensor.unflatten(0, (count, -1)) for tensor in tensors],
    )


def rows(ours: Sequence[int], theirs: Sequence[int], order: Callable[[], Tensor] | None = None) -> Form:
    """Tensors of these many rows: theirs one after the other, in another order, cut into ours.

    Args:
        ours, theirs: rows of each tensor; their sums are equal.
        order: gives which of their rows each of ours is, once shapes are known to be right; None for the same order.
    """

    def read(tensors: Tensors) -> Tensors:
        whole = torch.cat(tensors)
        return list((whole if order is None else whole[order()]).split(list(ours)))

    def write(tensors: Tensors) -> Tensors:
        whole = torch.cat(tensors)
        if order is not None and not whole.is_meta:  # without numbers there is nothing to put in order
            whole = whole[order().argsort()]
        return list(whole.split(list(theirs)))

    return Form(read, write)


def grouped(sizes: Sequence[int], groups: int) -> Callable[[], Tensor]:
    """The order for `rows` where theirs interleaves parts group by group: [a_1, b_1, a_2, b_2, ...] for [a, b].

    Args:
        sizes: rows of each part in one group.
    """

    def order() -> Tensor:
        index = torch.arange(groups * sum(sizes)).reshape(groups, -1)
        return torch.cat([part.flatten() for part in index.split(list(sizes), dim=1)])

    return order


@dataclass(frozen=True)
class Key:
    """Some of our parameters, and the published tensors that hold them."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    form: Form = SAME


def same(ours: str, theirs: str, *parts: str, form: Form = SAME) -> list[Key]:
    """A key each for parts of a module, e.g. "weight" and "bias"; without parts, for the names as they are."""
    if not parts:
        return [Key((ours,), (theirs,), form)]
    return [Key((f"{ours}.{part}",), (f"{theirs}.{part}",), form) for part in parts]


def affine(bias: bool) -> tuple[str, ...]:
    """The parts of a linear map."""
    return ("weight", "bias") if bias else ("weight",)


def joined(ours: str, theirs: Sequence[str], sizes: Sequence[int], *, bias: bool = False) -> list[Key]:
    """A linear map of ours whose output is that of several of theirs, one after the other."""
    form = rows([sum(sizes)], sizes)
    return [Key((f"{ours}.{part}",), tuple(f"{name}.{part}" for name in theirs), form) for part in affine(bias)]


def prefixed(ours: str, theirs: str, keys: Sequence[Key]) -> list[Key]:
    """The same keys below other modules."""
    return [Key(tuple(ours + n for n in key.ours), tuple(theirs + n for n in key.theirs), key.form) for key in keys]
