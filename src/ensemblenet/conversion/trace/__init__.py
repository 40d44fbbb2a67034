"""Trace a network into a graph of its own modules, by running it once in each mode.

The network runs on real tensors, so whatever its Python code does (checks of types, loops over blocks, branches
on shapes, helper functions, dictionaries) simply happens. Three observers write down what matters:

- calls of whole layers and of torch functions become the nodes of a `torch.fx` graph, with the modules' names;
- integers read from a tensor's shape become nodes too, so the batch size stays free;
- the ATen operators behind every node become its `Event`s, which say which sizes are coupled.

A layer stays whole, called but not opened, if it is PyTorch's own or its operation says so
([`ensemblenet.operations.Operation`][]): what it does in training mode it still does after conversion.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from ensemblenet.conversion.trace.graph import (
    BY_HAND,
    GraphRunner,
    NodeError,
    Trace,
    Trial,
    depends_on_input,
    parameter_names,
)
from ensemblenet.conversion.trace.modes import BY_MODE, ByMode, merge_modes
from ensemblenet.conversion.trace.outputs import Output, describe, pick
from ensemblenet.conversion.trace.recorder import Recorder
from ensemblenet.conversion.trace.trials import differs, examples, try_sizes
from ensemblenet.errors import ConversionError
from ensemblenet.inputs import Inputs, Tree, call, num_examples, tensors_in
from ensemblenet.operations import Event, TensorRef, refs

__all__ = [
    "BY_HAND",
    "BY_MODE",
    "ByMode",
    "Event",
    "GraphRunner",
    "NodeError",
    "Output",
    "TensorRef",
    "Trace",
    "Trial",
    "depends_on_input",
    "differs",
    "examples",
    "keeping_state",
    "pick",
    "refs",
    "trace",
]


def trace(base: nn.Module, example_inputs: Tree, output: Output = None, inputs: Inputs | None = None) -> Trace:
    """Trace a base in training and evaluation mode; the base and the random state are left as they were.

    Args:
        base: a network.
        example_inputs: its inputs, see [`ensemblenet.convert`][].
        output: which of the tensors that it returns are to be learned, see [`ensemblenet.convert`][].
        inputs: what a recipe knows of the inputs; the base's values are then not asked for again.

    Raises:
        ConversionError: the base fails on the input, or does what a graph cannot say.

    Example:
        >>> traced = trace(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.zeros(3, 4))
        >>> [node.target for node in traced.graph.nodes]
        ['input', '0', '1', '2', 'output']
    """
    try:
        module = copy.deepcopy(base)
    except Exception as error:
        raise ConversionError(f"The base cannot be copied: {type(error).__name__}: {error}. {BY_HAND}") from error
    if isinstance(example_inputs, Mapping):
        example_inputs = _in_order(base, example_inputs)
    is_known = inputs is not None
    inputs = inputs or Inputs.of(example_inputs)
    tensors = [tensor.detach() for tensor in tensors_in(example_inputs)]
    if num_examples(tensors) == 1:  # with two examples, sizes that follow the batch tell themselves from sizes of one
        _record(module, inputs, tensors, set(), training=True)
    few = examples(inputs, tensors, 2) if inputs.is_batched else tensors
    leaves: set[type[nn.Module]] = set()
    tried: set[str] = set()
    notes: list[str] = []
    while True:
        evaluation = _record(module, inputs, few, leaves, training=False)
        outputs = pick(evaluation.returned, output)
        if any(tensor not in evaluation.nodes for tensor in outputs):
            raise ConversionError(f"The base's output does not come from its input. {BY_HAND}")
        training = _record(module, inputs, few, leaves, training=True)
        evaluation.finish(outputs)
        if type(training.returned) is not type(evaluation.returned):
            notes = [f"The base returns {describe(training.returned)} in training mode; only its prediction is kept."]
            break
        training.finish(pick(training.returned, output))
        owner = merge_modes(evaluation, training)
        if owner is None:
            break
        if owner in tried or next(module.get_submodule(owner).parameters(), None) is None:
            if owner == "" or type(module.get_submodule(owner)) in leaves:
                raise ConversionError(
                    f"{type(module.get_submodule(owner)).__name__}.forward runs different operations in training and "
                    f"evaluation mode; move what differs into a module of its own. {BY_HAND}"
                )
            leaves.add(type(module.get_submodule(owner)))
        tried.add(owner)  # the first time may have been the filling of a cache
    module.add_module(BY_MODE, ByMode())  # only now: a Sequential would call it
    traced = evaluation.trace(module, inputs, few, notes)
    _try(traced, base, tensors, output, is_known)
    return traced


def _in_order(base: nn.Module, named: Mapping[str, Any]) -> dict[str, Any]:
    """Named inputs in the order in which the base takes them by position."""
    order = parameter_names(base)
    return dict(sorted(named.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))


def _try(traced: Trace, base: nn.Module, tensors: list[Tensor], output: Output, is_known: bool) -> None:
    """Compare the graph with the base, at the sizes of the examples and at others."""
    module = traced.module.eval()
    with keeping_state(module, tensors[0]):
        if is_known:
            try_sizes(traced, tensors, None)
            return
        twin = copy.deepcopy(base).eval()  # the traced copy has caches of the run, which may hold its sizes

        def run(tensors: list[Tensor]) -> list[Tensor]:
            return pick(call(twin, traced.inputs.build(tensors)), output)

        expected = None
        with torch.no_grad():
            expected = run(traced.tensors)
            if not all(torch.isfinite(tensor).all() for tensor in expected):
                raise ConversionError(
                    "The base's outputs are not finite on the example inputs; check its weights and the inputs' range."
                )
            got = fx.GraphModule(module, traced.graph)(*traced.arguments)
        if difference := differs(expected, got):
            raise ConversionError(
                f"The base, traced, does not give what it gave before. {difference} Does it keep values from one call "
                f"to the next? {BY_HAND}"
            )
        try_sizes(traced, tensors, run)


def _record(
    module: nn.Module, inputs: Inputs, tensors: list[Tensor], leaves: set[type[nn.Module]], *, training: bool
) -> Recorder:
    """Run the module once under all observers."""
    recorder = Recorder(module, leaves, tensors[0].device)
    module.train(training)
    mode = "training" if training else "evaluation"
    with torch.no_grad(), keeping_state(module, tensors[0]):
        try:
            recorder.run(inputs, tensors)
        except ConversionError:
            raise
        except Exception as error:
            hint = ""
            if training and num_examples(tensors) == 1:
                hint = " With batch size 1 some layers cannot train: pass example_inputs with at least 2 examples."
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
            raise ConversionError(
                f"The base's forward pass in {mode} mode, on an input of shape {shapes}, failed in "
                f"{recorder.where(error)}: {type(error).__name__}: {error}.{hint}"
            ) from error
    return recorder


@contextmanager
def keeping_state(module: nn.Module, x: Tensor) -> Iterator[None]:
    """Restore buffers and the random state after a run in training mode."""
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]
    devices = [x.device] if x.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        yield
    with torch.no_grad():
        for buffer, value in before:  # into the old tensors: a new one in their place is a cache that the run filled
            buffer.copy_(value)
