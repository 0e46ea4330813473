"""One's own task as a study: a file of prompts and answers, trained on in part and scored on what was held out."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bestiary.data.tokenizer import Tokenizer
from bestiary.errors import UsageError
from bestiary.models import LanguageModel

IGNORED = -100


@dataclass(frozen=True)
class Example:
    """A prompt and the answer that should follow it."""

    prompt: str
    answer: str


def read_task(path: str | Path, *, held_out: float = 0.1) -> tuple[list[Example], list[Example]]:
    """(training examples, held-out examples) of a JSON-lines file with the fields "prompt" and "answer".

    Which examples are held out follows from a hash of the prompt, so the same prompt never stands on both sides and
    the split stays what it is when lines are added.

    Raises:
        UsageError: the file is missing, a line is wrong (with its number), or a side of the split would be empty.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")  # no splitlines: strings may hold U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the task {path}: {error}") from error
    sides: tuple[list[Example], list[Example]] = ([], [])
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            example = Example(entry["prompt"], entry["answer"])
            (example.prompt + example.answer).encode()  # lone surrogates are no text
        except (ValueError, KeyError, TypeError, AttributeError):
            example = Example("", "")
        if not (example.prompt and example.answer):
            raise UsageError(f'{path}, line {number}: wanted {{"prompt": "...", "answer": "..."}} with text in both')
        share = int.from_bytes(hashlib.sha256(example.prompt.encode()).digest()[:8], "big") / 2**64
        sides[share < held_out].append(example)
    if not sides[0] or not sides[1]:
        raise UsageError(
            f"{path}: {len(sides[0])} examples to train on and {len(sides[1])} held out; give more of them"
        )
    return sides


class TaskBatches:
    """Batches of examples, a function of (seed, step): prompt, answer, end; only answer and end are targets.

    Rows are padded at their end, where a causal model cannot be disturbed and no target stands.
    """

    def __init__(
        self, examples: list[Example], tokenizer: Tokenizer, *, batch_size: int, seed: int = 0, longest: int = 2048
    ):
        self.rows = [encode(example, tokenizer) for example in examples]
        width = max(len(tokens) for tokens, _ in self.rows)
        if width > longest:
            raise UsageError(f"the longest example has {width} tokens, more than {longest}: raise --sequence-length")
        self.batch_size, self.seed, self.time = batch_size, seed, width - 1

    def global_batch(self, step: int) -> tuple[Tensor, Tensor]:
        """(inputs, targets) of a step, (batch, time) int64 each."""
        chosen = np.random.default_rng((self.seed, step)).integers(len(self.rows), size=self.batch_size)
        return pad([self.rows[i] for i in chosen], self.time)


def encode(example: Example, tokenizer: Tokenizer) -> tuple[list[int], int]:
    """All tokens of an example, its end among them, and where the answer begins."""
    prompt, answer = tokenizer.encode(example.prompt).tolist(), tokenizer.encode(example.answer).tolist()
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    return prompt + answer + end, len(prompt)


def pad(rows: list[tuple[list[int], int]], width: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets of some rows, right-padded; targets are IGNORED outside answers."""
    inputs = torch.zeros(len(rows), width, dtype=torch.int64)
    targets = torch.full((len(rows), width), IGNORED)
    for i, (tokens, start) in enumerate(rows):
        inputs[i, : len(tokens) - 1] = torch.tensor(tokens[:-1])
        targets[i, start - 1 : len(tokens) - 1] = torch.tensor(tokens[start:])
    return inputs, targets


@torch.no_grad()
def score(
    model: LanguageModel, examples: list[Example], tokenizer: Tokenizer, *, batch_size: int = 32
) -> dict[str, Any]:
    """Exact match of greedy answers, and nats and bits per byte of the true ones, over all examples."""
    model.eval()
    matches, nats, size = 0, 0.0, 0
    for start in range(0, len(examples), batch_size):
        part = examples[start : start + batch_size]
        rows = [encode(example, tokenizer) for example in part]
        inputs, targets = pad(rows, max(len(tokens) for tokens, _ in rows) - 1)
        hidden, _ = model.hidden(inputs)
        nats += float(model.head.nats(hidden.flatten(0, 1), targets.flatten()).sum())
        size += sum(len(example.answer.encode()) for example in part)
        prompts = [tokens[:begin] for tokens, begin in rows]
        most = max(len(tokens) - begin for tokens, begin in rows)
        answers = model.generate(prompts, max_new_tokens=most, eos=tokenizer.eos_id)
        for (tokens, begin), answer in zip(rows, answers):
            wanted = tokens[begin:]
            matches += answer[begin : begin + len(wanted)] == wanted
    return {
        "exact_match": matches / len(examples),
        "answer_nats": nats / len(examples),
        "bpb": nats / np.log(2) / size,
        "held_out": len(examples),
    }
