"""Tasks of GLUE (Wang et al. 2018, arXiv:1804.07461) from the files of their authors: TSV, one folder a task.

SST-2   is a sentence of a film review positive?        accuracy
CoLA    is a sentence English?                          Matthews correlation
RTE     does a text entail a sentence?                  accuracy
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bestiary.data.labelled import Labelled
from bestiary.data.special import SpecialIds
from bestiary.data.text import read_file
from bestiary.data.tokenizer import Tokenizer
from bestiary.errors import BestiaryError, UsageError, unknown


@dataclass(frozen=True)
class Example:
    """A text, perhaps a second one, and their class."""

    text: str
    second: str | None
    label: int


@dataclass(frozen=True)
class Task:
    """How a task's files are read.

    Args:
        columns: of the text, the second text (None without one) and the label.
        header: whether the first line names the columns.
        classes: the labels' names, in the order of their numbers.
        train: names of the files to train on, those that there are.
        metric: which measure the task is judged by.
    """

    columns: tuple[int, int | None, int]
    header: bool
    classes: tuple[str, ...]
    train: tuple[str, ...] = ("train.tsv",)
    metric: str = "accuracy"


TASKS = {
    "SST-2": Task((0, None, 1), True, ("0", "1")),
    # one distribution of CoLA keeps a part of the training sentences in a file of its own
    "CoLA": Task((3, None, 1), False, ("0", "1"), ("train.tsv", "train_val_part.tsv"), "matthews"),
    "RTE": Task((1, 2, 3), True, ("entailment", "not_entailment")),
}


def load_glue(folder: str | Path, task: str) -> tuple[list[Example], list[Example]]:
    """(train, dev) of a task, whose files lie in `folder/TASK`.

    Raises:
        UsageError: there is no such task or file.
        BestiaryError: a line is not as the task has them.
    """
    if task not in TASKS:
        raise unknown("task", task, TASKS)
    place, form = Path(folder) / task, TASKS[task]
    found = [place / name for name in form.train if (place / name).exists()]
    if not found or not (place / "dev.tsv").exists():
        raise UsageError(f"{place} does not hold {task}: it lacks train.tsv or dev.tsv")
    return [example for path in found for example in _read(path, form)], _read(place / "dev.tsv", form)


def _read(path: Path, task: Task) -> list[Example]:
    examples = []
    first, second, label = task.columns
    for number, line in enumerate(read_file(path).text.split("\n"), 1):
        cells = line.split("\t")  # quotes are characters like any others here
        if not line or (number == 1 and task.header):
            continue
        if len(cells) <= max(first, second or 0, label) or cells[label] not in task.classes:
            raise BestiaryError(f"{path}, line {number}: no label among {', '.join(task.classes)}")
        pair = None if second is None else cells[second].strip()
        examples.append(Example(cells[first].strip(), pair, task.classes.index(cells[label])))
    return examples


def encode(examples: Sequence[Example], tokenizer: Tokenizer, ids: SpecialIds, max_length: int) -> Labelled:
    """Examples as token rows: first, text, separator, and for a pair second, separator; the longer is cut to fit.

    Kinds are 0 up to the first separator, and 1 after it.
    """
    if max_length < 5:
        raise UsageError(f"max_length must be at least 5, not {max_length}")
    rows, kinds = [], []
    for example in examples:
        a = tokenizer.encode(example.text).tolist()
        b = [] if example.second is None else tokenizer.encode(example.second).tolist()
        room = max_length - (2 if example.second is None else 3)
        while len(a) + len(b) > room:
            (a if len(a) >= len(b) else b).pop()
        b = b if example.second is None else [*b, ids.separator]
        rows.append(torch.tensor([ids.first, *a, ids.separator, *b]))
        kinds.append(torch.tensor([0] * (len(a) + 2) + [1] * len(b)))
    return Labelled(tuple(rows), torch.tensor([example.label for example in examples]), tuple(kinds))
