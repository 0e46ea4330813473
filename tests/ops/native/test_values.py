"""The kernels without Python: each against its equation in C++, for every instruction set, by an emulator if need be.

Debian's packages g++-aarch64-linux-gnu and qemu-user-static bring what the ARM form needs on another processor.
"""

import ast
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from bestiary.ops.native import library

ROOT = Path(__file__).parents[3]
CROSS, EMULATORS, FOREIGN = "aarch64-linux-gnu-g++", ("qemu-aarch64-static", "qemu-aarch64"), "/usr/aarch64-linux-gnu"
SANITIZERS = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-static-libasan"]


def of_setup(name: str):
    """A constant of setup.py, which cannot be imported."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == name:
            return ast.literal_eval(node.value)
    raise AssertionError(f"setup.py has no {name}")


def builder(name: str) -> tuple[list[str], list[str]]:
    """Compiler with the flags of an instruction set, and what runs its programs; skips where one is missing."""
    arm = platform.machine().lower() in ("arm64", "aarch64")
    if name == "neon":
        flags, compiler, runner = of_setup("SETS")["aarch64"]["neon"], "c++", []
        if not arm:
            found = [path for emulator in EMULATORS if (path := shutil.which(emulator))]
            if shutil.which(CROSS) is None or not found:
                pytest.skip(f"no cross compiler {CROSS} with {EMULATORS[0]}, and no ARM processor")
            compiler, runner = CROSS, [found[0], "-L", FOREIGN]
    else:
        flags, compiler, runner = of_setup("SETS")["x86_64"].get(name, []), "c++", []
        if arm or (name in library.SETS and not library._runs(name)):
            pytest.skip(f"this processor lacks {name}")
    if shutil.which(compiler) is None:
        pytest.skip("no C++ compiler")
    return [compiler, "-Wno-psabi", *flags], runner


def built_and_run(build: list[str], runner: list[str], program: Path, source: str) -> str:
    """What a program prints."""
    subprocess.run([*build, "-o", str(program), str(ROOT / source)], check=True, capture_output=True, text=True)
    environment = os.environ | {"OMP_NUM_THREADS": "2", "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run([*runner, str(program)], capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("name", "lanes"),
    [
        pytest.param("avx512", 16, marks=pytest.mark.slow),
        ("avx2", 8),
        pytest.param("sse2", 4, marks=pytest.mark.slow),
        ("neon", 4),
    ],
)
def test_every_kernel_is_its_equation(name: str, lanes: int, tmp_path: Path) -> None:
    """Outputs, states and gradients over many shapes, with NaN in padding: exact to 2e-6 of the largest number; and the
    instructions of decoding."""
    build, runner = builder(name)
    build += [*of_setup("COMMON"), "-fopenmp"]
    printed = built_and_run(build, runner, tmp_path / "values", "tests/csrc/values.cpp")
    assert printed.endswith(f" 0 wrong, {lanes} lanes") and int(printed.split()[0]) > 29000, printed


@pytest.mark.slow
def test_the_sanitizers_find_nothing_on_arm(tmp_path: Path) -> None:
    build, runner = builder("neon")
    build += ["-std=c++20", *SANITIZERS]
    assert built_and_run(build, runner, tmp_path / "bounds", "tests/csrc/bounds.cpp").endswith("shapes ran")


# What one change, in the header's text, makes wrong: the case that notices, and what of it.
CHANGES = [
    ("linear_recurrence", "f * load(old + p * W, v.lanes(p)), v", "-f * load(old + p * W, v.lanes(p)), v", "da"),
    ("wkv", "sum_u[p] -= direct;", "sum_u[p] += direct;", "du"),
    ("linear_attention", "dbonus[i] += share * q[i] * k[i];", "dbonus[i] += share * q[i];", "dbonus"),
    ("delta_rule", "dq += load(b + block) * recalled;", "", "dq"),
    ("program", "sum_own *= less;", "", "o"),
    ("program", "if (k) store(after.at(r, k - 1, c), old, lanes);", "", "after"),
    ("matvec", "most / 127;", "most / 126;", "packed weights"),
]
NAMES = {"program": ("attend", "convolution"), "matvec": ("matvec",)}


@pytest.mark.parametrize(
    "change", [pytest.param(c, marks=[pytest.mark.slow] * (i > 0), id=f"{c[0]} {c[3]}") for i, c in enumerate(CHANGES)]
)
def test_the_program_notices_a_kernel_that_is_wrong(change: tuple[str, str, str, str], tmp_path: Path) -> None:
    """One place changed in a copy of the sources: the comparisons fail, and say where."""
    name, right, wrong, what = change
    build, runner = builder("sse2" if torch.backends.cpu.get_cpu_capability() != "DEFAULT" else "neon")
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    shutil.copytree(ROOT / "tests/csrc", tmp_path / "tests/csrc")
    header = tmp_path / f"csrc/{name}.h"
    assert header.read_text().count(right) == 1
    header.write_text(header.read_text().replace(right, wrong))
    source, program = tmp_path / "tests/csrc/values.cpp", tmp_path / "values"
    subprocess.run([*build, "-std=c++20", "-O1", "-o", str(program), str(source)], check=True, capture_output=True)
    done = subprocess.run([*runner, str(program)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 1
    named = [line for line in done.stdout.splitlines() if " off" in line]
    cases = NAMES.get(name, (name.replace("_", " "),))
    assert named and all(line.startswith(cases) and f": {what} " in line for line in named), named[:5]


def test_every_exported_function_and_instruction_is_run() -> None:
    """By the program that compares values, and by the one on exact buffers."""
    exported = set(re.findall(r"^EXPORT \w+ (bestiary_\w+)\(", (ROOT / "csrc/kernels.cpp").read_text(), re.MULTILINE))
    listed = re.search(r"enum Op \{([^}]*)\}", (ROOT / "csrc/program.h").read_text())
    assert len(exported) > 30 and listed
    bounds = (ROOT / "tests/csrc/bounds.cpp").read_text()
    values = "".join(path.read_text() for path in [ROOT / "tests/csrc/values.cpp", *ROOT.glob("tests/csrc/values/*.h")])
    facts = {"bestiary_version", "bestiary_threads"}
    for source, needed in ((bounds, exported), (values, exported - facts)):
        assert needed <= set(re.findall(r"bestiary_\w+", source))
        assert {op.strip() for op in listed[1].split(",")} <= set(re.findall(r"program::(\w+)", source))
