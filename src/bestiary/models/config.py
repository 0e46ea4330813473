"""What a language model is, as a value that is checked when it is made and lies as JSON beside the weights."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from bestiary.errors import UsageError, unknown
from bestiary.models import layout as grammar
from bestiary.models.norms import NORMS


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a language model.

    Args:
        layout: which mixer each layer has, e.g. "mamba*4" or "(hyena*3 attention)*2"; see bestiary.models.layout.
        d_model: width, a multiple of 32.
        vocab_size: number of token ids; 256 for bytes.
        norm: "rms", "layer" or "rms_outer" (see bestiary.models.norms), before every mixer and before the head.
        norm_eps: its epsilon.
        tie_embeddings: whether the head's weight is the embedding's.
        embedding_std: standard deviation of the embedding at initialisation; by default GPT-2's 0.02 at its width 768,
            scaled by 1/sqrt(width) to others (0.02 at small widths holds attention up for hundreds of steps).
        embedding_scale: what embeddings are multiplied by (Gemma: the root of the width).
        embedding_norm: whether they go through a norm of their own before the first layer (RWKV).
        parallel_residual: whether a layer's channel mixer reads what its mixer reads, instead of its sum (GPT-NeoX).
        logit_cap: logits stay within +-logit_cap by a tanh; None for no cap.

    Raises UsageError where a field is wrong, naming the field, the value and what is allowed.
    """

    layout: str = "mamba*4"
    d_model: int = 128
    vocab_size: int = 256
    norm: str = "rms"
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    embedding_std: float | None = None
    embedding_scale: float = 1.0
    embedding_norm: bool = False
    parallel_residual: bool = False
    logit_cap: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.d_model, int) or self.d_model < 32 or self.d_model % 32:
            raise UsageError(f"d_model must be a positive multiple of 32, not {self.d_model!r}")
        if not isinstance(self.vocab_size, int) or self.vocab_size < 1:
            raise UsageError(f"vocab_size must be a positive integer, not {self.vocab_size!r}")
        if self.norm not in NORMS:
            raise unknown("norm", str(self.norm), NORMS)
        for name in ("norm_eps", "embedding_std", "embedding_scale", "logit_cap"):
            value = getattr(self, name)
            if not (value is None and name in ("embedding_std", "logit_cap")) and not value > 0:
                raise UsageError(f"{name} must be positive, not {value!r}")
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
