"""All tests run with the shapes and types of the annotations checked, on one thread, from a fixed seed."""

from jaxtyping import install_import_hook

_hook = install_import_hook("bestiary", "typecheck.checker")  # before anything imports bestiary

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

settings.register_profile("bestiary", deadline=None)  # this machine may be busy: time says nothing here
settings.load_profile("bestiary")

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)
