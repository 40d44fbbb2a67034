"""What a network's inputs are: their shape and dtype, and examples of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["DTYPES", "InputSpec"]

DTYPES = (
    *("float64", "float32", "float16", "bfloat16", "complex128", "complex64", "bool"),
    *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"),
)


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

    def zeros(self, size: int = 1, like: nn.Module | None = None) -> Tensor:
        """A batch of zeros, (size, *).

        Args:
            size: N.
            like: a network, whose device and floating-point precision the batch gets.
        """
        dtype, device = getattr(torch, self.dtype), None
        for parameter in [] if like is None else like.parameters():
            if parameter.is_floating_point() or parameter.is_complex():
                precision, device = parameter.dtype.to_real(), parameter.device
                if dtype.is_floating_point:
                    dtype = precision
                elif dtype.is_complex:
                    dtype = torch.promote_types(precision, torch.complex64)
                break
        return torch.zeros(size, *self.shape, dtype=dtype, device=device)

    def random(self, size: int = 2) -> Tensor:
        """A batch of numbers in [0, 1), (size, *), the same every time; integers are zeros, flags are tossed."""
        dtype = getattr(torch, self.dtype)
        drawn = torch.complex64 if dtype.is_complex else torch.float32
        values = torch.rand((size, *self.shape), generator=torch.Generator().manual_seed(0), dtype=drawn)
        return values < 0.5 if dtype == torch.bool else values.to(dtype)
