"""Training resumes to the last bit, splits batches without changing gradients, and stops where it should."""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import bestiary
from bestiary import BestiaryError, LanguageModel, ModelConfig, UsageError
from bestiary.data import Batches, ByteTokenizer
from bestiary.training import Diverged, StepInfo, TrainConfig, lr_at, train
from bestiary.training.checkpoint import checkpoints
from bestiary.training.log import read_log
from bestiary.training.optimizer import build_optimizer, set_lr

TEXT = np.frombuffer(b"the quick brown fox jumps over the lazy dog. " * 100, np.uint8).astype(np.int64)


def model(layout: str = "mamba rwkv4") -> LanguageModel:
    torch.manual_seed(1)
    return LanguageModel(ModelConfig(layout, 32))


def batches() -> Batches:
    return Batches(TEXT, 4, 16, seed=3)


def weights(model: LanguageModel) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_a_run_that_stopped_twice_is_a_run_that_never_did(schedule: str, tmp_path: Path) -> None:
    config = TrainConfig(steps=12, accumulation=2, schedule=schedule, save_every=5)
    straight = model()
    whole = train(straight, batches(), config, folder=tmp_path / "a")

    first = model()
    train(first, batches(), config, folder=tmp_path / "b", until=3)

    def kill(info: StepInfo) -> None:
        if info.step == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(model(), batches(), config, folder=tmp_path / "b", resume=True, on_step=kill)
    assert checkpoints(tmp_path / "b")[-1].name == "step-000007"
    last = model()
    rest = train(last, batches(), config, folder=tmp_path / "b", resume=True)
    assert rest.step == 12 and rest.losses == whole.losses[7:]
    assert all(torch.equal(a, b) for a, b in zip(weights(straight), weights(last)))


def test_a_kill_between_checkpoints_repeats_the_lost_steps_exactly(tmp_path: Path) -> None:
    config = TrainConfig(steps=9, save_every=4, log_every=1)
    straight = model()
    train(straight, batches(), config)

    def crash(info: StepInfo) -> None:
        if info.step == 6:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        train(model(), batches(), config, folder=tmp_path, on_step=crash)
    assert checkpoints(tmp_path)[-1].name == "step-000004"
    again = model()
    train(again, batches(), config, folder=tmp_path, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(weights(straight), weights(again)))
    assert [line["step"] for line in read_log(tmp_path)] == list(range(1, 10))


def test_an_interrupt_in_the_middle_of_a_step_lets_it_end_and_saves(tmp_path: Path) -> None:
    class Interrupting:
        def global_batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
            if step == 5:
                os.kill(os.getpid(), signal.SIGINT)
            return batches().global_batch(step)

    config = TrainConfig(steps=9, save_every=0)
    with pytest.raises(KeyboardInterrupt):
        train(model(), Interrupting(), config, folder=tmp_path)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000006"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    straight, rest = model(), model()
    train(straight, batches(), config)
    train(rest, batches(), config, folder=tmp_path, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(weights(straight), weights(rest)))


def test_accumulation_and_masked_targets_change_no_gradient() -> None:
    class Masked:
        def global_batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
            inputs, targets = batches().global_batch(step)
            return inputs, targets.masked_fill(torch.arange(64).reshape(4, 16) % 7 < 3, -100)

    found = []
    for parts in (1, 2, 4):
        trained = model().double()
        train(trained, Masked(), TrainConfig(steps=3, accumulation=parts))
        found.append(weights(trained))
    for other in found[1:]:
        for a, b in zip(found[0], other):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_training_learns_and_evaluates(tmp_path: Path) -> None:
    seen: list[StepInfo] = []
    result = train(
        model("gla"),
        batches(),
        TrainConfig(steps=40, lr=1e-2, eval_every=20),
        folder=tmp_path,
        tokenizer=ByteTokenizer(),
        on_step=seen.append,
        evaluate=lambda model: {"parameters": float(model.n_parameters())},
    )
    assert result.losses[-1] < 0.6 * result.losses[0]
    assert [line["step"] for line in result.evaluations] == [20, 40]
    assert result.tokens == 40 * 64 and seen[-1].lr == pytest.approx(1e-3)
    loaded, tokenizer = bestiary.load(tmp_path)  # a run's folder gives its last checkpoint
    assert loaded.config.layout == "gla" and tokenizer is not None


def test_on_step_may_stop_and_a_folder_is_not_overwritten(tmp_path: Path) -> None:
    result = train(model("gru"), batches(), TrainConfig(steps=9), folder=tmp_path, on_step=lambda info: info.step == 2)
    assert result.stopped and result.step == 2
    with pytest.raises(UsageError, match="resume"):
        train(model("gru"), batches(), TrainConfig(steps=9), folder=tmp_path)
    with pytest.raises(BestiaryError, match="lr was"):
        train(model("gru"), batches(), TrainConfig(steps=9, lr=1.0), folder=tmp_path, resume=True)
    with pytest.raises(BestiaryError, match="another model"):
        train(model("lstm"), batches(), TrainConfig(steps=9), folder=tmp_path, resume=True)


def test_a_damaged_checkpoint_is_one_clear_error(tmp_path: Path) -> None:
    train(model("gru"), batches(), TrainConfig(steps=1), folder=tmp_path)
    path = checkpoints(tmp_path)[-1] / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(BestiaryError, match="checkpoint"):
        train(model("gru"), batches(), TrainConfig(steps=1), folder=tmp_path, resume=True)


def test_a_loss_that_is_not_finite_stops_and_leaves_evidence(tmp_path: Path) -> None:
    broken = model("gru")

    def break_it(info: StepInfo) -> None:
        if info.step == 2:
            with torch.no_grad():
                broken.norm.weight.fill_(float("nan"))

    with pytest.raises(Diverged, match="step 3"):
        train(broken, batches(), TrainConfig(steps=5), folder=tmp_path, on_step=break_it)
    report = json.loads((tmp_path / "diverged.json").read_text())
    assert report["step"] == 2 and "blocks.0.mixer.input.weight" in report["norms"]
    assert (tmp_path / "checkpoints" / "diverged" / "model.safetensors").exists()


def test_schedules() -> None:
    cosine = TrainConfig(steps=100, lr=1.0, warmup_steps=10, final_lr=0.1)
    assert lr_at(0, cosine) == pytest.approx(1 / 11) and lr_at(10, cosine) == 1.0
    assert lr_at(99, cosine) == pytest.approx(0.1) and lr_at(55, cosine) == pytest.approx(0.55, abs=0.01)
    wsd = TrainConfig(steps=100, lr=1.0, warmup_steps=0, schedule="wsd", cooldown=0.2, final_lr=0.0)
    assert {lr_at(step, wsd) for step in range(80)} == {1.0}
    assert lr_at(99, wsd) == 0.0 and lr_at(89, wsd) == pytest.approx(0.5)
    longer = TrainConfig(steps=200, lr=1.0, warmup_steps=0, schedule="wsd", cooldown=0.2, final_lr=0.0)
    assert all(lr_at(step, longer) == lr_at(step, wsd) for step in range(80))  # so a run may be prolonged
    assert lr_at(99, TrainConfig(steps=100, lr=0.5, schedule="constant")) == 0.5


def test_what_decays_and_what_has_a_rate_of_its_own() -> None:
    trained = model("mamba rwkv4 s4")
    optimizer = build_optimizer(trained, TrainConfig())
    set_lr(optimizer, 0.01)
    of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    groups = {name: of[id(parameter)] for name, parameter in trained.named_parameters()}
    assert groups["blocks.0.mixer.in_proj.weight"]["weight_decay"] == 0.1
    for name in ("blocks.0.mixer.A_log", "blocks.0.mixer.D", "blocks.0.mixer.dt_proj.bias", "blocks.0.norm.weight"):
        assert groups[name]["weight_decay"] == 0.0
    assert groups["embedding.weight"]["weight_decay"] == 0.0
    assert groups["blocks.1.mixer.time_decay"]["lr"] == 0.02 and groups["blocks.1.mixer.time_first"]["lr"] == 0.03
    assert groups["blocks.2.mixer.log_dt"]["lr"] == 1e-3 and groups["blocks.2.mixer.C"]["lr"] == 0.01


def test_bf16_trains_with_fp32_weights() -> None:
    trained = model("gla mamba")
    result = train(trained, batches(), TrainConfig(steps=20, lr=1e-2, precision="bf16"))
    assert result.losses[-1] < result.losses[0] and trained.embedding.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("field", "value"),
    [("lr", 0.0), ("schedule", "linear"), ("precision", "fp8"), ("accumulation", 0), ("clip", -1.0), ("beta2", 1.0)],
)
def test_wrong_options_are_named(field: str, value: object) -> None:
    with pytest.raises(UsageError, match=field):
        TrainConfig(**{field: value})


def _rank(rank: int, world: int, port: int, out: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    trained = model().double()
    train(trained, batches(), TrainConfig(steps=4, accumulation=2), folder=Path(out) / "run")
    torch.save(weights(trained), f"{out}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_rank, args=(rank, 2, port, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    alone = model().double()
    train(alone, batches(), TrainConfig(steps=4, accumulation=2))
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for a, b, c in zip(weights(alone), *ranks):
        assert torch.equal(b, c)
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    assert checkpoints(tmp_path / "run")[-1].name == "step-000004"
