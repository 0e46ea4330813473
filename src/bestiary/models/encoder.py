"""Models that read a sequence as a whole: an encoder (see encoder_stack.py) and a head.

MaskedLanguageModel     which token stands at a place, from both sides     E norm(gelu(dense(x_t))) + b, E: embedding
SequenceClassifier      the class of a row of tokens or vectors            W pool(x) + b
ImageClassifier         the class of an image, read patch by patch
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from bestiary import state as states
from bestiary.errors import UsageError
from bestiary.mixers import Context
from bestiary.mixers.parts import Linear, gpt_init
from bestiary.models.encoder_config import ClassifierConfig, EncoderConfig, ImageConfig
from bestiary.models.encoder_stack import Encoder
from bestiary.models.loss import linear_cross_entropy
from bestiary.models.norms import make_norm

__all__ = [
    "ClassifierConfig",
    "Encoder",
    "EncoderConfig",
    "EncoderModel",
    "ImageClassifier",
    "ImageConfig",
    "MaskedLanguageModel",
    "SequenceClassifier",
]


class EncoderModel(nn.Module):
    """An encoder, its configuration, and what a head makes of it."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)

    def n_parameters(self) -> int:
        """Number of parameters, shared ones once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def mixer_names(self) -> list[str]:
        """The sequence mixers' names, layer by layer."""
        return [block.mixer.name for block in self.encoder.blocks]  # type: ignore[union-attr, misc]


class MaskedLanguageModel(EncoderModel):
    """Says which token stands at a place, from both sides: dense, GELU, norm, and a decoder tied to the embedding."""

    def __init__(self, config: EncoderConfig):
        super().__init__(config)
        if config.vocab_size is None:
            raise UsageError("a masked language model reads tokens: give vocab_size, not features")
        self.dense, self.norm = Linear(config.d_model, config.d_model), make_norm(config)
        self.decoder = Linear(config.d_model, config.vocab_size)
        gpt_init(self.dense, config.d_model)
        nn.init.zeros_(self.decoder.bias)
        self.decoder.weight = self.encoder.embedding.weight

    def transform(self, hidden: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """What the decoder sees."""
        return self.norm(F.gelu(self.dense(hidden)))

    def forward(self, tokens: Int[Tensor, "batch time"], **rows: Any) -> Float[Tensor, "batch time vocab"]:
        """Logits of the token at every position; `rows` as in `Encoder.forward`."""
        return self.decoder(self.transform(self.encoder(tokens, **rows)))

    def loss(
        self, tokens: Int[Tensor, "batch time"], targets: Int[Tensor, "batch time"], **rows: Any
    ) -> tuple[Float[Tensor, ""], states.Empty]:
        """Mean cross-entropy in nats where targets are 0 or more, and an empty state, since training hands states on.

        Logits exist at these positions alone. In training mode, what parts of the model ask for beside it is added.
        """
        context = Context()
        hidden = self.encoder(tokens, context=context, **rows)
        wanted = targets >= 0
        hidden = self.transform(hidden[wanted])
        loss = linear_cross_entropy(hidden, self.decoder.weight, targets[wanted], bias=self.decoder.bias)
        return sum(context.losses, loss), states.Empty()


class SequenceClassifier(EncoderModel):
    """Classes of token sequences, or of real-valued ones (batch, time, features)."""

    config: ClassifierConfig

    def __init__(self, config: ClassifierConfig):
        super().__init__(config)
        self.dropout = nn.Dropout(config.dropout)
        self.head = Linear(config.d_model, config.n_classes)
        gpt_init(self.head, config.d_model)

    @staticmethod
    def from_pretrained(
        model: EncoderModel, *, n_classes: int = 2, pool: str = "mean", dropout: float | None = None
    ) -> "SequenceClassifier":
        """A classifier that begins with the weights of another model's encoder, and a new head."""
        fields = {name: getattr(model.config, name) for name in EncoderConfig.__dataclass_fields__}
        if dropout is not None:
            fields["dropout"] = dropout
        made = SequenceClassifier(ClassifierConfig(**fields, n_classes=n_classes, pool=pool))
        weight = model.encoder.embedding.weight
        made = made.to(device=weight.device, dtype=weight.dtype)
        made.encoder.load_state_dict(model.encoder.state_dict())
        return made

    def forward(self, inputs: Tensor, **rows: Any) -> Float[Tensor, "batch classes"]:
        """Logits of the classes; `rows` as in `Encoder.forward`, without `cu_seqlens`."""
        return self.head(self.pooled(inputs, **rows))

    def loss(
        self, inputs: Tensor, targets: Int[Tensor, " batch"], **rows: Any
    ) -> tuple[Float[Tensor, ""], states.Empty]:
        """Mean cross-entropy in nats of the rows whose class is given (0 or more), and an empty state."""
        context = Context()
        pooled = self.pooled(inputs, context=context, **rows)
        loss = linear_cross_entropy(pooled, self.head.weight, targets, bias=self.head.bias)
        return sum(context.losses, loss), states.Empty()

    def pooled(
        self, inputs: Tensor, *, lengths: Int[Tensor, " batch"] | None = None, **rows: Any
    ) -> Float[Tensor, "batch d_model"]:
        """One vector a row; that of an empty row is zero."""
        if rows.get("cu_seqlens") is not None:
            raise UsageError("a classifier reads rows: give lengths (a padded batch), not cu_seqlens")
        hidden = self.encoder(inputs, lengths=lengths, **rows)
        batch, time = hidden.shape[:2]
        lengths = torch.full((batch,), time, device=hidden.device) if lengths is None else lengths
        if self.config.pool == "mean":
            wide = torch.promote_types(hidden.dtype, torch.float32)
            pooled = hidden.sum(1, dtype=wide) / lengths.clamp(min=1)[:, None]
        elif self.config.pool == "first" or not time:
            pooled = hidden[:, :1].sum(1)
        else:
            pooled = hidden[torch.arange(batch, device=hidden.device), (lengths - 1).clamp(min=0)]
        return self.dropout(pooled.to(hidden.dtype))


class ImageClassifier(SequenceClassifier):
    """Classes of images (batch, channels, height, width), or (batch, height, width) of one channel: a ViT's patches
    (Dosovitskiy et al. 2020, arXiv:2010.11929) through any encoder."""

    config: ImageConfig

    def __init__(self, config: ImageConfig):
        super().__init__(config)

    def pooled(self, inputs: Tensor, **rows: Any) -> Float[Tensor, "batch d_model"]:
        config = self.config
        images = inputs[:, None] if inputs.ndim == 3 else inputs
        wanted = (config.channels, config.height, config.width)
        if tuple(images.shape[1:]) != wanted:
            raise UsageError(f"images must be (batch, {', '.join(map(str, wanted))}), not {tuple(inputs.shape)}")
        if rows.get("lengths") is not None:
            raise UsageError("images are all of one size: give no lengths")
        return super().pooled(patches(images, config.patch), **rows)


def patches(images: Float[Tensor, "batch channels height width"], size: int) -> Float[Tensor, "batch patches features"]:
    """Square patches row by row, each as one vector."""
    batch, channels, height, width = images.shape
    cut = images.reshape(batch, channels, height // size, size, width // size, size)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * size * size)
