"""Published models as configurations, by name: their shapes, not their weights.

    bestiary.models.presets.get("stripedhyena-7b") -> ModelConfig
    bestiary.models.presets.get("m2-bert-80m") -> EncoderConfig

Each builds a model with as many parameters as the published one. One thing differs by design: the poles of
StripedHyena's filters are kept inside the unit circle (`parametrisation=raw` has them as the published weights do, in
as many parameters). StripedHyena-7B was trained with fused norms; without them its code has rms_outer, as Evo's.
"""

from dataclasses import dataclass

from bestiary.errors import unknown
from bestiary.models.config import ModelConfig
from bestiary.models.encoder_config import EncoderConfig

M2_BERT = {  # width, longest row, parameters
    "m2-bert-80m": (768, 128, 80_267_328),
    "m2-bert-80m-2k": (768, 2048, 81_972_288),
    "m2-bert-80m-8k": (768, 8192, 87_428_160),
    "m2-bert-80m-32k": (768, 32768, 109_251_648),
    "m2-bert-110m": (960, 128, 115_583_616),
    "m2-bert-260m": (1536, 128, 259_133_760),
    "m2-bert-341m": (1792, 128, 341_038_144),
}


@dataclass(frozen=True)
class Preset:
    """A published model.

    Args:
        config: its shape.
        parameters: how many it has.
        source: who published it.
    """

    config: ModelConfig | EncoderConfig
    parameters: int
    source: str


def names() -> list[str]:
    """All names, sorted."""
    return sorted(_presets())


def get(name: str) -> ModelConfig | EncoderConfig:
    """The configuration of a published model; an unknown name is a UsageError that lists the valid ones."""
    return about(name).config


def about(name: str) -> Preset:
    """A published model's shape, size and source."""
    found = _presets()
    if name not in found:
        raise unknown("preset", name, found)
    return found[name]


def _presets() -> dict[str, Preset]:
    found = {"evo-1-8k": _evo_1(), "stripedhyena-7b": _stripedhyena_7b()}
    return found | {name: _m2_bert(*shape) for name, shape in M2_BERT.items()}


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
    config = ModelConfig(layout, d_model=4096, vocab_size=512, norm="rms_outer", norm_eps=1e-6)
    return Preset(config, 6_452_781_056, "evo-1-8k-base (Nguyen et al. 2024)")


def _m2_bert(d_model: int, max_length: int, parameters: int) -> Preset:
    """The encoder and its head for masked tokens; weights tuned on GLUE have input_norm as well."""
    mixer = f"m2{{l_max={max_length}, filter_order=128, trained_features=true, channel.d_hidden={4 * d_model}}}"
    config = EncoderConfig(
        f"{mixer}*12",
        d_model,
        vocab_size=30528,  # 30,522 word pieces, padded
        max_length=max_length,
        token_types=2,
        norm_eps=1e-12,
        block="m2",
    )
    return Preset(config, parameters, "M2-BERT (Fu et al. 2023)")
