"""Try a traced network at other numbers of examples and other sizes of its inputs, beside the base itself.

A size at which the base runs and the graph gives the same is free. Any other size of the inputs is fixed: a number in
the graph may come from it, so a model refuses inputs where it differs.

Shapes: N examples.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from ensemblenet.conversion.trace.graph import BY_HAND, GraphRunner, NodeError, Trace, Trial, arguments
from ensemblenet.ensemble import as_tuple
from ensemblenet.errors import ConversionError
from ensemblenet.inputs import Inputs, InputSpec, num_examples, resized

__all__ = ["differs", "examples", "try_sizes"]

Base = Callable[[list[Tensor]], Sequence[Tensor]]

_MOST_EXAMPLES = 8
_TOLERANCE = 1e-3  # of the largest output


def examples(inputs: Inputs, tensors: Sequence[Tensor], size: int) -> list[Tensor]:
    """The input tensors for so many examples, which are repeated where there are not enough.

    Example:
        >>> x = torch.tensor([[1.0], [2.0]])
        >>> examples(Inputs.of(x), [x], 3)[0].flatten()
        tensor([1., 2., 1.])
    """
    return [
        resized(tensor, 0, size) if spec.is_batched else tensor
        for spec, tensor in zip(inputs.tensors, tensors, strict=True)
    ]


def try_sizes(traced: Trace, tensors: list[Tensor], base: Base | None) -> None:
    """Run the graph at other sizes; note on each size that it reads what it follows.

    Sets "is_batch" on the nodes of sizes that are N, "varies" on those that any trial changes, `traced.trials`, and
    the fixed dimensions of `traced.inputs`.

    Args:
        traced: the network, traced on a part of the examples.
        tensors: all examples.
        base: gives the base's outputs; None takes the fixed dimensions as they stand, and compares nothing.

    Raises:
        ConversionError: the base runs on another number of examples, and the graph does not give the same.
    """
    sizes = {node: node.meta["scalar"] for node in traced.graph.nodes if "scalar" in node.meta}
    shapes = {node: ref.shape for node, ref in traced.refs.items()}
    batch = {node for node, size in sizes.items() if size == traced.num_examples}
    batch_dims = {(n, d) for n, shape in shapes.items() for d, size in enumerate(shape) if size == traced.num_examples}
    counts: set[int] = set()

    def note(found: _Reader, count: int) -> None:
        counts.add(count)
        for node, size in found.sizes.items():
            if size != sizes[node]:
                node.meta["varies"] = True
            if size != count:
                batch.discard(node)
        batch_dims.difference_update(
            {(n, d) for n, d in batch_dims if n in found.shapes and found.shapes[n][d] != count}
        )

    for count in _counts(traced, num_examples(tensors)):
        doubt = (
            f"The base cannot be followed from {traced.num_examples} examples to {count}; does its code turn the batch "
            "size into a constant?"
        )
        if (found := _run(traced, examples(traced.inputs, tensors, count), base, doubt)) is not None:
            note(found, count)
    is_free = bool(counts - {traced.num_examples})  # the number that it was traced on tells nothing
    fixed = set() if is_free else {(index, 0) for index, spec in enumerate(traced.inputs.tensors) if spec.is_batched}
    few = examples(traced.inputs, tensors, 1) if 1 in counts else traced.tensors

    def follows(places: list[tuple[int, int]], size: int) -> bool:
        if any(dim in traced.inputs.tensors[index].fixed for index, dim in places):
            return False
        found = _try_dimensions(traced, few, places, size, base)
        if found is not None:
            note(found, num_examples(few))
        return found is not None

    dimensions = _dimensions(traced.inputs, few)
    for size in dict.fromkeys(few[index].shape[dim] for index, dim in dimensions):
        same = [(index, dim) for index, dim in dimensions if few[index].shape[dim] == size]
        # first one dimension of all tensors; where the base takes that nowhere, all of this size
        groups = [[place for place in same if place[1] == dim] for dim in dict.fromkeys(dim for _, dim in same)]
        bound = [group for group in groups if not follows(group, size)]
        if len(bound) == len(groups) > 1 and follows(same, size):
            bound = []
        fixed.update(place for group in bound for place in group)
    if is_free:
        for node in batch:
            node.meta["is_batch"] = True
        for node, dim in sorted(batch_dims, key=operator.itemgetter(1)):
            node.meta.setdefault("batch_dims", []).append(dim)
    if base is not None:
        specs = []
        for index, (spec, tensor) in enumerate(zip(traced.inputs.tensors, traced.tensors, strict=True)):
            dims = tuple(sorted(dim for member, dim in fixed if member == index))
            # a fixed number of examples is a size like any other
            specs.append(replace(InputSpec.of(tensor, spec.is_batched and 0 not in dims), fixed=dims))
        traced.inputs = replace(traced.inputs, tensors=tuple(specs))


def _counts(traced: Trace, given: int) -> list[int]:
    """Numbers of examples to try."""
    if not traced.inputs.is_batched:
        return [traced.num_examples + 1]
    return sorted({1, min(max(given, 3), _MOST_EXAMPLES)})


def _try_dimensions(
    traced: Trace, tensors: list[Tensor], places: list[tuple[int, int]], size: int, base: Base | None
) -> _Reader | None:
    """The sizes that the graph reads where dimensions of one size have another; None where they are fixed."""
    for other in (size // 2, 2 * size, size + 1):
        if other not in (0, size):
            trial = list(tensors)
            for index, dim in places:
                trial[index] = resized(trial[index], dim, other)
            try:
                found = _run(traced, trial, base, "")
            except ConversionError:
                return None  # the base runs there, and the graph does not follow
            if found is not None:
                return found
    return None


def _dimensions(inputs: Inputs, tensors: list[Tensor]) -> list[tuple[int, int]]:
    """The dimensions behind the examples, each with the number of its tensor."""
    specs = enumerate(zip(inputs.tensors, tensors, strict=True))
    return [(index, dim) for index, (spec, x) in specs for dim in range(1 if spec.is_batched else 0, x.ndim)]


def _run(traced: Trace, tensors: list[Tensor], base: Base | None, doubt: str) -> _Reader | None:
    """The sizes that the graph reads on such inputs; None where the base does not run.

    Raises:
        ConversionError: the base runs, and the graph does not, or gives something else.
    """
    expected: Sequence[Tensor] = ()
    values = arguments(traced.inputs, tensors)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if base is not None:
            try:
                expected = base(tensors)
            except Exception:  # whatever it objects to: such inputs are not for it
                return None
        reader = _Reader(fx.GraphModule(traced.module, traced.graph).eval())
        try:
            got = reader.run(*values)
        except NodeError as error:
            if base is None:
                return None
            raise ConversionError(f"{doubt} The first failure is in {error}. {BY_HAND}") from error
    if base is not None:
        if difference := differs(expected, got):
            raise ConversionError(f"{doubt} {difference} {BY_HAND}")
        traced.trials.append(Trial(values, tuple(expected)))
    return reader


def differs(expected: Sequence[Tensor], got: Any, tolerance: float = _TOLERANCE) -> str:
    """In words, how outputs differ from those of the base; nothing where they do not.

    Example:
        >>> differs([torch.ones(2)], torch.ones(2)), differs([torch.ones(2)], torch.tensor([1.0, 1.5]))
        ('', 'An output differs by 0.5 of its largest value.')
    """
    for one, other in zip(expected, as_tuple(got), strict=True):
        if one.shape != other.shape:
            return f"An output has the shape {tuple(other.shape)} where the base gives {tuple(one.shape)}."
        if one.numel() == 0:
            continue
        error = ((one - other).abs().max() / one.abs().max().clamp(min=1e-6)).item()
        if not error <= tolerance and torch.isfinite(one).all():
            return f"An output differs by {error:.2g} of its largest value."
    return ""


class _Reader(GraphRunner):
    """Runs a graph and notes the sizes that it reads, and the shapes of its tensors."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.sizes: dict[fx.Node, Any] = {}
        self.shapes: dict[fx.Node, torch.Size] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node; remember a size."""
        value = super().run_node(n)
        if "scalar" in n.meta:
            self.sizes[n] = value
        if isinstance(value, Tensor):
            self.shapes[n] = value.shape
        return value
