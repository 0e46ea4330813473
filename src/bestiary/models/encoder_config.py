"""What an encoder and the models around it are, as values that are checked when they are made."""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, TypeVar

from bestiary.errors import UsageError, unknown
from bestiary.models import layout as grammar
from bestiary.models.norms import NORMS

BLOCKS, POOLS = ("pre", "post", "m2"), ("mean", "first", "last")
BYTES = 256
C = TypeVar("C", bound="EncoderConfig")


@dataclass(frozen=True)
class EncoderConfig:
    """The shape of an encoder, and of a masked language model.

    Args:
        layout: which mixer each layer has, e.g. "encoder_attention*4" or "bidirectional{mixer=mamba}*4"; see
            bestiary.models.layout. Causal mixers may be among them.
        d_model: width, a multiple of 32.
        vocab_size: number of token ids; 256 for bytes, the default where there are no features.
        features: numbers of a step, where inputs are real-valued sequences in place of tokens.
        max_length: most steps of a row, each place having a learned vector that is added; 0 for none, and any length.
        token_types: kinds of segments, each with a learned vector that is added (BERT: 2); 0 for none.
        norm: "rms", "layer" or "rms_outer"; see bestiary.models.norms.
        norm_eps: its epsilon.
        block: "pre": x + mixer(norm(x)), and a norm at the end; "post": norm(x + mixer(x)), as BERT; "m2":
            norm(h + mlp(h)) with h = mixer(x), as M2-BERT, whose mixer has a residual path of its own. The last two
            have a norm after the embeddings.
        dropout: share of the embeddings and of each part's outputs that training drops.
        embedding_std: standard deviation of the embeddings at initialisation.

    Raises UsageError where a field is wrong, naming the field, the value and what is allowed.
    """

    layout: str = "encoder_attention*4"
    d_model: int = 128
    vocab_size: int | None = None
    features: int | None = None
    max_length: int = 512
    token_types: int = 0
    norm: str = "layer"
    norm_eps: float = 1e-5
    block: str = "pre"
    dropout: float = 0.0
    embedding_std: float = 0.02

    def __post_init__(self) -> None:
        if self.vocab_size is None and self.features is None:
            object.__setattr__(self, "vocab_size", BYTES)
        for name, allowed in (("norm", NORMS), ("block", BLOCKS)):
            if getattr(self, name) not in allowed:
                raise unknown(name, str(getattr(self, name)), allowed)
        self._check(
            d_model=(self.d_model >= 32 and self.d_model % 32 == 0, "a positive multiple of 32"),
            vocab_size=(self.vocab_size is None or self.vocab_size >= 1, "a positive integer"),
            features=(self.features is None or self.features >= 1, "a positive integer"),
            max_length=(self.max_length >= 0, "at least 0"),
            token_types=(self.token_types >= 0, "at least 0"),
            norm_eps=(self.norm_eps > 0, "positive"),
            dropout=(0 <= self.dropout < 1, "in [0, 1)"),
            embedding_std=(self.embedding_std > 0, "positive"),
        )
        if self.vocab_size is not None and self.features is not None:
            raise UsageError("give vocab_size (inputs are tokens) or features (inputs are vectors), not both")
        if self.token_types and self.features is not None:
            raise UsageError("token_types go with tokens: leave them at 0 where inputs are vectors")
        if self.block == "m2":
            for layer in self.layers:
                if layer.channel is None:
                    raise UsageError(
                        f"block='m2' wants a channel mixer in every layer; give {layer.mixer} a channel=NAME"
                    )
        grammar.parse(self.layout)

    def _check(self, **rules: tuple[bool, str]) -> None:
        for name, (holds, allowed) in rules.items():
            if not holds:
                raise UsageError(f"{name} must be {allowed}, not {getattr(self, name)!r}")

    @property
    def layers(self) -> list[grammar.Layer]:
        """The layers that the layout spells out."""
        return grammar.parse(self.layout)

    def to_dict(self) -> dict[str, Any]:
        """All fields that are set by hand, ready for JSON."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}

    @classmethod
    def from_dict(cls: type[C], fields: dict[str, Any]) -> C:
        """The inverse of `to_dict`; an unknown field is an error that lists the valid ones."""
        valid = {f.name for f in dataclasses.fields(cls) if f.init}
        for name in fields:
            if name not in valid:
                raise unknown(f"field of {cls.__name__}", name, valid)
        return cls(**fields)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)


@dataclass(frozen=True)
class ClassifierConfig(EncoderConfig):
    """The shape of a classifier of sequences: an encoder's, and further

    Args:
        n_classes: number of classes.
        pool: what of a row the classes are read from: the "mean" of its real steps, the "first" one or the "last" one.
    """

    n_classes: int = 2
    pool: str = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pool not in POOLS:
            raise unknown("pool", self.pool, POOLS)
        self._check(n_classes=(self.n_classes >= 1, "at least 1"))


@dataclass(frozen=True)
class ImageConfig(ClassifierConfig):
    """The shape of a classifier of images, which an encoder reads patch by patch, row after row.

    Args:
        height, width: of the images, in pixels.
        channels: numbers of a pixel.
        patch: side of a square patch; divides height and width.

    `features` and `max_length` follow from these; there are no tokens.
    """

    vocab_size: None = field(init=False, default=None)
    features: int | None = field(init=False, default=None)
    max_length: int = field(init=False, default=0)
    token_types: int = field(init=False, default=0)
    n_classes: int = 10
    height: int = 28
    width: int = 28
    channels: int = 1
    patch: int = 4

    def __post_init__(self) -> None:
        self._check(channels=(self.channels >= 1, "at least 1"), patch=(self.patch >= 1, "at least 1"))
        for name in ("height", "width"):
            size = getattr(self, name)
            if size < 1 or size % self.patch:
                raise UsageError(f"{name} must be a positive multiple of patch={self.patch}, not {size}")
        object.__setattr__(self, "features", self.channels * self.patch**2)
        object.__setattr__(self, "max_length", self.height * self.width // self.patch**2)
        super().__post_init__()
