"""Peers are given the same work: with our weights they compute our logits."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import llama, works
from bestiary import LanguageModel, ModelConfig

TOKENS = [3, 5, 7, 11, 13]


@pytest.mark.parametrize(("form", "tolerance"), [("f32", 1e-5), ("bf16", 0.02), ("q8_0", 0.03), ("q4_0", 0.3)])
def test_llama_cpp_computes_our_mamba(form: str, tolerance: float, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed (pip install '.[peers]')")
    pytest.importorskip("xllamacpp", reason="xllamacpp is not installed (pip install '.[peers]')")
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig("mamba*2", 64, 100)).eval()
    with torch.no_grad():
        expected = model(torch.tensor([TOKENS]))[0][0]
    peer = llama.Llama(llama.write_gguf(model, form, tmp_path), 100, threads=1)
    for _ in range(2):
        peer.forget()
        peer.read(TOKENS[:4])
        assert (peer.logits() - expected[3]).abs().max() < tolerance
        peer.read(TOKENS[4:])
        assert (peer.logits() - expected[4]).abs().max() < tolerance


def test_a_file_of_weights_is_written_once_and_its_name_tells_them(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed (pip install '.[peers]')")
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig("mamba", 32, 10))
    path = llama.write_gguf(model, "f32", tmp_path)
    written = path.stat().st_mtime_ns
    assert llama.write_gguf(model, "f32", tmp_path) == path and path.stat().st_mtime_ns == written
    with torch.no_grad():
        model.norm.weight[0] += 1
    assert llama.write_gguf(model, "f32", tmp_path) != path
    assert len(list(tmp_path.iterdir())) == 2


@torch.no_grad()
def test_mambapy_computes_our_mamba() -> None:
    peer = pytest.importorskip("mambapy.mamba", reason="mambapy is not installed (pip install '.[peers]')")
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig("mamba*2", 64, 100)).eval()
    layers = peer.Mamba(peer.MambaConfig(d_model=64, n_layers=2))
    for block, layer in zip(model.blocks, layers.layers):
        weights = {name.replace("conv.", "conv1d."): tensor for name, tensor in block.mixer.state_dict().items()}
        weights["conv1d.weight"] = weights["conv1d.weight"][:, None]
        layer.mixer.load_state_dict(weights)
        layer.norm.load_state_dict(block.norm.state_dict())
    tokens = torch.tensor([TOKENS])
    expected = model.hidden(tokens)[0]
    assert (model.norm(layers(model.embedding(tokens))) - expected).abs().max() < 1e-5
    caches = [(None, torch.zeros(1, 128, 3)) for _ in range(2)]
    for token in TOKENS:
        y, caches = layers.step(model.embedding(torch.tensor([token])), caches)
    assert (model.norm(y) - expected[:, -1]).abs().max() < 1e-5


def test_the_scan_of_mambapy_is_given_the_work_of_ours() -> None:
    pytest.importorskip("mambapy.pscan", reason="mambapy is not installed (pip install '.[peers]')")
    live = [x.requires_grad_() for x in works.scan_inputs(64, 32)]
    ours, theirs = works.our_scan(live), works.pscan(live)
    assert (ours - theirs).abs().max() < 1e-5 * ours.abs().max()
    for a, b in zip(torch.autograd.grad(ours.sum(), live), torch.autograd.grad(theirs.sum(), live)):
        assert (a - b).abs().max() < 1e-5 * a.abs().max()


@pytest.mark.parametrize("name", ["rwkv4", "rwkv7"])
def test_the_package_rwkv_computes_ours(name: str, tmp_path: Path) -> None:
    pytest.importorskip("rwkv", reason="rwkv is not installed (pip install '.[peers]')")
    code = f"""
import torch
from pathlib import Path
from benchmarks import peers
from bestiary import LanguageModel, ModelConfig
torch.manual_seed(0)
torch.set_grad_enabled(False)
config = ModelConfig("{name}*2", 128, 100, norm="layer", norm_eps=1e-5, tie_embeddings=False)
model = LanguageModel(config).eval()
for parameter in model.parameters():
    parameter.add_(0.05 * torch.randn_like(parameter))
peer, state = peers.rwkv(model, Path({str(tmp_path)!r})), None
table = model.embedding.weight
table.copy_(torch.nn.functional.layer_norm(table, table.shape[-1:]))  # as the package does with what it read
for token in {TOKENS}:
    logits, state = peer.forward([token], state)
expected = model(torch.tensor([{TOKENS}]))[0][0, -1]
print((logits.float() - expected).abs().max().item())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 1e-4
