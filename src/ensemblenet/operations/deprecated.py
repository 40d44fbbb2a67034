"""The three decorators of version 0.1, each for a part of what one class of an operation says now."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch import fx, nn

from ensemblenet.operations.coupling import Event, LayerSizes
from ensemblenet.operations.fusion import Value
from ensemblenet.operations.registry import Operation, operation_named, operation_of, register

__all__ = ["LayerRule", "LayerSizes", "Rule", "fusion_rule", "layer_rule", "rule"]

Rule = Callable[[Any, Event], None]
LayerRule = Callable[[Any, Any, LayerSizes], None]
FusionRule = Callable[[Any, fx.Node], Value | None]


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register how the sizes of ATen operators couple; now the method `couple` of a registered class.

    Example:
        >>> import pytest
        >>> with pytest.deprecated_call(match="ensemblenet.operations.register"):
        ...     @rule("my_operator")
        ...     def my_operator(sizes, event):
        ...         sizes.set(event.out, sizes.axes(event.args[0]))
    """
    return _decorator("rule", names, lambda function: {"couple": lambda self, *arguments: function(*arguments)})


def layer_rule(*kinds: type[nn.Module] | str) -> Callable[[LayerRule], LayerRule]:
    """Register how a layer's own numbers are narrowed; now the method `narrow` of a registered class.

    Example:
        >>> import pytest
        >>> class Scaled(nn.Linear):
        ...     width = 8
        >>> with pytest.deprecated_call(match="ensemblenet.operations.register"):
        ...     @layer_rule(Scaled)
        ...     def scaled(layer, base, sizes):
        ...         layer.width = sizes.output[-1]
    """

    def members(function: LayerRule) -> dict[str, Any]:
        def narrow(self: Operation, layer: nn.Module, base: nn.Module, sizes: LayerSizes) -> None:
            operation_of(type(layer), but=self).narrow(layer, base, sizes)
            function(layer, base, sizes)

        return {"narrow": narrow, "is_whole": True}

    names = [kind if isinstance(kind, type) or "." in kind else f"*.{kind}" for kind in kinds]
    return _decorator("layer_rule", names, members)


def fusion_rule(*kinds: type[nn.Module] | str) -> Callable[[FusionRule], FusionRule]:
    """Register how a layer or a function runs for all heads at once; now the method `fuse` of a registered class.

    Example:
        >>> import pytest
        >>> with pytest.deprecated_call(match="ensemblenet.operations.register"):
        ...     @fusion_rule("my_function")
        ...     def my_function(program, node):
        ...         return None
    """
    return _decorator("fusion_rule", kinds, lambda function: {"fuse": lambda self, *arguments: function(*arguments)})


def _decorator(old: str, names: Any, members: Callable[[Callable[..., Any]], dict[str, Any]]) -> Callable[[Any], Any]:
    """Extend what is registered for each name by what a function says."""
    warnings.warn(
        f"{old} is now a method of a class that ensemblenet.operations.register takes; see "
        "ensemblenet.operations.Operation.",
        DeprecationWarning,
        stacklevel=3,
    )

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            known = operation_named(name) if isinstance(name, str) else operation_of(name)
            parent = type(known or operation_of(nn.Module))
            register(name)(type(function.__name__, (parent,), members(function)))
        return function

    return add
