"""What a language model is, as a value that is checked when it is made and lies as JSON beside the weights."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from bestiary.errors import UsageError, unknown
from bestiary.models import layout as grammar


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a language model.

    Args:
        layout: which mixer each layer has, e.g. "mamba*4" or "(hyena*3 attention)*2"; see bestiary.models.layout.
        d_model: width, a multiple of 32.
        vocab_size: number of token ids; 256 for bytes.
        norm: "rms" or "layer", before every mixer and before the head.
        norm_eps: its epsilon.
        tie_embeddings: whether the head's weight is the embedding's.
        embedding_std: standard deviation of the embedding at initialisation; by default GPT-2's 0.02 at its width 768,
            scaled by 1/sqrt(width) to others (0.02 at small widths holds attention up for hundreds of steps).

    Raises UsageError where a field is wrong, naming the field, the value and what is allowed.
    """

    layout: str = "mamba*4"
    d_model: int = 128
    vocab_size: int = 256
    norm: str = "rms"
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    embedding_std: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.d_model, int) or self.d_model < 32 or self.d_model % 32:
            raise UsageError(f"d_model must be a positive multiple of 32, not {self.d_model!r}")
        if not isinstance(self.vocab_size, int) or self.vocab_size < 1:
            raise UsageError(f"vocab_size must be a positive integer, not {self.vocab_size!r}")
        if self.norm not in ("rms", "layer"):
            raise unknown("norm", str(self.norm), ("rms", "layer"))
        if not self.norm_eps > 0:
            raise UsageError(f"norm_eps must be positive, not {self.norm_eps!r}")
        if self.embedding_std is not None and not self.embedding_std > 0:
            raise UsageError(f"embedding_std must be positive, not {self.embedding_std!r}")
        grammar.parse(self.layout)

    @property
    def layers(self) -> list[grammar.Layer]:
        """The layers that the layout spells out."""
        return grammar.parse(self.layout)

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "ModelConfig":
        """The inverse of `to_dict`; an unknown field is an error that lists the valid ones."""
        valid = {field.name for field in dataclasses.fields(cls)}
        for name in fields:
            if name not in valid:
                raise unknown("field of ModelConfig", name, valid)
        return cls(**fields)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)
