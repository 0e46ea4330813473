"""Reading and writing models: Bestiary's own format, and the published ones that it knows (read)."""

from pathlib import Path
from typing import Any

from bestiary.hub import folders, hugging_face, native
from bestiary.hub.native import save

__all__ = ["load", "save"]


def load(folder: str | Path, *, weights: str | None = None) -> tuple[Any, Any]:
    """Read (model, tokenizer) from a folder; the tokenizer is None where there is none.

    Args:
        folder: what `save` or a training run wrote, or a published model in the layout of Hugging Face's transformers:
            config.json with a `model_type` of bestiary.hub.families, safetensors files, and perhaps tokenizer.json.
        weights: "fp32", "bf16", "int8" or "int4" packs the weights for decoding on the CPU, tensor by tensor: see
            LanguageModel.packed. None: as they are.

    Raises:
        UsageError: there is no model at that place.
        BestiaryError: the model is of a kind that is not known or not supported, or damaged; the message names the
            field, file or tensor.
    """
    folder = folders.newest(Path(folder))
    fields = folders.read_config(folder)
    if "model_type" in fields and "format" not in fields:
        return hugging_face.load(folder, fields, weights)
    return native.load_fields(folder, fields, weights)
