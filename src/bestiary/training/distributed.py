"""Where a process of a run works: its device, and its place among the processes that `torchrun` started."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import distributed

from bestiary.errors import UsageError, unknown

DEVICES = ("auto", "cpu", "cuda", "mps", "xpu")


@dataclass(frozen=True)
class Place:
    """The device of this process, and which of how many processes it is."""

    device: torch.device
    rank: int = 0
    world: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process reports and writes."""
        return self.rank == 0

    def wait(self) -> None:
        """Return when all processes have come here."""
        if self.world > 1:
            distributed.barrier()


def choose_device(name: str = "auto") -> torch.device:
    """The device of that name; "auto" is CUDA where there is one, else the CPU.

    Raises UsageError for an unknown name or a device that this machine does not have.
    """
    kind, _, index = name.partition(":")
    if kind not in DEVICES or (index and not index.isdigit()):
        raise unknown("device", name, DEVICES)
    if kind == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    there = {"cuda": torch.cuda, "mps": torch.mps, "xpu": torch.xpu}
    if kind in there and int(index or 0) >= there[kind].device_count():
        raise UsageError(f"device {name!r}: this machine, or this build of PyTorch, has none; take --device cpu")
    return torch.device(name)


@contextlib.contextmanager
def join(device: str = "auto") -> Iterator[Place]:
    """This process's place; where torchrun started several, they form a group within the context.

    CUDA devices are dealt out by local rank and talk by NCCL; on others the processes talk by gloo.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Place(choose_device(device))
        return
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    found = choose_device(device)
    if found.type == "cuda":
        found = choose_device(f"cuda:{local}")
        torch.cuda.set_device(found)
    distributed.init_process_group("nccl" if found.type == "cuda" else "gloo")
    try:
        yield Place(found, rank, world)
    finally:
        distributed.destroy_process_group()
