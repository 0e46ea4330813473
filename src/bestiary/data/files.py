"""Files written whole or not at all, and the folder where fetched and derived data is kept."""

import contextlib
import hashlib
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from bestiary.errors import BestiaryError

CACHE_VARIABLE = "BESTIARY_CACHE"


def cache_folder() -> Path:
    """Where Bestiary keeps what it fetched: $BESTIARY_CACHE, else `bestiary` in the platform's own cache folder."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "bestiary"


def sha256(path: Path) -> str:
    """Checksum of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file so that a reader sees the old content or the new one, never a part; text as UTF-8.

    Raises BestiaryError where the place cannot be written.
    """
    part = _sibling(path, "part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise BestiaryError(f"cannot write {path}: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to fill with files, which replaces `folder` at the end; on an error that stays as it was.

    Raises BestiaryError where the place cannot be written.
    """
    part = _sibling(folder, "part")
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
        old = _sibling(folder, "old")
        with contextlib.suppress(FileNotFoundError):
            os.replace(folder, old)
        shutil.rmtree(old, ignore_errors=True)


def _sibling(path: Path, purpose: str) -> Path:
    """A new name beside a path, on the same disk."""
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.{purpose}")
