"""Memory for the kernels: large blocks that are used again instead of being given back, in large pages where there are.

A system hands memory out page by page, each cleared when it is first touched: for what a kernel writes once that costs
as much as the kernel. Blocks that no tensor needs any more are kept for the next one, up to `MOST_KEPT` bytes.
"""

import contextlib
import ctypes
import mmap
import sys
import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

LARGE_PAGE = 1 << 21
LEAST = 1 << 20
"""Bytes from which on a block comes from here; smaller ones are torch's own."""
MOST_KEPT = 1 << 28
SLACK = 1.25
"""A block may be so many times as large as what is asked for."""
CHUNK = 1 << 25
"""Bytes at a time for weights, which are never given back one by one."""


def mapped(size: int) -> Bytes:
    """New memory, at the start of a large page; of ordinary pages where the system has no large ones."""
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    block = mmap.mmap(-1, size + LARGE_PAGE, **private)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            block.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(block, dtype=np.uint8)
    start = -whole.ctypes.data % LARGE_PAGE
    return whole[start : start + size]


def keep_freed() -> bool:
    """Have the C library keep what this process frees, for its next blocks; whether it does (glibc alone can be told).

    Training frees and asks for the same large blocks at each step, which by default go back to the system in between.
    The process keeps as much memory as it ever needed at once.
    """
    most_mapped, most_free = -4, -1  # M_MMAP_MAX and M_TRIM_THRESHOLD of malloc.h
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(most_mapped, 0)) and bool(mallopt(most_free, 2**31 - 1))


class _Lent(np.ndarray):
    """Numbers in a block that goes back to the pool when the tensor made of them is gone."""

    block: Any = None

    def __del__(self) -> None:
        if self.block is not None:
            _pool.give_back(self.block)


class Pool:
    """Blocks that are free."""

    def __init__(self) -> None:
        self.free: list[Bytes] = []
        self.kept, self.lock = 0, threading.RLock()  # a collection in the middle may give a block back

    def numbers(self, count: int) -> Tensor:
        """A tensor of so many fp32 numbers, not initialised."""
        size = 4 * count
        with self.lock:
            fitting = [b for b in self.free if size <= len(b) <= SLACK * size + LARGE_PAGE]
            block = min(fitting, key=len, default=None)
            if block is not None:
                self.free = [b for b in self.free if b is not block]
                self.kept -= len(block)
        if block is None:
            block = mapped(-(-size // LARGE_PAGE) * LARGE_PAGE)
        lent = block[:size].view(np.float32).view(_Lent)
        lent.block = block
        return torch.from_numpy(lent)

    def give_back(self, block: Bytes) -> None:
        """Keep a block for another, or let it go."""
        with self.lock:
            self.free.append(block)
            self.kept += len(block)
            while self.kept > MOST_KEPT:
                self.kept -= len(self.free.pop(0))


class Arena:
    """Memory for packed weights, which live as long as their model: pieces of large chunks."""

    def __init__(self) -> None:
        self.rest, self.lock = np.empty(0, np.uint8), threading.Lock()

    def room(self, size: int) -> Tensor:
        """So many bytes, at the start of a cache line; a chunk lives as long as what was given of it."""
        whole = -(-size // 64) * 64
        with self.lock:
            if len(self.rest) < whole:
                self.rest = mapped(max(whole, CHUNK))
            found, self.rest = self.rest[:size], self.rest[whole:]
        return torch.from_numpy(found)


_pool = Pool()
numbers = _pool.numbers
weights = Arena().room
