"""Checksums and folders written whole or not at all; single files are in bestiary.files."""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from bestiary.errors import BestiaryError
from bestiary.files import CACHE_VARIABLE, cache_folder, sibling, write_whole

__all__ = ["CACHE_VARIABLE", "cache_folder", "sha256", "whole_folder", "write_whole"]


def sha256(path: Path) -> str:
    """Checksum of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to fill with files, which replaces `folder` at the end; on an error that stays as it was.

    Raises BestiaryError where the place cannot be written.
    """
    part = sibling(folder, "part")
    try:
        part.mkdir(parents=True)
        yield part
        for file in part.iterdir():
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        _move(part, folder)
    except OSError as error:
        raise BestiaryError(f"cannot write {folder}: {error.strerror}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _move(part: Path, folder: Path) -> None:
    """Put a folder in another's place; others may be doing the same at this moment."""
    for attempt in range(5):
        try:
            os.replace(part, folder)
            return
        except OSError:
            if attempt == 4 or not folder.exists():
                raise
        old = sibling(folder, "old")
        with contextlib.suppress(FileNotFoundError):
            os.replace(folder, old)
        shutil.rmtree(old, ignore_errors=True)
