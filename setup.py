"""The compiled kernels: one shared library for each instruction set, plain C inside, optional.

No compiler, or one that fails, costs speed alone: the package installs without the library. What is built depends on
the platform, not on the versions of Python and PyTorch, and the wheel is tagged so.
"""

import os
import platform
import re
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # older than setuptools 70
    from wheel.bdist_wheel import bdist_wheel

SETS = {
    "x86_64": {"avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"], "avx2": ["-march=x86-64-v3"]},
    "aarch64": {"neon": ["-march=armv8-a"]},  # vectors and fused multiply-add are in all of them
}
COMMON = ["-std=c++20", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]


def machine() -> str:
    """The architecture to build for. A universal Python on a Mac would build for two at once: no flag fits both."""
    name = platform.machine()
    if sys.platform == "darwin":
        wanted = re.findall(r"-arch\s+(\S+)", os.environ.get("ARCHFLAGS", ""))
        name = wanted[0] if len(wanted) == 1 else name
        os.environ["ARCHFLAGS"] = f"-arch {name}"
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name.lower(), name.lower())


def kernels() -> list[Extension]:
    """One extension for each instruction set that this platform may have."""
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]  # Apple's compiler has none: one thread there
    static = ["-static-libstdc++", "-static-libgcc"] if sys.platform == "linux" else []
    return [
        Extension(
            f"bestiary.ops.native.kernels_{name}",
            ["csrc/kernels.cpp"],
            depends=sorted(str(path) for path in Path("csrc").glob("*.h")),
            extra_compile_args=[*COMMON, "-Wno-psabi", *openmp, *flags],
            extra_link_args=[*openmp, *static],
            language="c++",
            optional=True,
        )
        for name, flags in SETS.get(machine(), {}).items()
    ]


class PlainLibrary(build_ext):
    """Builds shared libraries that know nothing of Python."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []


class AnyPython(bdist_wheel):
    """A wheel for a platform and any Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(ext_modules=kernels(), cmdclass={"build_ext": PlainLibrary, "bdist_wheel": AnyPython})
