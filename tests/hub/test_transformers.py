"""Models that transformers built and saved compute the same here: all at once, in segments, and step by step."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import bestiary
from bestiary import BestiaryError, LanguageModel
from bestiary.hub import families

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")

SMALL: dict[str, Any] = {"vocab_size": 61, "hidden_size": 64, "num_hidden_layers": 3}
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
MLP: dict[str, Any] = {"intermediate_size": 96}
QWEN3_NEXT: dict[str, Any] = {
    **SMALL,
    **HEADS,
    "num_hidden_layers": 4,
    "head_dim": 32,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 64,
    "mlp_only_layers": [1],
    **MLP,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", SMALL | HEADS | MLP),
    "llama, tied, biases, own head size": (
        "Llama",
        SMALL | HEADS | MLP | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 24},
    ),
    "llama, stretched positions": (
        "Llama",
        SMALL | HEADS | MLP | {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}},
    ),
    "mistral": ("Mistral", SMALL | HEADS | MLP | {"sliding_window": 8}),
    "qwen2": ("Qwen2", SMALL | HEADS | MLP | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("Qwen3", SMALL | HEADS | MLP | {"head_dim": 32}),
    "gpt_neox": ("GPTNeoX", SMALL | MLP | {"num_attention_heads": 2}),
    "gpt_neox, one after the other": (
        "GPTNeoX",
        SMALL | MLP | {"num_attention_heads": 2, "use_parallel_residual": False},
    ),
    "mamba": ("Mamba", SMALL | {"state_size": 8}),
    "mamba2": ("Mamba2", SMALL | {"num_heads": 8, "head_dim": 16, "n_groups": 2, "state_size": 24, "chunk_size": 16}),
    "falcon_mamba": ("FalconMamba", SMALL | {"state_size": 8, "expand": 3}),
    "recurrent_gemma": (
        "RecurrentGemma",
        SMALL | HEADS | {"lru_width": 96, "intermediate_size": 192, "attention_window_size": 8, "num_hidden_layers": 4},
    ),
    "xlstm": ("xLSTM", SMALL | {"num_heads": 4, "chunk_size": 16}),
    "lfm2": ("Lfm2", SMALL | HEADS | MLP | {"layer_types": ["conv", "full_attention", "conv"]}),
    "lfm2, biases": (
        "Lfm2",
        SMALL | HEADS | MLP | {"full_attn_idxs": [1], "conv_bias": True, "block_auto_adjust_ff_dim": False},
    ),
    "qwen3_next": ("Qwen3Next", QWEN3_NEXT),
    "rwkv": ("Rwkv", SMALL | {"rescale_every": 2, "context_length": 64}),
    "rwkv, wide": (
        "Rwkv",
        SMALL | {"intermediate_size": 160, "attention_hidden_size": 64, "tie_word_embeddings": True},
    ),
}


def published(name: str, options: dict[str, Any], seed: int = 0) -> Any:
    """A random model of transformers whose every weight matters: none is zero or one, none is alike."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**options)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.ndim > 1 else 0.3))
            if "time_mix" in key:
                parameter.sigmoid_()
    return model


def logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, LanguageModel]:
    """The published model, and what is loaded of it."""
    model = published(*request.param)
    model.save_pretrained(tmp_path)
    return model, bestiary.load(tmp_path)[0].eval()


def test_logits_are_the_same(pair: tuple[Any, LanguageModel]) -> None:
    theirs, ours = pair
    tokens = torch.randint(61, (2, 37))
    expected = logits(theirs, tokens)
    assert expected.std() > 0.1
    with torch.no_grad():
        close(ours(tokens)[0], expected)
        parts, state = [], None
        for segment in tokens.split([1, 12, 3, 21], dim=1):
            part, state = ours(segment, state)
            parts.append(part)
        close(torch.cat(parts, dim=1), expected)
        state = ours.initial_state(2)
        for t in range(20):
            step, state = ours.step(tokens[:, t], state)
            close(step, expected[:, t])


@pytest.mark.parametrize(("name", "options"), CASES.values(), ids=CASES.keys())
def test_what_a_form_reads_it_writes_again(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    published(name, options).save_pretrained(tmp_path)
    recipe = families.recipe(json.loads((tmp_path / "config.json").read_text()))
    for key in recipe.keys:
        stored = [load_file(tmp_path / "model.safetensors")[name] for name in key.theirs]
        again = key.form.write(key.form.read(stored))
        for tensor, expected in zip(again, stored, strict=True):
            torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-6)  # weights from one are rounded


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    published(*CASES["llama"]).save_pretrained(tmp_path)
    return tmp_path


def change(folder: Path, **fields: object) -> None:
    """Write other fields into config.json; None takes one out."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "lama"}, r"unknown model_type 'lama' \(did you mean 'llama'\?\)"),
        ({"hidden_size": None}, "hidden_size must be a positive integer, not None"),
        ({"hidden_size": "64"}, "hidden_size must be a positive integer, not '64'"),
        ({"hidden_act": "relu"}, "hidden_act='relu' is not supported, only 'silu'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rotary positions of type 'yarn' are not supported"),
        ({"num_key_value_heads": 3}, "n_kv_heads=3 must divide n_heads=4"),
        ({"intermediate_size": 128}, r"mlp.down_proj.weight is \(64, 96\), not \(64, 128\)"),
        ({"num_hidden_layers": 4}, "lacks model.layers.3.input_layernorm.weight"),
        ({"num_hidden_layers": 2}, "has an unknown model.layers.2.input_layernorm.weight"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 is more than 4096"),
        ({"hidden_size": 1 << 40}, "does not fit its config.json"),
        ({"tie_word_embeddings": True}, "lm_head.weight should be model.embed_tokens.weight again"),
    ],
)
def test_what_does_not_fit_is_one_clear_error(llama: Path, fields: dict[str, Any], message: str) -> None:
    change(llama, **fields)
    with pytest.raises(BestiaryError, match=message) as raised:
        bestiary.load(llama)
    assert "\n" not in str(raised.value)


ODD = [None, -1, 10**9, float("nan"), "x", [], {}]


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "recurrent_gemma", "lfm2", "qwen3_next"])
def test_odd_fields_are_one_clear_error_or_a_model(name: str, tmp_path: Path) -> None:
    """Each field of the configuration, and of the objects in it, becomes each of these; nothing else may happen."""
    published(*CASES[name]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    inside = {key: value for key, value in config.items() if isinstance(value, dict)}
    fields = [{key: odd} for key in config for odd in ODD]
    fields += [{key: value | {part: odd}} for key, value in inside.items() for part in value for odd in ODD]
    refused = 0
    for changed in fields:
        (tmp_path / "config.json").write_text(json.dumps(config | changed))
        try:
            bestiary.load(tmp_path)
        except BestiaryError as error:
            refused += 1
            assert "\n" not in str(error), changed
    assert 0 < refused < len(fields)


def test_weights_in_several_files_are_read_and_a_missing_file_is_named(tmp_path: Path) -> None:
    model = published(*CASES["llama"])
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 1
    tokens = torch.randint(61, (1, 9))
    close(bestiary.load(tmp_path)[0](tokens)[0], logits(model, tokens))
    files[0].unlink()
    with pytest.raises(BestiaryError, match=re.escape(files[0].name)):
        bestiary.load(tmp_path)


def test_an_index_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    published(*CASES["llama"]).save_pretrained(tmp_path / "model", max_shard_size="100KB")
    index = tmp_path / "model" / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"model-00001', '"../model-00001'))
    with pytest.raises(BestiaryError, match="names files outside its folder"):
        bestiary.load(tmp_path / "model")


def test_weights_keep_their_type(tmp_path: Path) -> None:
    published(*CASES["mamba"]).to(torch.bfloat16).save_pretrained(tmp_path)
    model, tokenizer = bestiary.load(tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16} and tokenizer is None


def test_what_is_loaded_can_be_saved_as_our_own(llama: Path, tmp_path: Path) -> None:
    model, _ = bestiary.load(llama)
    bestiary.save(model, None, tmp_path / "ours")
    tokens = torch.randint(61, (1, 9))
    assert torch.equal(bestiary.load(tmp_path / "ours")[0](tokens)[0], model(tokens)[0])
