"""Data that lies beside the project and is no part of it: tests that need it skip where it is absent."""

import os
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("BESTIARY_SHARED") or Path(__file__).resolve().parents[2] / "shared")


def shared(*parts: str) -> Path:
    """A file or folder of the shared data; skips the test where it is not there."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"no {path}: set BESTIARY_SHARED to a folder that has {'/'.join(parts)}")
    return path
