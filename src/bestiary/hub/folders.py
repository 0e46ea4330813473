"""Folders that hold a model: where in them it lies, and what its config.json says."""

import json
from pathlib import Path
from typing import Any

from bestiary.errors import BestiaryError, UsageError

CONFIG = "config.json"
LARGEST_CONFIG = 1 << 24  # bytes: no config.json is as large as this


def newest(folder: Path) -> Path:
    """The folder itself where it holds a model, or else the last checkpoint of the training run that it holds."""
    if (folder / CONFIG).exists() or not folder.is_dir():
        return folder
    steps = sorted((folder / "checkpoints").glob("step-*[0-9]"), key=lambda path: int(path.name[5:]))
    return steps[-1] if steps else folder


def read_config(folder: Path) -> dict[str, Any]:
    """What the config.json of a folder says.

    Raises:
        UsageError: there is no such folder or file.
        BestiaryError: the file is not readable.
    """
    path = folder / CONFIG
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder; give one that `bestiary train` or bestiary.save wrote")
    try:
        if path.stat().st_size > LARGEST_CONFIG:
            raise BestiaryError(f"{path} is larger than {LARGEST_CONFIG} bytes: it is no config.json")
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{folder} holds no model: there is no {CONFIG}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BestiaryError(f"{path} is not readable: {error}") from error
    if not isinstance(fields, dict):
        raise BestiaryError(f"{path} is not readable: it holds no object")
    return fields
