"""Bestiary's own format: a folder with config.json, model.safetensors and the tokenizer.

Loading is strict: every tensor of the model must be there, with its shape and a floating-point type, and no other.
Shapes are compared before anything is allocated. No pickle is read or written.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bestiary.data import tokenizer as tokens
from bestiary.data.files import whole_folder
from bestiary.errors import BestiaryError, UsageError, unknown
from bestiary.models import (
    ClassifierConfig,
    EncoderConfig,
    ImageClassifier,
    ImageConfig,
    LanguageModel,
    MaskedLanguageModel,
    ModelConfig,
    SequenceClassifier,
)

FORMAT = "bestiary"
VERSION = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
DEFAULT = "language_model"
"""What a model is whose config.json does not say."""
KINDS: dict[str, tuple[type, type]] = {
    DEFAULT: (LanguageModel, ModelConfig),
    "masked_language_model": (MaskedLanguageModel, EncoderConfig),
    "sequence_classifier": (SequenceClassifier, ClassifierConfig),
    "image_classifier": (ImageClassifier, ImageConfig),
}
"""What can be saved: the model's class and its configuration's, by the name in config.json."""
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def save(model: Any, tokenizer: Any, folder: str | Path) -> None:
    """Write a model, and its tokenizer unless that is None, as a folder; replaces an earlier one as a whole."""
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()) and not (folder / CONFIG).exists():
        raise UsageError(f"{folder} holds other files; choose an empty folder to save a model")
    with whole_folder(folder) as part:
        write(model, tokenizer, part)


def write(model: Any, tokenizer: Any, folder: Path) -> None:
    """Put the format's files into an existing folder."""
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
    folder = newest(Path(folder))
    cls, config = read_config(folder)
    try:
        with torch.device("meta"):
            skeleton = cls(config)
    except (RuntimeError, OverflowError) as error:
        raise BestiaryError(f"{folder / CONFIG} asks for an impossible size: {error}") from error
    wanted = {name: parameter.shape for name, parameter in skeleton.named_parameters()}
    tensors = _read(folder / WEIGHTS, wanted)
    with torch.random.fork_rng(devices=[]):  # loading leaves the caller's random numbers alone
        model = cls(config)
    dtypes = sorted({tensor.dtype for tensor in tensors.values()}, key=lambda dtype: dtype.itemsize)
    model = model.to(dtypes[0])  # some parts stay wide by themselves
    if any(parameter.dtype != tensors[name].dtype for name, parameter in model.named_parameters()):
        model = model.to(dtypes[-1])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[name])
    has_tokenizer = any((folder / name).exists() for name in (tokens.JSON_FILE, tokens.BYTES_FILE))
    return model, tokens.load(folder) if has_tokenizer else None


def newest(folder: Path) -> Path:
    """The folder itself where it holds a model, or else the last checkpoint of the training run that it holds."""
    if (folder / CONFIG).exists() or not folder.is_dir():
        return folder
    steps = sorted((folder / "checkpoints").glob("step-*[0-9]"), key=lambda path: int(path.name[5:]))
    return steps[-1] if steps else folder


def read_config(folder: Path) -> tuple[type, Any]:
    """The class and the configuration of the model in a folder."""
    path = folder / CONFIG
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder; give one that `bestiary train` or bestiary.save wrote")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{folder} holds no model: there is no {CONFIG}") from None
    except (OSError, ValueError) as error:
        raise BestiaryError(f"{path} is not readable: {error}") from error
    if not isinstance(fields, dict) or fields.pop("format", None) != FORMAT:
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


def _read(path: Path, wanted: dict[str, torch.Size]) -> dict[str, Tensor]:
    try:
        with safe_open(str(path), framework="pt") as file:
            names = set(file.keys())
            problems = [f"lacks {name}" for name in sorted(wanted.keys() - names)]
            problems += [f"has an unknown {name}" for name in sorted(names - wanted.keys())]
            for name in sorted(wanted.keys() & names):
                part = file.get_slice(name)
                if tuple(part.get_shape()) != tuple(wanted[name]):
                    problems.append(f"{name} is {tuple(part.get_shape())}, not {tuple(wanted[name])}")
                elif part.get_dtype() not in DTYPES:
                    problems.append(f"{name} is of type {part.get_dtype()}, not among {', '.join(DTYPES)}")
            if problems:
                more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
                raise BestiaryError(f"{path} does not fit its {CONFIG}: {'; '.join(problems[:5])}{more}")
            return {name: file.get_tensor(name) for name in wanted}
    except (OSError, SafetensorError, ValueError) as error:
        raise BestiaryError(f"{path} is not a readable weight file: {error}") from error
