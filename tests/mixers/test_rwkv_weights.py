"""RWKV with weights that others trained: their logits, whole, step by step and over splits.

The models and their expected logits are rwkv.cpp's test data (MIT): small models of bytes, versions 4, 6 and 7.
"""

import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from shared import shared
from torch import Tensor
from torch.nn import functional as F

from bestiary import LanguageModel, ModelConfig

Weights = dict[str, Tensor]
PROMPT = torch.tensor([list(b'"in')])

# BlinkDL's names -> ours; a tensor of several names is stacked from them
RENAMED = {
    r"blocks\.(\d+)\.ln1\.": r"blocks.\1.norm.",
    r"blocks\.(\d+)\.ln2\.": r"blocks.\1.channel_norm.",
    r"blocks\.(\d+)\.att\.": r"blocks.\1.mixer.",
    r"blocks\.(\d+)\.ffn\.": r"blocks.\1.channel.",
    r"^ln_out\.": "norm.",
    r"^emb\.": "embedding.",
    r"time_mix_": "mix_",  # RWKV-4
    r"time_maa_w1": "mix_down.weight",  # RWKV-6
    r"time_maa_w2": "mix_up",
    r"time_maa_": "maa_",
    r"time_decay_w1": "decay.down.weight",
    r"time_decay_w2": "decay.up.weight",
    r"time_faaaa": "bonus",
    r"mixer\.([wavg])1$": r"mixer.\1_low.down.weight",  # RWKV-7
    r"mixer\.([wavg])2$": r"mixer.\1_low.up.weight",
}
TRANSPOSED = re.compile(r"(mix_down|decay\.down|decay\.up|_low\.down|_low\.up)\.weight$")


def model_of(weights: Weights, mixer: str, **options: int) -> LanguageModel:
    """A model with these weights; the norm of the embeddings is done once and for all."""
    weights = {name: tensor.float() for name, tensor in weights.items()}
    ln0 = [weights.pop(f"blocks.0.ln0.{part}") for part in ("weight", "bias")]
    weights["emb.weight"] = F.layer_norm(weights["emb.weight"], ln0[0].shape, *ln0)
    vocab, d_model = weights["emb.weight"].shape
    layers = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    text = ", ".join(f"{key}={value}" for key, value in options.items())
    model = LanguageModel(
        ModelConfig(f"{mixer}{{{text}}}*{layers}", d_model, vocab, norm="layer", norm_eps=1e-5, tie_embeddings=False)
    )
    model.load_state_dict(ours(weights, model.state_dict()))
    return model.eval()


def ours(weights: Weights, wanted: Weights) -> Weights:
    renamed = {}
    for name, tensor in weights.items():
        for theirs, our in RENAMED.items():
            name = re.sub(theirs, our, name)
        renamed[name] = tensor.T if TRANSPOSED.search(name) else tensor
    for name in wanted:
        if name.endswith(".maa"):
            renamed[name] = torch.stack([renamed.pop(f"{name}_{part}").flatten() for part in "wkvrg"])
    return {name: tensor.reshape(wanted[name].shape) for name, tensor in renamed.items()}


def rwkv_cpp(path: Path) -> Weights:
    """The tensors of a file in rwkv.cpp's format, under BlinkDL's names, blocks of 32 five-bit numbers unpacked."""
    data, found, at = path.read_bytes(), {}, 24
    magic, version, _, _, _, _ = struct.unpack_from("<6I", data)
    assert (magic, version) == (0x67676D66, 101)
    while at < len(data):
        dims, key_length, kind = struct.unpack_from("<3I", data, at)
        shape = struct.unpack_from(f"<{dims}I", data, at + 12)[::-1]
        at += 12 + 4 * dims + key_length
        name, count = data[at - key_length : at].decode(), int(np.prod(shape))
        size = {0: 4 * count, 8: count // 32 * 24}[kind]
        raw, at = np.frombuffer(data, np.uint8, size, at), at + size
        values = raw.view("<f4") if kind == 0 else q5_1(raw.reshape(-1, 24))
        found[name] = torch.from_numpy(values.reshape(shape).copy())
        if re.search(r"_w[12]$", name):  # the file holds them transposed
            found[name] = found[name].mT
    return found


def q5_1(blocks: np.ndarray) -> np.ndarray:
    """scale (f16), minimum (f16), 32 fifth bits, then 16 bytes: low halves are numbers 0..15, high ones 16..31."""
    scale, low = (blocks[:, i : i + 2].copy().view("<f2").astype(np.float32) for i in (0, 2))
    fifth = np.unpackbits(blocks[:, 4:8].copy(), axis=1, bitorder="little")
    four = np.concatenate([blocks[:, 8:] & 15, blocks[:, 8:] >> 4], axis=1)
    return (four + 16 * fifth) * scale + low


def expected(name: str) -> Tensor:
    return torch.from_numpy(np.fromfile(shared(f"rwkv_tiny/expected-logits-{name}.bin"), dtype="<f4"))


def pth(name: str) -> Weights:
    return torch.load(shared(f"rwkv_tiny/pth/tiny-rwkv-{name}.pth"), weights_only=True)


def rwkv4() -> tuple[LanguageModel, Tensor]:
    return model_of(pth("4v0-660K"), "rwkv4", **{"channel.d_hidden": 256}), expected("4v0-660K")


def rwkv6() -> tuple[LanguageModel, Tensor]:
    weights = rwkv_cpp(shared("rwkv_tiny/tiny-rwkv-6v0-3m-Q5_1.bin"))
    return model_of(weights, "rwkv6", head_size=8, mix_rank=32, decay_rank=64), expected("6v0-3m")


def rwkv7() -> tuple[LanguageModel, Tensor]:
    ranks = {f"{part}_rank": 32 for part in ("decay", "rate", "value", "gate")}
    return model_of(pth("7v0-834K"), "rwkv7", head_size=64, **ranks), expected("7v0-834K")


@pytest.mark.parametrize(
    ("load", "tolerance"),
    [(rwkv4, 1e-4), (rwkv6, 0.1), (rwkv7, 1e-4)],  # the weights of RWKV-6 are rounded to five bits
    ids=["rwkv4", "rwkv6", "rwkv7"],
)
@torch.no_grad()
def test_the_expected_logits(load, tolerance: float) -> None:
    model, logits = load()
    whole, _ = model(PROMPT)
    assert (whole[0, -1] - logits).abs().max() < tolerance
    state = model.initial_state(1)
    for token in PROMPT.unbind(1):
        stepped, state = model.step(token, state)
    assert (stepped[0] - logits).abs().max() < tolerance
    for cut in (1, 2):
        _, state = model(PROMPT[:, :cut])
        split, _ = model(PROMPT[:, cut:], state)
        assert (split[0, -1] - logits).abs().max() < tolerance


@torch.no_grad()
def test_rwkv6_has_learned_to_read() -> None:
    model, _ = rwkv6()
    text = "The old man looked at the house and said that he would not go there again before the end of the year."
    tokens = torch.tensor([list(text.encode("utf-16-le"))])  # so it was trained
    loss = F.cross_entropy(model(tokens[:, :-1])[0][0], tokens[0, 1:], reduction="sum")
    bits = loss.item() / np.log(2) / (len(text) - 1)
    assert bits < 2


@torch.no_grad()
def test_rwkv7_generates_as_it_reads() -> None:
    model, _ = rwkv7()
    out = model.generate(PROMPT, max_new_tokens=20)
    logits, _ = model(out)
    assert torch.equal(logits[0, 2:-1].argmax(-1), out[0, 3:])
