"""Multi-query associative recall (Arora et al., Zoology, 2023, arXiv:2312.04927): the task on which mixers differ most.

    k1 v1 k2 v2 ... kn vn  .  .  k2 .  .  k1 .  ...        at every repeated key, predict its value

Keys and values are distinct tokens, drawn anew for each sequence, so nothing can be memorised. The n queries fall on
even positions after the pairs, nearer ones more often (slot i with weight i^(power - 1)). Positions in between hold
random values ("filler"), which are never keys.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from bestiary.errors import UsageError


@dataclass(frozen=True)
class Recall:
    """The task: `pairs` keys and values, then one query for each key, in `length` tokens.

    Args:
        vocab_size: token 0 is never used; keys come from the lower half, values from the upper.
        power: exponent of the queries' distances (0.01 as published: about 1/i).
    """

    pairs: int = 8
    length: int = 64
    vocab_size: int = 512
    power: float = 0.01

    def __post_init__(self) -> None:
        if self.pairs < 1 or 4 * self.pairs > self.length or self.length % 2:
            raise UsageError(f"length must be even and at least 4 pairs = {4 * self.pairs}, not {self.length}")
        if self.vocab_size // 2 <= self.pairs:
            raise UsageError(f"vocab_size must be more than twice the pairs, not {self.vocab_size}")

    @property
    def chance(self) -> float:
        """Accuracy of answering with any of the values in the context."""
        return 1 / self.pairs

    def batch(
        self, size: int, seed: int
    ) -> tuple[Int[Tensor, "batch length"], Int[Tensor, "batch pairs"], Int[Tensor, "batch pairs"]]:
        """`size` sequences: (tokens, positions of the queries, the values to predict there); a function of the seed."""
        generator = torch.Generator().manual_seed(seed)
        half, context = self.vocab_size // 2, 2 * self.pairs
        keys = _distinct(size, half - 1, self.pairs, generator) + 1
        values = _distinct(size, self.vocab_size - half, self.pairs, generator) + half
        slots = torch.arange(1, (self.length - context) // 2 + 1, dtype=torch.float64)
        # the largest of log weight + Gumbel noise are draws without replacement by weight
        noise = -torch.rand(size, len(slots), generator=generator, dtype=torch.float64).clamp(1e-300).log()
        chosen = ((self.power - 1) * slots.log() - noise.log()).topk(self.pairs, dim=1).indices
        positions = context + 2 * chosen
        tokens = torch.randint(half, self.vocab_size, (size, self.length), generator=generator)
        tokens[:, 0:context:2], tokens[:, 1:context:2] = keys, values
        return tokens.scatter(1, positions, keys), positions, values


def _distinct(rows: int, n: int, k: int, generator: torch.Generator) -> Tensor:
    """k distinct numbers below n in each row."""
    return torch.rand(rows, n, generator=generator).topk(k, dim=1).indices
