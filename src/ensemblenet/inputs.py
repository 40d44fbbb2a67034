"""What a network's inputs are: their shape and dtype, and examples of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["DTYPES", "InputSpec"]

DTYPES = ("float64", "float32", "float16", "bfloat16", "int64")


@dataclass(frozen=True)
class InputSpec:
    """The inputs of a network, as plain data.

    Attributes:
        shape: of one example.
        dtype: its dtype's name, such as "float32".

    Example:
        >>> spec = InputSpec.of(torch.zeros(4, 3, 8, 8))
        >>> spec, spec.zeros(2).shape
        (InputSpec(shape=(3, 8, 8), dtype='float32'), torch.Size([2, 3, 8, 8]))
    """

    shape: tuple[int, ...]
    dtype: str = "float32"

    @classmethod
    def of(cls, batch: Tensor) -> InputSpec:
        """The specification of a batch, (N, *)."""
        return cls(tuple(batch.shape[1:]), str(batch.dtype).removeprefix("torch."))

    def zeros(self, size: int = 1, like: Tensor | None = None) -> Tensor:
        """A batch of zeros, (size, *).

        Args:
            size: N.
            like: a parameter of the network, whose device and floating-point dtype the batch gets.
        """
        dtype = getattr(torch, self.dtype)
        if like is not None and dtype.is_floating_point:
            dtype = like.dtype
        return torch.zeros(size, *self.shape, dtype=dtype, device=None if like is None else like.device)

    def random(self, size: int = 2) -> Tensor:
        """A batch of numbers in [0, 1), (size, *), the same every time; zeros where inputs are integers."""
        values = torch.rand((size, *self.shape), generator=torch.Generator().manual_seed(0))
        return values.to(getattr(torch, self.dtype))
