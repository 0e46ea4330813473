"""RecurrentGemma (Griffin): two gated recurrences, then one attention to a window, Gemma's norms and embeddings."""

from typing import Any

import torch

from bestiary.hub.families import Fields, Recipe, assemble, family
from bestiary.hub.families.llama import attention, gated_mlp
from bestiary.hub.keys import CHANNELS, FROM_ONE, Key, blocks, same
from bestiary.models import ModelConfig
from bestiary.models.layout import Layer, Part, spell

# ours, theirs: an input and a gate, each a matrix a head
LRU = {"input_gate": "input_gate", "recurrence_gate": "recurrent_gate"}
MAPS = {"input": "linear_x", "gate": "linear_y", "out": "linear_out"}


@family("recurrent_gemma")
def read(fields: Fields) -> Recipe:
    d_model, n_layers = fields.size("hidden_size"), fields.layers()
    fields.must_be("hidden_activation", "gelu_pytorch_tanh", default="gelu_pytorch_tanh")
    n_heads, hidden = fields.size("num_attention_heads"), fields.size("intermediate_size") // 2
    head_dim = fields.size("head_dim", d_model // n_heads)
    local: dict[str, Any] = {
        "n_heads": n_heads,
        "n_kv_heads": fields.size("num_key_value_heads", n_heads),
        "head_dim": head_dim,
        "window": fields.size("attention_window_size", 2048),
        "qkv_bias": fields.flag("attention_bias", False),
        "out_bias": True,
        **fields.rotary(head_dim, part=0.5),
    }
    recurrent = {
        "lru_width": fields.size("lru_width", d_model),
        "n_heads": n_heads,
        "conv_kernel": fields.size("conv1d_width", 4),
        "unscaled_start": True,
    }
    parts = {"recurrent": Part("rg_lru", recurrent), "attention": Part("attention", local)}
    pattern = fields.kinds("block_types", parts, default=("recurrent", "recurrent", "attention"))
    kinds = [pattern[i % len(pattern)] for i in range(n_layers)]
    channel = {"d_hidden": hidden, "bias": True}
    config = ModelConfig(
        spell([Layer((parts[kind],), "geglu", channel) for kind in kinds]),
        d_model,
        fields.size("vocab_size"),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        tie_embeddings=fields.flag("tie_word_embeddings", True),
        embedding_scale=float(torch.tensor(d_model**0.5, dtype=torch.bfloat16)),  # as it was trained: rounded
        logit_cap=fields.number("logits_soft_cap", 30.0),
    )
    keys: list[Key] = []
    for i, kind in enumerate(kinds):
        ours, theirs = f"blocks.{i}", f"model.layers.{i}"
        keys += same(f"{ours}.norm", f"{theirs}.temporal_pre_norm", "weight", form=FROM_ONE)
        keys += same(f"{ours}.channel_norm", f"{theirs}.channel_pre_norm", "weight", form=FROM_ONE)
        keys += gated_mlp(f"{ours}.channel", f"{theirs}.mlp_block", hidden, bias=True)
        mixer = f"{ours}.mixer", f"{theirs}.temporal_block"
        keys += recurrence(*mixer, n_heads) if kind == "recurrent" else attention(*mixer, local)
    return assemble(config, keys, embedding="model.embed_tokens", norm="model.final_norm", norm_form=FROM_ONE)


def recurrence(ours: str, theirs: str, n_heads: int) -> list[Key]:
    """Keys of Griffin's recurrent block."""
    keys = same(f"{ours}.Lambda", f"{theirs}.rg_lru.recurrent_param")
    for name, published in MAPS.items():
        keys += same(f"{ours}.{name}", f"{theirs}.{published}", "weight", "bias")
    keys += same(f"{ours}.conv.weight", f"{theirs}.conv_1d.weight", form=CHANNELS)
    keys += same(f"{ours}.conv.bias", f"{theirs}.conv_1d.bias")
    for name, published in LRU.items():
        keys += same(f"{ours}.{name}.weight", f"{theirs}.rg_lru.{published}_weight")
        keys += same(f"{ours}.{name}.bias", f"{theirs}.rg_lru.{published}_bias", form=blocks(n_heads))
    return keys
