"""What a model costs, layer by layer: parameters, FLOPs a token, bytes of state, at any context length.

A multiply-add is two FLOPs; elementwise work counts where it dominates. Each mixer brings its own formulas.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from bestiary.models.language_model import Block, LanguageModel
from bestiary.models.layout import Layer

CONTEXTS = (256, 2048, 8192, 32768)


@dataclass(frozen=True)
class Cost:
    """Costs of one part: forward FLOPs a token and state bytes a sequence (fp32), by context length."""

    name: str
    parameters: int
    flops: dict[int, float]
    state_bytes: dict[int, int]


def costs(model: LanguageModel, contexts: Sequence[int] = CONTEXTS) -> list[Cost]:
    """One Cost for the embedding and head, and one for each layer."""
    config = model.config
    head = config.vocab_size * config.d_model
    tied = head if config.tie_embeddings else 2 * head
    norms = sum(_count(norm) for norm in (model.embedding_norm, model.norm) if norm is not None)
    ends = Cost("embedding, head", tied + norms, {c: 2.0 * head for c in contexts}, dict.fromkeys(contexts, 0))
    found, seen = [ends], set()
    for block, layer in zip(model.blocks, config.layers):
        found.append(_layer_cost(block, layer, contexts, new=id(block) not in seen))  # type: ignore[arg-type]
        seen.add(id(block))
    return found


def _layer_cost(block: Block, layer: Layer, contexts: Sequence[int], *, new: bool) -> Cost:
    """The cost of a layer; weights that an earlier layer had already count there."""
    parts = [part for part in (block.mixer, block.channel) if part is not None]
    return Cost(
        " + ".join(filter(None, (layer.mixer, layer.channel))),
        _count(block) if new else 0,
        {context: sum(part.flops_per_token(context) for part in parts) for context in contexts},
        {context: sum(part.state_nbytes(context) for part in parts) for context in contexts},
    )


def total(parts: Sequence[Cost]) -> Cost:
    """The sum of all parts."""
    contexts = list(parts[0].flops)
    return Cost(
        "total",
        sum(part.parameters for part in parts),
        {context: sum(part.flops[context] for part in parts) for context in contexts},
        {context: sum(part.state_bytes[context] for part in parts) for context in contexts},
    )


def _count(module: object) -> int:
    return sum(parameter.numel() for parameter in module.parameters())  # type: ignore[attr-defined]
