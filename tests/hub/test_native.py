"""Bestiary's own format: what was saved is what is loaded, and anything else is an error that names it."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import bestiary
from bestiary import BestiaryError, LanguageModel, ModelConfig, UsageError
from bestiary.data import ByteTokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig("mamba attention", 32))
    bestiary.save(model, ByteTokenizer(), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("layout", ["mamba attention", "hyena rwkv4{channel=gelu_mlp}", "striped_hyena hyena_li"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_model_survives_saving(layout: str, tied: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(layout, 32, tie_embeddings=tied)).to(dtype)
    bestiary.save(model, None, tmp_path / "m")
    before = torch.get_rng_state()
    loaded, tokenizer = bestiary.load(tmp_path / "m")
    assert torch.equal(torch.get_rng_state(), before)
    tokens = torch.randint(256, (2, 9))
    assert tokenizer is None and loaded.config == model.config and loaded.fingerprint() == model.fingerprint()
    assert torch.equal(loaded(tokens)[0], model(tokens)[0])
    assert (loaded.head.weight is loaded.embedding.weight) == tied
    assert [p.dtype for p in loaded.parameters()] == [p.dtype for p in model.parameters()]
    marks = {name: vars(p) for name, p in model.named_parameters()}
    assert {name: vars(p) for name, p in loaded.named_parameters()} == marks  # what an optimiser must know


def test_the_tokenizer_comes_along(folder: Path) -> None:
    assert bestiary.load(folder)[1].fingerprint == ByteTokenizer.fingerprint


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    found = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor is None:
            del found[name.replace("__", ".")]
        else:
            found[name.replace("__", ".")] = tensor
    save_file(found, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("norm__weight", None, "lacks norm.weight"),
        ("extra", torch.zeros(2), "unknown extra"),
        ("norm__weight", torch.zeros(31), r"norm.weight is \(31,\), not \(32,\)"),
        ("norm__weight", torch.zeros(32, dtype=torch.int32), "norm.weight is of type I32"),
    ],
)
def test_wrong_tensors_are_named(folder: Path, name: str, tensor: torch.Tensor | None, message: str) -> None:
    change(folder, **{name: tensor})
    with pytest.raises(BestiaryError, match=message):
        bestiary.load(folder)


def test_truncated_and_foreign_files_are_one_clear_error(folder: Path, tmp_path: Path) -> None:
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    for size in (0, 4, 100, len(content) - 1):
        weights.write_bytes(content[:size])
        with pytest.raises(BestiaryError, match=re.escape(str(weights))):
            bestiary.load(folder)
    weights.write_bytes(content)
    for text in (
        "",
        "[]",
        "{}",
        '{"format": "bestiary", "version": 99}',
        '{"format": "bestiary", "version": 1, "wings": 2}',
    ):
        (folder / "config.json").write_text(text)
        with pytest.raises(BestiaryError, match=r"config\.json"):
            bestiary.load(folder)
    with pytest.raises(UsageError, match="no folder"):
        bestiary.load(tmp_path / "absent")


def test_a_hostile_size_allocates_nothing(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    for size, message in ((2**30, "does not fit"), (2**40, "impossible")):
        (folder / "config.json").write_text(json.dumps(config | {"d_model": 32 * 2**20, "vocab_size": size}))
        with pytest.raises(BestiaryError, match=message):
            bestiary.load(folder)


def test_saving_refuses_a_folder_of_other_files(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="other files"):
        bestiary.save(LanguageModel(ModelConfig("gru", 32)), None, tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
