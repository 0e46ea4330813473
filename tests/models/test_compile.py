"""torch.compile takes a whole model, without a break, and what it makes computes the same."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

LAYOUTS = ("attention", "hyena", "mamba", "rwkv4")
MORE = ("attention{window=4}", "gated_delta_net", "gla", "hgrn", "mamba2", "rg_lru", "rwkv7*2")


def compiled(what: str, *layouts: str) -> None:
    """Run compiled.py, which ends with a word of its own where all was the same."""
    command = [sys.executable, str(Path(__file__).parent / "compiled.py"), what, *layouts]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0 and done.stdout == "the same\n", done.stderr[-3000:]


def test_whole_models_compile_and_learn_the_same() -> None:
    compiled("loss", *LAYOUTS)


def test_padding_and_states_to_go_on_from_compile_too() -> None:
    compiled("rows", "attention", "hyena", "mamba")


def test_large_models_compile_and_learn_the_same() -> None:
    compiled("large", "attention")


def test_a_forced_form_holds_in_compiled_code_and_ends_with_its_context() -> None:
    compiled("forms")


@pytest.mark.slow
@pytest.mark.parametrize("layout", MORE)
def test_more_models_compile_and_learn_the_same(layout: str) -> None:
    compiled("loss", layout)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("layout", ["attention", "gla", "mamba"])
def test_inductor_computes_the_same(layout: str) -> None:
    compiled("inductor", layout)
