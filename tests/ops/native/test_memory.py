"""Blocks of memory are used again when nobody needs them, never before, and only so many are kept."""

import ctypes
import gc
import mmap
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from bestiary.ops.native import memory


def test_a_block_is_used_again_when_its_tensors_are_gone() -> None:
    pool = memory._pool
    first = memory.numbers(1 << 20)
    address, view = first.data_ptr(), first.view(1 << 10, -1)[3:]
    del first
    second = memory.numbers(1 << 20)
    assert second.data_ptr() != address  # a view still needs it
    del view
    gc.collect()
    assert any(block.ctypes.data == address for block in pool.free)
    assert address % memory.LARGE_PAGE == 0
    found = [memory.numbers(1 << 20) for _ in range(len(pool.free) + 1)]
    assert address in [tensor.data_ptr() for tensor in found]
    assert len({tensor.data_ptr() for tensor in (*found, second)}) == len(found) + 1


def test_little_is_kept_and_a_small_tensor_takes_no_large_block() -> None:
    pool = memory.Pool()
    kept = [memory.mapped(memory.LARGE_PAGE) for _ in range(memory.MOST_KEPT // memory.LARGE_PAGE + 3)]
    for block in kept:
        pool.give_back(block)
    assert pool.kept == memory.MOST_KEPT and pool.free[-1] is kept[-1]
    pool.free, pool.kept = [memory.mapped(1 << 25)], 1 << 25
    pool.numbers(memory.LEAST // 4)
    assert pool.kept == 1 << 25


def test_tensors_in_blocks_are_tensors_like_others() -> None:
    x = memory.numbers(3 << 18).view(3, -1)
    x.fill_(2.0)
    y = (x.clone().requires_grad_() * x).sum()
    y.backward()
    assert y.item() == 12.0 * (1 << 18) and x.dtype == torch.float32 and x.is_contiguous()


def test_weights_lie_side_by_side_at_cache_lines() -> None:
    room = memory.Arena().room
    first, second = room(100), room(5)
    assert second.data_ptr() - first.data_ptr() == 128 and first.data_ptr() % 64 == 0
    assert len(room(memory.CHUNK + 1)) == memory.CHUNK + 1


KEEPING = """
import resource, sys, torch
from bestiary.ops.native.memory import keep_freed
assert keep_freed()
for _ in range(2):
    torch.ones(1 << 24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    torch.ones(1 << 24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="the C library is not glibc")
def test_a_process_that_keeps_its_memory_gets_few_new_pages_from_the_system() -> None:
    def new_pages(source: str) -> int:
        done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
        return int(done.stdout)

    given_back = new_pages(KEEPING.replace("assert keep_freed()", "assert True"))
    assert given_back > 4 * 2**26 // mmap.PAGESIZE // 2 and new_pages(KEEPING) < given_back // 10


def test_threads_that_pack_at_once_get_memory_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new chunk takes long: who asks meanwhile waits for it, and no piece of any is lost or given twice."""
    real, sizes = memory.mapped, []

    def slow(size: int) -> memory.Bytes:
        sizes.append(size)
        time.sleep(0.05)
        return real(size)

    monkeypatch.setattr(memory, "mapped", slow)
    arena = memory.Arena()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(arena.room, [memory.CHUNK // 2] * 8))
    for i, tensor in enumerate(found):
        tensor.fill_(i)
    assert [tensor.unique().tolist() for tensor in found] == [[i] for i in range(8)]
    assert sizes == [memory.CHUNK] * 4
