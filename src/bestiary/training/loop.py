"""The training loop: a step is a function of weights, optimiser and (seed, step), so that runs resume exactly.

for step: batch -> loss, in parts -> gradient, clipped -> AdamW with lr_at(step) -> log, evaluation, checkpoint
"""

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, distributed, nn

from bestiary.data.files import write_whole
from bestiary.errors import BestiaryError, UsageError
from bestiary.hub import native
from bestiary.training.checkpoint import checkpoints, restore, save_checkpoint
from bestiary.training.config import TrainConfig, lr_at
from bestiary.training.log import Log
from bestiary.training.optimizer import build_optimizer, set_lr


@runtime_checkable
class GlobalBatches(Protocol):
    """Where batches come from: a pure function of the step."""

    def global_batch(self, step: int) -> tuple[Any, ...]:
        """(inputs, targets), and perhaps a dictionary of further tensors, which the model's loss takes by keyword.

        Rows come first in all of them: of a language model (batch, time) int64 each, of a classifier's targets
        (batch,). Targets below 0 do not count.
        """


class Diverged(BestiaryError):
    """The loss or the gradient is not finite; the message names the step and where to look."""


@dataclass(frozen=True)
class StepInfo:
    """What is known after a step: `step` is the number of steps done, `loss` the batch's mean in nats.

    `tokens` counts the places of the targets so far: a language model's tokens, a classifier's rows.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    tokens_per_second: float


@dataclass
class TrainResult:
    """Steps and tokens done, the loss of each step of this call, evaluations, and whether `on_step` asked to stop."""

    step: int
    tokens: int
    losses: list[float] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    stopped: bool = False


def train(
    model: nn.Module,
    batches: GlobalBatches,
    config: TrainConfig,
    *,
    folder: str | Path | None = None,
    tokenizer: Any = None,
    until: int | None = None,
    resume: bool = False,
    on_step: Callable[[StepInfo], bool | None] | None = None,
    evaluate: Callable[[Any], dict[str, float]] | None = None,
) -> TrainResult:
    """Train a model in place: anything with a `loss(inputs, targets, **more)` that returns (loss, state).

    Args:
        model: a LanguageModel, an encoder's model, or a module of one's own (which then has no folder).
        folder: where the log and the checkpoints go; None for neither.
        tokenizer: saved beside the weights.
        until: stop after this step of the schedule, with a checkpoint; a later call with `resume` goes on.
        resume: go on from the folder's last checkpoint, where there is one.
        on_step: called after every step; a true answer stops, with a checkpoint.
        evaluate: called every `config.eval_every` steps and at the end; its numbers are logged.

    Within torch.distributed, every rank takes its share of the rows of each batch, gradients are summed, and rank 0
    writes. Ctrl-C lets the step end, saves a checkpoint and raises KeyboardInterrupt; a second one leaves at once.

    Raises:
        Diverged: the loss or gradient is not finite; the state before that step is saved in the folder.
        UsageError: the folder holds a run already and `resume` was not asked for.
    """
    return _Run(model, batches, config, None if folder is None else Path(folder), tokenizer).run(
        until, resume, on_step, evaluate
    )


class _Run:
    def __init__(self, model: Any, batches: GlobalBatches, config: TrainConfig, folder: Path | None, tokenizer: Any):
        self.model, self.batches, self.config, self.tokenizer = model, batches, config, tokenizer
        self.optimizer = build_optimizer(model, config)
        parallel = distributed.is_available() and distributed.is_initialized()
        self.rank, self.world = (distributed.get_rank(), distributed.get_world_size()) if parallel else (0, 1)
        self.folder, self.writes = folder, folder is not None and self.rank == 0
        if folder is not None:
            native.kind_of(model)  # now, not when the first checkpoint is due
        self.device = next(model.parameters()).device
        self.progress: dict[str, Any] = {"step": 0, "tokens": 0}
        self.interrupts: list[int] = []

    def run(
        self,
        until: int | None,
        resume: bool,
        on_step: Callable[[StepInfo], bool | None] | None,
        evaluate: Callable[[Any], dict[str, float]] | None,
    ) -> TrainResult:
        self._begin(resume)
        log = Log(self.folder, after=self.progress["step"]) if self.writes and self.folder is not None else None
        result = TrainResult(self.progress["step"], self.progress["tokens"])
        last = self.config.steps if until is None else min(until, self.config.steps)
        saved = self.progress["step"]
        self.model.train()
        try:
            while self.progress["step"] < last and not result.stopped:
                with _delayed_interrupts(self.interrupts):
                    info = self._step()
                result.losses.append(info.loss)
                step, config = info.step, self.config
                if log is not None and config.log_every and (step % config.log_every == 0 or step == last):
                    log.add(**(vars(info) | _scalars(self.model)))
                if evaluate is not None and (step == last or (config.eval_every and step % config.eval_every == 0)):
                    found = self._evaluate(evaluate)
                    result.evaluations.append({"step": step, "tokens": info.tokens, **found})
                    if log is not None:
                        log.add(step, **found)
                result.stopped = bool(on_step is not None and on_step(info))
                if config.save_every and step % config.save_every == 0:
                    self._save()
                    saved = step
                if self.interrupts:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            if len(self.interrupts) < 2 and saved != self.progress["step"]:
                self._save()
            raise
        finally:
            if log is not None:
                log.close()
        if saved != self.progress["step"] or (self.writes and not checkpoints(self.folder)):  # type: ignore[arg-type]
            self._save()
        result.step, result.tokens = self.progress["step"], self.progress["tokens"]
        return result

    def _begin(self, resume: bool) -> None:
        """Resume from the last checkpoint, or make sure that the folder is free."""
        found = [] if self.folder is None else checkpoints(self.folder)
        if found and not resume:
            raise UsageError(f"{self.folder} holds a run already: resume it (--resume), or choose another folder")
        if found:
            self.progress = restore(found[-1], self.model, self.optimizer, self.config)

    def _step(self) -> StepInfo:
        start, step = time.perf_counter(), self.progress["step"]
        inputs, targets, *rest = self.batches.global_batch(step)
        more: dict[str, Tensor] = rest[0] if rest else {}
        count = int((targets >= 0).sum())
        share = inputs.shape[0] // self.world
        if share * self.world != inputs.shape[0] or share % self.config.accumulation:
            raise UsageError(
                f"{inputs.shape[0]} rows of a batch cannot be shared equally by {self.world} processes and split into "
                f"{self.config.accumulation} parts"
            )
        rows = slice(self.rank * share, (self.rank + 1) * share)
        self.optimizer.zero_grad(set_to_none=True)
        # the loss, and whether to stop: all ranks must agree after which step
        total = torch.zeros(2, dtype=torch.float32 if self.device.type == "mps" else torch.float64, device=self.device)
        split = [x[rows].chunk(self.config.accumulation) for x in (inputs, targets, *more.values())]
        for part_in, part_out, *part_more in zip(*split):
            counted = int((part_out >= 0).sum())
            if not counted:
                continue
            with self._precision():
                named = {name: x.to(self.device) for name, x in zip(more, part_more)}
                loss, _ = self.model.loss(part_in.to(self.device), part_out.to(self.device), **named)
            loss = loss * (counted / count)  # parts weigh as much as they have targets
            loss.backward()
            total[0] += loss.detach()
        total[1] = len(self.interrupts)
        self._sum_over_ranks(total)
        loss_value, interrupts = total.tolist()
        if interrupts and not self.interrupts:
            self.interrupts.append(signal.SIGINT)
        norm = _grad_norm(self.model)
        if not math.isfinite(loss_value) or not math.isfinite(norm):
            raise self._diverged(loss_value, norm)
        if self.config.clip:
            scale = self.config.clip / (norm + 1e-6)
            if scale < 1:
                for parameter in self.model.parameters():
                    if parameter.grad is not None:
                        parameter.grad.mul_(scale)
        lr = lr_at(step, self.config)
        set_lr(self.optimizer, lr)
        self.optimizer.step()
        self.progress["step"] += 1
        self.progress["tokens"] += targets.numel()
        speed = targets.numel() / (time.perf_counter() - start)
        return StepInfo(step + 1, loss_value, lr, norm, self.progress["tokens"], speed)

    def _precision(self) -> AbstractContextManager[Any]:
        if self.config.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def _sum_over_ranks(self, total: Tensor) -> None:
        if self.world == 1:
            return
        distributed.all_reduce(total)
        for parameter in self.model.parameters():
            if not parameter.requires_grad:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            distributed.all_reduce(parameter.grad)

    def _evaluate(self, evaluate: Callable[[Any], dict[str, float]]) -> dict[str, float]:
        self.model.eval()
        try:
            with torch.no_grad():
                return evaluate(self.model)
        finally:
            self.model.train()

    def _save(self) -> None:
        if self.writes and self.folder is not None:
            save_checkpoint(self.folder, self.model, self.tokenizer, self.optimizer, self.config, self.progress)

    def _diverged(self, loss: float, norm: float) -> Diverged:
        """What is known about a failed step: norms of each parameter and gradient, and the state before it."""
        step = self.progress["step"]
        where = ""
        if self.writes and self.folder is not None:
            norms = {
                name: {"weight": parameter.norm().item(), "gradient": _norm(parameter.grad)}
                for name, parameter in self.model.named_parameters()
            }
            report = {"step": step, "loss": str(loss), "grad_norm": str(norm), "norms": norms}
            write_whole(self.folder / "diverged.json", json.dumps(report, indent=2))
            save_checkpoint(
                self.folder,
                self.model,
                self.tokenizer,
                self.optimizer,
                self.config,
                self.progress,
                name="diverged",
            )
            where = f"; norms are in {self.folder / 'diverged.json'}, the state before it in checkpoints/diverged"
        return Diverged(
            f"step {step + 1}: the loss is {loss}, the gradient's norm {norm}{where}. A lower learning rate, or "
            "stronger clipping, usually helps"
        )


def _scalars(model: nn.Module) -> dict[str, float]:
    """The means over the layers of what parts of the model told in single numbers, if it keeps such."""
    measures: dict[str, list[Tensor]] = getattr(model, "measures", {})
    found = {name: [x for x in told if x.ndim == 0] for name, told in measures.items()}
    return {name: torch.stack(told).mean().item() for name, told in found.items() if told}


@contextmanager
def _delayed_interrupts(seen: list[int]) -> Iterator[None]:
    """Within it, Ctrl-C (and SIGTERM, where that interrupts too) is only noted in `seen`; a second one interrupts."""
    if threading.current_thread() is not threading.main_thread():  # only there may handlers be set
        yield
        return

    def note(number: int, frame: Any) -> None:
        seen.append(number)
        if len(seen) > 1:
            raise KeyboardInterrupt

    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is signal.default_int_handler]
    for number in numbers:
        signal.signal(number, note)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.default_int_handler)


def _grad_norm(model: nn.Module) -> float:
    norms = [parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None]
    return torch.stack(norms).norm().item() if norms else 0.0


def _norm(gradient: Tensor | None) -> float | None:
    if gradient is None:
        return None
    value = gradient.norm().item()
    return value if math.isfinite(value) else None
