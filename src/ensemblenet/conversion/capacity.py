"""Whether a trained network has capacity to spare, and so is likely to gain from a conversion."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ensemblenet.conversion.trace import pick
from ensemblenet.errors import ConversionError
from ensemblenet.functional import Task, codistillation
from ensemblenet.inputs import call, inputs_and_targets, to_device

__all__ = ["Capacity", "spare_capacity"]

_SPARE = 0.2


@dataclass(frozen=True)
class Capacity:
    """The losses of a trained network on its training examples and on others.

    A network that has learned its training examples by heart has more capacity than it can use, and that is what
    narrower heads give up. A ratio below 0.2 separated conversions that gained from those that did not in 18 of 20
    bases on MNIST-1D, CIFAR-10 and YouTube-8M; no base below it lost (`docs/procedure.md`, `benchmarks/capacity.py`).

    Attributes:
        train_loss: mean over training examples, in nats.
        validation_loss: mean over examples that it was not trained with, in nats.

    Example:
        >>> capacity = Capacity(train_loss=0.01, validation_loss=0.5)
        >>> capacity.ratio, capacity.is_spare
        (0.02, True)
    """

    train_loss: float
    validation_loss: float

    @property
    def ratio(self) -> float:
        """The training loss as a share of the validation loss."""
        return self.train_loss / self.validation_loss if self.validation_loss else math.inf

    @property
    def is_spare(self) -> bool:
        """Whether a conversion is likely to gain."""
        return self.ratio < _SPARE

    def __str__(self) -> str:
        found = f"{self.ratio:.2f} of its validation loss ({self.train_loss:.4f} against {self.validation_loss:.4f})"
        return f"The base's training loss is {found}: " + (
            f"below {_SPARE}, so it has capacity to spare and a conversion is likely to gain."
            if self.is_spare
            else f"not below {_SPARE}, so it shows no capacity to spare: expect no gain in accuracy from heads, "
            "calibration apart. Late splits and a co-distillation weight of 1 lose least. Train it for longer or widen "
            "it until it overfits, keep the base, or let `ensemblenet fit --plan search` try."
        )


def spare_capacity(
    base: nn.Module,
    train_batches: Iterable[Any],
    validation_batches: Iterable[Any],
    task: Task = "multiclass",
) -> Capacity:
    """Measure a trained base's loss in evaluation mode, on training examples and on others.

    Args:
        base: a trained network, from inputs (N, *) to outputs (N, C).
        train_batches: pairs of inputs and targets, or what else [`ensemblenet.inputs.inputs_and_targets`][] takes, as
            the base was trained with, augmentation included; some thousand examples are enough.
        validation_batches: the same of examples that it was not trained with.
        task: what the outputs mean.

    Raises:
        ConversionError: there are no examples.

    Example:
        >>> base, x = nn.Linear(4, 3), torch.randn(6, 4)
        >>> y = base(x).argmax(1)
        >>> spare_capacity(base, [(x, y)], [(x, y)]).ratio
        1.0
    """
    was_training = base.training
    try:
        losses = [_loss(base.eval(), batches, task) for batches in (train_batches, validation_batches)]
    finally:
        base.train(was_training)
    return Capacity(*losses)


@torch.no_grad()
def _loss(base: nn.Module, batches: Iterable[Any], task: Task) -> float:
    device = next((parameter.device for parameter in base.parameters()), torch.device("cpu"))
    total, examples = 0.0, 0
    for batch in batches:
        x, y = inputs_and_targets(batch)
        outputs = pick(call(base, to_device(x, device)), None)[0].unsqueeze(0)  # of one head: (1, N, C)
        total += codistillation(outputs, y.to(device), 1.0, task).item() * len(y)
        examples += len(y)
    if not examples:
        raise ConversionError("Spare capacity needs training and validation examples; there were none of one kind.")
    return total / examples
