"""Training classifiers: on images, on series, or from a pretrained encoder on GLUE's tasks."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bestiary.data.glue import TASKS, encode, load_glue
from bestiary.data.labelled import Labelled, LabelledBatches
from bestiary.data.special import SpecialIds
from bestiary.data.tokenizer import Tokenizer
from bestiary.evaluation.classification import classification_score
from bestiary.models import MaskedLanguageModel, SequenceClassifier
from bestiary.training.config import TrainConfig
from bestiary.training.loop import StepInfo, TrainResult, train


def train_classifier(
    model: SequenceClassifier,
    data: Labelled,
    test: Labelled,
    config: TrainConfig,
    *,
    batch_size: int = 32,
    folder: str | Path | None = None,
    tokenizer: Any = None,
    resume: bool = False,
    on_step: Callable[[StepInfo], bool | None] | None = None,
) -> TrainResult:
    """Train a classifier in place; the result's evaluations hold loss, accuracy and Matthews correlation on `test`.

    Images and token rows alike; `folder`, `tokenizer`, `resume` and `on_step` are as in `train`.
    """
    return train(
        model,
        LabelledBatches(data, batch_size, config.seed),
        config,
        folder=folder,
        tokenizer=tokenizer,
        resume=resume,
        on_step=on_step,
        evaluate=lambda trained: classification_score(trained, test),
    )


@dataclass(frozen=True)
class GlueResult:
    """A fine-tuned classifier and its measures on the task's dev set; `score` is the one the task is judged by."""

    model: SequenceClassifier
    score: float
    measures: dict[str, float]


def fine_tune(
    pretrained: MaskedLanguageModel,
    tokenizer: Tokenizer,
    ids: SpecialIds,
    task: str,
    glue: str | Path,
    config: TrainConfig,
    *,
    batch_size: int = 32,
    pool: str = "mean",
    dropout: float | None = None,
    folder: str | Path | None = None,
    examples: int | None = None,
    on_step: Callable[[StepInfo], bool | None] | None = None,
) -> GlueResult:
    """Teach a pretrained encoder a task of GLUE.

    Args:
        task: "SST-2", "CoLA" or "RTE"; its files lie in the folder `glue`, see bestiary.data.glue.
        examples: train on the first so many only.
        pool, dropout: of the classifier; the encoder's dropout where that is None.
    """
    parts = load_glue(glue, task)
    most = pretrained.config.max_length or 512
    data, dev = (encode(part[:limit], tokenizer, ids, most) for part, limit in zip(parts, (examples, None)))
    if not pretrained.config.token_types:
        data, dev = (Labelled(part.inputs, part.labels) for part in (data, dev))
    classes = len(TASKS[task].classes)
    model = SequenceClassifier.from_pretrained(pretrained, n_classes=classes, pool=pool, dropout=dropout)
    result = train_classifier(
        model, data, dev, config, batch_size=batch_size, folder=folder, tokenizer=tokenizer, on_step=on_step
    )
    measures = result.evaluations[-1] if result.evaluations else classification_score(model, dev)
    return GlueResult(model.eval(), measures[TASKS[task].metric], measures)
