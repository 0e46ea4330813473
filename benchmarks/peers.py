"""Other people's models of the same shapes: transformers, mambapy, and the package `rwkv` with our weights."""

import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bestiary import LanguageModel

LAYERS, WIDTH, VOCABULARY = 24, 768, 50280
"""Mamba-130M's shape."""

BLINK = {
    r"blocks\.(\d+)\.norm\.": r"blocks.\1.ln1.",
    r"blocks\.(\d+)\.channel_norm\.": r"blocks.\1.ln2.",
    r"blocks\.(\d+)\.mixer\.": r"blocks.\1.att.",
    r"blocks\.(\d+)\.channel\.": r"blocks.\1.ffn.",
    r"^norm\.": "ln_out.",
    r"^embedding\.": "emb.",
    r"\.mix_": ".time_mix_",
    r"att\.([wavg])_low\.down\.weight$": r"att.\g<1>1",
    r"att\.([wavg])_low\.up\.weight$": r"att.\g<1>2",
}
"""Our names -> those of RWKV's author, versions 4 and 7."""


@cache
def transformers(kind: str, layers: int = LAYERS) -> Any:
    """A model of that kind with random weights; GPT-NeoX with tied embeddings, as ours are."""
    import transformers as library

    common: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": layers}
    if kind == "GPTNeoX":
        common |= {"num_attention_heads": 12, "intermediate_size": 4 * WIDTH, "tie_word_embeddings": True}
        common |= {"max_position_embeddings": 8192, "attn_implementation": "sdpa"}
    if kind == "Mamba2":
        common |= {"num_heads": 24, "n_groups": 1}
    torch.manual_seed(0)
    return getattr(library, f"{kind}ForCausalLM")(getattr(library, f"{kind}Config")(**common)).eval()


@cache
def mambapy() -> nn.ModuleList:
    """Embedding, layers and head of the package mambapy."""
    from mambapy.mamba import Mamba, MambaConfig

    torch.manual_seed(0)
    layers = Mamba(MambaConfig(d_model=WIDTH, n_layers=LAYERS))
    return nn.ModuleList([nn.Embedding(VOCABULARY, WIDTH), layers, nn.Linear(WIDTH, VOCABULARY, bias=False)]).eval()


def rwkv(model: LanguageModel, folder: Path) -> Any:
    """The package `rwkv` with the weights of one of our RWKV-4 or 7 models, in fp32."""
    version = model.mixer_names()[0]
    os.environ["RWKV_JIT_ON"], os.environ["RWKV_CUDA_ON"] = "1", "0"
    os.environ["RWKV_V7_ON"] = "1" if version == "rwkv7" else "0"
    from rwkv.model import RWKV

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / version
    torch.save(blink(model), f"{path}.pth")
    return (
        RWKV(model=str(path), strategy="cpu fp32", verbose=False) if version != "rwkv7" else RWKV(str(path), "cpu fp32")
    )


def blink(model: LanguageModel) -> dict[str, Tensor]:
    """Weights under the names and in the shapes of RWKV's author; the embeddings' norm has no weights of its own."""
    found = {
        "blocks.0.ln0.weight": torch.ones(model.config.d_model),
        "blocks.0.ln0.bias": torch.zeros(model.config.d_model),
    }
    for name, tensor in model.state_dict().items():
        low = "_low." in name
        for ours, theirs in BLINK.items():
            name = re.sub(ours, theirs, name)
        vector = tensor.ndim == 1 and re.search(r"(time_mix_.|att\.x_.|ffn\.x_.|att\.[wav]0|k_k|k_a)$", name)
        found[name] = (tensor.T if low else tensor[None, None] if vector else tensor).contiguous().clone()
    return found
