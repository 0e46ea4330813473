"""Examples with classes: rows of one size, or token rows of any lengths, and batches of them.

Sample k of a run (k = step * batch_size + row) is the example permutation_{k // n}(k % n) of an epoch's own order, so
that a batch is a pure function of (seed, step); see bestiary.data.batches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from bestiary.data.batches import permuted
from bestiary.errors import UsageError

Rows = tuple[Tensor, Int64[Tensor, " batch"], dict[str, Tensor]]


@dataclass(frozen=True)
class Labelled:
    """Inputs and their classes.

    Args:
        inputs: one tensor, rows first, of equal rows (images, series); or a tuple of 1-D token rows of any lengths.
        labels: (rows,) int64, the class of each.
        kinds: for each token row the kind of each token, where a model tells the texts of a pair apart.
    """

    inputs: Tensor | tuple[Tensor, ...]
    labels: Tensor
    kinds: tuple[Tensor, ...] | None = None

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.labels) or not len(self.labels):
            raise UsageError(f"{len(self.inputs)} inputs for {len(self.labels)} labels: give as many, at least one")
        if self.kinds is not None and [len(row) for row in self.kinds] != [len(row) for row in self.inputs]:
            raise UsageError("kinds must be as long as the token rows, one for each")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def n_classes(self) -> int:
        """The highest class, and one."""
        return int(self.labels.max()) + 1

    def rows(self, index: Sequence[int] | np.ndarray) -> Rows:
        """(inputs, labels, further arguments of a classifier): token rows are right-padded, and lengths come along."""
        chosen = [int(i) for i in index]
        labels, more = self.labels[chosen], dict[str, Tensor]()
        if isinstance(self.inputs, Tensor):
            return self.inputs[chosen], labels, more
        more["lengths"] = torch.tensor([len(self.inputs[i]) for i in chosen])
        if self.kinds is not None:
            more["token_types"] = _padded([self.kinds[i] for i in chosen])
        return _padded([self.inputs[i] for i in chosen]), labels, more


@dataclass(frozen=True)
class LabelledBatches:
    """Random batches of examples, each example once an epoch."""

    data: Labelled
    batch_size: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UsageError(f"batch_size must be at least 1, not {self.batch_size}")

    def global_batch(self, step: int) -> Rows:
        """(inputs, labels, further arguments of a classifier) of a step."""
        sample, n = step * self.batch_size + np.arange(self.batch_size), len(self.data)
        return self.data.rows(permuted(sample % n, n, self.seed, sample // n))


def split(data: Labelled, held_out: float, seed: int = 0) -> tuple[Labelled, Labelled]:
    """(train, test), the latter a random share of the examples; the same for the same seed.

    Raises UsageError where one of them would be empty.
    """
    n = len(data)
    order, cut = permuted(np.arange(n), n, seed, np.zeros(n, np.int64)), n - round(held_out * n)
    if not 0 < cut < n:
        raise UsageError(f"cannot hold out {held_out} of {n} examples")
    return _select(data, order[:cut]), _select(data, order[cut:])


def _select(data: Labelled, index: np.ndarray) -> Labelled:
    def pick(rows: Any) -> Any:
        if rows is None or isinstance(rows, Tensor):
            return None if rows is None else rows[torch.from_numpy(index)]
        return tuple(rows[i] for i in index.tolist())

    return Labelled(pick(data.inputs), pick(data.labels), pick(data.kinds))


def _padded(rows: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
