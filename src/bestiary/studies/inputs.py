"""What a study trains on: a text or a task, as batches, and as bytes for those who count bytes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bestiary.data import Batches, ByteTokenizer, Corpus, Shards, Tokenizer, load_corpus
from bestiary.data.shards import build
from bestiary.studies.task import Example, TaskBatches, read_task

VALIDATION_BYTES = 1 << 16
"""The validation text's share that a study scores: enough for a standard error of about 0.01 bits per byte."""


@dataclass(frozen=True)
class TextData:
    """A corpus, tokenised into shards below `folder`."""

    corpus: Corpus
    folder: Path
    tokenizer: Tokenizer

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def description(self) -> dict[str, Any]:
        """What reports say of the corpus."""
        return {
            "name": self.corpus.name,
            "note": self.corpus.note or None,
            "licence": self.corpus.licence,
            "source": self.corpus.source,
            "held_out": self.corpus.held_out,
            "train_bytes": len(self.corpus.train_text.encode()),
            "validation_bytes": len(self.validation_bytes),
        }

    @property
    def validation_bytes(self) -> bytes:
        """The part of the held-out text that is scored: evenly spread pieces of it."""
        return spread(self.corpus.validation_text.encode(), VALIDATION_BYTES)

    def spec(self, batch_size: int, time: int) -> dict[str, Any]:
        """What a worker process needs to make the same batches."""
        return {"kind": "text", "folder": str(self.folder), "batch_size": batch_size, "time": time}

    def training_bytes(self, spec: dict[str, Any], steps: int) -> bytes:
        """The text of the windows that `steps` batches of seed 0 show, in their order."""
        batches = Batches(Shards(self.folder / "train"), spec["batch_size"], spec["time"], 0)
        table = self.tokenizer.token_bytes()
        if self.vocab_size == 256 and table.max() == 1:  # ids are bytes
            return b"".join(batches.global_batch(step)[0].numpy().astype(np.uint8).tobytes() for step in range(steps))
        rows = (row for step in range(steps) for row in batches.global_batch(step)[0].tolist())
        return "".join(self.tokenizer.decode(row) for row in rows).encode()


@dataclass(frozen=True)
class TaskData:
    """The user's own task."""

    path: str
    train: list[Example]
    held_out: list[Example]
    tokenizer: Tokenizer

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def description(self) -> dict[str, Any]:
        return {
            "name": Path(self.path).name,
            "note": None,
            "licence": "the user's own",
            "source": self.path,
            "held_out": f"{len(self.held_out)} examples, by a hash of the prompt; {len(self.train)} to train on",
            "train_bytes": sum(len((e.prompt + e.answer).encode()) for e in self.train),
            "validation_bytes": sum(len((e.prompt + e.answer).encode()) for e in self.held_out),
        }

    def spec(self, batch_size: int, time: int) -> dict[str, Any]:
        return {"kind": "task", "path": self.path, "batch_size": batch_size, "time": time}


def prepare(data: str, task: str | None, folder: Path) -> TextData | TaskData:
    """Read, split and tokenise what a study was asked for."""
    tokenizer = ByteTokenizer()
    if task is not None:
        train, held_out = read_task(task)
        return TaskData(task, train, held_out, tokenizer)
    corpus = load_corpus(data)
    found = TextData(corpus, folder, tokenizer)
    build(corpus.train, tokenizer, folder / "train")
    validation = folder / "validation"
    build([found.validation_bytes.decode(errors="ignore")], tokenizer, validation)
    return found


def batches(spec: dict[str, Any], seed: int) -> Batches | TaskBatches:
    """The training batches of a spec."""
    if spec["kind"] == "task":
        train, _ = read_task(spec["path"])
        return TaskBatches(train, ByteTokenizer(), batch_size=spec["batch_size"], seed=seed, longest=spec["time"])
    return Batches(Shards(Path(spec["folder"]) / "train"), spec["batch_size"], spec["time"], seed)


def spread(text: bytes, size: int, *, pieces: int = 16) -> bytes:
    """About `size` bytes of a text: equal pieces at equal distances, cut at line ends."""
    if len(text) <= size:
        return text
    step, length, parts = len(text) // pieces, size // pieces, []
    for i in range(pieces):
        start = i * step
        start = text.find(b"\n", start, start + step - length) + 1 or start
        end = text.rfind(b"\n", start, start + length) + 1
        parts.append(text[start : end if end > start else start + length])
    return b"".join(parts)
