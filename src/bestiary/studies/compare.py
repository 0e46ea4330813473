"""`compare`: architectures of equal size on the same tokens in the same order; what each is good for, and costs.

    fit widths -> time a few steps -> plan the tokens that the minutes allow -> learning-rate trials -> training
    -> recall probes -> floors -> speeds, interleaved -> samples -> results.jsonl -> report

Every finished piece is a line in results.jsonl and every run a folder with a checkpoint, so that the same command goes
on where a kill, or Ctrl-C, stopped it.
"""

import dataclasses
import hashlib
import json
import math
import platform
import shutil
import time
from dataclasses import dataclass, replace
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
from bestiary.studies.architectures import DEFAULT, RECALL_WINDOW, find_all, recall_layout
from bestiary.studies.fitting import count, fit
from bestiary.studies.mqar import Recall
from bestiary.studies.pool import Pool
from bestiary.studies.records import Records

OVERHEAD = 20.0
"""Seconds for starting processes, reading the corpus, floors and the report."""
TRAINING_SHARE = 0.75
"""Of the minutes left: text and recall training and the trials; the rest measures speed and writes."""
RECALL_SHARE = 0.3
"""Of the training time: the recall probes, at most."""
TRIAL_SHARES = (0.12, 0.35)
"""Of a run: its beginning, tried with every learning rate; the better ones go on to the second, the best from there."""
RECALL_TRIAL_SHARE = 0.3
"""Of a recall probe: the length of its trials."""
SPEED_SHARE = 0.05
"""Of the minutes: what measuring speed at one context length may take; beyond that it is computed."""
MOST_RECALL_STEPS = 1000
LEAST_STEPS = 20
SAMPLE_TEMPERATURE = 0.8
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
    trial_steps: tuple[int, ...]
    recall_steps: int
    recall_trial_steps: int


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
        own, archs = [mixers.registry.load(spec) for spec in config.mixer], config.arch or DEFAULT
        self.config, self.progress = config, progress
        self.architectures = find_all((*archs, *(name for name in own if name not in archs)))
        self.folder = Path(config.folder)
        self.began = time.perf_counter()
        self._claim_folder()
        self.records = Records(self.folder)
        self.data = inputs.prepare(config.data, config.task, self.folder / "data")
        self.spec = self.data.spec(config.batch_size, config.sequence_length)
        self.batches = inputs.batches(self.spec, 0)
        self.recall = Recall()

    def _claim_folder(self) -> None:
        """A folder belongs to one configuration, once it has measured anything: another must not mix its results in."""
        wanted = json.loads(json.dumps(dataclasses.asdict(self.config) | {"folder": None, "workers": None}))
        path = self.folder / "config.json"
        if path.exists():
            if json.loads(path.read_text(encoding="utf-8")) == wanted:
                return
            if Records(self.folder).has(kind="timing"):
                raise UsageError(
                    f"{self.folder} holds a comparison with other options; choose another --folder, or add --restart"
                )
            (self.folder / "results.jsonl").unlink(missing_ok=True)  # it was refused, say for a text that is not there
        elif self.folder.exists() and any(self.folder.iterdir()):
            raise UsageError(f"{self.folder} holds other files; choose another --folder")
        write_whole(path, json.dumps(wanted, indent=2))

    def run(self) -> Path:
        if self.records.has(kind="finished"):
            return self.folder
        configs = self._models()
        timings = self._timings(configs)
        plan = self._plan(timings)
        self._describe(plan)
        self._train(configs, plan, timings)
        self._floors(plan)
        self._speeds(configs)
        self._samples(configs)
        self.records.add(kind="finished", seconds=round(time.perf_counter() - self.began, 1))
        return self.folder

    # the phases, each of which skips what is recorded already

    def _models(self) -> dict[str, ModelConfig]:
        self.progress.phase("fitting widths to the parameters")
        configs = {}
        for architecture in self.architectures:
            known = self.records.find(kind="model", arch=architecture.name)
            if known:
                configs[architecture.name] = ModelConfig(known[0]["layout"], known[0]["d_model"], self.data.vocab_size)
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

    def _timings(self, configs: dict[str, ModelConfig]) -> dict[tuple[str, str], float]:
        """Seconds that a training step of each takes, with all workers busy."""
        names = list(configs)
        known = self.records.find(kind="timing")
        if not known:
            self.progress.phase("timing a few steps of each")
            pool = self._pool()
            for name in names:
                pool.add(replace(self._text_job(name, configs[name], 1), timing=True))
                pool.add(replace(self._recall_job(name, 1), timing=True))
            found = {(job.kind, job.arch): result["seconds_per_step"] for job, result in pool.results(lambda: None)}
            seconds = [[kind, arch, found[kind, arch]] for kind in ("text", "recall") for arch in names]
            known = [self.records.add(kind="timing", seconds_per_step=seconds)]
        return {(kind, arch): seconds for kind, arch, seconds in known[0]["seconds_per_step"]}

    def _plan(self, timings: dict[tuple[str, str], float]) -> Plan:
        """Steps that fit the minutes, from the seconds that a step of each takes."""
        path = self.folder / "plan.json"
        if path.exists():
            known = json.loads(path.read_text(encoding="utf-8"))
            return Plan(**(known | {"trial_steps": tuple(known["trial_steps"])}))
        config = self.config
        seconds = max(5.0, 60 * config.minutes - OVERHEAD) * TRAINING_SHARE * self.workers
        text, recall = (sum(value for (kind, _), value in timings.items() if kind == of) for of in ("text", "recall"))
        recall_runs = config.n_seeds + RECALL_TRIAL_SHARE * len(jobs.RECALL_RATES)
        recall_steps = min(MOST_RECALL_STEPS, int(RECALL_SHARE * seconds / (recall * recall_runs)))
        left = seconds - recall_steps * recall_runs * recall
        runs = config.n_seeds + jobs.trial_share(len(config.learning_rates), TRIAL_SHARES)
        if config.tokens is None:
            steps = int(left / (text * runs))
        else:
            steps = math.ceil(config.tokens / (self.batches.batch_size * self.batches.time))
        steps, recall_steps = max(LEAST_STEPS, steps), max(LEAST_STEPS, recall_steps)
        rungs = tuple(max(2 + i, round(share * steps)) for i, share in enumerate(TRIAL_SHARES))
        plan = Plan(steps, rungs, recall_steps, max(2, round(RECALL_TRIAL_SHARE * recall_steps)))
        write_whole(path, json.dumps(dataclasses.asdict(plan), indent=2))
        return plan

    def _describe(self, plan: Plan) -> None:
        if self.records.has(kind="study"):
            return
        recall = self.recall
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
            tokens=plan.steps * self.batches.batch_size * self.batches.time,
            steps=plan.steps,
            trial_steps=plan.trial_steps,
            sequence_length=self.batches.time,
            batch_size=self.batches.batch_size,
            seeds=list(range(self.config.n_seeds)),
            tokenizer="bytes",
            vocab_size=self.data.vocab_size,
            recall={
                "pairs": recall.pairs,
                "length": recall.length,
                "vocab": recall.vocab_size,
                "probes": jobs.RECALL_PROBES * recall.pairs,
                "steps": plan.recall_steps,
                "chance": recall.chance,
                "blind": 1 / (recall.vocab_size // 2),
                "description": (
                    f"Recall is multi-query associative recall: {recall.pairs} random key-value pairs, then every key "
                    f"again, in {recall.length} tokens; the model must give each key's value. Not the text models "
                    "themselves but small ones made for it (width 64: a short convolution, then each different layer "
                    f"of the layout once, no MLP, attention windows cut to {RECALL_WINDOW} tokens, since longer ones "
                    f"would be full attention here), trained from scratch on {plan.recall_steps} batches of "
                    f"{jobs.RECALL_BATCH} sequences and probed on {jobs.RECALL_PROBES} new ones. Chance is a guess "
                    f"among the {recall.pairs} values in the context; a model that has not learned even that scores "
                    "below it. A low score says 'not within these steps', never 'cannot'."
                ),
            },
        )

    @property
    def workers(self) -> int:
        return self.config.workers or max(1, min(torch.get_num_threads(), 2 * len(self.architectures)))

    def _pool(self) -> Pool:
        return Pool(jobs.work, self.workers)

    def _text_job(self, arch: str, config: ModelConfig, steps: int) -> jobs.Job:
        return jobs.Job(
            kind="text",
            arch=arch,
            model=config.to_dict(),
            lr=self.config.learning_rates[0],
            seed=0,
            steps=steps,
            until=steps,
            folder=str(self.folder / "runs" / _safe(arch)),
            mixers=self.config.mixer,
            data=self.spec,
        )

    def _recall_job(self, arch: str, steps: int) -> jobs.Job:
        layout = next(architecture.layout for architecture in self.architectures if architecture.name == arch)
        config = ModelConfig(recall_layout(layout), 64, self.recall.vocab_size, norm="layer", embedding_std=0.125)
        job = self._text_job(arch, config, steps)
        return replace(job, kind="recall", lr=jobs.RECALL_RATES[0], data=None)

    def _train(self, configs: dict[str, ModelConfig], plan: Plan, timings: dict[tuple[str, str], float]) -> None:
        """Trials, then runs with each architecture's best rate; recall likewise; a worker each."""
        self.progress.phase("training")
        seeds, tracks = self.config.n_seeds, []
        for name, config in configs.items():
            text, recall = self._text_job(name, config, plan.steps), self._recall_job(name, plan.recall_steps)
            rates = self.config.learning_rates
            tracks.append(jobs.Track(text, rates, plan.trial_steps, seeds, timings["text", name]))
            seconds = timings["recall", name]
            tracks.append(jobs.Track(recall, jobs.RECALL_RATES, (plan.recall_trial_steps,), seeds, seconds))
        jobs.Schedule(self.records, tracks, self.recall.chance).run(self._pool(), self.progress.advance)

    def _floors(self, plan: Plan) -> None:
        if not isinstance(self.data, inputs.TextData) or self.records.has(kind="floor", name="xz"):
            return
        self.progress.phase("n-gram and xz floors")
        seen = self.data.training_bytes(self.spec, plan.steps)
        text = self.data.validation_bytes
        detail = f"on the same {len(seen):,} training bytes"
        value = floors.ngram_bits_per_byte(seen, text)
        self.records.add(kind="floor", name="6-gram", bpb=value, detail=f"bytes, interpolated Witten-Bell, {detail}")
        value = floors.xz_bits_per_byte(seen, text)
        self.records.add(kind="floor", name="xz", bpb=value, detail=f"what the text adds to an archive, {detail}")

    def _speeds(self, configs: dict[str, ModelConfig]) -> None:
        # measured in turn or not at all: where a kill left some, all are measured again, and later records count
        if not all(self.records.has(kind="train_speed", arch=name) for name in configs):
            self.progress.phase("training speed")
            timed = {name: jobs.TimedStep(LanguageModel(config), self.batches) for name, config in configs.items()}
            measures = {name: step.tokens_per_second for name, step in timed.items()}
            speed.interleaved(measures, 1)  # to warm up
            for name, found in speed.interleaved(measures, 3).items():
                self.records.add(kind="train_speed", arch=name, tokens_per_second=speed.spread(found))
        if not all(
            self.records.has(kind="cost", arch=name, context=context) for name in configs for context in CONTEXTS
        ):
            models = {name: LanguageModel(config).eval() for name, config in configs.items()}
            for record in speed.costs(
                models,
                CONTEXTS,
                allowance=SPEED_SHARE * 60 * self.config.minutes,
                on_progress=lambda context: self.progress.phase(f"reading and writing speed at context {context}"),
            ):
                self.records.add(kind="cost", **record)

    def _samples(self, configs: dict[str, ModelConfig]) -> None:
        self.progress.phase("samples")
        for name in configs:
            if self.config.task is not None or self.records.has(kind="sample", arch=name):
                continue
            run = self.records.find(kind="run", arch=name, seed=0)
            if not run or run[0]["diverged"]:
                continue
            model, tokenizer = bestiary.load(run[0]["model_folder"])
            prompt = tokenizer.encode(SAMPLE_PROMPT).tolist()
            # the end of text ends a sample, too
            tokens = model.eval().generate(
                [prompt], max_new_tokens=SAMPLE_TOKENS, temperature=SAMPLE_TEMPERATURE, eos=tokenizer.eos_id, seed=0
            )[0]
            self.records.add(
                kind="sample",
                arch=name,
                prompt=SAMPLE_PROMPT,
                text=tokenizer.decode(tokens),
                temperature=SAMPLE_TEMPERATURE,
            )


def restart(folder: str) -> None:
    """Throw a study's results away, so that the same folder can begin anew; refuses what is no study."""
    path = Path(folder)
    if path.exists() and not (path / "config.json").exists() and any(path.iterdir()):
        raise UsageError(f"{path} holds no comparison; choose another --folder")
    shutil.rmtree(path, ignore_errors=True)


def _safe(name: str) -> str:
    """A folder name for any layout."""
    plain = "".join(c if c.isalnum() or c in "-_." else "-" for c in name)
    return plain if plain == name and len(name) < 80 else plain[:60] + hashlib.sha256(name.encode()).hexdigest()[:8]
