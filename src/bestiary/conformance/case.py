"""One random experiment on a mixer: its parameters, its inputs, and where the sequence is cut."""

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bestiary.mixers.base import Mixer

Builder = Callable[[], Mixer]


@dataclass(frozen=True)
class Case:
    """A mixer with random parameters, a random sequence, and cuts; everything follows from the seed.

    Args:
        build: makes the mixer, e.g. `lambda: bestiary.mixers.build("gla", 32)`.
        seed: of the parameters and the inputs.
        batch: rows.
        time: steps.
        cuts: where the sequence is split, each in 0..time, in rising order; equal ones make empty segments.
        strong: large weights and inputs of very uneven size, so that gates open and shut entirely, in any order.
        dtype: of parameters and inputs.
        d_model: width of the inputs that the mixer takes.
    """

    build: Builder
    seed: int = 0
    batch: int = 2
    time: int = 12
    cuts: tuple[int, ...] = (5,)
    strong: bool = False
    dtype: torch.dtype = torch.float64
    d_model: int = 32

    @classmethod
    def draw(cls, build: Builder, seed: int, *, d_model: int = 32, longest: int = 80) -> "Case":
        """A random case; half of them strong, some with 0 to 3 steps."""
        rng = random.Random(seed)
        time = rng.choice([0, 1, 2, 3, rng.randint(4, 20), rng.randint(21, longest), rng.randint(21, longest)])
        cuts = tuple(sorted(rng.randint(0, time) for _ in range(rng.randint(1, 4))))
        return cls(build, seed, rng.randint(1, 3), time, cuts, strong=rng.random() < 0.5, d_model=d_model)

    def mixer(self) -> Mixer:
        """The mixer in eval mode, woken: matrices that start at zero are drawn at random, lest laws hold trivially."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            mixer = self.build()
            with torch.no_grad():
                for parameter in mixer.parameters():
                    if parameter.ndim >= 2 and not parameter.any():
                        parameter.normal_(std=0.2)
                    if self.strong:
                        parameter.mul_(2).add_(0.3 * torch.randn_like(parameter))
        return mixer.to(self.dtype).eval()

    def inputs(self, time: int | None = None, *, batch: int | None = None, salt: int = 0) -> Tensor:
        """(batch, time, d_model) random inputs; `salt` tells several draws apart."""
        time, batch = self.time if time is None else time, self.batch if batch is None else batch
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + salt)
        x = torch.randn(batch, time, self.d_model, generator=generator, dtype=torch.float64)
        if self.strong:  # steps of very uneven size: weak gates after strong ones, and the reverse
            size = torch.tensor([0.01, 1.0, 10.0], dtype=x.dtype)
            x = x * size[torch.randint(3, (batch, time, 1), generator=generator)]
        return x.to(self.dtype)

    def lengths(self) -> Tensor:
        """Random real lengths of a right-padded batch, 0 and `time` among them where there is room."""
        generator = torch.Generator().manual_seed(self.seed + 7)
        lengths = torch.randint(0, self.time + 1, (self.batch,), generator=generator)
        if self.batch > 1:
            lengths[0], lengths[-1] = self.time, torch.randint(0, 2, (), generator=generator) * lengths[-1]
        return lengths

    @property
    def segments(self) -> list[slice]:
        """The slices of time between the cuts."""
        bounds = [0, *self.cuts, self.time]
        return [slice(a, b) for a, b in itertools.pairwise(bounds)]
