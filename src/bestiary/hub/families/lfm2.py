"""LFM2 (Liquid AI): mostly gated short convolutions, attention with normed q and k in between."""

from collections.abc import Iterable
from typing import Any

from bestiary.hub.families import Fields, Recipe, assemble, family
from bestiary.hub.families.llama import attention, gated_mlp
from bestiary.hub.keys import CHANNELS, Key, affine, same
from bestiary.models import ModelConfig
from bestiary.models.layout import Layer, Part, spell


@family("lfm2")
def read(fields: Fields) -> Recipe:
    d_model, n_layers = fields.size("hidden_size"), fields.layers()
    n_heads, biased = fields.size("num_attention_heads"), fields.flag("conv_bias", False)
    head_dim, eps = d_model // n_heads, fields.number("norm_eps", 1e-5)
    full: dict[str, Any] = {
        "n_heads": n_heads,
        "n_kv_heads": fields.size("num_key_value_heads", n_heads),
        "head_dim": head_dim,
        "qk_norm": True,
        "norm_eps": eps,
        **fields.rotary(head_dim, base=1e6),
    }
    conv = {"conv_kernel": fields.size("conv_L_cache", 3), "bias": biased}
    parts = {"conv": Part("gated_conv", conv), "full_attention": Part("attention", full)}
    kinds, hidden = _kinds(fields, n_layers, parts), _hidden(fields)
    layers = [Layer((parts[kind],), "swiglu", {"d_hidden": hidden}) for kind in kinds]
    config = ModelConfig(
        spell(layers),
        d_model,
        fields.size("vocab_size"),
        norm_eps=eps,
        tie_embeddings=fields.flag("tie_word_embeddings", fields.get("tie_embedding", True)),
    )
    keys: list[Key] = []
    for i, kind in enumerate(kinds):
        ours, theirs = f"blocks.{i}", f"model.layers.{i}"
        keys += same(f"{ours}.norm", f"{theirs}.operator_norm", "weight")
        keys += same(f"{ours}.channel_norm", f"{theirs}.ffn_norm", "weight")
        keys += gated_mlp(f"{ours}.channel", f"{theirs}.feed_forward", hidden, ("w1", "w3", "w2"))
        if kind == "conv":
            keys += same(f"{ours}.mixer", f"{theirs}.conv", *(f"in_proj.{part}" for part in affine(biased)))
            keys += same(f"{ours}.mixer", f"{theirs}.conv", *(f"out_proj.{part}" for part in affine(biased)))
            keys += same(f"{ours}.mixer.conv.weight", f"{theirs}.conv.conv.weight", form=CHANNELS)
            keys += same(f"{ours}.mixer.conv.bias", f"{theirs}.conv.conv.bias") if biased else []
        else:
            keys += attention(f"{ours}.mixer", f"{theirs}.self_attn", full, out="out_proj", norms="layernorm")
    return assemble(config, keys, embedding="model.embed_tokens", norm="model.embedding_norm")


def _kinds(fields: Fields, n_layers: int, parts: Iterable[str]) -> list[str]:
    if fields.get("layer_types") is not None:
        return fields.kinds("layer_types", parts, count=n_layers)
    full = fields.listed("full_attn_idxs", int, list(range(n_layers)))
    return ["full_attention" if i in full else "conv" for i in range(n_layers)]


def _hidden(fields: Fields) -> int:
    """The MLP's inner width: two thirds of what is written, times a factor, rounded up, where it is to be adjusted."""
    hidden = fields.size("block_ff_dim", fields.size("intermediate_size", fields.get("block_ff_dim")))
    if not fields.flag("block_auto_adjust_ff_dim", True):
        return hidden
    hidden = int(2 * hidden / 3)
    if fields.fields.get("block_ffn_dim_multiplier", 1.0) is None:
        return hidden
    hidden = int(fields.number("block_ffn_dim_multiplier", 1.0) * hidden)
    multiple = fields.size("block_multiple_of", 256)
    return multiple * -(-hidden // multiple)
