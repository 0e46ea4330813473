"""Published models as configurations, by name: their shapes, not their weights.

    bestiary.models.presets.get("stripedhyena-7b") -> ModelConfig

Each builds a model with as many parameters as the published one. Two things differ by design: norms add their epsilon
inside the root; the poles of StripedHyena's filters are kept inside the unit circle (`parametrisation=raw` has them as
the published weights do, in as many parameters).
"""

from dataclasses import dataclass

from bestiary.errors import unknown
from bestiary.models.config import ModelConfig


@dataclass(frozen=True)
class Preset:
    """A published model.

    Args:
        config: its shape.
        parameters: how many it has.
        source: who published it.
    """

    config: ModelConfig
    parameters: int
    source: str


def names() -> list[str]:
    """All names, sorted."""
    return sorted(_presets())


def get(name: str) -> ModelConfig:
    """The configuration of a published model; an unknown name is a UsageError that lists the valid ones."""
    return about(name).config


def about(name: str) -> Preset:
    """A published model's shape, size and source."""
    found = _presets()
    if name not in found:
        raise unknown("preset", name, found)
    return found[name]


def _presets() -> dict[str, Preset]:
    return {"evo-1-8k": _evo_1(), "stripedhyena-7b": _stripedhyena_7b()}


def _stripedhyena_7b() -> Preset:
    wide = "channel.d_hidden=14336"
    pair = (
        f"striped_hyena{{d_state=2, n_heads=32, {wide}}} "
        f"attention{{n_heads=32, n_kv_heads=8, rotary_base=500000.0, {wide}}}"
    )
    config = ModelConfig(f"({pair})*16", d_model=4096, vocab_size=32000, norm_eps=1e-5, tie_embeddings=False)
    return Preset(config, 7_646_023_680, "StripedHyena-Hessian-7B, StripedHyena-Nous-7B (Together 2023)")


def _evo_1() -> Preset:
    """Bytes of DNA; attention in 3 layers of 32. Its context of 131,072 also stretches rotary positions, by 16."""
    wide = "channel=geglu, channel.exact=true, channel.d_hidden=10928"
    hyena = f"striped_hyena{{d_state=8, n_heads=32, {wide}}}"
    attention = f"attention{{n_heads=32, qkv_bias=true, out_bias=true, {wide}}}"
    layout = f"{hyena}*8 ({attention} {hyena}*7)*3"
    config = ModelConfig(layout, d_model=4096, vocab_size=512, norm_eps=1e-6)
    return Preset(config, 6_452_781_056, "evo-1-8k-base (Nguyen et al. 2024)")
