"""Which kernels are loaded and why; the functions that they are made of; the sanitizers find nothing."""

import ctypes
import hashlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ops.native.kit import in_process, needed

from bestiary import UsageError, ops
from bestiary.ops.native import library

ROOT = Path(__file__).parents[3]
PRINT = "from bestiary.ops.native import load; found, why = load(); print(found is not None, '|', why)"
SETS = [name for name in library.SETS if (library.FOLDER / f"kernels_{name}.so").exists()]


def test_the_variable_switches_kernels_off_and_names_them() -> None:
    assert in_process(PRINT, BESTIARY_KERNELS="off") == "False | BESTIARY_KERNELS=off switches the kernels off"
    for name in SETS:
        found, why = in_process(PRINT, BESTIARY_KERNELS=name).split(" | ")
        assert (found == "True") == library._runs(name) and name in why
    code = "import bestiary; bestiary.ops.active()"
    with pytest.raises(AssertionError, match="BESTIARY_KERNELS must be off or one of avx512, avx2, neon, not 'sse'"):
        in_process(code, BESTIARY_KERNELS="sse")


def _kernels(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two instruction sets that this processor runs, "first" and "second", the latter a library that loads."""
    able = [name for name in SETS if library._runs(name)]
    shutil.copy(library.FOLDER / f"kernels_{able[0]}.so", folder / "kernels_second.so")
    monkeypatch.setattr(library, "FOLDER", folder)
    monkeypatch.setattr(library, "SETS", dict.fromkeys(("first", "second"), library.SETS[able[0]]))


@needed
@pytest.mark.parametrize("broken", [b"no library", b""])
def test_a_library_that_does_not_load_leaves_the_place_to_the_next(
    broken: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _kernels(tmp_path, monkeypatch)
    (tmp_path / "kernels_first.so").write_bytes(broken)
    found, why = library.load.__wrapped__()
    assert (
        found is not None and "second kernels, the best that loads" in why and "kernels_first.so does not load" in why
    )
    with monkeypatch.context() as other:
        before = library.VERSION
        other.setattr(library, "VERSION", -1)
        found, why = library.load.__wrapped__()
        assert found is None and "kernels_second.so does not load: it is of another version" in why
        other.setattr(library, "VERSION", before)
        other.setitem(library.SIZES, "no_such_thing", "")
        found, why = library.load.__wrapped__()
        assert found is None and "bestiary_no_such_thing" in why
    (tmp_path / "kernels_second.so").unlink()
    found, why = library.load.__wrapped__()
    assert found is None and why.startswith("kernels_first.so does not load")


def _interface() -> tuple[dict[str, tuple[str, str]], str]:
    """The exported functions, each with its result and the kinds of its arguments, and a digest of all that is C."""
    found, seen = {}, []
    source = (ROOT / "csrc/kernels.cpp").read_text()
    for result, name, arguments in re.findall(r"^EXPORT (\w+) bestiary_(\w+)\(([^)]*)\)", source, re.MULTILINE):
        kinds = "".join("p" if "*" in one else "s" for one in arguments.split(",") if one.strip())
        found[name] = (result, kinds)
        seen.append(f"{result} {name} {arguments}")
    for header in sorted((ROOT / "csrc").glob("*.h")):
        for block in re.findall(r'^extern "C" \{\n(.*?)^\}', header.read_text(), re.MULTILINE | re.DOTALL):
            seen.append(re.sub(r"//.*", "", block))
    return found, hashlib.sha256(" ".join(" ".join(seen).split()).encode()).hexdigest()[:12]


def test_python_calls_the_functions_that_there_are_as_they_are() -> None:
    found, digest = _interface()
    assert {name: kinds for name, (_, kinds) in found.items() if name != "version"} == library.SIZES | library.KERNELS
    assert {name for name, (result, _) in found.items() if result == "i64"} == {*library.SIZES, "version"}
    assert (library.VERSION, digest) == (6, "8d19850ce6c1"), (
        "the C interface has changed: raise VERSION, and say so here"
    )


@needed
@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit memory so")
@pytest.mark.parametrize(("rows", "inputs"), [(8, 1 << 22), (16, 1 << 22), (1 << 20, 1)])
def test_a_kernel_without_memory_is_an_error_that_python_survives(rows: int, inputs: int) -> None:
    """Its workspace alone is too large: of few rows, of many, and of each thread."""
    code = f"""
import resource, torch
from bestiary.ops.native.matvec import PackedMatrix
torch.set_num_threads(2)
small, large = PackedMatrix(torch.randn(64, 64), "fp32"), PackedMatrix(torch.zeros(1, {inputs}), "fp32")
ones = torch.ones(2048, 64)
expected = small.multiply(ones)
x = torch.ones({inputs}).expand({rows}, -1)  # the numbers of one row
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (4096 * pages + (50 << 20), resource.RLIM_INFINITY))
try: large.multiply(x)
except MemoryError as error: print(error)
assert torch.equal(small.multiply(ones), expected)
"""
    assert in_process(code) == "a kernel could not allocate its workspace"


def test_without_kernels_the_ops_say_so_and_run() -> None:
    code = (
        "import torch, bestiary; print(bestiary.ops.active()['selective_scan']['form'],"
        "torch.isfinite(bestiary.mixers.build('mamba', 32)(torch.randn(1, 9, 32))[0]).all().item())"
    )
    assert in_process(code, BESTIARY_KERNELS="off") == "torch True"


@needed
def test_what_a_kernel_cannot_compute_is_an_error_where_it_is_forced() -> None:
    u, A = torch.randn(1, 3, 4, dtype=torch.float64), -torch.ones(4, 2, dtype=torch.float64)
    B = torch.randn(1, 3, 2, dtype=torch.float64)
    with (
        ops.use("native"),
        pytest.raises(UsageError, match="no compiled form here: the kernels compute in fp32 on the CPU"),
    ):
        ops.selective_scan(u, u, A, B, B)
    with ops.use("native"), pytest.raises(UsageError, match="discretises by euler, not by zoh"):
        ops.selective_scan(u.float(), u.float(), A.float(), B.float(), B.float(), discretisation="zoh")


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize(
    ("which", "exact", "ulps"),
    [
        (0, np.exp, 2.0),
        (1, lambda x: 1 / (1 + np.exp(-x)), 3.0),
        (2, lambda x: np.logaddexp(0, x), 3.0),
        (3, lambda x: x / (1 + np.exp(-x)), 4.0),
    ],
    ids=["exp", "sigmoid", "softplus", "silu"],
)
def test_gates_are_exact_to_a_few_last_places(name: str, which: int, exact, ulps: float) -> None:
    if not library._runs(name):
        pytest.skip(f"this processor lacks {name}")
    kernels = ctypes.CDLL(str(library.FOLDER / f"kernels_{name}.so"))
    x = np.concatenate([np.linspace(-87, 88, 1 << 18), np.linspace(-1, 1, 1 << 16), [0.0] * 64]).astype(np.float32)
    y = np.empty_like(x)
    kernels.bestiary_elementwise.argtypes = [ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p]
    kernels.bestiary_elementwise(len(x), which, x.ctypes.data, y.ctypes.data)
    wanted = exact(x.astype(np.float64))
    off = np.abs(y - wanted) / np.spacing(np.maximum(np.abs(wanted), 1.2e-38).astype(np.float32))
    assert off.max() <= ulps, (float(off.max()), float(x[off.argmax()]))


@pytest.mark.parametrize("name", SETS)
def test_nan_and_infinities_go_through_the_gates(name: str) -> None:
    if not library._runs(name):
        pytest.skip(f"this processor lacks {name}")
    kernels = ctypes.CDLL(str(library.FOLDER / f"kernels_{name}.so"))
    kernels.bestiary_elementwise.argtypes = [ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p]
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), -1e30, 1e30, -104.0, 89.0, 0.0] * 8)
    y = torch.empty_like(x)
    for which, function in enumerate((torch.exp, torch.sigmoid, torch.nn.functional.softplus)):
        kernels.bestiary_elementwise(len(x), which, x.data_ptr(), y.data_ptr())
        wanted = function(x)
        wanted[wanted.abs() < 1.2e-38] = 0  # what has no normal number is zero here
        torch.testing.assert_close(y, wanted, equal_nan=True, rtol=1e-6, atol=0)


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("flags", ["-march=x86-64-v4", "-march=x86-64-v3", ""], ids=["avx512", "avx2", "sse2"])
def test_the_sanitizers_find_no_access_outside_and_no_undefined_behaviour(flags: str, tmp_path: Path) -> None:
    """A program runs every kernel on buffers that are exactly as large as they must be, over many shapes."""
    wide = torch.backends.cpu.get_cpu_capability()
    if (flags.endswith("v4") and wide != "AVX512") or (flags.endswith("v3") and wide not in ("AVX2", "AVX512")):
        pytest.skip(f"this processor runs {wide}")
    program = tmp_path / "bounds"
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-static-libasan"]
    build = ["c++", "-std=c++20", "-O1", "-g", "-Wno-psabi", *sanitizers, *flags.split(), "-o", str(program)]
    subprocess.run([*build, str(ROOT / "tests/csrc/bounds.cpp")], check=True, capture_output=True, text=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().endswith("shapes ran"), done.stdout
