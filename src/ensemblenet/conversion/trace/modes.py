"""One graph for both modes, from a run in each."""

from __future__ import annotations

from dataclasses import replace
from itertools import zip_longest
from typing import Any

from torch import fx, nn

from ensemblenet.conversion.trace.calls import PLAIN
from ensemblenet.conversion.trace.recorder import Recorder

__all__ = ["BY_MODE", "ByMode", "merge_modes"]

BY_MODE = "_by_mode"


class ByMode(nn.Module):
    """A value in training mode, another in evaluation mode: what `a if self.training else b` becomes."""

    def forward(self, in_training: Any, in_evaluation: Any) -> Any:
        """Choose by the mode that the module is in."""
        return in_training if self.training else in_evaluation


class _MismatchError(Exception):
    """The two modes do different things."""


def merge_modes(evaluation: Recorder, training: Recorder) -> str | None:
    """Make the evaluation graph serve both modes; return the innermost module where that fails, if any.

    Where only a constant differs, the graph chooses it by the mode.
    """
    twins: dict[fx.Node, fx.Node] = {}
    stack = [""]
    for left, right in zip_longest(evaluation.stream, training.stream):
        if isinstance(left, fx.Node) and isinstance(right, fx.Node):
            try:
                _merge_nodes(left, right, twins)
            except _MismatchError:
                return stack[-1]
        elif not isinstance(left, str) or left != right:
            return stack[-1]
        elif left[0] == "+":
            stack.append(left[1:])
        else:
            stack.pop()
    for left, right in twins.items():
        if "random" in right.meta:
            left.meta["random"] = True
    return None


def _merge_nodes(left: fx.Node, right: fx.Node, twins: dict[fx.Node, fx.Node]) -> None:
    """Pair two nodes, merging the arguments of the right one into the left one."""
    if (left.op, left.target) != (right.op, right.target):
        raise _MismatchError
    context = right.meta.get("context")
    # without gradients in evaluation mode alone, nothing is trained otherwise: as if the caller had turned them off
    if left.meta.get("context") not in (context, context and replace(context, gradients=False)):
        raise _MismatchError
    if context is not None:
        left.meta["context"] = context

    def merge(a: Any, b: Any) -> Any:
        if isinstance(a, fx.Node) and isinstance(b, fx.Node):
            if a not in twins:  # a node outside the stream: a size, an attribute, a part of a tuple
                _merge_nodes(a, b, twins)
            if twins[a] is not b:
                raise _MismatchError
            return a
        if isinstance(a, (tuple, list)) and type(a) is type(b) and len(a) == len(b):
            return type(a)(merge(x, y) for x, y in zip(a, b, strict=True))
        if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
            return {key: merge(a[key], b[key]) for key in a}
        if isinstance(a, slice) and isinstance(b, slice):
            return slice(merge(a.start, b.start), merge(a.stop, b.stop), merge(a.step, b.step))
        if type(a) is type(b) and a == b:
            return a
        if isinstance(a, PLAIN) and isinstance(b, PLAIN):
            with left.graph.inserting_before(left):
                return left.graph.create_node("call_module", BY_MODE, (b, a))  # pyright: ignore[reportArgumentType]
        raise _MismatchError

    arguments = merge((tuple(left.args), dict(left.kwargs)), (tuple(right.args), dict(right.kwargs)))
    left.args, left.kwargs = arguments
    twins[left] = right
