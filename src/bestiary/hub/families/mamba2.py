"""Mamba-2, and Codestral-Mamba in its layout."""

from bestiary.hub.families import Fields, Recipe, assemble, family
from bestiary.hub.families.mamba import blocks, check
from bestiary.hub.keys import same
from bestiary.models import ModelConfig
from bestiary.models.layout import Layer, Part, spell

PARTS = ("A_log", "D", "dt_bias", "in_proj.weight", "out_proj.weight")


@family("mamba2")
def read(fields: Fields) -> Recipe:
    d_model, n_layers = fields.size("hidden_size"), fields.layers()
    check(fields)
    fields.must_be("rms_norm", True, default=True)
    fields.must_be(
        "time_step_limit", [0.0, float("inf")], [0.0, {"__float__": "Infinity"}], default=[0.0, float("inf")]
    )
    head_dim = fields.size("head_dim", 64)
    options = {
        "d_state": fields.size("state_size", 128),
        "expand": fields.size("num_heads") * head_dim / d_model,
        "head_dim": head_dim,
        "n_groups": fields.size("n_groups", 1),
        "conv_kernel": fields.size("conv_kernel", 4),
    }
    config = ModelConfig(
        spell([Layer((Part("mamba2", options),))] * n_layers),
        d_model,
        fields.size("vocab_size"),
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
    )
    keys = blocks(n_layers, PARTS)
    for i in range(n_layers):
        keys += same(f"blocks.{i}.mixer.norm_weight", f"backbone.layers.{i}.mixer.norm.weight")
    return assemble(config, keys, embedding="backbone.embeddings", norm="backbone.norm_f")
