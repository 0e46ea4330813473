"""Files written whole or not at all, and the folder where Bestiary keeps what it made or fetched."""

import contextlib
import os
import secrets
import sys
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


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file so that a reader sees the old content or the new one, never a part; text as UTF-8.

    Raises BestiaryError where the place cannot be written.
    """
    part = sibling(path, "part")
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


def sibling(path: Path, purpose: str) -> Path:
    """A new name beside a path, on the same disk."""
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.{purpose}")
