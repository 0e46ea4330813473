"""AdamW with the groups that these models want.

Matrices decay. Vectors (norms, biases, skips), embeddings (rare tokens would fade between their occurrences) and
whatever a mixer marks with `_no_weight_decay` (A, dt, D, ...) do not. `_lr_scale` multiplies a parameter's learning
rate (RWKV's time_decay), `_max_lr` caps it (S4's A, B and dt).
"""

import torch
from torch import nn

from bestiary.training.config import TrainConfig


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over all parameters, grouped by weight decay, learning-rate factor and cap."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    groups: dict[tuple[bool, float, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        exempt = parameter.ndim < 2 or id(parameter) in embeddings or getattr(parameter, "_no_weight_decay", False)
        key = (not exempt, getattr(parameter, "_lr_scale", 1.0), getattr(parameter, "_max_lr", float("inf")))
        groups.setdefault(key, []).append(parameter)
    settings = [
        {"params": parameters, "weight_decay": config.weight_decay if decays else 0.0, "lr_scale": scale, "max_lr": cap}
        for (decays, scale, cap), parameters in groups.items()
    ]
    return torch.optim.AdamW(settings, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its share of the learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = min(lr * group["lr_scale"], group["max_lr"])
