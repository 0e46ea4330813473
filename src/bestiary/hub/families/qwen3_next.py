"""Qwen3-Next: three gated delta nets to one gated attention, a mixture of experts after each."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from bestiary.hub.families import Fields, Recipe, assemble, family
from bestiary.hub.families.llama import gated_mlp
from bestiary.hub.keys import CHANNELS, FROM_ONE, Form, Key, affine, grouped, rows, same
from bestiary.models import ModelConfig
from bestiary.models.layout import Layer, Part, spell


@family("qwen3_next")
def read(fields: Fields) -> Recipe:
    d_model, n_layers = fields.size("hidden_size"), fields.layers()
    fields.must_be("hidden_act", "silu", default="silu")
    eps, biased = fields.number("rms_norm_eps", 1e-6), fields.flag("attention_bias", False)
    n_heads, head_dim = fields.size("num_attention_heads"), fields.size("head_dim", 256)
    full: dict[str, Any] = {
        "n_heads": n_heads,
        "n_kv_heads": fields.size("num_key_value_heads", n_heads),
        "head_dim": head_dim,
        "qkv_bias": biased,
        "out_bias": biased,
        "qk_norm": True,
        "norm_eps": eps,
        "gate": True,
        **fields.rotary(head_dim, part=0.25),
    }
    linear = _Linear(fields, d_model)
    delta = {
        "n_heads": linear.heads,
        "n_value_heads": linear.value_heads,
        "expand_k": linear.d_key / d_model,
        "expand_v": linear.d_value / d_model,
        "conv_kernel": fields.size("linear_conv_kernel_dim", 4),
        "norm_eps": eps,
    }
    parts = {"linear_attention": Part("gated_delta_net", delta), "full_attention": Part("attention", full)}
    kinds, channels = _kinds(fields, n_layers, parts), [_channel(fields, i) for i in range(n_layers)]
    config = ModelConfig(
        spell([Layer((parts[kind],), *channel) for kind, channel in zip(kinds, channels)]),
        d_model,
        fields.size("vocab_size"),
        norm_eps=eps,
        tie_embeddings=fields.flag("tie_word_embeddings", False),
    )
    keys: list[Key] = []
    for i, (kind, (channel, options)) in enumerate(zip(kinds, channels)):
        ours, theirs = f"blocks.{i}", f"model.layers.{i}"
        keys += same(f"{ours}.norm", f"{theirs}.input_layernorm", "weight", form=FROM_ONE)
        keys += same(f"{ours}.channel_norm", f"{theirs}.post_attention_layernorm", "weight", form=FROM_ONE)
        if kind == "full_attention":
            keys += _attention(f"{ours}.mixer", f"{theirs}.self_attn", full)
        else:
            keys += linear.keys(f"{ours}.mixer", f"{theirs}.linear_attn")
        mlp = f"{ours}.channel", f"{theirs}.mlp"
        keys += _experts(*mlp, options) if channel == "moe" else gated_mlp(*mlp, options["d_hidden"])
    return assemble(config, keys, embedding="model.embed_tokens", norm="model.norm", norm_form=FROM_ONE)


def _kinds(fields: Fields, n_layers: int, parts: Iterable[str]) -> list[str]:
    if fields.get("layer_types") is not None:
        return fields.kinds("layer_types", parts, count=n_layers)
    every = fields.size("full_attention_interval", 4)
    return ["linear_attention" if (i + 1) % every else "full_attention" for i in range(n_layers)]


def _channel(fields: Fields, layer: int) -> tuple[str, dict[str, Any]]:
    """What follows the mixer of a layer: experts, or one MLP."""
    alone = layer in fields.listed("mlp_only_layers", int, []) or (layer + 1) % fields.size("decoder_sparse_step", 1)
    if alone or fields.get("num_experts", 0) == 0:
        return "swiglu", {"d_hidden": fields.size("intermediate_size")}
    experts = fields.few("num_experts")
    fields.must_be("norm_topk_prob", True, default=True)
    hidden, shared = fields.size("moe_intermediate_size"), fields.size("shared_expert_intermediate_size")
    fields.must_be("shared_expert_intermediate_size", shared // hidden * hidden)
    options = {"n_experts": experts, "top_k": fields.size("num_experts_per_tok"), "d_hidden": hidden}
    return "moe", options | {"shared": shared // hidden, "shared_gate": True}


def _attention(ours: str, theirs: str, options: dict[str, Any]) -> list[Key]:
    """Keys of an attention layer; q and the gate are interleaved head by head."""
    n_heads, head_dim, biased = options["n_heads"], options["head_dim"], options["qkv_bias"]
    wide, narrow = n_heads * head_dim, options["n_kv_heads"] * head_dim

    def order() -> Tensor:
        q, gate = grouped([head_dim, head_dim], n_heads)().chunk(2)
        return torch.cat([q, torch.arange(2 * wide, 2 * (wide + narrow)), gate])

    form, keys = rows([wide + 2 * narrow, wide], [2 * wide, narrow, narrow], order), list[Key]()
    for part in affine(biased):
        published = tuple(f"{theirs}.{name}_proj.{part}" for name in "qkv")
        keys.append(Key((f"{ours}.qkv.{part}", f"{ours}.gate.{part}"), published, form))
    keys += same(f"{ours}.out", f"{theirs}.o_proj", *affine(options["out_bias"]))
    keys += same(f"{ours}.q_norm", f"{theirs}.q_norm", "weight", form=FROM_ONE)
    return keys + same(f"{ours}.k_norm", f"{theirs}.k_norm", "weight", form=FROM_ONE)


class _Linear:
    """The gated delta net: its widths, and its keys."""

    def __init__(self, fields: Fields, d_model: int):
        self.heads, self.value_heads = fields.size("linear_num_key_heads"), fields.size("linear_num_value_heads")
        self.key_dim, self.value_dim = fields.size("linear_key_head_dim"), fields.size("linear_value_head_dim")
        self.d_key, self.d_value = self.heads * self.key_dim, self.value_heads * self.value_dim

    def keys(self, ours: str, theirs: str) -> list[Key]:
        """q, k, v and the gate lie interleaved, a group a key head; so do beta and the decay."""
        ratio = self.value_heads // self.heads
        sizes = [self.key_dim, self.key_dim, ratio * self.value_dim, ratio * self.value_dim]
        together = 2 * (self.d_key + self.d_value)
        qkvz = rows([together - self.d_value, self.d_value], [together], grouped(sizes, self.heads))
        ba = rows([self.value_heads] * 2, [2 * self.value_heads], grouped([ratio, ratio], self.heads))
        keys = [
            Key((f"{ours}.qkv.weight", f"{ours}.gate.weight"), (f"{theirs}.in_proj_qkvz.weight",), qkvz),
            Key((f"{ours}.beta.weight", f"{ours}.decay.logits.weight"), (f"{theirs}.in_proj_ba.weight",), ba),
        ]
        keys += same(f"{ours}.conv.weight", f"{theirs}.conv1d.weight", form=CHANNELS)
        keys += same(f"{ours}.decay", theirs, "A_log", "dt_bias") + same(ours, theirs, "norm.weight")
        return keys + same(f"{ours}.out", f"{theirs}.out_proj", "weight")


def _experts(ours: str, theirs: str, options: dict[str, Any]) -> list[Key]:
    """Keys of a mixture of experts: the routed ones one by one, then the shared one, cut into ours."""
    n, shared, hidden = options["n_experts"], options["shared"], options["d_hidden"]
    names = [f"{theirs}.experts.{i}" for i in range(n)] + [f"{theirs}.shared_expert"]

    def cut(gate: Tensor, up: Tensor) -> Tensor:
        """(k hidden, d_model) twice -> (k, 2 hidden, d_model)"""
        return torch.cat([gate.unflatten(0, (-1, hidden)), up.unflatten(0, (-1, hidden))], dim=1)

    def read_up(tensors: list[Tensor]) -> list[Tensor]:
        return [torch.cat([cut(gate, up) for gate, up in zip(tensors[::2], tensors[1::2])])]

    def write_up(tensors: list[Tensor]) -> list[Tensor]:
        parts = tensors[0].split([*[1] * n, shared])
        return [half.flatten(0, 1) for part in parts for half in part.chunk(2, dim=1)]

    def read_down(tensors: list[Tensor]) -> list[Tensor]:
        return [torch.cat([tensor.unflatten(1, (-1, hidden)).transpose(0, 1) for tensor in tensors])]

    def write_down(tensors: list[Tensor]) -> list[Tensor]:
        return [part.transpose(0, 1).flatten(1) for part in tensors[0].split([*[1] * n, shared])]

    ups = tuple(f"{name}.{part}_proj.weight" for name in names for part in ("gate", "up"))
    downs = tuple(f"{name}.down_proj.weight" for name in names)
    return [
        Key((f"{ours}.gate_up",), ups, Form(read_up, write_up)),
        Key((f"{ours}.down",), downs, Form(read_down, write_down)),
        *same(f"{ours}.router", f"{theirs}.gate", "weight"),
        *same(f"{ours}.shared_gate", f"{theirs}.shared_expert_gate", "weight"),
    ]
