"""Llama, Mistral, Qwen2 and Qwen3, SmolLM: pre-norm Transformers with rotary positions and a gated MLP."""

from typing import Any

from bestiary.hub.families import Fields, Recipe, assemble, family
from bestiary.hub.keys import Key, affine, joined, same
from bestiary.models import ModelConfig
from bestiary.models.layout import Layer, Part, spell


@family("llama", "mistral", "qwen2", "qwen3")
def read(fields: Fields) -> Recipe:
    kind, d_model, n_layers = fields.get("model_type"), fields.size("hidden_size"), fields.layers()
    fields.must_be("hidden_act", "silu", default="silu")
    n_heads, biased = fields.size("num_attention_heads"), fields.flag("attention_bias", False)
    head_dim, hidden = fields.size("head_dim", d_model // n_heads), fields.size("intermediate_size")
    n_kv_heads = fields.size("num_key_value_heads", n_heads)
    options: dict[str, Any] = {"n_heads": n_heads, "n_kv_heads": n_kv_heads, "head_dim": head_dim}
    options |= fields.rotary(head_dim) | {"qkv_bias": biased or kind == "qwen2", "out_bias": biased}
    if kind == "qwen3":
        options |= {"qk_norm": True, "norm_eps": fields.number("rms_norm_eps", 1e-6)}
    mlp: dict[str, Any] = {"d_hidden": hidden}
    if fields.flag("mlp_bias", False):
        mlp["bias"] = True
    layers = [
        Layer((Part("attention", options | _window(fields, i, n_layers)),), "swiglu", mlp) for i in range(n_layers)
    ]
    config = ModelConfig(
        spell(layers),
        d_model,
        fields.size("vocab_size"),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
    )
    keys: list[Key] = []
    for i in range(n_layers):
        ours, theirs = f"blocks.{i}", f"model.layers.{i}"
        keys += same(f"{ours}.norm", f"{theirs}.input_layernorm", "weight")
        keys += same(f"{ours}.channel_norm", f"{theirs}.post_attention_layernorm", "weight")
        keys += attention(f"{ours}.mixer", f"{theirs}.self_attn", options)
        keys += gated_mlp(f"{ours}.channel", f"{theirs}.mlp", hidden, bias="bias" in mlp)
    return assemble(config, keys, embedding="model.embed_tokens", norm="model.norm")


def attention(
    ours: str, theirs: str, options: dict[str, Any], *, out: str = "o_proj", norms: str = "norm"
) -> list[Key]:
    """Keys of an attention layer whose q, k and v are maps of their own."""
    width, narrow = options["n_heads"] * options["head_dim"], options["n_kv_heads"] * options["head_dim"]
    maps = [f"{theirs}.{name}_proj" for name in "qkv"]
    keys = joined(f"{ours}.qkv", maps, [width, narrow, narrow], bias=options.get("qkv_bias", False))
    keys += same(f"{ours}.out", f"{theirs}.{out}", *affine(options.get("out_bias", False)))
    if options.get("qk_norm"):
        keys += same(f"{ours}.q_norm", f"{theirs}.q_{norms}", "weight")
        keys += same(f"{ours}.k_norm", f"{theirs}.k_{norms}", "weight")
    return keys


def gated_mlp(
    ours: str,
    theirs: str,
    hidden: int,
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    bias: bool = False,
) -> list[Key]:
    """Keys of a gated MLP; `names` are those of the gate, the values and the output."""
    gate, up, down = (f"{theirs}.{name}" for name in names)
    return [
        *joined(f"{ours}.gate_up", [gate, up], [hidden, hidden], bias=bias),
        *same(f"{ours}.down", down, *affine(bias)),
    ]


def _window(fields: Fields, layer: int, n_layers: int) -> dict[str, Any]:
    """The option for a layer's window, where it has one."""
    window = fields.get("sliding_window")
    if window is None or not fields.flag("use_sliding_window", True):
        return {}
    if fields.get("layer_types") is not None:
        kinds = fields.kinds("layer_types", ("full_attention", "sliding_attention"), count=n_layers)
        slides = kinds[layer] == "sliding_attention"
    else:
        slides = layer >= fields.number("max_window_layers", 0)
    return {"window": fields.size("sliding_window")} if slides else {}
