"""How a model is trained, as a value, and the learning rate that follows from it."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from bestiary.errors import UsageError, unknown

SCHEDULES = ("cosine", "wsd", "constant")
PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class TrainConfig:
    """AdamW with warm-up and a schedule.

    Args:
        steps: optimiser steps of the whole run; the schedule ends there.
        lr: the highest learning rate.
        final_lr: the last learning rate, as a share of `lr`.
        warmup_steps: of linear rise; by default a twentieth of the steps, at most 500.
        schedule: "cosine"; "wsd" (warm-up, stable, decay: constant until the last part, so that a run may be prolonged
            from there); or "constant".
        cooldown: the share of the steps in which "wsd" falls, linearly.
        weight_decay: of matrices; norms, biases, embeddings and the parameters of recurrences do not decay.
        beta1, beta2, eps: of AdamW.
        clip: largest norm of the gradient; 0 for no clipping.
        accumulation: parts into which each batch is split, one after the other, to save memory.
        precision: "fp32", or "bf16" for autocast.
        seed: of the initialisation and of the order of the batches.
        log_every, eval_every, save_every: steps between lines of the log, evaluations and checkpoints; 0 for none.
    """

    steps: int = 1000
    lr: float = 3e-3
    final_lr: float = 0.1
    warmup_steps: int | None = None
    schedule: str = "cosine"
    cooldown: float = 0.3
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip: float = 1.0
    accumulation: int = 1
    precision: str = "fp32"
    seed: int = 0
    log_every: int = 10
    eval_every: int = 0
    save_every: int = 200

    def __post_init__(self) -> None:
        for field, allowed in (("schedule", SCHEDULES), ("precision", PRECISIONS)):
            if getattr(self, field) not in allowed:
                raise unknown(field, str(getattr(self, field)), allowed)
        rules = [
            ("steps", self.steps >= 0, "at least 0"),
            ("lr", self.lr > 0, "positive"),
            ("final_lr", 0 <= self.final_lr <= 1, "a share in 0..1"),
            ("warmup_steps", self.warmup_steps is None or self.warmup_steps >= 0, "at least 0"),
            ("cooldown", 0 < self.cooldown <= 1, "a share in 0..1"),
            ("weight_decay", self.weight_decay >= 0, "at least 0"),
            ("beta1", 0 <= self.beta1 < 1, "in [0, 1)"),
            ("beta2", 0 <= self.beta2 < 1, "in [0, 1)"),
            ("eps", self.eps > 0, "positive"),
            ("clip", self.clip >= 0, "at least 0"),
            ("accumulation", self.accumulation >= 1, "at least 1"),
            ("log_every", self.log_every >= 0, "at least 0"),
            ("eval_every", self.eval_every >= 0, "at least 0"),
            ("save_every", self.save_every >= 0, "at least 0"),
        ]
        for field, holds, allowed_text in rules:
            if not holds:
                raise UsageError(f"{field} must be {allowed_text}, not {getattr(self, field)!r}")

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return dataclasses.asdict(self)


def lr_at(step: int, config: TrainConfig) -> float:
    """The learning rate of a step, 0 being the first: a function of step and configuration alone."""
    warmup = min(500, config.steps // 20) if config.warmup_steps is None else config.warmup_steps
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "wsd":
        start = max(warmup, config.steps - round(config.cooldown * config.steps))
        share = max(0.0, (step - start + 1) / max(1, config.steps - start))
        return config.lr * (1 - (1 - config.final_lr) * min(1.0, share))
    share = min(1.0, (step - warmup) / max(1, config.steps - 1 - warmup))
    return config.lr * (config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * share)))
