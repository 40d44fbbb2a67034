"""Operations without a fused form: run for all heads by `torch.vmap`, or for one head after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

__all__ = ["Looped", "Mapped", "Slot"]


@dataclass(frozen=True)
class Slot:
    """The place of a value among a call's arguments."""

    number: int


def _fill(template: Any, values: Sequence[Any]) -> Any:
    return tree_map(lambda leaf: values[leaf.number] if isinstance(leaf, Slot) else leaf, template)


class Mapped(nn.Module):
    """One call for all heads, by `torch.vmap`; what it draws is independent for every head.

    Args:
        function: what every head calls; where it is a module, the first head's.
        template: its arguments (args, kwargs), with a `Slot` in the place of every value.
        stacked: which values have heads in front.
        names: the parameters of the module, whose stacks follow the values.
    """

    def __init__(
        self, function: Callable[..., Any], template: Any, stacked: Sequence[bool], names: Sequence[str] = ()
    ) -> None:
        super().__init__()
        self.functions = (function,)  # in a tuple: the module belongs to its head
        self.template = template
        self.names = tuple(names)
        self.in_dims = tuple(0 if own else None for own in (*stacked, *(True for _ in names)))

    def forward(self, *values: Any) -> Any:
        """Values and stacked parameters to the heads' outputs, heads in front."""
        return torch.vmap(self._one, in_dims=self.in_dims, randomness="different")(*values)

    def _one(self, *values: Any) -> Any:
        (function,) = self.functions
        count = len(values) - len(self.names)
        args, kwargs = _fill(self.template, values[:count])
        if not isinstance(function, nn.Module):
            return function(*args, **kwargs)
        return functional_call(function, dict(zip(self.names, values[count:], strict=True)), args, kwargs)


class Looped(nn.Module):
    """One call for each head.

    Args:
        functions: what each head calls.
        template: its arguments (args, kwargs), with a `Slot` in the place of every value.
        stacked: which values have heads in front.
    """

    def __init__(self, functions: Sequence[Callable[..., Any]], template: Any, stacked: Sequence[bool]) -> None:
        super().__init__()
        self.functions = tuple(functions)  # a tuple: modules belong to their heads
        self.template = template
        self.stacked = tuple(stacked)

    def forward(self, *values: Any) -> Any:
        """Values to the heads' outputs, heads in front."""
        outputs = []
        for k, function in enumerate(self.functions):
            own = [_of_head(value, k) if one else value for value, one in zip(values, self.stacked, strict=True)]
            args, kwargs = _fill(self.template, own)
            outputs.append(function(*args, **kwargs))
        return tree_map(lambda *parts: torch.stack(parts) if isinstance(parts[0], Tensor) else parts[0], *outputs)


def _of_head(value: Any, k: int) -> Any:
    return tree_map(lambda leaf: leaf[k] if isinstance(leaf, Tensor) else leaf, value)
