"""Small sets of images and series that need no network: (train, test) of each.

digits      1,797 handwritten digits of 8 x 8 pixels, out of scikit-learn (Alpaydin, Kaynak 1998)
mnist       any MNIST-like set in idx files
mnist1d     4,000 + 1,000 series of 40 numbers in ten classes (Greydanus, Kobak 2020, arXiv:2011.14439), made here

Images are (rows, height, width), series (rows, time, 1), fp32, with mean 0 and deviation 1 over the training set.
"""

import gzip
import importlib
import random
import types
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bestiary.data.labelled import Labelled, split
from bestiary.errors import BestiaryError, UsageError

EXTRA = "samples"
"""The optional dependencies that hold these packages: pip install 'bestiary[samples]'."""


def digits(*, held_out: float = 0.2, seed: int = 0) -> tuple[Labelled, Labelled]:
    """scikit-learn's digits, a random share of them held out."""
    found = _package("sklearn.datasets", "scikit-learn", "the digits").load_digits()
    images = torch.from_numpy(np.asarray(found.images, np.float32))
    return _standardised(*split(Labelled(images, torch.from_numpy(np.asarray(found.target, np.int64))), held_out, seed))


def mnist(images: str | Path, labels: str | Path, *, held_out: float = 0.2, seed: int = 0) -> tuple[Labelled, Labelled]:
    """Images and labels from two idx files, gzipped or not, a random share of them held out."""
    pixels, classes = read_idx(images), read_idx(labels)
    if pixels.ndim != 3 or classes.ndim != 1:
        raise UsageError(f"{images} must hold images and {labels} labels, not {pixels.shape} and {classes.shape}")
    data = Labelled(torch.from_numpy(pixels.astype(np.float32)), torch.from_numpy(classes.astype(np.int64)))
    return _standardised(*split(data, held_out, seed))


def mnist1d() -> tuple[Labelled, Labelled]:
    """MNIST-1D as its authors split it; the caller's random numbers stay as they were."""
    package = _package("mnist1d.data", "mnist1d", "MNIST-1D")
    before = random.getstate(), np.random.get_state()  # noqa: NPY002 (the package seeds the global generators)
    try:
        made = package.make_dataset(package.get_dataset_args())
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002

    def part(ending: str) -> Labelled:
        series = torch.from_numpy(made[f"x{ending}"].astype(np.float32))[:, :, None]
        return Labelled(series, torch.from_numpy(made[f"y{ending}"].astype(np.int64)))

    return _standardised(part(""), part("_test"))


def read_idx(path: str | Path) -> np.ndarray:
    """The array of unsigned bytes in an idx file, gzipped or not.

    Raises BestiaryError where it is none, or damaged.
    """
    try:
        content = Path(path).read_bytes()
        content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    except (OSError, EOFError) as error:
        raise BestiaryError(f"{path} is not readable: {error}") from error
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise BestiaryError(f"{path} is no idx file of unsigned bytes")
    start = 4 + 4 * content[3]
    shape = tuple(int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4))
    if len(content) != start + int(np.prod(shape, dtype=np.int64)):
        raise BestiaryError(f"{path} is damaged: {len(content)} bytes do not hold an array of shape {shape}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _standardised(train: Labelled, test: Labelled) -> tuple[Labelled, Labelled]:
    assert isinstance(train.inputs, Tensor) and isinstance(test.inputs, Tensor)
    mean, deviation = train.inputs.mean(), train.inputs.std()
    return tuple(Labelled((part.inputs - mean) / deviation, part.labels) for part in (train, test))  # type: ignore


def _package(module: str, name: str, what: str) -> types.ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(f"{what} come with {name}: pip install 'bestiary[{EXTRA}]' ({error})") from None
