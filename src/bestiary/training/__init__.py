"""Training: configuration, optimiser, loop, checkpoints, logs."""

from bestiary.training.config import TrainConfig, lr_at
from bestiary.training.loop import Diverged, StepInfo, TrainResult, train

__all__ = ["Diverged", "StepInfo", "TrainConfig", "TrainResult", "lr_at", "train"]
