"""`bestiary eval`: how well a model predicts a text."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from bestiary.cli.common import load_language_model, parse, write_json
from bestiary.data import text
from bestiary.errors import UsageError
from bestiary.evaluation import perplexity


@dataclass(frozen=True)
class Eval:
    """Bits per byte and perplexity of a text under a model.

    Examples:
      bestiary eval runs/mamba/model book.txt
      bestiary eval runs/mamba/model book.txt --window 256     windows read afresh, as in training
    """

    model: Annotated[Path, tyro.conf.Positional]
    """A folder with a model."""
    text: Annotated[Path, tyro.conf.Positional]
    """A text file, or a folder of them."""
    window: int | None = None
    """Cut the text into windows of so many tokens; by default the state is carried through all of it."""
    errors: str = "strict"
    """What to do with bytes that are not UTF-8: strict (report the first one) or replace."""
    json: Path | None = None
    """Write the numbers here too."""


def main(argv: list[str]) -> int:
    arguments = parse(Eval, argv, "eval")
    model, tokenizer = load_language_model(arguments.model)
    if tokenizer is None:
        raise UsageError(f"{arguments.model} has no tokenizer, so it cannot read text")
    documents = text.read(arguments.text, errors=arguments.errors)
    tokens = tokenizer.encode("\n".join(document.text for document in documents))
    found = perplexity(model, tokens, tokenizer, window=arguments.window)
    Console().print(
        f"{found.bits_per_byte:.4f} bits per byte, perplexity {found.perplexity:.3f} per token "
        f"({found.tokens:,} tokens, {found.bytes:,} bytes)",
        highlight=False,
    )
    write_json(arguments.json, found.to_dict())
    return 0
