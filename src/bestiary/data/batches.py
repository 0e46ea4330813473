"""Batches as pure functions of (seed, step): resuming needs no state, and ranks need not talk.

An epoch cuts the corpus into n windows of `time` tokens, beginning at an offset of the epoch's own in [0, time), and
visits each window once, in a pseudo-random order of the epoch's own. Sample k of the run (k = step * batch_size + row)
is the window

    permutation_{k // n}(k % n),        n = (tokens - time) // time

where the permutation of [0, n) is an eight-round Feistel network on the next even number of bits, walked until it falls
into [0, n): a few integer operations for each sample, nothing to store, the same on every machine and version. So an
epoch sees each token at most once, and all but those before its offset and a rest of less than a window at the end.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from bestiary.errors import UsageError


@runtime_checkable
class Tokens(Protocol):
    """A sequence of ids: an int array, or `shards.Shards`."""

    def __len__(self) -> int: ...

    def __getitem__(self, window: slice, /) -> np.ndarray: ...


@dataclass(frozen=True)
class Batches:
    """Random windows of a corpus.

    Args:
        tokens: the corpus.
        batch_size: rows of the global batch, whatever the number of ranks.
        time: tokens of a row.
        seed: another seed gives another order.
        rank, world: which share of the rows `batch` gives; see `slice`.

    Raises UsageError where a number is out of range, the corpus too short, or ranks cannot share the rows equally.
    """

    tokens: Tokens
    batch_size: int
    time: int
    seed: int = 0
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        for name in ("batch_size", "time", "world"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}")
        if len(self.tokens) < self.time + 1:
            raise UsageError(
                f"the corpus has {len(self.tokens)} tokens, too few for a window of {self.time} and its next token; "
                "give more text or a smaller time"
            )
        if not 0 <= self.rank < self.world:
            raise UsageError(f"rank must lie in [0, {self.world}), not {self.rank}")
        if self.batch_size % self.world:
            raise UsageError(f"batch_size {self.batch_size} is no multiple of the number of ranks, {self.world}")

    @property
    def windows(self) -> int:
        """Windows of an epoch."""
        return max(1, (len(self.tokens) - self.time) // self.time)

    def slice(self, rank: int, world: int) -> "Batches":
        """The same batches, as rank `rank` of `world` sees them: `batch` gives equal runs of rows, in order of rank."""
        return replace(self, rank=rank, world=world)

    def batch(self, step: int) -> tuple[Int64[Tensor, "rows time"], Int64[Tensor, "rows time"]]:
        """This rank's rows of the global batch at a step: (inputs, targets), the targets one token further."""
        rows = self.batch_size // self.world
        return self._rows(step, self.rank * rows, rows)

    def global_batch(self, step: int) -> tuple[Int64[Tensor, "batch time"], Int64[Tensor, "batch time"]]:
        """All rows of a step: (inputs, targets)."""
        return self._rows(step, 0, self.batch_size)

    def starts(self, step: int) -> np.ndarray:
        """Where in the corpus each row of the global batch begins, (batch,) int64."""
        return self._starts(step * self.batch_size + np.arange(self.batch_size))

    def _rows(self, step: int, first: int, count: int) -> tuple[Tensor, Tensor]:
        if step < 0:
            raise UsageError(f"step must be at least 0, not {step}")
        starts = self._starts(step * self.batch_size + first + np.arange(count))
        rows = torch.from_numpy(np.stack([self.tokens[start : start + self.time + 1] for start in starts.tolist()]))
        rows = rows.to(torch.int64)
        return rows[:, :-1], rows[:, 1:]

    def _starts(self, samples: np.ndarray) -> np.ndarray:
        epoch, place = np.divmod(samples, self.windows)
        room = min(self.time, len(self.tokens) - self.windows * self.time)
        offset = (_hash(self.seed, epoch, 0) % np.uint64(room)).astype(np.int64)
        return offset + permuted(place, self.windows, self.seed, epoch) * self.time


def in_order(
    tokens: Tokens, batch_size: int, time: int
) -> Iterator[tuple[Int64[Tensor, "rows time"], Int64[Tensor, "rows time"], Bool[Tensor, "rows time"]]]:
    """Every token but the first exactly once as a target, for validation: yields (inputs, targets, mask).

    Windows follow each other without overlap. The last row is filled up with zeros, which the mask excludes.
    """
    count = len(tokens) - 1
    for first in range(0, count, batch_size * time):
        ids = tokens[first : first + batch_size * time + 1]
        real = len(ids) - 1
        rows = -(-real // time)
        filled = np.zeros((2, rows * time), np.int64)
        filled[0, :real], filled[1, :real] = ids[:-1], ids[1:]
        inputs, targets = torch.from_numpy(filled.reshape(2, rows, time))
        yield inputs, targets, (torch.arange(rows * time) < real).reshape(rows, time)


def permuted(place: np.ndarray, n: int, seed: int, epoch: np.ndarray) -> np.ndarray:
    """Where a pseudo-random permutation of [0, n), one for each (seed, epoch), sends each place."""
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    value = place.astype(np.uint64)
    todo = np.ones(len(value), bool)
    while todo.any():  # at most 4 n values: 4 walks on average
        left, right = value[todo] >> half, value[todo] & low
        for turn in range(1, 9):  # fewer favour some orders of few windows
            left, right = right, left ^ (_hash(seed, epoch[todo], turn, right) & low)
        value[todo] = left << half | right
        todo = value >= n
    return value.astype(np.int64)


def _hash(seed: int, epoch: np.ndarray, turn: int, value: np.ndarray | int = 0) -> np.ndarray:
    """64 well-mixed bits of four numbers (splitmix64's finaliser, applied after each)."""
    mixed = np.zeros(len(epoch), np.uint64)
    for part in (np.uint64(seed % (1 << 64)), epoch.astype(np.uint64), np.uint64(turn), np.asarray(value, np.uint64)):
        mixed = (mixed ^ part) + np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ mixed >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ mixed >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        mixed = mixed ^ mixed >> np.uint64(31)
    return mixed
