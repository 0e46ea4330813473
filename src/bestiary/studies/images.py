"""`python -m bestiary.studies.images`: an image classifier without attention beside a ViT of about twice its size.

    python -m bestiary.studies.images                              digits of 8 x 8 pixels, two minutes on two cores
    python -m bestiary.studies.images --data mnist1d               series in place of images
    python -m bestiary.studies.images --data FOLDER --patch 7      a folder with MNIST-like idx files, gzipped or not
    python -m bestiary.studies.images --layouts "bidirectional{mixer=mamba, channel=none}*4" "encoder_attention*4"

All models get the same examples in the same order. Each takes the learning rate that did best on a part of the training
set; the test set chooses nothing. What simple methods reach stands beside them: nearest neighbours and a linear model.
"""

import dataclasses
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from jaxtyping import Bool
from torch import Tensor
from torch.nn import functional as F

import bestiary
from bestiary import channel_mixers, mixers
from bestiary.data import samples
from bestiary.data.files import write_whole
from bestiary.data.labelled import Labelled, split
from bestiary.errors import BestiaryError, UsageError
from bestiary.evaluation.classification import accuracy, class_logits
from bestiary.models import ClassifierConfig, ImageClassifier, ImageConfig, SequenceClassifier
from bestiary.studies.speed import machine
from bestiary.training import TrainConfig
from bestiary.training.classify import train_classifier


@dataclass(frozen=True)
class ImageStudy:
    """Which models to train on which examples.

    Args:
        data: "digits", "mnist1d", or a folder with one pair of idx files.
        layouts: of the models; by default a Monarch Mixer and a ViT of about twice its parameters.
        d_model: width of all models.
        patch: side of a patch of an image, in pixels; 2 for digits, 4 else, unless given.
        epochs: times that each example is seen; half as often in trials of the learning rate.
        batch_size: examples of a batch.
        learning_rates: tried for each model.
        dropout: in all models.
        seeds: runs of each model; seed 0 splits off the test set in all.
        folder: where result.json goes.
    """

    data: str = "digits"
    layouts: tuple[str, ...] = ()
    d_model: int = 64
    patch: int | None = None
    epochs: int = 20
    batch_size: int = 64
    learning_rates: tuple[float, ...] = (1e-3, 3e-3)
    dropout: float = 0.1
    seeds: int = 3
    folder: str = "runs/images"

    def __post_init__(self) -> None:
        for field in ("epochs", "batch_size", "seeds"):
            if getattr(self, field) < 1:
                raise UsageError(f"{field} must be at least 1, not {getattr(self, field)}")
        if not self.learning_rates or min(self.learning_rates) <= 0:
            raise UsageError(f"learning_rates must be some positive numbers, not {self.learning_rates}")


def run(study: ImageStudy, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Train all models on all seeds; returns what is also written to result.json. `say` hears of each run."""
    train, test = _data(study)
    models: dict[str, dict[str, Any]] = {
        layout: {"parameters": build(study, layout, train).n_parameters(), "accuracy": [], "seconds": []}
        for layout in study.layouts or default_layouts(study, train)
    }
    part, validation = split(train, 0.2, seed=1)
    for layout, found in models.items():
        found["trials"] = {}
        for lr in study.learning_rates if len(study.learning_rates) > 1 else ():
            tried = _train(study, layout, part, validation, lr, seed=0, epochs=max(1, study.epochs // 2))
            found["trials"][lr] = tried.double().mean().item()
            say(f"lr {lr:g}  {found['trials'][lr]:.2%} on the validation part  {layout}")
        found["lr"] = max(study.learning_rates, key=lambda lr: found["trials"].get(lr, 0.0))
    right: dict[str, list[Tensor]] = {layout: [] for layout in models}
    for seed in range(study.seeds):
        for layout, found in models.items():
            start = time.perf_counter()
            right[layout].append(_train(study, layout, train, test, found["lr"], seed=seed, epochs=study.epochs))
            found["accuracy"].append(right[layout][-1].double().mean().item())
            found["seconds"].append(round(time.perf_counter() - start, 1))
            say(f"seed {seed}  {found['accuracy'][-1]:.2%}  {found['seconds'][-1]:.0f} s  {layout}")
    result = {
        "config": dataclasses.asdict(study),
        "examples": {"train": len(train), "test": len(test), "classes": train.n_classes},
        "models": models,
        "baselines": baselines(train, test),
        "verdict": verdict({layout: torch.stack(seeds) for layout, seeds in right.items()}),
        "versions": {"bestiary": bestiary.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": machine(),
    }
    write_whole(Path(study.folder) / "result.json", json.dumps(result, indent=2) + "\n")
    return result


def _train(
    study: ImageStudy, layout: str, train: Labelled, test: Labelled, lr: float, *, seed: int, epochs: int
) -> Bool[Tensor, " examples"]:
    """Which examples of `test` a new model has right, after some epochs on `train`."""
    torch.manual_seed(seed)
    steps = epochs * -(-len(train) // study.batch_size)
    config = TrainConfig(steps=steps, lr=lr, seed=seed, save_every=0)
    model = build(study, layout, train)
    train_classifier(model, train, test, config, batch_size=study.batch_size)
    return class_logits(model, test).argmax(1) == test.labels


def build(study: ImageStudy, layout: str, data: Labelled) -> SequenceClassifier:
    """A model for these examples: of images where they have two dimensions, of series where one and features."""
    assert isinstance(data.inputs, Tensor)
    common: dict[str, Any] = {"d_model": study.d_model, "dropout": study.dropout, "n_classes": data.n_classes}
    _, *size = data.inputs.shape
    if study.data == "mnist1d":
        return SequenceClassifier(ClassifierConfig(layout, features=size[1], max_length=size[0], **common))
    return ImageClassifier(ImageConfig(layout, height=size[0], width=size[1], patch=_patch(study), **common))


def default_layouts(study: ImageStudy, data: Labelled) -> tuple[str, str]:
    """A Monarch Mixer of three layers, and as many layers of attention as have about twice its parameters."""
    if "m2" in mixers.names() and "m2_mlp" in channel_mixers.names():
        assert isinstance(data.inputs, Tensor)
        _, height, width = data.inputs.shape
        time = height if study.data == "mnist1d" else height * width // _patch(study) ** 2
        ours = f"m2{{l_max={time}}}*3"
    else:
        ours = "bidirectional{mixer=hyena, tied=true, channel=monarch_mlp}*3"
    wanted = 2 * build(study, ours, data).n_parameters()
    sizes = {depth: build(study, f"encoder_attention*{depth}", data).n_parameters() for depth in range(1, 13)}
    depth = min(sizes, key=lambda depth: abs(sizes[depth] - wanted))
    return ours, f"encoder_attention*{depth}"


def baselines(train: Labelled, test: Labelled) -> dict[str, float]:
    """Accuracy of the most frequent class, of the three nearest neighbours, and of a linear model, on the numbers."""
    assert isinstance(train.inputs, Tensor) and isinstance(test.inputs, Tensor)
    x, y, z = train.inputs.flatten(1), train.labels, test.inputs.flatten(1)
    usual = y.bincount().argmax().expand(len(z))
    near = torch.cdist(z, x).topk(3, largest=False).indices
    votes = F.one_hot(y[near], train.n_classes).sum(1) + 0.5 * F.one_hot(y[near[:, 0]], train.n_classes)
    weight = torch.zeros(x.shape[1] + 1, train.n_classes, requires_grad=True)
    with_one = torch.cat([x, torch.ones(len(x), 1)], 1)
    optimizer = torch.optim.LBFGS([weight], max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(with_one @ weight, y) + 1e-3 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    said = (torch.cat([z, torch.ones(len(z), 1)], 1) @ weight).argmax(1)
    found = {"most frequent class": usual, "3 nearest neighbours": votes.argmax(1), "linear model": said}
    return {name: accuracy(predicted, test.labels) for name, predicted in found.items()}


def verdict(right: dict[str, Bool[Tensor, "seeds examples"]]) -> str:
    """One sentence on the first two models: which is better, if these examples and seeds are enough to say so.

    Both are judged on the same examples, so the difference is taken example by example; its error is that of the choice
    of examples and that of the seeds.
    """
    if len(right) < 2:
        return "One model: nothing to compare."
    (a, first), (b, second) = list(right.items())[:2]
    difference = first.double() - second.double()
    by_example, by_seed = difference.mean(0), difference.mean(1)
    variance = by_example.var() / len(by_example) + (by_seed.var() / len(by_seed) if len(by_seed) > 1 else 0.0)
    gap, error = float(difference.mean()), 2 * float(variance) ** 0.5
    facts = f"{a} has {abs(gap):.2%} {'more' if gap >= 0 else 'fewer'} right than {b}"
    if abs(gap) <= error:
        return f"{facts}: no difference shown, since chance alone makes up to {error:.2%}."
    return f"{facts}: {a if gap > 0 else b} is better here, by more than the {error:.2%} that chance makes."


def _patch(study: ImageStudy) -> int:
    return study.patch or (2 if study.data == "digits" else 4)


def _data(study: ImageStudy) -> tuple[Labelled, Labelled]:
    if study.data == "digits":
        return samples.digits()
    if study.data == "mnist1d":
        return samples.mnist1d()
    found = [sorted(Path(study.data).glob(f"*{kind}*ubyte*")) for kind in ("images-idx3", "labels-idx1")]
    if [len(files) for files in found] != [1, 1]:
        raise UsageError(f'data must be "digits", "mnist1d" or a folder with one pair of idx files, not {study.data!r}')
    return samples.mnist(found[0][0], found[1][0])


def main(argv: list[str] | None = None) -> int:
    """The command line: prints what was found; exit codes as of `bestiary`."""
    try:
        study = tyro.cli(ImageStudy, args=argv, prog="python -m bestiary.studies.images", description=__doc__)
        result = run(study, lambda line: print(line, file=sys.stderr, flush=True))
    except BestiaryError as error:
        print(f"bestiary: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    print(f"{'accuracy':>10}  {'lowest':>7} {'highest':>8} {'parameters':>11}")
    for layout, found in result["models"].items():
        values = found["accuracy"]
        row = f"{statistics.mean(values):>10.2%}  {min(values):>7.2%} {max(values):>8.2%} {found['parameters']:>11,}"
        print(f"{row}  {layout}")
    for name, value in result["baselines"].items():
        print(f"{value:>10.2%}  {'':>7} {'':>8} {'':>11}  {name}")
    print(result["verdict"])
    print(f"wrote {Path(study.folder) / 'result.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
