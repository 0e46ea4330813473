"""RWKV-4 in the layout of transformers' `rwkv`."""

from bestiary.hub.families import Fields, Recipe, assemble, family
from bestiary.hub.keys import Form, Key, same
from bestiary.models import ModelConfig
from bestiary.models.layout import Layer, Part, spell

FLAT = Form(lambda tensors: [t.flatten() for t in tensors], lambda tensors: [t[None, None] for t in tensors])


@family("rwkv")
def read(fields: Fields) -> Recipe:
    d_model, n_layers = fields.size("hidden_size"), fields.layers()
    fields.must_be("attention_hidden_size", d_model, default=d_model)
    channel = {"d_hidden": fields.size("intermediate_size", 4 * d_model)}
    config = ModelConfig(
        spell([Layer((Part("rwkv4"),), "rwkv_channel_mix", channel)] * n_layers),
        d_model,
        fields.size("vocab_size"),
        norm="layer",
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        embedding_norm=True,
    )
    keys = same("embedding_norm", "rwkv.blocks.0.pre_ln", "weight", "bias")
    for i in range(n_layers):
        keys += _block(f"blocks.{i}", f"rwkv.blocks.{i}")
    return assemble(config, keys, embedding="rwkv.embeddings", norm="rwkv.ln_out", head="head")


def _block(ours: str, theirs: str) -> list[Key]:
    keys = same(f"{ours}.norm", f"{theirs}.ln1", "weight", "bias")
    keys += same(f"{ours}.channel_norm", f"{theirs}.ln2", "weight", "bias")
    time, channel = (f"{ours}.mixer", f"{theirs}.attention"), (f"{ours}.channel", f"{theirs}.feed_forward")
    keys += same(*time, "time_decay", "time_first")
    for part in ("key", "value", "receptance"):
        keys += same(*time, f"{part}.weight") + same(*channel, f"{part}.weight")
    keys += same(*time, "output.weight")
    for place, parts in ((time, "kvr"), (channel, "kr")):
        for part, name in zip(parts, ("key", "value", "receptance") if parts == "kvr" else ("key", "receptance")):
            keys += same(f"{place[0]}.mix_{part}", f"{place[1]}.time_mix_{name}", form=FLAT)
    return keys
