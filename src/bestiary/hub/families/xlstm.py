"""xLSTM-7B: matrix memories with capped gates, a SwiGLU after each, capped logits."""

from bestiary.hub.families import Fields, Recipe, assemble, family
from bestiary.hub.families.llama import gated_mlp
from bestiary.hub.keys import Key, joined, same
from bestiary.models import ModelConfig
from bestiary.models.layout import Layer, Part, spell


@family("xlstm")
def read(fields: Fields) -> Recipe:
    d_model, n_layers = fields.size("hidden_size"), fields.layers()
    fields.must_be("use_bias", False, default=False)
    fields.must_be("add_out_norm", True, default=True)
    fields.must_be("weight_mode", "single", default="single")
    n_heads, eps = fields.size("num_heads"), fields.number("norm_eps", 1e-6)
    expand_k, expand_v = fields.number("qk_dim_factor", 0.5), fields.number("v_dim_factor", 1.0)
    options = {
        "n_heads": n_heads,
        "expand_k": expand_k,
        "expand_v": expand_v,
        "gate_cap": fields.number("gate_soft_cap", 15.0),
        "norm_eps": eps,
    }
    multiple = fields.size("ffn_round_up_to_multiple_of", 64)
    hidden = int((fields.number("ffn_proj_factor", 2.667) * d_model + multiple - 1) // multiple) * multiple
    config = ModelConfig(
        spell([Layer((Part("xlstm_7b", options),), "swiglu", {"d_hidden": hidden})] * n_layers),
        d_model,
        fields.size("vocab_size"),
        norm_eps=eps,
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        logit_cap=fields.number("output_logit_soft_cap", 30.0),
    )
    widths = [round(expand_k * d_model)] * 2 + [round(expand_v * d_model)] * 2
    keys: list[Key] = []
    for i in range(n_layers):
        ours, theirs = f"blocks.{i}", f"backbone.blocks.{i}"
        keys += same(f"{ours}.norm", f"{theirs}.norm_mlstm", "weight")
        keys += same(f"{ours}.channel_norm", f"{theirs}.norm_ffn", "weight")
        keys += gated_mlp(f"{ours}.channel", f"{theirs}.ffn", hidden, ("proj_up_gate", "proj_up", "proj_down"))
        ours, theirs = f"{ours}.mixer", f"{theirs}.mlstm_layer"
        keys += joined(f"{ours}.qkvo", [f"{theirs}.{name}" for name in ("q", "k", "v", "ogate_preact")], widths)
        gates = [f"{theirs}.{name}_preact" for name in ("igate", "fgate")]
        keys += joined(f"{ours}.gates", gates, [n_heads, n_heads], bias=True)
        keys += same(f"{ours}.norm", f"{theirs}.multihead_norm", "weight")
        keys += same(f"{ours}.out", f"{theirs}.out_proj", "weight")
    return assemble(config, keys, embedding="backbone.embeddings", norm="backbone.out_norm")
