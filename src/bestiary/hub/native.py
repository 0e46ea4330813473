"""Bestiary's own format: a folder with config.json, model.safetensors and the tokenizer.

Loading is strict: every tensor of the model must be there, with its shape and a floating-point type, and no other.
Shapes are compared before anything is allocated. No pickle is read or written.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bestiary.data import tokenizer as tokens
from bestiary.data.files import whole_folder
from bestiary.errors import BestiaryError, UsageError, unknown
from bestiary.hub import folders
from bestiary.hub.folders import CONFIG
from bestiary.hub.shards import WEIGHTS, Shards
from bestiary.models import (
    ClassifierConfig,
    EncoderConfig,
    ImageClassifier,
    ImageConfig,
    LanguageModel,
    MaskedLanguageModel,
    ModelConfig,
    SequenceClassifier,
    packing,
)

FORMAT = "bestiary"
VERSION = 1
DEFAULT = "language_model"
"""What a model is whose config.json does not say."""
KINDS: dict[str, tuple[type, type]] = {
    DEFAULT: (LanguageModel, ModelConfig),
    "masked_language_model": (MaskedLanguageModel, EncoderConfig),
    "sequence_classifier": (SequenceClassifier, ClassifierConfig),
    "image_classifier": (ImageClassifier, ImageConfig),
}
"""What can be saved: the model's class and its configuration's, by the name in config.json."""


def save(model: Any, tokenizer: Any, folder: str | Path) -> None:
    """Write a model, and its tokenizer unless that is None, as a folder; replaces an earlier one as a whole."""
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()) and not (folder / CONFIG).exists():
        raise UsageError(f"{folder} holds other files; choose an empty folder to save a model")
    with whole_folder(folder) as part:
        write(model, tokenizer, part)


def write(model: Any, tokenizer: Any, folder: Path) -> None:
    """Put the format's files into an existing folder."""
    packing.check_plain(model)
    config = {"format": FORMAT, "version": VERSION, "model": kind_of(model), **model.config.to_dict()}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in model.named_parameters()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    if tokenizer is not None:
        tokenizer.save(folder)


def kind_of(model: Any) -> str:
    """The name of a model's kind; a UsageError where the format does not hold such models."""
    for base in type(model).__mro__:
        for kind, (cls, _) in KINDS.items():
            if base is cls:
                return kind
    raise UsageError(f"a {type(model).__name__} cannot be saved in this format, which holds {', '.join(KINDS)}")


def load(folder: str | Path) -> tuple[Any, Any]:
    """Read (model, tokenizer) from a folder that `save`, or a training run, wrote; the tokenizer is None without one.

    The model is of the class that was saved: a LanguageModel, or one of the encoders' models.

    Raises:
        BestiaryError: the folder holds no model of this format, or a damaged one; the message names the file or tensor.
    """
    return load_fields(newest := folders.newest(Path(folder)), folders.read_config(newest))


def load_fields(folder: Path, fields: dict[str, Any], weights: str | None = None) -> tuple[Any, Any]:
    """The same for a folder whose config.json holds these fields; language models perhaps with packed `weights`."""
    cls, config = _config(folder / CONFIG, fields)
    try:
        with torch.device("meta"):
            skeleton = cls(config)
    except (RuntimeError, OverflowError) as error:
        raise BestiaryError(f"{folder / CONFIG} asks for an impossible size: {error}") from error
    wanted = {name: parameter.shape for name, parameter in skeleton.named_parameters()}
    shards = Shards(folder)
    shards.check(wanted)
    has_tokenizer = any((folder / name).exists() for name in (tokens.JSON_FILE, tokens.BYTES_FILE))
    if weights is not None:
        if not isinstance(skeleton, LanguageModel):
            raise UsageError(f"{folder} holds a {cls.__name__}: only language models can be packed for decoding")
        return packing.packed(skeleton, weights, shards.read), tokens.load(folder) if has_tokenizer else None
    tensors = {name: shards.read(name) for name in wanted}
    with torch.random.fork_rng(devices=[]):  # loading leaves the caller's random numbers alone
        model = cls(config)
    dtypes = sorted({tensor.dtype for tensor in tensors.values()}, key=lambda dtype: dtype.itemsize)
    model = model.to(dtypes[0])  # some parts stay wide by themselves
    if any(parameter.dtype != tensors[name].dtype for name, parameter in model.named_parameters()):
        model = model.to(dtypes[-1])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[name])
    return model, tokens.load(folder) if has_tokenizer else None


def _config(path: Path, fields: dict[str, Any]) -> tuple[type, Any]:
    """The class and the configuration of the model that a config.json describes."""
    fields = dict(fields)
    if fields.pop("format", None) != FORMAT:
        raise BestiaryError(f'{path} is not of this format: it lacks "format": "{FORMAT}"')
    version = fields.pop("version", None)
    if version != VERSION:
        raise BestiaryError(f"{path} has version {version!r}, this Bestiary reads {VERSION}")
    try:
        kind = fields.pop("model", DEFAULT)
        if kind not in KINDS:
            raise unknown("kind of model", str(kind), KINDS)
        cls, config = KINDS[kind]
        return cls, config.from_dict(fields)  # type: ignore[attr-defined]
    except (UsageError, TypeError) as error:
        raise BestiaryError(f"{path}: {error}") from error
