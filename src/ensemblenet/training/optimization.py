"""The optimizer and the learning rate's course, shared by every way to train."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

__all__ = ["Optimization", "build_optimizer", "build_schedule"]


@dataclass(frozen=True)
class Optimization:
    """How weights are updated.

    Args:
        optimizer: "adamw", or "sgd" with Nesterov momentum.
        lr: the highest learning rate, reached after the warmup; a cosine takes it to 0 from there.
        weight_decay: as the optimizer has it: decoupled from the gradient in AdamW, part of it in SGD.
        momentum: SGD's; AdamW does not read it.
        warmup: the share of all steps in which the learning rate rises in a line.
        decay_all: also decay what has one dimension: biases and the parameters of normalisations.
    """

    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = 0.01
    weight_decay: float = 0.05
    momentum: float = 0.9
    warmup: float = 0.05
    decay_all: bool = False

    def __post_init__(self) -> None:
        for name, valid, wanted in [
            ("lr", self.lr > 0, "above 0"),
            ("weight_decay", self.weight_decay >= 0, "at least 0"),
            ("momentum", 0 <= self.momentum < 1, "in [0, 1)"),
            ("warmup", 0 <= self.warmup < 1, "in [0, 1)"),
        ]:
            if not valid:
                raise ValueError(f"{name} must be {wanted}, got {getattr(self, name)}.")


def build_optimizer(network: nn.Module, settings: Optimization) -> Optimizer:
    """An optimizer of the network's parameters.

    Example:
        >>> network = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        >>> [group["weight_decay"] for group in build_optimizer(network, Optimization()).param_groups]
        [0.05, 0.0]
    """
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in parameters if parameter.ndim > 1 or settings.decay_all]
    kept = [parameter for parameter in parameters if parameter.ndim <= 1 and not settings.decay_all]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}]
    groups += [{"params": kept, "weight_decay": 0.0}] if kept else []
    return _OPTIMIZERS[settings.optimizer](groups, settings)


def _adamw(groups: list[dict[str, Any]], settings: Optimization) -> Optimizer:
    return torch.optim.AdamW(groups, lr=settings.lr, fused=True)


def _sgd(groups: list[dict[str, Any]], settings: Optimization) -> Optimizer:
    momentum = settings.momentum
    return torch.optim.SGD(groups, lr=settings.lr, momentum=momentum, nesterov=momentum > 0, fused=True)


_OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]], Optimization], Optimizer]] = {
    "adamw": _adamw,
    "sgd": _sgd,
}


def build_schedule(optimizer: Optimizer, steps: int, settings: Optimization) -> LambdaLR:
    """The learning rate's course over a run: a linear warmup, then a cosine to 0.

    Args:
        optimizer: what to schedule.
        steps: optimizer steps of the whole run.
        settings: its `warmup` is the share of the steps that warm up.
    """
    warmup = math.ceil(settings.warmup * steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))

    return LambdaLR(optimizer, factor)
