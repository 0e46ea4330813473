"""Training: configuration, optimiser, loop, checkpoints, logs."""

from bestiary.training.config import TrainConfig, lr_at
from bestiary.training.loop import Diverged, StepInfo, TrainResult, train
from bestiary.training.masked import MaskedBatches

__all__ = ["Diverged", "MaskedBatches", "StepInfo", "TrainConfig", "TrainResult", "lr_at", "train"]
