"""What the verbs share: command lines from dataclasses, and JSON results."""

import contextlib
import inspect
import io
import json
import re
import sys
from pathlib import Path
from typing import Any, TypeVar

import tyro

import bestiary
from bestiary import LanguageModel
from bestiary.data.files import write_whole
from bestiary.errors import UsageError

T = TypeVar("T")


def parse(arguments: type[T], argv: list[str], verb: str) -> T:
    """The dataclass `arguments` filled from the command line; its docstring and field docs make the help.

    Raises UsageError, in one line, where the command line does not fit.
    """
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(
                arguments,
                args=argv,
                prog=f"bestiary {verb}",
                description=inspect.getdoc(arguments),  # all of it: tyro itself drops the examples
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise SystemExit(0) from None  # --help, printed on stdout
    raise UsageError(f"{_first_message(errors.getvalue())} (bestiary {verb} --help lists what there is)") from None


def _first_message(box: str) -> str:
    """tyro prints errors in a box, the reason before the first rule; we want that reason as a line."""
    words: list[str] = []
    for line in box.splitlines()[1:]:
        text = line.strip().strip("│").strip()
        if set(text) <= set("─╰╯") and words:
            break
        words.append(text)
    message = " ".join(filter(None, words)) or "the command line is wrong"
    return re.sub(r"^Error parsing [\w.]+: ", "", message)  # "--option" stays, a group of options says nothing


def load_language_model(folder: str | Path) -> tuple[LanguageModel, Any]:
    """(model, tokenizer) of a folder, for the verbs that want a causal language model and no other kind."""
    model, tokenizer = bestiary.load(folder)
    if not isinstance(model, LanguageModel):
        raise UsageError(f"{folder} holds a {type(model).__name__}: give a language model here")
    return model, tokenizer


def load_with_tokenizer(folder: str | Path) -> tuple[LanguageModel, Any]:
    """The same for the verbs that read or write text."""
    model, tokenizer = load_language_model(folder)
    if tokenizer is None:
        raise UsageError(
            f"{folder} has no tokenizer, so it can neither read nor write text: put a tokenizer.json there"
        )
    return model, tokenizer


def write_json(path: Path | None, results: Any) -> None:
    """Write results for machines where `--json` asks for them, atomically."""
    if path is None:
        return
    write_whole(path, json.dumps(results, indent=2) + "\n")
    print(f"wrote {path}", file=sys.stderr)
