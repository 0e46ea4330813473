"""What `bestiary doctor --check-backend` found, kept in a file: which function computes right, here.

Kernels that are compiled at run time have given wrong gradients on some GPUs with some compilers, silently, so what was
found holds for one version of the library, of torch and of triton, one GPU and one dtype.
"""

import functools
import json
from pathlib import Path

import torch

from bestiary.files import cache_folder, write_whole
from bestiary.ops.backends import backend
from bestiary.ops.backends.backend import Backend

SCHEMA = 1


def path() -> Path:
    """Where the record is."""
    return cache_folder() / "backends.json"


def key(of: Backend, device: torch.device, dtype: torch.dtype) -> str:
    """What a finding holds for."""
    return f"{of.function} | {str(dtype).removeprefix('torch.')} | {_setup(of.library.distribution, device)}"


def why_not(of: Backend, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the record does not speak for a function; None where it does."""
    if of.library.version() is None:
        return f"{of.library.distribution} is not installed"
    found = read().get(key(of, device, dtype))
    if found is None:
        return "not checked with these versions on this GPU: bestiary doctor --check-backend"
    return None if found["verdict"] == "ok" else f"{found['verdict']} when it was checked: {found['detail']}"


def read() -> dict[str, dict[str, str]]:
    """All findings, by key; none where there is no record or one that cannot be read."""
    return _read(path())


def add(findings: dict[str, dict[str, str]]) -> Path:
    """Add findings to the record, in the place of older ones with the same keys; returns where it is."""
    place = path()
    _read.cache_clear()
    write_whole(place, json.dumps({"schema": SCHEMA, "findings": _read(place) | findings}, indent=2) + "\n")
    _read.cache_clear()
    return place


@functools.cache
def _read(place: Path) -> dict[str, dict[str, str]]:
    try:
        content = json.loads(place.read_text(encoding="utf-8"))
        findings = content["findings"].items() if content["schema"] == SCHEMA else ()
        return {name: {"verdict": found["verdict"], "detail": found["detail"]} for name, found in findings}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _setup(distribution: str, device: torch.device) -> str:
    versions = {name: backend.version_of(name) for name in (distribution, "triton")}
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return " | ".join([*(f"{name} {version}" for name, version in versions.items()), f"torch {torch.__version__}", gpu])
