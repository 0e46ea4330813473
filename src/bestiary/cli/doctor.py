"""`bestiary doctor`: what is installed, what runs where, and why."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import bestiary
from bestiary import ops
from bestiary.cli.common import parse, write_json
from bestiary.data.corpora import PUBLISHED
from bestiary.data.files import cache_folder
from bestiary.ops import backends
from bestiary.ops.backends import check, record
from bestiary.ops.native import load
from bestiary.studies.speed import machine

PACKAGES = ("torch", "numpy", "safetensors", "tokenizers", "tyro", "rich", "matplotlib", "jaxtyping")
EXTRAS = {"tensorboard": "training logs for it"}


@dataclass(frozen=True)
class Doctor:
    """Show what is installed, what this machine has, which form of each op runs and why, and what is missing.

    Examples:
      bestiary doctor
      bestiary doctor --check-backend
      bestiary doctor --json doctor.json
    """

    check_backend: bool = False
    """Compare what other libraries' kernels compute on this GPU with our definitions, gradients included, and keep the
    findings: only functions that computed the same are used."""
    json: Path | None = None
    """Write the findings here too."""


def main(argv: list[str]) -> int:
    arguments = parse(Doctor, argv, "doctor")
    console = Console()
    checked = _check_backends(console) if arguments.check_backend else None
    found = examine()
    for title in ("versions", "machine", "extras", "corpora", "GPU libraries"):
        console.print(_table(title, found[title]))
    table = Table("op", "form", "why", title="ops", title_justify="left")
    for op, choice in found["ops"].items():
        table.add_row(op, choice["form"], choice["why"])
    console.print(table)
    console.print(found["verdict"], highlight=False)
    write_json(arguments.json, found if checked is None else found | {"checked": checked})
    return 0


def examine() -> dict[str, Any]:
    """All findings, as one value."""
    versions = {"bestiary": bestiary.__version__, "python": platform.python_version()}
    versions |= {name: _version(name) or "missing" for name in PACKAGES}
    here = machine() | {
        "C++ compiler": _compiler() or "none found: no kernels are built, every op has a form in plain PyTorch"
    }
    here |= {"instructions": torch.backends.cpu.get_cpu_capability()}
    return {
        "versions": versions,
        "machine": {key: value for key, value in here.items() if value is not None},
        "extras": {name: _version(name) or f"not installed ({what})" for name, what in EXTRAS.items()},
        "corpora": {"cache": str(cache_folder())}
        | {name: "fetched" if corpus.archive.cached() else "not fetched yet" for name, corpus in PUBLISHED.items()},
        "GPU libraries": _libraries(),
        "ops": ops.active(),
        "verdict": _verdict(),
    }


def _libraries() -> dict[str, str]:
    """What of other libraries is there and, on a GPU, which of their functions are used, or why not."""
    facts = {}
    for library in backends.LIBRARIES.values():
        facts[library.distribution] = library.version() or "not installed"
    gpu = _gpu()
    return facts | ({"used": "none of them: there is no CUDA GPU here"} if gpu is None else backends.standing(gpu))


def _gpu() -> torch.device | None:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None


def _check_backends(console: Console) -> list[dict[str, str]]:
    """Run the comparison, print what came of it, a line a function and dtype."""
    for library in backends.LIBRARIES.values():
        why_not = library.missing()
        console.print(why_not or f"{library.distribution} {library.version()}", highlight=False)
    gpu = _gpu()
    if gpu is None:
        console.print("Nothing was compared: these kernels run on CUDA GPUs, and there is none here.", highlight=False)
        return []
    table, findings = (
        Table("function", "dtype", "verdict", "what was found", title="backends", title_justify="left"),
        [],
    )
    for finding in check.run(gpu):
        table.add_row(*finding)
        findings.append(finding._asdict())
    if findings:
        console.print(table)
        console.print(f"Recorded in {record.path()}.", highlight=False, soft_wrap=True)
    return findings


def _verdict() -> str:
    """What runs where, in a sentence or two."""
    device = "device of their inputs" if torch.cuda.is_available() else "CPU"
    kernels = [op for op, choice in ops.active().items() if choice["form"] == "native"]
    rest = f"ops run as plain PyTorch on the {device}; a sequence of one step runs the recurrence itself."
    if kernels:
        return f"Compiled for this processor: {', '.join(kernels)}. The other {rest}"
    return f"All {rest} No compiled kernels: {load()[1]}."


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _compiler() -> str | None:
    """The first line of the C++ compiler's --version, or None."""
    path = shutil.which(os.environ.get("CXX") or "c++") or shutil.which("g++") or shutil.which("clang++")
    if path is None:
        return None
    try:
        answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.partition("\n")[0] or path


def _table(title: str, facts: dict[str, Any]) -> Table:
    table = Table("what", "here", title=title, title_justify="left", show_header=False)
    for name, fact in facts.items():
        table.add_row(name.replace("_", " "), str(fact))
    return table
