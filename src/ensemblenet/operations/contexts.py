"""Operations that run in a context of their own: without gradients, with autocast or without it.

A graph has no `with`, so every operation brings its contexts along.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

__all__ = ["Autocast", "Context", "InContext", "always_in_evaluation", "in_context"]

_Layer = TypeVar("_Layer", bound=nn.Module)


class Autocast(NamedTuple):
    """An entered `torch.autocast`; a device type of None is that of the tensors that the operation gets."""

    device_type: str | None
    dtype: torch.dtype
    enabled: bool
    cache_enabled: bool


@dataclass(frozen=True)
class Context:
    """What surrounds an operation.

    Attributes:
        gradients: whether gradients flow through it.
        autocasts: at most one for each device type.

    Example:
        >>> Context(gradients=False).run(torch.relu, (torch.ones(2, requires_grad=True),), {}).requires_grad
        False
    """

    gradients: bool = True
    autocasts: tuple[Autocast, ...] = ()

    def run(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function in this context."""
        managers: list[AbstractContextManager[Any]] = [] if self.gradients else [torch.no_grad()]
        for device_type, dtype, enabled, cache_enabled in self.autocasts:
            if device_type is None:
                leaves = tree_leaves((args, kwargs))
                device_type = next((leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)), "cpu")
            managers.append(torch.autocast(device_type, dtype, enabled, cache_enabled))
        return _run(managers, function, args, kwargs)


def _run(managers: Sequence[AbstractContextManager[Any]], function: Any, args: Any, kwargs: Any) -> Any:
    if not managers:
        return function(*args, **kwargs)
    with managers[0]:
        return _run(managers[1:], function, args, kwargs)


class InContext:
    """A function, or a method by its name, that runs in a context; it takes the place of the function in a graph.

    Example:
        >>> method = InContext("relu", Context(gradients=False))
        >>> method.__name__, method(torch.tensor([-1.0, 1.0]))
        ('relu', tensor([0., 1.]))
    """

    def __init__(self, function: Callable[..., Any] | str, context: Context, name: str | None = None) -> None:
        self.function = function
        self.context = context
        self.__name__ = name or (function if isinstance(function, str) else function.__name__)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it."""
        if isinstance(self.function, str):
            return self.context.run(_call_method, (self.function, *args), kwargs)
        return self.context.run(self.function, args, kwargs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, InContext) and (self.function, self.context) == (other.function, other.context)

    def __hash__(self) -> int:
        return hash((self.function, self.context))

    def __deepcopy__(self, memo: Any) -> InContext:
        return self

    def within(self, context: Context) -> InContext:
        """The same function in another context."""
        return InContext(self.function, context, self.__name__)


def _call_method(name: str, owner: Any, *args: Any, **kwargs: Any) -> Any:
    return getattr(owner, name)(*args, **kwargs)


def in_context(layer: _Layer, context: Context) -> _Layer:
    """Make a layer run in a context whenever it is called, from now on.

    Its names and its place stay, and it is still of its type; only its class is a new one that derives from it.

    Example:
        >>> layer = in_context(nn.Linear(2, 3), Context(gradients=False))
        >>> layer(torch.ones(1, 2)).requires_grad, isinstance(layer, nn.Linear)
        (False, True)
    """
    layer.__class__ = _class_in_context(type(layer), context)  # type: ignore[assignment]
    return layer


@functools.cache
def _class_in_context(kind: type[nn.Module], context: Context) -> type[nn.Module]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return context.run(functools.partial(kind.forward, self), args, kwargs)

    return _derived(kind, forward=forward)


def always_in_evaluation(layer: _Layer) -> _Layer:
    """Make a layer stay in evaluation mode, whatever the mode of the model is.

    Example:
        >>> always_in_evaluation(nn.BatchNorm1d(3)).train().training
        False
    """
    layer.__class__ = _class_in_evaluation(type(layer))  # type: ignore[assignment]
    return layer.eval()


@functools.cache
def _class_in_evaluation(kind: type[nn.Module]) -> type[nn.Module]:
    def train(self: nn.Module, mode: bool = True) -> nn.Module:
        return kind.train(self, False)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:  # its own, so that it is not fused like another
        return kind.forward(self, *args, **kwargs)

    return _derived(kind, train=train, forward=forward)


def _derived(kind: type[nn.Module], **methods: Callable[..., Any]) -> type[nn.Module]:
    return type(kind.__name__, (kind,), {**methods, "__module__": kind.__module__, "__doc__": kind.__doc__})
