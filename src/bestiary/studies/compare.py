"""`compare`: several architectures, equal parameters, the same tokens in the same order; what each is good for, and costs.

    fit widths -> time a few steps -> plan the tokens that the minutes allow -> learning-rate trials -> training
    -> recall probes -> floors -> speeds, interleaved -> samples -> results.jsonl -> report

Every finished piece is a line in results.jsonl and every run a folder with a checkpoint, so that the same command goes on
where a kill, or Ctrl-C, stopped it.
"""

import dataclasses
import json
import math
import platform
import shutil
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

import bestiary
from bestiary import mixers
from bestiary.data.files import write_whole
from bestiary.errors import UsageError
from bestiary.models import LanguageModel, ModelConfig
from bestiary.models.costs import CONTEXTS, costs, total
from bestiary.studies import floors, inputs, jobs, speed
from bestiary.studies.architectures import find_all, recall_layout
from bestiary.studies.fitting import count, fit
from bestiary.studies.mqar import Recall
from bestiary.studies.pool import Pool
from bestiary.studies.records import Records

TRAINING_SHARE = 0.72
"""Of the minutes: text and recall training and the trials; the rest measures speed and writes."""
RECALL_SHARE = 0.25
"""Of the training time: the recall probes."""
TRIAL_SHARE = 0.12
"""Of a run: its beginning, tried with every learning rate; the best one goes on from there."""
SAMPLE_PROMPT = "\n"
SAMPLE_TOKENS = 240


@dataclass(frozen=True)
class CompareConfig:
    """What to compare, on what, and for how long.

    Args:
        arch: architectures by name, or any layouts; none for a default selection.
        data: a corpus by name, a text file or a folder of them.
        task: a JSON-lines file of prompts and answers to learn instead of a text.
        minutes: time for all of it, on this machine; tokens follow from it.
        tokens: training tokens of every run, instead of what the minutes allow.
        parameters: of every model.
        seeds: runs of every architecture; by default 1, and 3 from 30 minutes on.
        batch_size: rows of a batch.
        sequence_length: tokens of a row.
        learning_rates: tried for each architecture.
        folder: where results go.
        workers: processes that train side by side; by default one a core.
        mixer: further mixers of your own, as module:Class.
    """

    arch: tuple[str, ...] = ()
    data: str = "default"
    task: str | None = None
    minutes: float = 5.0
    tokens: int | None = None
    parameters: int = 250_000
    seeds: int | None = None
    batch_size: int = 16
    sequence_length: int = 256
    learning_rates: tuple[float, ...] = (2e-3, 5e-3, 1.2e-2)
    folder: str = "runs/compare"
    workers: int | None = None
    mixer: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        rules = [
            ("minutes", self.minutes > 0, "positive"),
            ("tokens", self.tokens is None or self.tokens > 0, "positive"),
            ("parameters", self.parameters >= 10_000, "at least 10,000"),
            ("seeds", self.seeds is None or self.seeds > 0, "positive"),
            ("batch_size", self.batch_size > 0, "positive"),
            ("sequence_length", self.sequence_length >= 8, "at least 8"),
            ("learning_rates", self.learning_rates and min(self.learning_rates) > 0, "some positive numbers"),
            ("workers", self.workers is None or self.workers > 0, "positive"),
        ]
        for field, holds, allowed in rules:
            if not holds:
                raise UsageError(f"{field} must be {allowed}, not {getattr(self, field)!r}")

    @property
    def n_seeds(self) -> int:
        return self.seeds or (3 if self.minutes >= 30 else 1)


@dataclass(frozen=True)
class Plan:
    """What the minutes were found to allow; fixed at the first start, so that resuming changes nothing."""

    steps: int
    trial_steps: int
    recall_steps: int


class Progress:
    """What a study reports while it runs; the command line draws it."""

    def phase(self, text: str) -> None:
        """A new phase begins."""

    def advance(self, done: float, of: float) -> None:
        """How far the training is, in seconds of work."""


def compare(config: CompareConfig, progress: Progress | None = None) -> Path:
    """Run the study, or what is left of it; returns its folder, which then holds results.jsonl.

    Raises:
        UsageError: the configuration is wrong, or the folder holds a study with another one.
    """
    return _Study(config, progress or Progress()).run()


class _Study:
    def __init__(self, config: CompareConfig, progress: Progress):
        for spec in config.mixer:
            mixers.registry.load(spec)
        names = (*config.arch, *(mixers.registry.load(spec) for spec in config.mixer))
        self.config, self.progress = config, progress
        self.architectures = find_all(names if config.arch or not config.mixer else (*find_names(), *names))
        self.folder = Path(config.folder)
        self.began = time.perf_counter()
        self.records = Records(self.folder)
        self._claim_folder()
        self.data = inputs.prepare(config.data, config.task, self.folder / "data")
        self.recall = Recall()

    def _claim_folder(self) -> None:
        """A folder belongs to one configuration: another one must not mix its results in."""
        wanted = json.loads(json.dumps(dataclasses.asdict(self.config) | {"folder": None, "workers": None}))
        path = self.folder / "config.json"
        if path.exists():
            if json.loads(path.read_text(encoding="utf-8")) != wanted:
                raise UsageError(
                    f"{self.folder} holds a comparison with other options; choose another --folder, or add --restart"
                )
        else:
            write_whole(path, json.dumps(wanted, indent=2))

    def run(self) -> Path:
        if self.records.has(kind="finished"):
            return self.folder
        configs = self._models()
        plan = self._plan(configs)
        self._describe(plan)
        self._train(configs, plan)
        self._floors(plan)
        self._speeds(configs)
        self._samples(configs)
        self.records.add(kind="finished", seconds=round(time.perf_counter() - self.began, 1))
        return self.folder

    # the phases, each of which skips what is recorded already

    def _models(self) -> dict[str, ModelConfig]:
        self.progress.phase("fitting widths")
        configs = {}
        for architecture in self.architectures:
            known = self.records.find(kind="model", arch=architecture.name)
            if known:
                layout, width = known[0]["layout"], known[0]["d_model"]
                configs[architecture.name] = ModelConfig(layout, width, self.data.vocab_size)
                continue
            config = fit(architecture.layout, self.config.parameters, vocab_size=self.data.vocab_size)
            configs[architecture.name] = config
            whole = total(costs(LanguageModel(config)))
            self.records.add(
                kind="model",
                arch=architecture.name,
                layout=config.layout,
                asked_layout=architecture.layout,
                family=architecture.family,
                attends=architecture.attends,
                d_model=config.d_model,
                layers=len(config.layers),
                parameters=count(config),
                flops_per_token=whole.flops,
                state_bytes=whole.state_bytes,
            )
        return configs

    def _plan(self, configs: dict[str, ModelConfig]) -> Plan:
        path = self.folder / "plan.json"
        if path.exists():
            return Plan(**json.loads(path.read_text(encoding="utf-8")))
        self.progress.phase("timing a few steps of each")
        timings: dict[tuple[str, str], float] = {}
        pool = self._pool()
        for name, config in configs.items():
            pool.add(
                self._text_job(name, config, self.config.learning_rates[0], 0, Plan(10**6, 1, 1), until=0, timing=True)
            )
            pool.add(self._recall_job(name, self.config.learning_rates[0], 0, steps=0, timing=True))
        for job, result in pool.results(lambda: None):
            timings[job.kind, job.arch] = result["seconds_per_step"]
        plan = self._divide(timings)
        write_whole(path, json.dumps(dataclasses.asdict(plan), indent=2))
        return plan

    def _divide(self, timings: dict[tuple[str, str], float]) -> Plan:
        """Steps that fit the minutes, from the seconds that a step of each takes."""
        seconds = 60 * self.config.minutes * TRAINING_SHARE * self.workers
        text = sum(value for (kind, _), value in timings.items() if kind == "text")
        recall = sum(value for (kind, _), value in timings.items() if kind == "recall")
        tokens_a_step = self.data.batches(self.config, 0).batch_size * self.data.batches(self.config, 0).time
        runs = self.config.n_seeds + TRIAL_SHARE * (len(self.config.learning_rates) - 1)
        if self.config.tokens is not None:
            steps = math.ceil(self.config.tokens / tokens_a_step)
        else:
            steps = int((1 - RECALL_SHARE) * seconds / (text * runs))
        recall_runs = self.config.n_seeds + 0.3 * (len(jobs.RECALL_RATES) - 1)
        recall_steps = int(RECALL_SHARE * seconds / (recall * recall_runs))
        steps = max(20, steps)
        return Plan(steps, max(5, round(TRIAL_SHARE * steps)), min(2000, max(40, recall_steps)))

    def _describe(self, plan: Plan) -> None:
        if self.records.has(kind="study"):
            return
        batches = self.data.batches(self.config, 0)
        self.records.add(
            kind="study",
            title="compare",
            started=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            config=dataclasses.asdict(self.config),
            machine=speed.machine() | {"workers": self.workers},
            versions={
                "bestiary": bestiary.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            corpus=self.data.description,
            tokens=plan.steps * batches.batch_size * batches.time,
            steps=plan.steps,
            trial_steps=plan.trial_steps,
            sequence_length=batches.time,
            batch_size=batches.batch_size,
            seeds=list(range(self.config.n_seeds)),
            tokenizer="bytes",
            vocab_size=self.data.vocab_size,
            recall={
                "pairs": self.recall.pairs,
                "length": self.recall.length,
                "vocab": self.recall.vocab_size,
                "probes": jobs.RECALL_PROBES * self.recall.pairs,
                "steps": plan.recall_steps,
                "chance": self.recall.chance,
                "blind": 1 / (self.recall.vocab_size // 2),
                "description": (
                    f"Multi-query associative recall: {self.recall.pairs} random key-value pairs, then every key again, in "
                    f"{self.recall.length} tokens; the model must give each key's value. Not the text models above but small "
                    "ones made for it (width 64: a short convolution, then each different layer of the layout once, no "
                    f"MLP), trained from scratch on {plan.recall_steps} batches of {jobs.RECALL_BATCH} sequences and probed on "
                    f"{jobs.RECALL_PROBES} new ones. Chance is a guess among the {self.recall.pairs} values in the context. A low "
                    "score says 'not within these steps', never 'cannot'."
                ),
            },
        )

    @property
    def workers(self) -> int:
        return self.config.workers or max(1, min(torch.get_num_threads(), 2 * len(self.architectures)))

    def _pool(self) -> Pool:
        return Pool(jobs.work, self.workers)

    def _text_job(
        self, arch: str, config: ModelConfig, lr: float, seed: int, plan: Plan, *, until: int, timing: bool = False
    ) -> "jobs.Job":
        return jobs.Job(
            kind="text",
            arch=arch,
            model=config.to_dict(),
            lr=lr,
            seed=seed,
            steps=plan.steps,
            until=until,
            folder=str(self.folder / "runs" / _safe(f"{arch} seed{seed} lr{lr:g}")),
            mixers=self.config.mixer,
            timing=timing,
            data=self.data.spec(self.config),
        )

    def _recall_job(
        self, arch: str, lr: float, seed: int, *, steps: int, until: int = 0, timing: bool = False
    ) -> "jobs.Job":
        layout = next(a.layout for a in self.architectures if a.name == arch)
        config = ModelConfig(recall_layout(layout), 64, self.recall.vocab_size, norm="layer", embedding_std=0.125)
        return jobs.Job(
            kind="recall",
            arch=arch,
            model=config.to_dict(),
            lr=lr,
            seed=seed,
            steps=steps,
            until=until or steps,
            folder=str(self.folder / "runs" / _safe(f"recall {arch} seed{seed} lr{lr:g}")),
            mixers=self.config.mixer,
            timing=timing,
            data=None,
        )

    def _train(self, configs: dict[str, ModelConfig], plan: Plan) -> None:
        """Trials, then runs with each architecture's best rate; recall likewise; as many at a time as there are workers."""
        self.progress.phase("training")
        schedule = jobs.Schedule(
            self.records,
            {name: config for name, config in configs.items()},
            plan_steps=(plan.trial_steps, plan.steps, max(1, round(0.3 * plan.recall_steps)), plan.recall_steps),
            rates={"text": self.config.learning_rates, "recall": jobs.RECALL_RATES},
            seeds=self.config.n_seeds,
            make={
                "text": lambda name, lr, seed, until: self._text_job(name, configs[name], lr, seed, plan, until=until),
                "recall": lambda name, lr, seed, until: self._recall_job(
                    name, lr, seed, steps=plan.recall_steps, until=until
                ),
            },
        )
        schedule.run(self._pool, self.progress.advance)

    def _floors(self, plan: Plan) -> None:
        if self.config.task is not None or self.records.has(kind="floor", name="xz"):
            return
        self.progress.phase("n-gram and xz floors")
        seen = self.data.training_bytes(self.config, plan.steps)
        text = self.data.validation_bytes
        detail = f"on the same {len(seen):,} training bytes"
        value = floors.ngram_bits_per_byte(seen, text)
        self.records.add(kind="floor", name="6-gram", bpb=value, detail=f"bytes, interpolated Witten-Bell, {detail}")
        value = floors.xz_bits_per_byte(seen, text)
        self.records.add(kind="floor", name="xz", bpb=value, detail=f"what the text adds to an archive, {detail}")

    def _speeds(self, configs: dict[str, ModelConfig]) -> None:
        models = {name: LanguageModel(config).eval() for name, config in configs.items()}
        if not all(self.records.has(kind="train_speed", arch=name) for name in models):
            self.progress.phase("training speed")
            batches = self.data.batches(self.config, 0)
            steps = {name: jobs.TimedStep(LanguageModel(config), batches) for name, config in configs.items()}
            speed.interleaved({name: step.run for name, step in steps.items()}, 1)  # to warm up
            for name, found in speed.interleaved({name: step.run for name, step in steps.items()}, 5).items():
                self.records.add(kind="train_speed", arch=name, tokens_per_second=speed.spread(found))
        if not self.records.has(kind="cost"):
            for record in speed.costs(
                models,
                CONTEXTS,
                longest=2048 if self.config.minutes < 10 else 8192,
                on_progress=lambda context: self.progress.phase(f"speed at context {context}"),
            ):
                self.records.add(kind="cost", **record)

    def _samples(self, configs: dict[str, ModelConfig]) -> None:
        self.progress.phase("samples")
        for name in configs:
            if self.config.task is not None or self.records.has(kind="sample", arch=name):
                continue
            run = self.records.find(kind="run", arch=name, seed=0)
            if not run or run[0].get("diverged"):
                continue
            model, tokenizer = bestiary.load(run[0]["model_folder"])
            prompt = tokenizer.encode(SAMPLE_PROMPT).tolist()
            tokens = model.eval().generate([prompt], max_new_tokens=SAMPLE_TOKENS, temperature=0.8, seed=0)[0]
            self.records.add(
                kind="sample",
                arch=name,
                prompt=SAMPLE_PROMPT,
                text=tokenizer.decode(tokens[len(prompt) :]),
                temperature=0.8,
            )


def find_names() -> tuple[str, ...]:
    """The default selection."""
    from bestiary.studies.architectures import DEFAULT

    return DEFAULT


def restart(folder: str) -> None:
    """Throw a study's results away, so that the same folder can begin anew; refuses what is no study."""
    path = Path(folder)
    if path.exists() and not (path / "config.json").exists() and any(path.iterdir()):
        raise UsageError(f"{path} holds no comparison; choose another --folder")
    shutil.rmtree(path, ignore_errors=True)


def _safe(name: str) -> str:
    """A folder name for any layout."""
    import hashlib

    plain = "".join(c if c.isalnum() or c in "-_." else "-" for c in name)
    return (
        plain
        if plain.replace("-", " ") == name and len(plain) < 80
        else plain[:60] + hashlib.sha256(name.encode()).hexdigest()[:8]
    )
