"""Published shapes: as many parameters as published, in total and part by part, and they run when made small."""

import re
from dataclasses import replace

import pytest
import torch

from bestiary import LanguageModel, MaskedLanguageModel, ModelConfig, UsageError
from bestiary.models import presets

CAUSAL = [name for name in presets.names() if isinstance(presets.get(name), ModelConfig)]


def skeleton(name: str) -> LanguageModel | MaskedLanguageModel:
    config = presets.get(name)
    with torch.device("meta"):
        return LanguageModel(config) if isinstance(config, ModelConfig) else MaskedLanguageModel(config)


@pytest.mark.parametrize("name", presets.names())
def test_a_preset_has_as_many_parameters_as_the_published_model(name: str) -> None:
    assert skeleton(name).n_parameters() == presets.about(name).parameters


def test_stripedhyena_7b_is_the_published_table_part_by_part() -> None:
    """Shapes of the published weights (names are theirs): 15.292 GB in bf16 but for fp32 poles and residues."""
    D, M = 4096, 14336
    table = {
        "embedding and unembedding": 2 * 32000 * D,
        "norms": (2 * 32 + 1) * D,
        "projections": 16 * (12288 * D + 12288),
        "short filters": 16 * (12288 * 3 + 12288),
        "poles, residues, D": 16 * (2 * D * 2 * 2 + D),
        "out_filter_dense": 16 * (D * D + D),
        "Wqkv, out_proj": 16 * (6144 * D + D * D),
        "l1, l2, l3": 32 * 3 * D * M,
    }
    assert sum(table.values()) == presets.about("stripedhyena-7b").parameters == 7_646_023_680
    model = skeleton("stripedhyena-7b")
    hyena, attention = model.blocks[0].mixer, model.blocks[1].mixer
    assert [name for name in model.mixer_names()] == ["striped_hyena", "attention"] * 16
    assert hyena.in_proj.weight.shape == (12288, D) and hyena.conv.weight.shape == (12288, 3)
    assert hyena.filter.residues.shape == (D, 2, 2) and hyena.n_heads == 32
    assert attention.qkv.weight.shape == (6144, D) and attention.qkv.bias is None and attention.out.bias is None
    assert attention.rotary_base == 500000 and model.head.weight is not model.embedding.weight


def test_evo_1_attends_in_layers_8_16_and_24() -> None:
    model = skeleton("evo-1-8k")
    assert [i for i, name in enumerate(model.mixer_names()) if name == "attention"] == [8, 16, 24]
    assert len(model.blocks) == 32 and model.blocks[0].mixer.filter.residues.shape == (4096, 8, 2)
    assert model.blocks[8].mixer.out.bias is not None and model.head.weight is model.embedding.weight


def test_both_parametrisations_have_as_many_parameters() -> None:
    config = presets.get("stripedhyena-7b")
    with torch.device("meta"):
        raw = LanguageModel(
            replace(config, layout=config.layout.replace("d_state=2", "d_state=2, parametrisation=raw"))
        )
    assert raw.n_parameters() == presets.about("stripedhyena-7b").parameters


@pytest.mark.parametrize(
    ("name", "d_model", "max_length", "millions"),
    [
        ("m2-bert-80m", 768, 128, 80.27),
        ("m2-bert-80m-2k", 768, 2048, 81.97),
        ("m2-bert-80m-8k", 768, 8192, 87.43),
        ("m2-bert-80m-32k", 768, 32768, 109.25),
        ("m2-bert-110m", 960, 128, 115.58),
        ("m2-bert-260m", 1536, 128, 259.13),
        ("m2-bert-341m", 1792, 128, 341.04),
    ],
)
def test_m2_bert_is_the_published_table_part_by_part(name: str, d_model: int, max_length: int, millions: float) -> None:
    """Shapes of the published weights: two convolutions a layer, each of two networks and one table of features."""
    D, inner, order = d_model, 4 * d_model, 128
    network = 5 * order + order + 2 * (order * order + order) + order * D
    convolution = D + order + 5 * max_length + 2 * network
    layer = 3 * D * D + 3 * D + 4 * 3 * D + D * D + D + 2 * convolution + 3 * inner * D // 4 + D + 2 * D
    ends = (30528 + max_length + 2) * D + 2 * D + D * D + D + 2 * D + 30528
    assert 12 * layer + ends == presets.about(name).parameters == skeleton(name).n_parameters()
    assert round(presets.about(name).parameters / 1e6, 2) == millions
    block = skeleton(name).encoder.blocks[11]
    assert block.channel.gate_up.weight.shape == (4, 2 * inner // 4, D // 4) and block.norm is None
    assert block.mixer.residual.ahead.features.weight.shape == (max_length, 5) and block.mixer.norm is None


@pytest.mark.parametrize("name", CAUSAL)
def test_a_preset_made_small_trains_and_decodes(name: str) -> None:
    config = presets.get(name)
    layout = re.sub(r"d_hidden=\d+", "d_hidden=64", config.layout).replace("n_heads=32", "n_heads=4")
    layout = layout.replace("n_kv_heads=8", "n_kv_heads=2")
    model = LanguageModel(ModelConfig(**{**config.to_dict(), "layout": layout, "d_model": 32, "vocab_size": 50}))
    tokens = torch.randint(50, (2, 12))
    loss, _ = model.loss(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        whole, _ = model(tokens)
        _, state = model(tokens[:, :-1])
        last, _ = model.step(tokens[:, -1], state)
    torch.testing.assert_close(last, whole[:, -1], rtol=0, atol=1e-4)


def test_an_unknown_preset_is_an_error_that_names_the_valid_ones() -> None:
    with pytest.raises(UsageError, match=r"did you mean 'stripedhyena-7b'.*evo-1-8k"):
        presets.get("stripedhyena-8b")
