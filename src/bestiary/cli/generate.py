"""`bestiary generate`: continue a prompt, streaming."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from bestiary.cli.common import load_with_tokenizer, parse, write_json
from bestiary.errors import UsageError


@dataclass(frozen=True)
class Generate:
    """Continue a prompt with a trained model; the text streams to the terminal as it comes.

    Examples:
      bestiary generate runs/mymodel --prompt "To be, or not"
      bestiary generate runs/mymodel --temperature 0.8 --top-p 0.9 --max-new-tokens 500 --seed 3
      bestiary generate runs/mymodel --weights int8            faster on the CPU, weights rounded
      echo "Once upon" | bestiary generate runs/mymodel --prompt -
    """

    model: Annotated[str, tyro.conf.Positional]
    """Folder of the model."""
    prompt: str = "\n"
    """Text to continue; - reads it from standard input."""
    max_new_tokens: int = 256
    """Most tokens to add."""
    temperature: float = 0.8
    """0 takes the most probable token; 1 is the model's own distribution."""
    top_k: int | None = None
    """Keep the k most probable tokens."""
    top_p: float = 1.0
    """Keep the most probable tokens up to this probability in all."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as probable as the most probable one."""
    repetition_penalty: float = 1.0
    """Above 1: tokens that were seen become less likely."""
    seed: int = 0
    """The same seed gives the same text."""
    weights: str | None = None
    """Pack the weights for fast decoding on the CPU: fp32, bf16, int8 or int4 (bestiary eval tells what it costs)."""
    json: Path | None = None
    """Write prompt, text and tokens here too."""


def main(argv: list[str]) -> int:
    arguments = parse(Generate, argv, "generate")
    model, tokenizer = load_with_tokenizer(arguments.model)
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    model = model if arguments.weights is None else model.packed(arguments.weights)
    tokens = list(tokenizer.encode(prompt))
    if not tokens:
        raise UsageError("the prompt is empty; give --prompt at least one character")
    decoder, found = tokenizer.detokenizer(), []
    print(prompt, end="", flush=True)
    for step in model.eval().stream(
        torch.tensor([tokens]),
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        repetition_penalty=arguments.repetition_penalty,
        eos=tokenizer.eos_id,
        seed=arguments.seed,
    ):
        token = int(step[0])
        found.append(token)
        print(decoder.add(token), end="", flush=True)
    print(decoder.finish(), flush=True)
    write_json(arguments.json, {"prompt": prompt, "text": tokenizer.decode(found), "tokens": found})
    return 0
