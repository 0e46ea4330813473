"""The results of a comparison, read back from its folder as typed values; reports see nothing else.

A later line replaces an earlier one of the same identity. What is not there yet is empty or None: a report can be made
of a study that still runs.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bestiary.errors import UsageError

Record = dict[str, Any]
Curve = list[tuple[float, float]]


@dataclass(frozen=True)
class Model:
    """An architecture as it was built; state bytes and forward FLOPs a token by context length."""

    arch: str
    layout: str
    family: str
    attends: bool
    d_model: int
    layers: int
    parameters: int
    flops: dict[int, float]
    state_bytes: dict[int, int]


@dataclass(frozen=True)
class Trial:
    """A learning rate that was tried; `of` is "text" or "recall", the loss in nats a token."""

    of: str
    arch: str
    lr: float
    steps: int
    loss: float | None
    diverged: bool


@dataclass(frozen=True)
class Run:
    """A training: bits per byte of the held-out text (of a task: of its held-out answers), None where it diverged."""

    arch: str
    seed: int
    lr: float
    tokens: int | None
    bpb: float | None
    curve: Curve
    seconds: float | None
    diverged: bool
    exact_match: float | None
    held_out: int | None


@dataclass(frozen=True)
class Recall:
    """A recall probe: the share of right answers after `steps` training steps, and on the way there."""

    arch: str
    seed: int
    accuracy: float
    steps: int
    lr: float
    curve: Curve
    diverged: bool


@dataclass(frozen=True)
class Speed:
    """Tokens a second: median, smallest and largest of some repeats; the median alone where it was computed."""

    median: float
    low: float | None
    high: float | None
    repeats: int


@dataclass(frozen=True)
class Cost:
    """What a context of some length costs; `how`: "measured", "few steps" or "computed"."""

    arch: str
    context: int
    how: str
    prefill: Speed
    decode: Speed
    state_bytes: int


@dataclass(frozen=True)
class Floor:
    """What a model must beat, in bits per byte of the same text."""

    name: str
    bpb: float
    detail: str


@dataclass(frozen=True)
class Sample:
    """A text that a model wrote."""

    arch: str
    prompt: str
    text: str
    temperature: float | None


@dataclass(frozen=True)
class Results:
    """All of a study; dictionaries by architecture keep the order in which they were compared."""

    folder: Path
    study: Record
    models: dict[str, Model] = field(default_factory=dict)
    trials: list[Trial] = field(default_factory=list)
    runs: dict[str, list[Run]] = field(default_factory=dict)
    recalls: dict[str, list[Recall]] = field(default_factory=dict)
    floors: list[Floor] = field(default_factory=list)
    train_speeds: dict[str, Speed] = field(default_factory=dict)
    costs: dict[tuple[str, int], Cost] = field(default_factory=dict)
    samples: dict[str, Sample] = field(default_factory=dict)
    finished: bool = False
    seconds: float | None = None

    @property
    def archs(self) -> list[str]:
        return list(self.models)

    @property
    def config(self) -> Record:
        return dict(self.study.get("config") or {})

    @property
    def task(self) -> str | None:
        """The file of the user's own task, where the study is of one."""
        return self.config.get("task")

    @property
    def contexts(self) -> list[int]:
        """Context lengths with costs, shortest first."""
        computed = {context for model in self.models.values() for context in model.state_bytes}
        return sorted({context for _, context in self.costs} or computed)

    def sound(self, arch: str) -> list[Run]:
        """An architecture's runs that did not diverge."""
        return [run for run in self.runs.get(arch, []) if not run.diverged and run.bpb is not None]

    def bpb(self, arch: str) -> list[float]:
        """Bits per byte of its runs, one a seed."""
        return [run.bpb for run in self.sound(arch) if run.bpb is not None]

    def accuracies(self, arch: str) -> list[float]:
        """Recall of its probes, one a seed."""
        return [recall.accuracy for recall in self.recalls.get(arch, []) if not recall.diverged]

    def state_bytes(self, arch: str, context: int) -> int | None:
        """Bytes of state after a context, where known."""
        return self.models[arch].state_bytes.get(context)


def read(folder: Path) -> Results:
    """Read a study's folder, finished or not.

    Raises:
        UsageError: there is no comparison in it, or a line of its results is broken (a torn last one is passed over).
    """
    path = folder / "results.jsonl"
    try:
        text = path.read_bytes()
    except OSError:
        raise UsageError(f"{folder} holds no comparison: there is no results.jsonl in it") from None
    whole = text[: text.rfind(b"\n") + 1]
    latest: dict[tuple[Any, ...], tuple[int, Record]] = {}
    for number, line in enumerate(whole.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            key = tuple(record.get(name) for name in ("kind", "of", "arch", "seed", "lr", "context", "name", "steps"))
            latest[_identity(record["kind"], key)] = (number, record)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UsageError(f"{path}, line {number}: this is no line of results") from None
    results = Results(folder, next((record for _, record in latest.values() if record["kind"] == "study"), {}))
    for number, record in latest.values():
        try:
            results = _with(results, record)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{path}, line {number}: wrong {record['kind']!r}: {error!r}") from None
    if not results.models:
        raise UsageError(f"{folder} holds no comparison: {path.name} names no model yet")
    return results


def _identity(kind: str, key: tuple[Any, ...]) -> tuple[Any, ...]:
    """A run and a recall probe are one a seed, whatever their learning rate; a trial one a length; the rest as the keys
    say."""
    return key[:4] if kind in ("run", "recall") else key if kind == "trial" else key[:-1]


def _with(results: Results, record: Record) -> Results:
    """Add a line to the results; kinds of which a report says nothing are passed over."""
    kind, arch = record["kind"], str(record.get("arch", ""))
    if kind == "model":
        results.models[arch] = Model(
            arch=arch,
            layout=record["layout"],
            family=record["family"],
            attends=bool(record.get("attends")),
            d_model=record["d_model"],
            layers=record["layers"],
            parameters=record["parameters"],
            flops={int(context): flops for context, flops in record["flops_per_token"].items()},
            state_bytes={int(context): size for context, size in record["state_bytes"].items()},
        )
    elif kind == "trial":
        diverged = bool(record.get("diverged"))
        results.trials.append(
            Trial(record.get("of", "text"), arch, record["lr"], record["steps"], _number(record.get("loss")), diverged)
        )
    elif kind == "run":
        results.runs.setdefault(arch, []).append(
            Run(
                arch=arch,
                seed=record["seed"],
                lr=record["lr"],
                tokens=record.get("tokens"),
                bpb=_number(record.get("bpb")),
                curve=_curve(record),
                seconds=_number(record.get("seconds")),
                diverged=bool(record.get("diverged")),
                exact_match=_number(record.get("exact_match")),
                held_out=record.get("held_out"),
            )
        )
    elif kind == "recall":
        results.recalls.setdefault(arch, []).append(
            Recall(
                arch=arch,
                seed=record["seed"],
                accuracy=float(record["accuracy"]),
                steps=record["steps"],
                lr=record["lr"],
                curve=_curve(record),
                diverged=bool(record.get("diverged")),
            )
        )
    elif kind == "floor":
        if (bpb := _number(record["bpb"])) is not None:
            results.floors.append(Floor(record["name"], bpb, record.get("detail", "")))
    elif kind == "train_speed":
        results.train_speeds[arch] = _speed(record["tokens_per_second"])
    elif kind == "cost":
        results.costs[arch, record["context"]] = Cost(
            arch=arch,
            context=record["context"],
            how=record["how"],
            prefill=_speed(record["prefill_tokens_per_second"]),
            decode=_speed(record["decode_tokens_per_second"]),
            state_bytes=record["state_bytes"],
        )
    elif kind == "sample":
        results.samples[arch] = Sample(arch, record["prompt"], record["text"], record.get("temperature"))
    elif kind == "finished":
        return _finished(results, record)
    return results


def _finished(results: Results, record: Record) -> Results:
    return Results(**(vars(results) | {"finished": True, "seconds": _number(record.get("seconds"))}))


def _speed(record: Record) -> Speed:
    return Speed(float(record["median"]), record.get("min"), record.get("max"), int(record.get("repeats", 0)))


def _curve(record: Record) -> Curve:
    points = [(_number(x), _number(y)) for x, y in record.get("curve") or []]
    return [(x, y) for x, y in points if x is not None and y is not None]


def _number(value: Any) -> float | None:
    """A finite number, or None."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
