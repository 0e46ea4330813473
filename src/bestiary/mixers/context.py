"""What the parts of a model share during one call, beside the stream between them; it is never part of a state."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from jaxtyping import Float, Int
from torch import Tensor, nn

from bestiary.errors import UsageError


@dataclass
class Context:
    """Made anew for every call of a model; a part that reads or writes it overrides `mix_in_context`.

    Args:
        embeddings: the model's input embeddings, of the same steps as x.
        intervals: time that passes before each step, in units of a usual step; None where all are 1.
        v_first: values of the first RWKV-7 layer; that layer sets it.
        losses: what training adds to the loss (a router's balance), set by the parts.
        measures: what parts tell about themselves (a router's load), by name, one entry a part and call.
    """

    embeddings: Float[Tensor, "batch time d_model"] | None = None
    intervals: Float[Tensor, "batch time"] | None = None
    v_first: Tensor | None = None
    losses: list[Tensor] = field(default_factory=list)
    measures: dict[str, list[Tensor]] = field(default_factory=dict)

    def unpacked(self, cu_seqlens: Int[Tensor, " bounds"]) -> Context:
        """The same, its packed tensors as right-padded rows, one a document; losses and measures stay shared."""
        return replace(
            self,
            embeddings=None if self.embeddings is None else unpack(self.embeddings, cu_seqlens)[0],
            intervals=None if self.intervals is None else unpack(self.intervals, cu_seqlens)[0],
        )


def unpack(x: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Packed documents (1, total, ...) -> right-padded rows (documents, longest, ...) and their lengths."""
    bounds = cu_seqlens.tolist()
    if x.shape[0] != 1:
        raise UsageError(f"packed documents come as a batch of one, not of {x.shape[0]}")
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != x.shape[1] or bounds != sorted(bounds):
        raise UsageError(f"cu_seqlens must rise from 0 to the packed length {x.shape[1]}, not {bounds}")
    documents = x[0].tensor_split(bounds[1:-1])
    return nn.utils.rnn.pad_sequence(list(documents), batch_first=True), cu_seqlens.diff()
