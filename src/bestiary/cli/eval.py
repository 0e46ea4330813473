"""`bestiary eval`: how well a model predicts a text."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from bestiary.cli.common import load_with_tokenizer, parse, write_json
from bestiary.data import text
from bestiary.evaluation import perplexity
from bestiary.models.packing import nbytes
from bestiary.report.format import size


@dataclass(frozen=True)
class Eval:
    """Bits per byte and perplexity of a text under a model.

    Examples:
      bestiary eval runs/mamba/model book.txt
      bestiary eval runs/mamba/model book.txt --window 256     windows read afresh, as in training
      bestiary eval runs/mamba/model book.txt --weights int8 int4         what rounded weights cost
    """

    model: Annotated[Path, tyro.conf.Positional]
    """A folder with a model."""
    text: Annotated[Path, tyro.conf.Positional]
    """A text file, or a folder of them."""
    window: int | None = None
    """Cut the text into windows of so many tokens; by default the state is carried through all of it."""
    weights: tuple[str, ...] = ()
    """Evaluate with these weights as well, packed for the CPU: fp32, bf16, int8, int4."""
    errors: str = "strict"
    """What to do with bytes that are not UTF-8: strict (report the first one) or replace."""
    json: Path | None = None
    """Write the numbers here too."""


def main(argv: list[str]) -> int:
    arguments = parse(Eval, argv, "eval")
    model, tokenizer = load_with_tokenizer(arguments.model)
    documents = text.read(arguments.text, errors=arguments.errors)
    tokens = tokenizer.encode("\n".join(document.text for document in documents))
    console, results = Console(), {}
    nets = {"": model} | {form: model.packed(form) for form in dict.fromkeys(arguments.weights)}
    for form, net in nets.items():
        found = perplexity(net, tokens, tokenizer, window=arguments.window)
        results[form] = found.to_dict() | {"weight_bytes": nbytes(net)}
        title = f"{form} weights, {size(nbytes(net))}: " if form else ""
        loss = f" ({found.bits_per_byte / results['']['bits_per_byte'] - 1:+.2%})" if form else ""
        console.print(
            f"{title}{found.bits_per_byte:.4f} bits per byte{loss}, perplexity {found.perplexity:.3f} per token "
            f"({found.tokens:,} tokens, {found.bytes:,} bytes)",
            highlight=False,
        )
    packed = {form: result for form, result in results.items() if form}
    write_json(arguments.json, results[""] | ({"packed": packed} if packed else {}))
    return 0
