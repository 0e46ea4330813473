"""Mixers side by side in one layer, all reading the same input (`+` in a layout).

norm    y = 1/n sum_i RMSNorm_i(mixer_i(x))          with learned scales: Hymba (Dong et al. 2024, arXiv:2411.13676)
sum     y = sum_i mixer_i(x)                         Falcon-H1 (Zuo et al. 2025, arXiv:2507.22448)
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from bestiary import state
from bestiary.errors import UsageError
from bestiary.mixers.base import Mixer
from bestiary.mixers.context import Context
from bestiary.mixers.parts import RMSNorm

JOINS = ("norm", "sum")


@state.register
class ParallelState(NamedTuple):
    """The state of each part."""

    parts: tuple[Any, ...]


class Parallel(Mixer):
    """Several mixers that work as one.

    Args:
        parts: the mixers, all of the same width.
        join: "norm" or "sum".
    """

    def __init__(self, parts: Sequence[Mixer], join: str = "norm"):
        if join not in JOINS or len(parts) < 2:
            raise UsageError(f"mixers side by side: two or more, joined by one of {', '.join(JOINS)}, not {join!r}")
        super().__init__(parts[0].d_model)
        self.parts = nn.ModuleList(parts)
        self.norms = nn.ModuleList(RMSNorm(self.d_model, eps=1e-5) for _ in parts) if join == "norm" else None
        self.causal = all(part.causal for part in parts)
        self.timed = any(part.timed for part in parts)
        self.cached_activations = tuple(name for part in parts for name in part.cached_activations)

    @property
    def members(self) -> list[Mixer]:
        """The parts, as mixers."""
        return [part for part in self.parts if isinstance(part, Mixer)]

    def reset_parameters(self) -> None:
        for module in (*self.members, *(self.norms or ())):
            module.reset_parameters()

    def initial_state(self, batch_size: int, *, device: Any = None, dtype: Any = None) -> ParallelState:
        return ParallelState(tuple(part.initial_state(batch_size, device=device, dtype=dtype) for part in self.members))

    def state_nbytes(self, time: int) -> int:
        return sum(part.state_nbytes(time) for part in self.members)

    def mixing_flops(self, context: int) -> float:
        return sum(part.mixing_flops(context) for part in self.members)

    def mix_in_context(
        self, x: Tensor, state: ParallelState, lengths: Tensor | None, context: Context
    ) -> tuple[Tensor, ParallelState]:
        found = [part(x, before, lengths=lengths, context=context) for part, before in zip(self.members, state.parts)]
        outputs = [y for y, _ in found]
        if self.norms is not None:
            outputs = [norm(y) / len(outputs) for norm, y in zip(self.norms, outputs)]
        return sum(outputs[1:], outputs[0]), ParallelState(tuple(after for _, after in found))
