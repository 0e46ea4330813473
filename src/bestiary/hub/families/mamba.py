"""Mamba and FalconMamba, whose step sizes, B and C go through norms without weights."""

from typing import Any

from bestiary.hub.families import Fields, Recipe, assemble, family
from bestiary.hub.keys import CHANNELS, Key, same
from bestiary.models import ModelConfig
from bestiary.models.layout import Layer, Part, spell

PARTS = ("A_log", "D", "in_proj.weight", "x_proj.weight", "dt_proj.weight", "dt_proj.bias", "out_proj.weight")


@family("mamba", "falcon_mamba")
def read(fields: Fields) -> Recipe:
    d_model, n_layers = fields.size("hidden_size"), fields.layers()
    check(fields)
    inner = fields.size("intermediate_size", int(fields.number("expand", 2) * d_model))
    options: dict[str, Any] = {
        "d_state": fields.size("state_size", 16),
        "expand": inner / d_model,
        "conv_kernel": fields.size("conv_kernel", 4),
        "dt_rank": -(-d_model // 16) if fields.get("time_step_rank") == "auto" else fields.size("time_step_rank"),
    }
    if fields.get("model_type") == "falcon_mamba":
        options |= {"norm_dt_bc": True, "norm_eps": fields.number("mixer_rms_eps", 1e-6)}
    config = ModelConfig(
        spell([Layer((Part("mamba", options),))] * n_layers),
        d_model,
        fields.size("vocab_size"),
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        tie_embeddings=fields.flag("tie_word_embeddings", True),
    )
    return assemble(config, blocks(n_layers, PARTS), embedding="backbone.embeddings", norm="backbone.norm_f")


def check(fields: Fields) -> None:
    """What both Mambas have in common that no published model has otherwise."""
    fields.must_be("hidden_act", "silu", default="silu")
    fields.must_be("use_bias", False, default=False)
    fields.must_be("use_conv_bias", True, default=True)


def blocks(n_layers: int, parts: tuple[str, ...]) -> list[Key]:
    """Keys of all layers: these parts of the mixer, its convolution, and the norm before it."""
    keys: list[Key] = []
    for i in range(n_layers):
        ours, theirs = f"blocks.{i}", f"backbone.layers.{i}"
        keys += same(f"{ours}.norm", f"{theirs}.norm", "weight")
        keys += same(f"{ours}.mixer", f"{theirs}.mixer", *parts)
        keys += same(f"{ours}.mixer.conv.weight", f"{theirs}.mixer.conv1d.weight", form=CHANNELS)
        keys += same(f"{ours}.mixer.conv.bias", f"{theirs}.mixer.conv1d.bias")
    return keys
