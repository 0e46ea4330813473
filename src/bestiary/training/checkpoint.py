"""Checkpoints: folders that hold a model, its tokenizer and all that training needs to go on to the last bit.

    FOLDER/checkpoints/step-000200/    config.json model.safetensors tokenizer... optimizer.safetensors training.json

Each is written under another name and moved when it is whole, so that a kill at any moment leaves the one before.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bestiary.data.files import whole_folder
from bestiary.errors import BestiaryError
from bestiary.hub import native
from bestiary.training.config import TrainConfig

OPTIMIZER, TRAINING = "optimizer.safetensors", "training.json"
KEPT = 2
"""Checkpoints that stay: the last one, and one in case that is damaged."""


def save_checkpoint(
    folder: Path,
    model: Any,
    tokenizer: Any,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    progress: dict[str, Any],
    *,
    name: str | None = None,
) -> Path:
    """Write the state after `progress["step"]` steps; older checkpoints but the last ones are deleted."""
    base = folder / "checkpoints"
    path = base / (name or f"step-{progress['step']:06d}")
    with whole_folder(path) as part:
        native.write(model, tokenizer, part)
        save_file(_pack(model, optimizer), part / OPTIMIZER)
        content = {"config": config.to_dict(), "progress": progress}
        (part / TRAINING).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if name is None:
        for old in checkpoints(folder)[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)
    return path


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = [path for path in (folder / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name[5:]))


def restore(path: Path, model: Any, optimizer: torch.optim.Optimizer, config: TrainConfig) -> dict[str, Any]:
    """Put a checkpoint back into a model and an optimiser; returns the progress it recorded.

    Raises:
        BestiaryError: the checkpoint is damaged, or of another model or another training configuration.
    """
    try:
        content = json.loads((path / TRAINING).read_text(encoding="utf-8"))
        saved, progress = content["config"], content["progress"]
        packed = load_file(path / OPTIMIZER)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise BestiaryError(f"{path} is no readable checkpoint: {error}") from error
    wanted = config.to_dict()
    changed = [f"{key} was {saved.get(key)!r}, now {wanted[key]!r}" for key in wanted if saved.get(key) != wanted[key]]
    free = ("log_every", "eval_every", "save_every")  # these change no number
    changed = [text for text in changed if not text.startswith(free)]
    if changed:
        raise BestiaryError(f"{path} belongs to another run: {'; '.join(changed)}")
    loaded, _ = native.load(path)
    if loaded.config != model.config:
        raise BestiaryError(f"{path} holds another model: {loaded.config.layout}, width {loaded.config.d_model}")
    model.load_state_dict(loaded.state_dict())
    _unpack(packed, model, optimizer)
    return progress


def _pack(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    packed = {"rng": torch.get_rng_state()}
    for parameter, entries in optimizer.state.items():
        for key, value in entries.items():
            packed[f"{key}/{names[id(parameter)]}"] = torch.as_tensor(value).detach().cpu().contiguous()
    return packed


def _unpack(packed: dict[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    parameters = dict(model.named_parameters())
    torch.set_rng_state(packed.pop("rng"))
    optimizer.state.clear()
    for key, value in packed.items():
        entry, _, name = key.partition("/")
        if name not in parameters:
            raise BestiaryError(f"the optimiser's state has an unknown parameter {name}")
        device = "cpu" if entry == "step" else parameters[name].device
        optimizer.state[parameters[name]][entry] = value.to(device)
