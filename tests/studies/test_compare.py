"""A comparison from end to end, in small: complete, fair, and the same to the last bit wherever it was stopped."""

import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import bestiary
from bestiary import mixers, report
from bestiary.data import ByteTokenizer, Shards
from bestiary.errors import UsageError
from bestiary.evaluation import perplexity
from bestiary.models.costs import CONTEXTS
from bestiary.studies.compare import CompareConfig, Progress, compare, restart

ARCHS = ("gru*1", "linear_attention*1")
TRAINED = ("trial", "run", "recall")
MEASURED = ("train_speed", "cost")

WORKERS = 2


def write_text(path: Path) -> Path:
    """About 20 kB of lines of made-up words."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 7))) for _ in range(200)]
    path.write_text("".join(" ".join(draw.choices(words, k=9)) + ".\n" for _ in range(420)))
    return path


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> CompareConfig:
    folder = tmp_path_factory.mktemp("compare")
    return CompareConfig(
        arch=ARCHS,
        data=str(write_text(folder / "text.txt")),
        tokens=1500,
        parameters=20_000,
        batch_size=2,
        sequence_length=32,
        minutes=0.2,
        learning_rates=(1e-3, 3e-3),
        folder=str(folder / "study"),
        workers=WORKERS,
    )


@pytest.fixture(scope="module")
def study(config: CompareConfig) -> Path:
    """A finished comparison that nothing interrupted; tests only read it."""
    torch.manual_seed(0)
    return compare(config)


def records(folder: Path, *kinds: str) -> list[dict[str, Any]]:
    path = folder / "results.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []  # without a torn one
    found = [json.loads(line) for line in lines]
    return [record for record in found if not kinds or record["kind"] in kinds]


def identity(record: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(record.get(key) for key in ("kind", "of", "arch", "seed", "context", "name"))


def trained(folder: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    """What training found, without what depends on the machine's mood and on where the folder lies."""
    free = ("seconds", "model_folder")
    return {
        (*identity(record), record["lr"], record["steps"]): {
            key: value for key, value in record.items() if key not in free
        }
        for record in records(folder, *TRAINED)
    }


def cut(study: Path, to: Path, lines: int, torn: bytes = b"") -> CompareConfig:
    """A copy of a finished study as it was after its first records: what later ones left is gone with them."""
    shutil.copytree(study, to)
    kept = (study / "results.jsonl").read_bytes().splitlines(keepends=True)[:lines]
    (to / "results.jsonl").write_bytes(b"".join(kept).replace(bytes(study), bytes(to)) + torn)
    if not records(to, "run"):
        shutil.rmtree(to / "runs")
    fields = json.loads((study / "config.json").read_text())
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    return CompareConfig(**fields | {"folder": str(to), "workers": WORKERS})


def place(study: Path, kind: str, number: int = 1) -> int:
    """How many records there were when the n-th of a kind had just been written."""
    places = [i for i, record in enumerate(records(study), start=1) if record["kind"] == kind]
    return places[number - 1]


class Stop(Progress):
    """Ctrl-C at the first phase or moment of training of which `when` holds."""

    def __init__(self, when: Callable[[str], bool]):
        self.when = when

    def phase(self, text: str) -> None:
        if self.when(text):
            raise KeyboardInterrupt

    def advance(self, done: float, of: float) -> None:
        assert 0 <= done <= of
        if self.when("..."):
            raise KeyboardInterrupt


# ----------------------------------------------------------------------------------------------- a study that went well


def test_every_finding_is_on_record_once(study: Path) -> None:
    found = records(study)
    expected = {("study", None, None, None, None, None), ("timing", None, None, None, None, None)}
    expected |= {("finished", None, None, None, None, None)}
    expected |= {("floor", None, None, None, None, name) for name in ("6-gram", "xz")}
    for arch in ARCHS:
        expected |= {(kind, None, arch, None, None, None) for kind in ("model", "train_speed", "sample")}
        expected |= {(kind, None, arch, 0, None, None) for kind in ("run", "recall")}
        expected |= {("trial", of, arch, None, None, None) for of in ("text", "recall")}
        expected |= {("cost", None, arch, None, context, None) for context in CONTEXTS}
    assert {identity(record) for record in found} == expected
    assert len(found) == len(expected) + 8  # there are two rates of each trial, and two trials of each text rate
    assert found[-1]["kind"] == "finished"


def test_models_are_of_equal_size_and_read_the_same_tokens(study: Path, config: CompareConfig) -> None:
    for model in records(study, "model"):
        loaded, _ = bestiary.load(next(r for r in records(study, "run") if r["arch"] == model["arch"])["model_folder"])
        assert loaded.n_parameters() == model["parameters"] and loaded.config.layout == model["layout"]
        assert abs(model["parameters"] / config.parameters - 1) < 0.02
    (whole,) = records(study, "study")
    assert {run["tokens"] for run in records(study, "run")} == {whole["tokens"]} == {24 * 2 * 32}  # the next full batch
    trials = [trial for trial in records(study, "trial") if trial["of"] == "text"]
    assert sorted({trial["steps"] for trial in trials}) == whole["trial_steps"]
    assert len({probe["steps"] for probe in records(study, "recall")}) == 1


def test_each_architecture_goes_on_with_its_best_rate(study: Path) -> None:
    for run in records(study, "run"):
        trials = [t for t in records(study, "trial") if t["of"] == "text" and t["arch"] == run["arch"]]
        last = max(trial["steps"] for trial in trials)
        assert sorted((trial["steps"] == last, trial["lr"]) for trial in trials) == [
            (False, 1e-3), (False, 3e-3), (True, 1e-3), (True, 3e-3),
        ]  # fmt: skip
        final = [trial for trial in trials if trial["steps"] == last]
        assert run["lr"] == min(final, key=lambda trial: trial["loss"])["lr"]
        assert [path.name for path in Path(run["model_folder"]).parent.parent.iterdir()] == [f"seed0-lr{run['lr']:g}"]
        assert not (Path(run["model_folder"]).parent / "checkpoints").exists()


def test_the_score_on_record_is_that_of_the_saved_model(study: Path) -> None:
    held_out = Shards(study / "data" / "validation")
    for run in records(study, "run"):
        model, _ = bestiary.load(run["model_folder"])
        found = perplexity(model, held_out[0 : len(held_out)], ByteTokenizer(), window=32)
        assert found.bits_per_byte == pytest.approx(run["bpb"], rel=1e-9)
        assert 2 < run["bpb"] < 7 and run["curve"][0][1] > run["curve"][-1][1]  # it learnt something
        assert run["curve"][-1][0] == run["tokens"]


def test_the_report_can_be_written(study: Path, tmp_path: Path) -> None:
    shutil.copytree(study, tmp_path / "copy")
    page = report.write_report(tmp_path / "copy")
    results = report.read(tmp_path / "copy")
    assert results.finished and results.archs == list(ARCHS)
    assert results.bpb("gru*1") == [run["bpb"] for run in records(study, "run") if run["arch"] == "gru*1"]
    assert all(arch in page.read_text(encoding="utf-8") for arch in ARCHS)


def test_running_a_finished_study_again_changes_nothing(study: Path, config: CompareConfig) -> None:
    def state() -> dict[Path, tuple[int, int]]:
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in study.rglob("*") if path.is_file()}

    before = state()
    assert compare(config, Stop(lambda phase: True)) == study  # no phase begins
    assert compare(replace(config, workers=5)) == study  # the workers make no other study
    assert {path for path, stat in state().items() if before.get(path) != stat} <= set()
    assert set(state()) == set(before)


# ---------------------------------------------------------------------------------------------- a study that did not


def test_a_study_stopped_at_every_turn_finds_what_an_uninterrupted_one_found(
    study: Path, config: CompareConfig, tmp_path: Path
) -> None:
    config = replace(config, folder=str(tmp_path / "stopped"))
    folder = Path(config.folder)

    def on_record(n: int, *kinds: str) -> Callable[[str], bool]:
        return lambda event: event == "..." and len(records(folder, *kinds)) >= n

    def begins(word: str) -> Callable[[str], bool]:
        return lambda event: word in event

    with pytest.raises(KeyboardInterrupt):
        compare(config, Stop(begins("timing")))
    shutil.copy(study / "plan.json", folder / "plan.json")  # how many steps fit is the only thing a clock decides
    models: dict[Path, int] = {}
    for when in (
        on_record(1, "trial"),
        on_record(5, "trial"),
        on_record(1, "run", "recall"),
        begins("floors"),
        begins("context 2048"),
        begins("samples"),
    ):
        with pytest.raises(KeyboardInterrupt):
            compare(config, Stop(when))
        for run in records(folder, "run"):
            path = Path(run["model_folder"]) / "model.safetensors"
            assert models.setdefault(path, path.stat().st_mtime_ns) == path.stat().st_mtime_ns  # it is not run again
    compare(config)
    assert trained(folder) == trained(study)
    names = [identity(record) for record in records(folder) if record["kind"] not in ("trial", *MEASURED)]
    assert len(names) == len(set(names)) and len(records(folder, "trial")) == len(records(study, "trial"))


@pytest.mark.parametrize(
    ("kind", "number", "torn"),
    [
        # text trials are on record of which no checkpoint is left
        pytest.param("trial", 6, b'{"kind": "trial", "of": "te', marks=pytest.mark.slow),
        ("run", 1, b""),  # the other run had ended, and its record was lost
        ("floor", 1, b""),
        ("train_speed", 1, b'{"kind": "tr'),
        ("cost", 3, b""),
        ("sample", 1, b""),
    ],
)
def test_a_study_killed_behind_any_record_is_completed(
    study: Path, tmp_path: Path, kind: str, number: int, torn: bytes
) -> None:
    config = cut(study, tmp_path / "cut", place(study, kind, number), torn)
    left = (tmp_path / "cut" / "results.jsonl").read_bytes().removesuffix(torn)
    compare(config)
    assert (tmp_path / "cut" / "results.jsonl").read_bytes().startswith(left)  # what was there stays
    assert trained(tmp_path / "cut") == trained(study)
    assert {identity(record) for record in records(tmp_path / "cut")} == {identity(r) for r in records(study)}
    assert len(records(tmp_path / "cut", *TRAINED)) == len(records(study, *TRAINED))
    results = report.read(tmp_path / "cut")
    assert results.finished and set(results.train_speeds) == set(ARCHS) and len(results.costs) == 2 * len(CONTEXTS)
    assert sorted(floor.name for floor in results.floors) == ["6-gram", "xz"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_process_loses_nothing_that_was_finished(study: Path, tmp_path: Path, number: int) -> None:
    config = cut(study, tmp_path / "killed", place(study, "study"))
    script = tmp_path / "main.py"
    script.write_text(
        f"from bestiary.studies.compare import *\nif __name__ == '__main__':\n    compare({config!r})\n",
        encoding="utf-8",
    )
    process = subprocess.Popen([sys.executable, str(script)], start_new_session=True, stderr=subprocess.DEVNULL)
    while not records(tmp_path / "killed", "trial"):
        assert process.poll() is None
        time.sleep(0.02)
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)  # Ctrl-C reaches the workers, too
    assert process.wait(60) != 0
    assert not records(tmp_path / "killed", "finished")
    time.sleep(2)  # orphans leave
    compare(config)
    assert trained(tmp_path / "killed") == trained(study)
    assert len(records(tmp_path / "killed", *TRAINED)) == len(records(study, *TRAINED))


# -------------------------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("change", [{"seeds": 2}, {"tokens": 1600}, {"arch": ("gru*1",)}, {"data": "other.txt"}])
def test_a_folder_belongs_to_one_configuration(study: Path, config: CompareConfig, change: dict[str, Any]) -> None:
    before = (study / "results.jsonl").read_bytes()
    with pytest.raises(UsageError, match="other options; choose another --folder, or add --restart"):
        compare(replace(config, **change))
    assert (study / "results.jsonl").read_bytes() == before


def test_a_configuration_that_was_refused_claims_no_folder(config: CompareConfig, tmp_path: Path) -> None:
    config = replace(config, folder=str(tmp_path / "study"))
    with pytest.raises(UsageError, match="missing"):
        compare(replace(config, data=str(tmp_path / "missing.txt")))
    with pytest.raises(UsageError, match="far from 20,000"):
        compare(replace(config, arch=("gru*1", "mamba*90")))
    with pytest.raises(KeyboardInterrupt):
        compare(config, Stop(lambda phase: "timing" in phase))
    assert [record["arch"] for record in records(tmp_path / "study")] == list(ARCHS)


def test_a_folder_of_other_things_is_left_alone(config: CompareConfig, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("dear reader")
    with pytest.raises(UsageError, match="other files"):
        compare(replace(config, folder=str(tmp_path)))
    with pytest.raises(UsageError, match="no comparison"):
        restart(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_restarting_throws_a_comparison_away(study: Path, tmp_path: Path) -> None:
    shutil.copytree(study, tmp_path / "copy")
    restart(str(tmp_path / "copy"))
    restart(str(tmp_path / "copy"))  # there is nothing left to throw away
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("minutes", 0.0),
        ("tokens", 0),
        ("parameters", 9_999),
        ("seeds", 0),
        ("batch_size", 0),
        ("sequence_length", 7),
        ("learning_rates", ()),
        ("learning_rates", (1e-3, 0.0)),
        ("workers", 0),
    ],
)
def test_wrong_options_are_named(field: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"{field} must be"):
        CompareConfig(**{field: value})


def test_long_studies_have_three_seeds_unless_told_otherwise() -> None:
    assert [CompareConfig(minutes=minutes).n_seeds for minutes in (5.0, 29.9, 30.0)] == [1, 1, 3]
    assert CompareConfig(minutes=60.0, seeds=2).n_seeds == 2


# --------------------------------------------------------------------------------- one's own mixer on one's own task

OWN = '''
from bestiary.mixers import register
from bestiary.mixers.linear_attention import LinearAttention


@register("own")
class Own(LinearAttention):
    """Linear attention by another name."""
'''


@pytest.fixture(scope="module")
def own_study(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_mixer.py").write_text(OWN, encoding="utf-8")
    examples = [{"prompt": f"{a}{b}=", "answer": b} for a in "abcdefghijklm" for b in "xyz"]
    (folder / "task.jsonl").write_text("\n".join(map(json.dumps, examples)), encoding="utf-8")
    registered = dict(mixers.registry._classes)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setenv("PYTHONPATH", str(folder))
        try:
            yield compare(
                CompareConfig(
                    arch=("own",),
                    mixer=("own_mixer:Own",),
                    task=str(folder / "task.jsonl"),
                    tokens=400,
                    parameters=40_000,
                    batch_size=4,
                    sequence_length=32,
                    minutes=0.2,
                    seeds=2,
                    learning_rates=(5e-3,),
                    folder=str(folder / "study"),
                    workers=WORKERS,
                )
            )
        finally:  # other tests list the registered mixers
            mixers.registry._classes = registered
            sys.modules.pop("own_mixer", None)
            importlib.invalidate_caches()


def test_ones_own_mixer_is_compared_once_under_its_name(own_study: Path) -> None:
    (model,) = records(own_study, "model")
    assert (model["arch"], model["family"], model["asked_layout"]) == ("own", "your mixer", "own*4")
    assert abs(model["parameters"] / 40_000 - 1) < 0.02
    assert {record["arch"] for record in records(own_study, *TRAINED, *MEASURED)} == {"own"}
    assert all("own{channel=none}" in probe["layout"] for probe in records(own_study, "recall"))
    assert records(own_study)[-1]["kind"] == "finished"


def test_ones_own_task_is_scored_by_exact_match_and_has_no_text_floors_or_samples(own_study: Path) -> None:
    runs = sorted(records(own_study, "run"), key=lambda run: run["seed"])  # two workers end in any order
    assert [run["seed"] for run in runs] == [0, 1] and runs[0]["bpb"] != runs[1]["bpb"]
    for run in runs:
        assert 0 <= run["exact_match"] <= 1 and run["bpb"] > 0 and run["held_out"] >= 1
        assert run["tokens"] >= 400 and run["tokens"] % 4 == 0
    assert not records(own_study, "floor", "sample")
    assert not [trial for trial in records(own_study, "trial") if trial["of"] == "text"]  # one rate needs no trial


def test_the_report_of_a_task_can_be_written(own_study: Path) -> None:
    assert "task.jsonl" in report.write_report(own_study).read_text(encoding="utf-8")
