"""What a model costs, layer by layer: parameters, FLOPs a token, bytes of state, at any context length.

A multiply-add is two FLOPs; elementwise work counts where it dominates. Each mixer brings its own formulas.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from bestiary.models.encoder import MaskedLanguageModel
from bestiary.models.encoder_stack import EncoderBlock
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


def costs(model: LanguageModel | MaskedLanguageModel, contexts: Sequence[int] = CONTEXTS) -> list[Cost]:
    """One Cost for what stands around the layers (embedding, head), and one for each layer."""
    blocks = model.blocks if isinstance(model, LanguageModel) else model.encoder.blocks
    found, seen = list[Cost](), set()
    for block, layer in zip(blocks, model.config.layers):
        found.append(_layer_cost(block, layer, contexts, new=id(block) not in seen))  # type: ignore[arg-type]
        seen.add(id(block))
    around = model.n_parameters() - sum(cost.parameters for cost in found)
    head = 2.0 * (model.config.vocab_size or 0) * model.config.d_model
    if isinstance(model, MaskedLanguageModel):
        head += 2.0 * model.dense.weight.numel()
    return [Cost("embedding, head", around, dict.fromkeys(contexts, head), dict.fromkeys(contexts, 0)), *found]


def _layer_cost(block: Block | EncoderBlock, layer: Layer, contexts: Sequence[int], *, new: bool) -> Cost:
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
