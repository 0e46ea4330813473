"""The compiled kernels: which there are, which this processor runs, and how they are called.

Each instruction set is one shared library beside this file, plain C inside, built when the package was installed if a
C++ compiler was there. BESTIARY_KERNELS=off switches them off, BESTIARY_KERNELS=avx2 takes the one of that name.
"""

import ctypes
import functools
import math
import os
import platform
from pathlib import Path
from typing import Any

import torch  # first: it brings the OpenMP library that the kernels then share
from torch import Tensor

from bestiary.errors import UsageError
from bestiary.ops.native import memory

VARIABLE = "BESTIARY_KERNELS"
VERSION = 6
"""Of the C interface: raised, here and in csrc/kernels.cpp, with each change of a name, an argument or a struct."""
FOLDER = Path(__file__).parent
SETS = {"avx512": ("AVX512",), "avx2": ("AVX2", "AVX512"), "neon": ()}
"""Instruction sets, the best first, and what torch calls processors that have them; every ARM processor has NEON."""

_TYPES = {"s": ctypes.c_int64, "p": ctypes.c_void_p}
SIZES = {
    "lanes": "",
    "threads": "",
    "scan_starts": "ssss",
    "scan_groups": "s",
    "wkv_chunk": "",
    "pack_bytes": "sss",
    "rounds_inputs": "",
    "delta_steps": "ss",
    "delta_panels": "s",
    "linear_attention_starts": "sssss",
    "linear_attention_parts": "ss",
    "norm_parts": "ss",
}
"""Functions that give a size, all named bestiary_...; their arguments are sizes (s) and pointers (p)."""
KERNELS = {
    "scan_forward": "p",
    "scan_backward": "pp",
    "convolution_forward": "p",
    "convolution_backward": "pp",
    "recurrence_forward": "p",
    "recurrence_backward": "pp",
    "wkv_forward": "p",
    "wkv_backward": "pp",
    "pack": "pppp",
    "unpack": "pssp",
    "gather": "pspp",
    "multiply": "pspsps",
    "program": "pp",
    "delta_forward": "p",
    "delta_backward": "pp",
    "elementwise": "sspp",
    "linear_attention_forward": "p",
    "linear_attention_backward": "pp",
    "norm_forward": "p",
    "norm_backward": "pp",
    "cross_entropy": "p",
}
"""Functions that compute, and return whether memory ran out."""


@functools.cache
def load() -> tuple[ctypes.CDLL | None, str]:
    """The library that fits this processor, and why; None where there is none.

    Raises UsageError where BESTIARY_KERNELS names an instruction set that does not exist.
    """
    wanted = selected()
    if wanted in ("off", "0"):
        return None, f"{VARIABLE}={wanted} switches the kernels off"
    if wanted and wanted not in SETS:
        raise UsageError(f"{VARIABLE} must be off or one of {', '.join(SETS)}, not {wanted!r}")
    built = {name: path for name in SETS if (path := FOLDER / f"kernels_{name}.so").exists()}
    if not built:
        return None, "no kernels were built: install a C++ compiler and then the package again"
    able = [name for name in built if _runs(name)]
    if wanted and wanted not in able:
        return None, f"{VARIABLE}={wanted}, which was not built or which this processor lacks"
    if not able:
        return None, f"this processor runs none of the kernels that were built ({', '.join(built)})"
    reasons: list[str] = []
    for name in [wanted] if wanted else able:
        try:
            library = _loaded(built[name])
        except (OSError, AttributeError) as error:
            reasons.append(f"{built[name].name} does not load: {error}")
            continue
        how = f"by {VARIABLE}" if wanted else f"the best that {'loads' if reasons else 'this processor runs'}"
        return library, "; ".join([f"{name} kernels, {how}", *reasons])
    return None, "; ".join(reasons)


def _loaded(path: Path) -> ctypes.CDLL:
    """A library of this version, the types of its functions set; OSError or AttributeError where it cannot be used."""
    library = ctypes.CDLL(str(path))
    library.bestiary_version.restype = ctypes.c_int64
    if library.bestiary_version() != VERSION:
        raise OSError("it is of another version: install the package again")
    for name, arguments in (SIZES | KERNELS).items():
        function = getattr(library, f"bestiary_{name}")
        function.argtypes = [_TYPES[kind] for kind in arguments]
        function.restype = ctypes.c_int64 if name in SIZES else ctypes.c_int
        if name in KERNELS:
            function.errcheck = _succeeded
    return library


def selected() -> str:
    """What BESTIARY_KERNELS asks for; empty for the best."""
    return os.environ.get(VARIABLE, "").strip().lower()


def _succeeded(status: int | None, function: Any, arguments: Any) -> None:
    """One clear error where a kernel had no memory; Python and all that it holds go on."""
    if status:
        raise MemoryError("a kernel could not allocate its workspace")


def kernel(name: str) -> Any:
    """A function of the library that fits this processor; only for what asked `refuses` before."""
    library, why = load()
    if library is None:
        raise RuntimeError(why)
    return getattr(library, name)


def _runs(name: str) -> bool:
    """Whether this processor has the instruction set."""
    arm = platform.machine().lower() in ("arm64", "aarch64")
    return arm if name == "neon" else not arm and torch.backends.cpu.get_cpu_capability() in SETS[name]


@torch.compiler.assume_constant_result
def _missing() -> str | None:
    """Why there are no kernels, None where there are: the same as long as the process lives, also to torch.compile."""
    library, why = load()
    return why if library is None else None


def refuses(*tensors: Tensor | None) -> str | None:
    """Why the kernels do not take these tensors; None where they do: fp32 on the CPU."""
    why = _missing()
    if why is not None:
        return why
    for tensor in tensors:
        if tensor is not None and (tensor.device.type != "cpu" or tensor.dtype != torch.float32):
            return f"the kernels compute in fp32 on the CPU, not in {tensor.dtype} on {tensor.device.type}"
    return None


def buffer(*shape: int) -> Tensor:
    """A new tensor for a kernel to write into, whatever torch's default dtype and device are."""
    count = math.prod(shape)
    if 4 * count < memory.LEAST:
        return torch.empty(shape, dtype=torch.float32, device="cpu")
    return memory.numbers(count).view(shape)


def pointer(tensor: Tensor | None) -> int | None:
    """The address of a tensor's first number, which must be what kernels read; None for none."""
    if tensor is None:
        return None
    if tensor.dtype not in (torch.float32, torch.int64) or tensor.device.type != "cpu":
        raise TypeError(
            f"kernels read fp32 numbers and int64 lengths on the CPU, not {tensor.dtype} on {tensor.device}"
        )
    return tensor.data_ptr()


def check_shapes(op: str, *expected: tuple[str, Tensor | None, tuple[int, ...]]) -> None:
    """One clear error where a tensor has not the shape that the kernel will read: it looks at nothing but addresses."""
    for name, tensor, shape in expected:
        if tensor is not None and tensor.shape != shape:
            raise UsageError(f"{op}: {name} must be of shape {shape}, not {tuple(tensor.shape)}")


def only_once(operator: str) -> None:
    """Registers that an operator, some backward pass, has no derivative itself: asking for one is a clear error."""

    def refuse(*_: Any) -> Any:
        raise UsageError(
            f'{operator} is a compiled kernel and has no second derivative: compute within bestiary.ops.use("torch")'
        )

    torch.library.register_autograd(operator, refuse)


def row_ends(op: str, lengths: Tensor | None, batch: int, time: int) -> Tensor | None:
    """Lengths as the kernels read them, none beyond the segment's end; None for none."""
    if lengths is None:
        return None
    check_shapes(op, ("lengths", lengths, (batch,)))
    return lengths.to(torch.int64).clamp(0, time).contiguous()


def rows(tensor: Tensor) -> Tensor:
    """The tensor itself where its last dimension lies in one piece, else a copy that does."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()
