"""Examples that lie in memory as tensors, loaded a batch at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ensemblenet.errors import EnsembleNetError

__all__ = ["DataError", "TensorExamples", "batch_loader"]

Batch = tuple[Tensor, Tensor]


class DataError(EnsembleNetError, ValueError):
    """Data that is missing, damaged, or not of the expected form."""


class TensorExamples(Dataset[Batch]):
    """Inputs and targets of N examples; a whole batch is taken, and transformed, at once.

    Args:
        inputs: shape (N, *).
        targets: shape (N, *).
        transform: called with a batch of inputs; draws its random numbers from PyTorch's global generator.

    Example:
        >>> import torch
        >>> examples = TensorExamples(torch.arange(6.0).view(3, 2), torch.arange(3))
        >>> examples[1]
        (tensor([2., 3.]), tensor(1))
        >>> examples.__getitems__([0, 2])[1]
        tensor([0, 2])
    """

    def __init__(self, inputs: Tensor, targets: Tensor, transform: Callable[[Tensor], Tensor] | None = None) -> None:
        self.inputs = inputs
        self.targets = targets
        self.transform = transform

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> Batch:
        inputs, targets = self.__getitems__([index])
        return inputs[0], targets[0]

    def __getitems__(self, indices: list[int]) -> Batch:
        inputs = self.inputs[indices]
        return inputs if self.transform is None else self.transform(inputs), self.targets[indices]


def batch_loader(examples: TensorExamples, batch_size: int, shuffle: bool = False) -> DataLoader[Any]:
    """Load examples in batches; a training loader shuffles and leaves the last, smaller batch out."""
    return DataLoader(examples, batch_size=batch_size, shuffle=shuffle, drop_last=shuffle, collate_fn=_as_it_is)


def _as_it_is(batch: Any) -> Any:
    return batch
