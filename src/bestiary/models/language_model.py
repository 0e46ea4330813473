"""A causal language model: embedding, pre-norm residual blocks, norm, head.

x = x + mixer(norm(x));   x = x + channel_mixer(norm(x))      per layer (the second where the layer has one)
x = x + mixer(norm(x)) + channel_mixer(norm'(x))              with a parallel residual path (GPT-J, GPT-NeoX)
logits = head(norm(x))
"""

import functools
import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bestiary import mixers
from bestiary import state as states
from bestiary.decoding import Decoder
from bestiary.errors import UsageError
from bestiary.mixers import Context
from bestiary.mixers.base import numbers_at_hand
from bestiary.mixers.parts import gpt_init
from bestiary.models import generation, packing
from bestiary.models.config import ModelConfig
from bestiary.models.layout import Layer, build_blocks
from bestiary.models.loss import Head
from bestiary.models.norms import make_norm


@states.register
class LayerState(NamedTuple):
    """What one layer remembers: the state of its sequence mixer and that of its channel mixer."""

    mixer: Any
    channel: Any


@states.register
class ModelState(NamedTuple):
    """What a language model remembers: one LayerState a layer."""

    layers: tuple[LayerState, ...]


class Block(nn.Module):
    """One layer: sequence mixing and perhaps a channel mixer, each behind a norm and beside a residual path."""

    def __init__(self, layer: Layer, config: ModelConfig, **place: int):
        super().__init__()
        self.parallel = config.parallel_residual
        self.norm = make_norm(config)
        self.mixer = layer.build_mixer(config.d_model, **place)
        if not self.mixer.causal:
            raise UsageError(f"mixer {layer.mixer!r} is bidirectional: a language model wants causal ones")
        self.channel_norm = None if layer.channel is None else make_norm(config)
        self.channel = layer.build_channel(config.d_model, **place)

    def initial_state(self, batch_size: int, **kwargs: Any) -> LayerState:
        """The layer's state before the first step."""
        channel = states.Empty() if self.channel is None else self.channel.initial_state(batch_size, **kwargs)
        return LayerState(self.mixer.initial_state(batch_size, **kwargs), channel)

    def forward(self, x: Tensor, state: LayerState | None, **rows: Any) -> tuple[Tensor, LayerState]:
        """One segment through the layer; `rows` are `lengths`, `cu_seqlens` and `context` of the mixers' contract."""
        y, mixed = self.mixer(self.norm(x), None if state is None else state.mixer, **rows)
        before, x = x, x + y
        remembered: Any = states.Empty()
        if self.channel is not None and self.channel_norm is not None:
            seen = self.channel_norm(before if self.parallel else x)
            y, remembered = self.channel(seen, None if state is None else state.channel, **rows)
            x = x + y
        return x, LayerState(mixed, remembered)

    def step(self, x: Tensor, state: LayerState, context: Context) -> tuple[Tensor, LayerState]:
        """One step of every row through the layer: (batch, d_model)."""
        y, mixed = self.mixer.step(self.norm(x), state.mixer, context=context)
        before, x, remembered = x, x + y, state.channel
        if self.channel is not None and self.channel_norm is not None:
            seen = self.channel_norm(before if self.parallel else x)
            y, remembered = self.channel.step(seen, state.channel, context=context)
            x = x + y
        return x, LayerState(mixed, remembered)


class LanguageModel(nn.Module):
    """A stack of blocks over tokens: `logits, state = model(tokens, state)`.

    Splitting tokens into segments and handing the state over changes nothing; `lengths` (right-padded rows) and
    `cu_seqlens` (packed documents) are as in the mixers' contract.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.embedding_norm = make_norm(config) if config.embedding_norm else None
        self.blocks = build_blocks(config.layers, functools.partial(Block, config=config))
        self.norm = make_norm(config)
        self.head = Head(config.d_model, config.vocab_size, config.logit_cap)
        self.decoder: Decoder | None = None  # of a packed model: takes its steps
        self.measures: dict[str, list[Tensor]] = {}  # what parts told about themselves in the last call of `loss`
        for table in (self.embedding, self.head):
            if config.embedding_std is None:
                gpt_init(table, config.d_model)
            else:
                nn.init.normal_(table.weight, std=config.embedding_std)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight

    def initial_state(self, batch_size: int, **kwargs: Any) -> ModelState:
        """The state before the first token; `device` and `dtype` as in the mixers' contract."""
        return ModelState(tuple(block.initial_state(batch_size, **kwargs) for block in self.blocks))  # type: ignore[operator]

    def embed(self, tokens: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch d_model"]:
        """What the first block sees."""
        x = self.embedding(tokens)
        x = x if self.config.embedding_scale == 1 else x * self.config.embedding_scale
        return x if self.embedding_norm is None else self.embedding_norm(x)

    def hidden(
        self,
        tokens: Int[Tensor, "batch time"],
        state: ModelState | None = None,
        *,
        lengths: Int[Tensor, " batch"] | None = None,
        cu_seqlens: Int[Tensor, " bounds"] | None = None,
        context: Context | None = None,
        intervals: Float[Tensor, "batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time d_model"], ModelState]:
        """What the head sees: the normed output of the last block. A context is filled in; see bestiary.mixers.

        Args:
            intervals: time that passes before each token, in units of a usual step; some mixer must be a timed one.
        """
        if numbers_at_hand(tokens):
            self.check_tokens(int(tokens.min()), int(tokens.max()))
        if state is not None and len(state.layers) != len(self.blocks):
            raise UsageError(f"the state has {len(state.layers)} layers, the model {len(self.blocks)}")
        x, after = self.embed(tokens), []
        context = Context() if context is None else context
        context.embeddings = x
        if intervals is not None:
            if not any(block.mixer.timed for block in self.blocks):  # type: ignore[union-attr]
                able = ", ".join(name for name in mixers.names() if mixers.get(name).timed)
                raise UsageError(f"no mixer of this model follows the time between tokens; these can: {able}")
            context.intervals = intervals
        for i, block in enumerate(self.blocks):
            before = None if state is None else state.layers[i]
            x, layer = block(x, before, lengths=lengths, cu_seqlens=cu_seqlens, context=context)
            after.append(layer)
        return self.norm(x), ModelState(tuple(after))

    def forward(
        self,
        tokens: Int[Tensor, "batch time"],
        state: ModelState | None = None,
        *,
        lengths: Int[Tensor, " batch"] | None = None,
        cu_seqlens: Int[Tensor, " bounds"] | None = None,
        intervals: Float[Tensor, "batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time vocab"], ModelState]:
        """Logits of the next token at every position, and the state to continue with; `intervals` as in `hidden`."""
        hidden, state = self.hidden(tokens, state, lengths=lengths, cu_seqlens=cu_seqlens, intervals=intervals)
        return self.head(hidden), state

    def check_tokens(self, lowest: int, highest: int) -> None:
        """One clear error for ids that the vocabulary does not have."""
        if not 0 <= lowest <= highest < self.config.vocab_size:
            raise UsageError(f"token ids must lie in 0..{self.config.vocab_size - 1}, got {lowest}..{highest}")

    def step(self, tokens: Int[Tensor, " batch"], state: ModelState) -> tuple[Float[Tensor, "batch vocab"], ModelState]:
        """One token of every row: logits of the next, and the state."""
        if self.decoder is not None:
            done = self.decoder.step(tokens, state)
            if done is not None:
                return done
        x, after = self.embed(tokens), []
        context = Context(embeddings=x[:, None])
        for block, layer in zip(self.blocks, state.layers):
            x, layer = block.step(x, layer, context)  # type: ignore[operator]
            after.append(layer)
        return self.head(self.norm(x)), ModelState(tuple(after))

    def loss(
        self,
        tokens: Int[Tensor, "batch time"],
        targets: Int[Tensor, "batch time"],
        mask: Tensor | None = None,
        state: ModelState | None = None,
        *,
        lengths: Int[Tensor, " batch"] | None = None,
        cu_seqlens: Int[Tensor, " bounds"] | None = None,
        intervals: Float[Tensor, "batch time"] | None = None,
    ) -> tuple[Float[Tensor, ""], ModelState]:
        """Mean cross-entropy in nats over the targets, and the state.

        In training mode, what parts of the model ask for beside it (a router's balance) is added.

        Args:
            mask: (batch, time) booleans or weights of the targets; targets below 0 never count.
        """
        context = Context()
        rows: dict[str, Any] = {"lengths": lengths, "cu_seqlens": cu_seqlens, "intervals": intervals}
        hidden, state = self.hidden(tokens, state, context=context, **rows)
        weights = None if mask is None else mask.flatten().to(torch.promote_types(hidden.dtype, torch.float32))
        loss = self.head.loss(hidden.flatten(0, 1), targets.flatten(), weights)
        self.measures = context.measures
        return sum(context.losses, loss), state

    def generate(self, tokens: Tensor | list[list[int]], **options: Any) -> Any:
        """Continue prompts; see bestiary.models.generation.generate for the options."""
        return generation.generate(self, tokens, **options)

    def stream(self, tokens: Tensor | list[list[int]], **options: Any) -> Iterator[Tensor]:
        """Continue prompts, a step at a time; see bestiary.models.generation.stream."""
        return generation.stream(self, tokens, **options)

    def packed(self, weights: str = "fp32") -> "LanguageModel":
        """A copy for decoding on the CPU, its matrices in "fp32", "bf16", "int8" or "int4"; see models.packing."""
        return packing.packed(self, weights)

    def n_parameters(self) -> int:
        """Number of parameters, shared ones once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def mixer_names(self) -> list[str]:
        """The sequence mixers' names, layer by layer."""
        return [layer.mixer for layer in self.config.layers]

    @torch.no_grad()
    def fingerprint(self) -> str:
        """A short hash of the configuration and of samples of every weight: tells whose state a state is."""
        digest = hashlib.sha256(self.config.to_json().encode())
        for name, parameter in self.named_parameters():
            flat = parameter.detach().flatten()
            index = torch.linspace(0, flat.numel() - 1, min(flat.numel(), 256), device=flat.device).long()
            sample = flat[index.clamp(max=flat.numel() - 1)]  # fp32 rounds the last one up in large tensors
            digest.update(name.encode() + sample.float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]
