"""Encoders: stacks of mixers that read a sequence as a whole.

x = embedding + position + token type                       tokens, or vectors through a linear map
x = x + mixer(norm(x));    x = x + mlp(norm(x))             block "pre", and a norm at the end
x = norm(x + mixer(x));    x = norm(x + mlp(x))             block "post": BERT (Devlin et al. 2018, arXiv:1810.04805)
h = mixer(x);              x = norm(h + mlp(h))             block "m2": M2-BERT (Fu et al. 2023, arXiv:2310.12109)

Rows of different lengths come right-padded with `lengths`; padding changes nothing, whatever it holds.
"""

import functools
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bestiary.errors import UsageError
from bestiary.mixers import Context
from bestiary.mixers.base import check_lengths, keep_real, numbers_at_hand, real_steps
from bestiary.mixers.context import unpack
from bestiary.mixers.parts import Linear
from bestiary.models.encoder_config import EncoderConfig
from bestiary.models.layout import Layer, build_blocks
from bestiary.models.norms import make_norm


class EncoderBlock(nn.Module):
    """One layer: a sequence mixer, causal or not, and perhaps a channel mixer, in one of the three forms above."""

    def __init__(self, layer: Layer, config: EncoderConfig, **place: int):
        super().__init__()
        self.form = config.block
        self.mixer = layer.build_mixer(config.d_model, **place)
        self.norm = None if self.form == "m2" else make_norm(config)
        self.channel_norm = None if layer.channel is None else make_norm(config)
        self.channel = layer.build_channel(config.d_model, **place)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, **rows: Any) -> Tensor:
        """A batch through the layer; `rows` are `lengths`, `cu_seqlens` and `context` of the mixers' contract."""
        if self.norm is None:
            x = self.dropout(self.mixer(x, **rows)[0])
        else:
            x = self._beside(self.mixer, self.norm, x, rows)
        if self.channel is None or self.channel_norm is None:
            return x
        return self._beside(self.channel, self.channel_norm, x, rows)

    def _beside(self, part: nn.Module, norm: nn.Module, x: Tensor, rows: dict[str, Any]) -> Tensor:
        """A part beside a residual path, with its norm before it or after the sum."""
        if self.form == "pre":
            return x + self.dropout(part(norm(x), **rows)[0])
        return norm(x + self.dropout(part(x, **rows)[0]))


class Encoder(nn.Module):
    """A stack of blocks over tokens or vectors: `hidden = encoder(inputs, lengths=lengths)`."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        d_model, std = config.d_model, config.embedding_std
        self.embedding: nn.Embedding | nn.Linear
        if config.vocab_size is not None:
            self.embedding = nn.Embedding(config.vocab_size, d_model)
            nn.init.normal_(self.embedding.weight, std=std)
        else:
            assert config.features is not None  # the configuration has one of the two
            self.embedding = Linear(config.features, d_model)
            nn.init.normal_(self.embedding.weight, std=std * config.features**-0.5)  # as large as positions
            nn.init.zeros_(self.embedding.bias)
        self.positions = nn.Embedding(config.max_length, d_model) if config.max_length else None
        self.types = nn.Embedding(config.token_types, d_model) if config.token_types else None
        for table in (self.positions, self.types):
            if table is not None:
                nn.init.normal_(table.weight, std=std)
        inside = config.block != "pre"
        self.embedding_norm = make_norm(config) if inside else None
        self.norm = None if inside else make_norm(config)
        # where norms stand inside the residual path, it does not grow with depth, and nothing is scaled down
        make = functools.partial(EncoderBlock, config=config)
        self.blocks = build_blocks(config.layers, make, residuals=1 if inside else None)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        inputs: Int[Tensor, "batch time"] | Float[Tensor, "batch time features"],
        *,
        lengths: Int[Tensor, " batch"] | None = None,
        cu_seqlens: Int[Tensor, " bounds"] | None = None,
        token_types: Int[Tensor, "batch time"] | None = None,
        context: Context | None = None,
    ) -> Float[Tensor, "batch time d_model"]:
        """What each step is in the light of all others, zero at padding.

        Args:
            lengths: real steps of each row of a right-padded batch; padding may hold anything.
            cu_seqlens: bounds of documents packed into a batch of one, each encoded alone; excludes `lengths`.
            token_types: kind of each token, 0 by default, where the model tells kinds apart.
            context: what the parts share during this call; see bestiary.mixers.
        """
        context = Context() if context is None else context
        x = context.embeddings = self.embed(inputs, lengths, cu_seqlens, token_types)
        for block in self.blocks:
            x = block(x, lengths=lengths, cu_seqlens=cu_seqlens, context=context)
        return keep_real(x if self.norm is None else self.norm(x), lengths)

    def embed(
        self, inputs: Tensor, lengths: Tensor | None, cu_seqlens: Tensor | None, token_types: Tensor | None
    ) -> Float[Tensor, "batch time d_model"]:
        """What the first block sees."""
        if lengths is not None:
            check_lengths(lengths, inputs)
            inputs = _blank(inputs, lengths)
        x = self._tokens(inputs) if isinstance(self.embedding, nn.Embedding) else self._vectors(inputs)
        if self.positions is not None:
            x = x + self.positions(self._place(inputs.shape[1], cu_seqlens, x.device))
        if self.types is not None:
            kinds = torch.zeros_like(inputs) if token_types is None else token_types
            x = x + self.types(kinds if lengths is None else _blank(kinds, lengths))
        elif token_types is not None:
            raise UsageError("the model knows no token types: build it with token_types, or give none")
        x = self.dropout(x if self.embedding_norm is None else self.embedding_norm(x))
        return keep_real(x, lengths)

    def _tokens(self, tokens: Tensor) -> Tensor:
        if tokens.is_floating_point() or tokens.ndim != 2:
            raise UsageError(f"inputs must be (batch, time) token ids, not {tokens.dtype} {tuple(tokens.shape)}")
        most = self.embedding.weight.shape[0] - 1
        if numbers_at_hand(tokens) and not 0 <= tokens.min() <= tokens.max() <= most:
            raise UsageError(f"token ids must lie in 0..{most}, got {int(tokens.min())}..{int(tokens.max())}")
        return self.embedding(tokens)

    def _vectors(self, vectors: Tensor) -> Tensor:
        weight = self.embedding.weight
        if vectors.ndim != 3 or vectors.shape[2] != weight.shape[1]:
            raise UsageError(f"inputs must be (batch, time, {weight.shape[1]}) numbers, not {tuple(vectors.shape)}")
        return self.embedding(vectors.to(weight.dtype))

    def _place(self, time: int, cu_seqlens: Tensor | None, device: torch.device) -> Int[Tensor, " time"]:
        """The position of each step in its row or document."""
        place = torch.arange(time, device=device)
        longest = time
        if cu_seqlens is not None:
            _, sizes = unpack(place[None], cu_seqlens)  # it knows what is wrong with bounds
            place = place - torch.repeat_interleave(cu_seqlens[:-1], sizes)
            longest = int(sizes.max())
        if longest > self.config.max_length:
            raise UsageError(
                f"a row has {longest} steps, the model positions for {self.config.max_length}: shorten it, or build "
                "the model with a larger max_length (0 for no positions)"
            )
        return place


def _blank(x: Tensor, lengths: Tensor) -> Tensor:
    """Zeros in place of what padding holds: ids that do not exist, NaN."""
    mask = real_steps(lengths, x.shape[1])
    return torch.where(
        mask.reshape(mask.shape + (1,) * (x.ndim - 2)), x, torch.zeros((), dtype=x.dtype, device=x.device)
    )
