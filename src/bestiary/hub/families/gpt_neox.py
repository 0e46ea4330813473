"""GPT-NeoX and Pythia: parallel residual paths, layer norms with biases, a quarter of each head turned."""

from bestiary.hub.families import Fields, Recipe, assemble, family
from bestiary.hub.keys import Key, affine, grouped, rows, same
from bestiary.models import ModelConfig
from bestiary.models.layout import Layer, Part, spell


@family("gpt_neox")
def read(fields: Fields) -> Recipe:
    d_model, n_layers = fields.size("hidden_size"), fields.layers()
    n_heads, biased = fields.size("num_attention_heads"), fields.flag("attention_bias", True)
    fields.must_be("hidden_act", "gelu", default="gelu")
    fields.must_be("hidden_size", d_model // n_heads * n_heads)
    head_dim, bases = d_model // n_heads, {"base": fields.number("rotary_emb_base", 10000.0)}
    turn = fields.rotary(head_dim, part=fields.number("rotary_pct", 0.25), **bases)
    attention = Part("attention", {"n_heads": n_heads, "qkv_bias": biased, "out_bias": biased, **turn})
    layer = Layer((attention,), "gelu_mlp", {"d_hidden": fields.size("intermediate_size")})
    config = ModelConfig(
        spell([layer] * n_layers),
        d_model,
        fields.size("vocab_size"),
        norm="layer",
        norm_eps=fields.number("layer_norm_eps", 1e-5),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        parallel_residual=fields.flag("use_parallel_residual", True),
    )
    interleaved = rows([3 * d_model], [3 * d_model], grouped([head_dim] * 3, n_heads))  # q, k, v head by head
    keys: list[Key] = []
    for i in range(n_layers):
        ours, theirs = f"blocks.{i}", f"gpt_neox.layers.{i}"
        keys += same(f"{ours}.norm", f"{theirs}.input_layernorm", "weight", "bias")
        keys += same(f"{ours}.channel_norm", f"{theirs}.post_attention_layernorm", "weight", "bias")
        qkv = f"{theirs}.attention.query_key_value"
        keys += same(f"{ours}.mixer.qkv", qkv, *affine(biased), form=interleaved)
        keys += same(f"{ours}.mixer.out", f"{theirs}.attention.dense", *affine(biased))
        keys += same(f"{ours}.channel.up", f"{theirs}.mlp.dense_h_to_4h", "weight", "bias")
        keys += same(f"{ours}.channel.down", f"{theirs}.mlp.dense_4h_to_h", "weight", "bias")
    return assemble(config, keys, embedding="gpt_neox.embed_in", norm="gpt_neox.final_layer_norm", head="embed_out")
