"""Where the tests find data that no package carries: the folder of BESTIARY_SHARED, or one beside the project."""

import os
from pathlib import Path

import pytest


def shared(path: str) -> Path:
    """A file or folder of the shared data; a test that asks for one that is not there is skipped."""
    root = Path(os.environ.get("BESTIARY_SHARED") or Path(__file__).parents[2] / "shared" / "data")
    if not (root / path).exists():
        pytest.skip(f"no {path} in {root}: set BESTIARY_SHARED to the folder that holds the shared test data")
    return root / path
