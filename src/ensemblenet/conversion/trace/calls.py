"""How a call of PyTorch, its arguments and its results stand in a graph."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ensemblenet.conversion.trace.graph import parameter_names

__all__ = ["PLAIN", "fx_target", "is_atom", "may_write", "named_arguments", "parts_of", "works_in_place"]

PLAIN = (
    bool, int, float, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format, type,
)  # fmt: skip


def is_atom(value: Any) -> bool:
    """Whether a value is an argument as a whole: `tree_map` would open it, or leave it closed."""
    return isinstance(value, (torch.Size, slice)) or (dataclasses.is_dataclass(value) and not isinstance(value, type))


def works_in_place(op: str, target: Any) -> bool:
    """Whether an operation writes in place; it then stays although nobody reads its result."""
    return op == "call_method" and target.endswith("_") and not target.endswith("__")


def may_write(root: nn.Module, op: str, target: Any, kwargs: Any) -> bool:
    """Whether an operation writes in place in one of the modes, if perhaps not in this one."""
    layer = root.get_submodule(target) if op == "call_module" else None
    return bool(kwargs.get("inplace") or getattr(layer, "inplace", False))


def parts_of(value: Any) -> Iterator[tuple[Callable[..., Any], Any, Any]]:
    """The parts of an output that may hold tensors: how each is taken, by what key, and the part."""
    if isinstance(value, Mapping):
        yield from ((operator.getitem, key, part) for key, part in value.items() if isinstance(key, PLAIN))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from ((getattr, field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
    elif isinstance(value, (tuple, list)):
        yield from ((operator.getitem, index, part) for index, part in enumerate(value))


def fx_target(func: Any, name: str) -> tuple[str, Any]:
    """The kind and the target of the graph node that calls a torch function."""
    if name == "__getitem__":
        return "call_function", operator.getitem
    if name == "__setitem__":
        return "call_function", operator.setitem
    is_method = type(func).__name__ in ("method_descriptor", "wrapper_descriptor")
    if is_method or getattr(func, "__module__", "") == "torch._tensor":
        return "call_method", name
    return "call_function", func


def named_arguments(module: nn.Module, arguments: Any) -> list[tuple[str, Any]]:
    """The arguments with the names that the module's forward gives them."""
    if isinstance(arguments, dict):
        return list(arguments.items())
    values = arguments if isinstance(arguments, tuple) else (arguments,)
    names = parameter_names(module)
    names += [f"input_{index}" if index else "input" for index in range(len(names), len(values))]
    return list(zip(names, values, strict=False))
