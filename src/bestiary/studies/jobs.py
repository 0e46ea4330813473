"""What the worker processes of a comparison do: train a text model, or a recall probe, up to a step."""

import math
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from bestiary import hub, mixers
from bestiary.data import ByteTokenizer, Shards
from bestiary.evaluation import perplexity
from bestiary.models import LanguageModel, ModelConfig
from bestiary.studies import inputs, task
from bestiary.studies.mqar import Recall
from bestiary.studies.pool import Pool
from bestiary.studies.records import Records
from bestiary.training import Diverged, TrainConfig, train
from bestiary.training.log import read_log
from bestiary.training.optimizer import build_optimizer, set_lr

RECALL_RATES = (3e-3, 1e-2)
RECALL_BATCH = 64
RECALL_PROBES = 512
RECALL_WARMUP = 20
RECALL_SEED = 1_000_003  # of the probes; training batches take their own numbers from 0 on
SCORED = 0.3
"""The share of a trial, at its end, whose mean loss decides."""


@dataclass(frozen=True)
class Job:
    """One piece of training; a plain value, so that it travels to a worker.

    Args:
        kind: "text" (also a user's task) or "recall".
        model: ModelConfig as a dict.
        steps: of the schedule; `until`: where this job stops.
        folder: of the run, where it saves and resumes.
        mixers: the user's own, module:Class, to be loaded first.
        data: what the batches are, see bestiary.studies.inputs.
        timing: only time a few steps.
    """

    kind: str
    arch: str
    model: dict[str, Any]
    lr: float
    seed: int
    steps: int
    until: int
    folder: str
    mixers: tuple[str, ...] = ()
    data: dict[str, Any] | None = None
    timing: bool = False


def work(job: Job) -> dict[str, Any]:
    """Run a job; returns what it found."""
    for spec in job.mixers:
        mixers.registry.load(spec)
    torch.manual_seed(job.seed)
    model = LanguageModel(ModelConfig.from_dict(job.model))
    if job.timing:
        step = TimedRecall(model) if job.kind == "recall" else TimedStep(model, inputs.batches(job.data or {}, 0))
        return {"seconds_per_step": sorted(step.seconds() for _ in range(4))[1]}
    return _recall(job, model) if job.kind == "recall" else _text(job, model)


# ------------------------------------------------------------------------------------------------------------- text


def _text(job: Job, model: LanguageModel) -> dict[str, Any]:
    batches, folder = inputs.batches(job.data or {}, job.seed), Path(job.folder)
    config = TrainConfig(
        steps=job.steps, lr=job.lr, schedule="wsd", cooldown=0.3, seed=job.seed, log_every=1, save_every=100
    )
    start = time.perf_counter()
    try:
        train(model, batches, config, folder=folder, tokenizer=ByteTokenizer(), until=job.until, resume=True)
    except Diverged as error:
        return {"diverged": True, "loss": None, "message": str(error)}
    log = [line for line in read_log(folder) if "loss" in line]
    losses = [line["loss"] for line in log][: job.until]
    found: dict[str, Any] = {"diverged": False, "loss": _tail(losses), "seconds": time.perf_counter() - start}
    if job.until < job.steps:
        return found
    found["seconds"] = sum(_batch_tokens(batches) / line["tokens_per_second"] for line in log)
    found["tokens"] = job.steps * _batch_tokens(batches)
    found["curve"] = _smoothed(losses, _batch_tokens(batches))
    hub.save(model, ByteTokenizer(), folder / "model")
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return found | {"model_folder": str(folder / "model")} | _evaluation(job, model)


def _evaluation(job: Job, model: LanguageModel) -> dict[str, Any]:
    data = job.data or {}
    if data["kind"] == "task":
        _, held_out = task.read_task(data["path"])
        return task.score(model, held_out, ByteTokenizer())
    tokens = Shards(Path(data["folder"]) / "validation")
    found = perplexity(model, tokens[0 : len(tokens)], ByteTokenizer(), window=data["time"])
    return {"bpb": found.bits_per_byte}


def _tail(losses: list[float]) -> float:
    part = losses[-max(1, round(SCORED * len(losses))) :]
    return sum(part) / len(part)


def _smoothed(losses: list[float], tokens: int, points: int = 80) -> list[list[float]]:
    """[tokens, bits per byte] at up to `points` places, each the mean of the steps since the last."""
    size = max(1, math.ceil(len(losses) / points))
    parts = [losses[i : i + size] for i in range(0, len(losses), size)]
    ends = [min(len(losses), (i + 1) * size) * tokens for i in range(len(parts))]
    return [[end, sum(part) / len(part) / math.log(2)] for end, part in zip(ends, parts)]


def _batch_tokens(batches: Any) -> int:
    return int(batches.batch_size * batches.time)


class TimedStep:
    """Whole training steps of a model, one at a time."""

    def __init__(self, model: LanguageModel, batches: Any):
        self.model, self.batches, self.step = model, batches, 0
        self.optimizer = build_optimizer(model, TrainConfig())
        set_lr(self.optimizer, 1e-5)

    def seconds(self) -> float:
        """Run a step; returns what it took."""
        tokens, targets = self.batches.global_batch(self.step)
        start = time.perf_counter()
        loss, _ = self.model.loss(tokens, targets)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return time.perf_counter() - start

    def tokens_per_second(self) -> float:
        """Run a step; returns its speed."""
        return _batch_tokens(self.batches) / self.seconds()


# ----------------------------------------------------------------------------------------------------------- recall


def _recall(job: Job, model: LanguageModel) -> dict[str, Any]:
    """Train from scratch on fresh sequences, then probe on ones that no training saw."""
    recall, start = Recall(), time.perf_counter()
    optimizer = _recall_optimizer(model, job.lr)
    losses, curve = [], []
    for step in range(job.until):
        set_lr(optimizer, job.lr * min(1.0, (step + 1) / RECALL_WARMUP))
        losses.append(recall_step(model, optimizer, recall, job.seed * job.steps + step))
        if (step + 1) % max(1, job.until // 10) == 0 and step + 1 < job.until:
            curve.append([step + 1, _accuracy(model, recall, 128)])
    if not math.isfinite(losses[-1]):
        return {"diverged": True, "accuracy": 0.0, "loss": None, "curve": curve}
    accuracy = _accuracy(model, recall, RECALL_PROBES)
    return {
        "diverged": False,
        "accuracy": accuracy,
        "loss": _tail(losses),
        "curve": [*curve, [job.until, accuracy]],
        "parameters": model.n_parameters(),
        "seconds": time.perf_counter() - start,
    }


def _recall_optimizer(model: LanguageModel, lr: float) -> torch.optim.Optimizer:
    return build_optimizer(model, TrainConfig(lr=lr))


def recall_step(model: LanguageModel, optimizer: torch.optim.Optimizer, recall: Recall, seed: int) -> float:
    """One step on a fresh batch; only the queried positions go through the head."""
    tokens, positions, values = recall.batch(RECALL_BATCH, seed)
    model.train()
    loss = F.cross_entropy(_at_queries(model, tokens, positions), values.flatten())
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


@torch.no_grad()
def _accuracy(model: LanguageModel, recall: Recall, sequences: int) -> float:
    model.eval()
    tokens, positions, values = recall.batch(sequences, RECALL_SEED)
    return (_at_queries(model, tokens, positions).argmax(-1) == values.flatten()).double().mean().item()


def _at_queries(model: LanguageModel, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    hidden, _ = model.hidden(tokens)
    return model.head(hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[2])).flatten(0, 1))


class TimedRecall:
    """Steps of a recall probe, one at a time."""

    def __init__(self, model: LanguageModel):
        self.model, self.recall, self.step = model, Recall(), 0
        self.optimizer = _recall_optimizer(model, 1e-5)

    def seconds(self) -> float:
        start = time.perf_counter()
        recall_step(self.model, self.optimizer, self.recall, self.step)
        self.step += 1
        return time.perf_counter() - start


# --------------------------------------------------------------------------------------------------------- schedule


@dataclass
class Track:
    """One architecture's way through a kind of training: trials of each rate, then a run a seed with the best.

    Args:
        job: what all its jobs have in common.
        rates: learning rates to try.
        rungs: lengths of the trials in steps, rising: all rates go to the first, the better half on to the next (two at
            least), and the best of the last one is taken. A text trial is the beginning of a run, which goes on there.
        seeds: runs.
        seconds_per_step: measured.
    """

    job: Job
    rates: tuple[float, ...]
    rungs: tuple[int, ...]
    seeds: int
    seconds_per_step: float

    def __post_init__(self) -> None:
        if len(self.rates) == 1:
            self.rungs = ()

    def trial(self, lr: float, steps: int) -> Job:
        return replace(self.job, lr=lr, until=steps, folder=self.folder(lr, 0))

    def runs(self, lr: float) -> list[Job]:
        return [replace(self.job, lr=lr, seed=seed, folder=self.folder(lr, seed)) for seed in range(self.seeds)]

    def folder(self, lr: float, seed: int) -> str:
        return f"{self.job.folder}/seed{seed}-lr{lr:g}"

    def cost(self, job: Job) -> float:
        """Seconds that a job will take; a text job of seed 0 begins where its last trial ended."""
        earlier = [steps for steps in self.rungs if steps < job.until]
        done = earlier[-1] if earlier and job.kind == "text" and job.seed == 0 else 0
        return (job.until - done) * self.seconds_per_step

    def total(self) -> float:
        """Seconds that all of it will take."""
        left, seconds = len(self.rates), 0.0
        for steps in self.rungs:
            seconds += left * self.cost(self.trial(self.rates[0], steps))
            left = halved(left)
        return seconds + sum(self.cost(job) for job in self.runs(self.rates[0]))


def halved(rates: int) -> int:
    """How many of so many rates go on to the next rung."""
    return min(rates, max(2, math.ceil(rates / 2)))


def trial_share(rates: int, shares: tuple[float, ...]) -> float:
    """What the trials cost beside one run of the best rate, in runs, if rung i is `shares[i]` of a run long."""
    cost, before, left = 0.0, 0.0, rates
    for share in shares if rates > 1 else ():
        cost += (left - 1) * (share - before)
        before, left = share, halved(left)
    return cost


def _identity(job: Job) -> tuple[Any, ...]:
    return job.kind, job.arch, job.lr, job.seed, job.until


class Schedule:
    """All tracks' jobs, in worker processes; what is on record is not done again."""

    def __init__(self, records: Records, tracks: list[Track], chance: float):
        self.records, self.chance = records, chance
        self.tracks = {(track.job.kind, track.job.arch): track for track in tracks}
        self.done, self.total = 0.0, sum(track.total() for track in tracks)
        self.queued: set[tuple[Any, ...]] = set()

    def run(self, pool: Pool, on_progress: Callable[[float, float], None]) -> None:
        """Do what is left to do."""
        # the longest track first, so that no worker is left with it alone at the end
        for track in sorted(self.tracks.values(), key=Track.total, reverse=True):
            self._advance(track, pool)
        start, before = time.perf_counter(), self.done

        def tick() -> None:
            passed = before + (time.perf_counter() - start) * pool.workers
            on_progress(min(max(self.done, passed), 0.99 * self.total), self.total)

        for job, found in pool.results(tick):
            track = self.tracks[job.kind, job.arch]
            self.done += track.cost(job)
            if job.until < job.steps:
                self._add_trial(job, found)
                self._advance(track, pool)
            else:
                self._add_run(job, found)
        on_progress(self.total, self.total)

    def _advance(self, track: Track, pool: Pool) -> None:
        """Queue what a track can do next: the trials of its rung, or, once the last one is decided, its runs."""
        rates = list(track.rates)
        for steps in track.rungs:
            trials = {lr: self._trial(track, lr, steps) for lr in rates}
            for lr in [lr for lr in rates if trials[lr] is None]:
                self._queue(track.trial(lr, steps), pool)
            found = [trial for trial in trials.values() if trial is not None]
            if len(found) < len(rates):
                return
            self._note_done(track.trial(lr, steps) for lr in rates)
            rates = [float(trial["lr"]) for trial in self._ranked(found)][: halved(len(rates))]
        self._begin_runs(track, rates[0], pool)

    def _queue(self, job: Job, pool: Pool) -> None:
        if _identity(job) not in self.queued:
            self.queued.add(_identity(job))
            pool.add(job)

    def _note_done(self, jobs: Iterable[Job]) -> None:
        """Count what an earlier start has done, once."""
        for job in jobs:
            if _identity(job) not in self.queued:
                self.queued.add(_identity(job))
                self.done += self.tracks[job.kind, job.arch].cost(job)

    def _trial(self, track: Track, lr: float, steps: int) -> dict[str, Any] | None:
        found = self.records.find(kind="trial", of=track.job.kind, arch=track.job.arch, lr=lr, steps=steps)
        return found[0] if found else None

    def _add_trial(self, job: Job, found: dict[str, Any]) -> None:
        self.records.add(
            kind="trial",
            of=job.kind,
            arch=job.arch,
            lr=job.lr,
            steps=job.until,
            loss=found["loss"],
            accuracy=found.get("accuracy"),
            diverged=found["diverged"],
        )

    def _begin_runs(self, track: Track, lr: float, pool: Pool) -> None:
        kind = "run" if track.job.kind == "text" else "recall"
        for job in track.runs(lr):
            if self.records.has(kind=kind, arch=job.arch, seed=job.seed):
                self._note_done([job])
            else:
                self._queue(job, pool)
        if track.job.kind == "text":
            for other in track.rates:
                if other != lr:
                    shutil.rmtree(track.folder(other, 0), ignore_errors=True)

    def _ranked(self, trials: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The best first: by the lowest loss at the end; of recall probes, the highest accuracy if any learnt."""

        def rank(trial: dict[str, Any]) -> tuple[bool, float, float]:
            accuracy = trial["accuracy"] or 0.0
            learnt = accuracy if accuracy > 1.5 * self.chance else 0.0
            return bool(trial["diverged"]), -learnt, math.inf if trial["loss"] is None else trial["loss"]

        return sorted(trials, key=rank)

    def _add_run(self, job: Job, found: dict[str, Any]) -> None:
        kind = "run" if job.kind == "text" else "recall"
        self.records.add(
            kind=kind, arch=job.arch, seed=job.seed, lr=job.lr, steps=job.until, layout=job.model["layout"], **found
        )
