"""What a function of another library has to tell about itself before an op may call it."""

import functools
import importlib
import importlib.metadata
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

DEVICES = ("cuda",)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Library(NamedTuple):
    """A package with kernels.

    Args:
        name: what `ops.use` calls it, and the name it is imported by.
        distribution: what it is installed by.
        least: the oldest version whose functions have the keywords that we use.
        lacks: what an installed one may lack; gives the reason, or None.
    """

    name: str
    distribution: str
    least: tuple[int, ...]
    lacks: Callable[[], str | None] = lambda: None

    def version(self) -> str | None:
        """The installed version, found without importing anything; None where there is none."""
        return version_of(self.distribution)

    def missing(self) -> str | None:
        """Why it cannot be called; None where it can. Imports it."""
        version = self.version()
        if version is None:
            return f"{self.distribution} is not installed"
        if tuple(int(part) for part in re.findall(r"\d+", version)[: len(self.least)]) < self.least:
            return f"{self.distribution} is {version}, and {'.'.join(map(str, self.least))} is needed"
        return _import_error(self.name) or self.lacks()


class Backend(NamedTuple):
    """One function of a library that computes what a form of an op computes.

    Args:
        function: where it is, in dots.
        refuses: of (dtype, the arguments of the op's forms): why not these; None where it takes them.
        call: of (the function, dtype, the arguments of the op's forms): the results of the op's forms.

    Arguments arrive as the op's own forms get them: wide and scaled. `dtype` is the one in which the caller of the op
    computes, and which products inside the library's kernels have.
    """

    library: Library
    function: str
    refuses: Callable[..., str | None]
    call: Callable[..., Any]

    def why_not(self, like: Tensor, arguments: tuple[Any, ...]) -> str | None:
        """Why it cannot compute this op on these arguments; None where it can. Imports the library."""
        if like.device.type not in DEVICES:
            return f"its kernels run on {' and '.join(DEVICES)}, not on {like.device.type}"
        if like.dtype not in DTYPES or any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in arguments):
            return "its kernels do not compute in float64"
        return self.library.missing() or self.refuses(like.dtype, *arguments)

    def __call__(self, dtype: torch.dtype, *arguments: Any) -> Any:
        module, _, name = self.function.rpartition(".")
        return self.call(getattr(importlib.import_module(module), name), dtype, *arguments)


@functools.cache
def version_of(distribution: str) -> str | None:
    """The version of an installed distribution; None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def _import_error(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except Exception as error:  # a library with compiled parts fails in many ways: all of them mean the same here
        return f"{module} does not import: {type(error).__name__}: {error}".partition("\n")[0]
    return None
