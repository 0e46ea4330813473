"""Tensors in safetensors files: one, or several with an index beside them. Nothing is read unasked."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bestiary.errors import BestiaryError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class Entry(NamedTuple):
    """Where a tensor lies, and what it is."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


class Shards:
    """The tensors of a folder, by name.

    Raises:
        BestiaryError: there are no weights, a file is damaged, or the index names what is not there.
    """

    def __init__(self, folder: Path):
        self.source = folder / WEIGHTS
        files = [self.source]
        if not self.source.exists() and (folder / INDEX).exists():
            self.source = folder / INDEX
            files = self._indexed(folder)
        self.entries: dict[str, Entry] = {}
        for file in files:
            try:
                with safe_open(str(file), framework="pt") as tensors:
                    for name in list(tensors.keys()):
                        part = tensors.get_slice(name)
                        self.entries[name] = Entry(file, tuple(part.get_shape()), part.get_dtype())
            except (OSError, SafetensorError, ValueError) as error:
                raise BestiaryError(f"{file} is not a readable weight file: {error}") from error

    def _indexed(self, folder: Path) -> list[Path]:
        try:
            names = set(json.loads(self.source.read_text(encoding="utf-8"))["weight_map"].values())
            files = [folder / name for name in sorted(names)]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BestiaryError(f"{self.source} is no readable index of weight files: {error!r}") from error
        if any(file.parent != folder for file in files):
            raise BestiaryError(f"{self.source} names files outside its folder")
        return files

    def check(self, wanted: dict[str, torch.Size], *, may_have: Iterable[str] = ()) -> None:
        """All wanted tensors are there, of these shapes and of floating point, and no others beside `may_have`.

        Raises BestiaryError naming what is missing, what is too much, and what has another shape or type.
        """
        names, allowed = self.entries.keys(), set(may_have)
        problems = [f"lacks {name}" for name in sorted(wanted.keys() - names)]
        problems += [f"has an unknown {name}" for name in sorted(names - wanted.keys() - allowed)]
        for name in sorted(wanted.keys() & names):
            entry = self.entries[name]
            if entry.shape != tuple(wanted[name]):
                problems.append(f"{name} is {entry.shape}, not {tuple(wanted[name])}")
            elif entry.dtype not in DTYPES:
                problems.append(f"{name} is of type {entry.dtype}, not among {', '.join(DTYPES)}")
        if problems:
            more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise BestiaryError(f"{self.source} does not fit its config.json: {'; '.join(problems[:5])}{more}")

    def dtype(self, names: Iterable[str]) -> torch.dtype:
        """The narrowest type that holds all of these exactly."""
        found = {DTYPES[self.entries[name].dtype] for name in names}
        widest = found.pop()
        for dtype in found:
            widest = torch.promote_types(widest, dtype)
        return widest

    def read(self, name: str) -> Tensor:
        """One tensor, read now."""
        file = self.entries[name].file
        try:
            with safe_open(str(file), framework="pt") as tensors:
                return tensors.get_tensor(name)
        except (OSError, SafetensorError, ValueError) as error:
            raise BestiaryError(f"{file} is not a readable weight file: {error}") from error
