"""Examples that lie in memory as tensors."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.utils.data import Dataset

from ensemblenet.errors import DataError

__all__ = ["DataError", "TensorExamples"]

Batch = tuple[Tensor, Tensor]


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
