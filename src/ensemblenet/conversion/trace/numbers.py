"""Numbers that come from a tensor's shape and remember the node that computes them.

What Python works out with them becomes nodes too, so a graph computes its sizes from its inputs. Where such a number
becomes a plain one (`float(n)`, `int(n / 2)`, a function of another library), its node is marked "escaped": the number
stands in the graph as it was, so what it was read from must keep its size.
"""

from __future__ import annotations

import dis
import math
import operator
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from torch import fx

__all__ = ["TracedFloat", "TracedInt", "followed_functions", "node_of_size", "traced_number"]


class _Traced:
    """A number with the node that computes it."""

    node: fx.Node

    def __float__(self) -> float:
        return float(_escaped(self))

    def __int__(self) -> int:
        return int(_escaped(self))

    def __divmod__(self, other: Any) -> tuple[Any, Any]:
        return self // other, self % other  # type: ignore[operator]

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        """What NumPy makes of it is a number of NumPy's."""
        return getattr(ufunc, method)(*(_escaped(value) for value in inputs), **options)

    def __reduce__(self) -> tuple[type, tuple[Any]]:
        value = _plain(self)
        return type(value), (value,)


class TracedInt(_Traced, int):
    """A size, or an integer made of sizes."""

    def __hash__(self) -> int:
        # A table finds a size like any integer. A call that hashes its arguments is a cache's (`lru_cache`, as in
        # einops): it must not give back what was made of another number, of this run or of an earlier one.
        caller = sys._getframe(1)
        is_call = dis.opname[caller.f_code.co_code[caller.f_lasti]].startswith(("CALL", "PRECALL"))
        return id(self) if is_call else hash(_plain(self))


class TracedFloat(_Traced, float):
    """A number made of sizes by a division or a root."""


def traced_number(value: Any, node: fx.Node) -> Any:
    """The number with its node; what is neither an integer nor a float stays as it is."""
    if type(value) not in (int, float):
        return value
    node.meta["scalar"] = value
    number = TracedInt(value) if type(value) is int else TracedFloat(value)
    number.node = node
    return number


def _plain(value: Any) -> Any:
    if isinstance(value, TracedInt):
        return int.__int__(value)
    return float.__float__(value) if isinstance(value, TracedFloat) else value


def _escaped(value: Any) -> Any:
    if isinstance(value, _Traced):
        value.node.meta["escaped"] = True
    return _plain(value)


def _apply(function: Callable[..., Any], *operands: Any) -> Any:
    node = next(operand.node for operand in operands if isinstance(operand, _Traced))
    value = function(*map(_plain, operands))
    arguments = tuple(operand.node if isinstance(operand, _Traced) else operand for operand in operands)
    return traced_number(value, node.graph.call_function(function, arguments))


def _binary(function: Callable[..., Any], reflected: bool) -> Callable[..., Any]:
    def apply(self: _Traced, other: Any) -> Any:
        if not isinstance(other, (int, float)):
            return NotImplemented
        return _apply(function, *((other, self) if reflected else (self, other)))

    return apply


def _unary(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, *others: _apply(function, self, *others)


for _kind in (TracedInt, TracedFloat):
    for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
        setattr(_kind, f"__{_name}__", _binary(getattr(operator, _name), reflected=False))
        setattr(_kind, f"__r{_name}__", _binary(getattr(operator, _name), reflected=True))
    for _name, _function in (
        ("neg", operator.neg), ("abs", operator.abs), ("round", round), ("ceil", math.ceil), ("floor", math.floor),
    ):  # fmt: skip
        setattr(_kind, f"__{_name}__", _unary(_function))


@contextmanager
def followed_functions() -> Iterator[None]:
    """Let functions of `math`, which would take a traced number for a plain one, write their node."""

    def followed(function: Callable[..., Any]) -> Callable[..., Any]:
        def apply(*operands: Any) -> Any:
            if any(isinstance(operand, _Traced) for operand in operands):
                return _apply(function, *operands)
            return function(*operands)

        return apply

    names = ("sqrt", "log", "log2", "exp")
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(math, name, followed(getattr(math, name))))
        yield


def node_of_size(value: Any) -> fx.Node | None:
    """The node of a traced number; None for any other value."""
    return value.node if isinstance(value, _Traced) else None
