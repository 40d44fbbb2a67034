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
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from ensemblenet.conversion.trace.graph import BY_HAND, GraphRunner, NodeError, Trace, depends_on_input
from ensemblenet.conversion.trace.modes import BY_MODE, ByMode, merge_modes
from ensemblenet.conversion.trace.recorder import Recorder
from ensemblenet.errors import ConversionError
from ensemblenet.operations import Event, TensorRef, refs

__all__ = [
    "BY_HAND",
    "BY_MODE",
    "ByMode",
    "Event",
    "GraphRunner",
    "NodeError",
    "TensorRef",
    "Trace",
    "depends_on_input",
    "keeping_state",
    "refs",
    "trace",
]


def trace(base: nn.Module, example_input: Tensor) -> Trace:
    """Trace a base in training and evaluation mode; the base and the random state are left as they were.

    Args:
        base: a network of one tensor in and one tensor out.
        example_input: its input, of shape (N, *).

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
    if len(example_input) == 1:  # with two examples, sizes that follow the batch tell themselves from sizes of one
        _record(module, example_input, set(), training=True)
        example_input = example_input.repeat_interleave(2, dim=0)
    x = example_input[:2]
    leaves: set[type[nn.Module]] = set()
    tried: set[str] = set()
    notes: list[str] = []
    expected: Tensor | None = None
    while True:
        evaluation = _record(module, x, leaves, training=False)
        expected = evaluation.output if expected is None else expected  # of the base as it came
        training = _record(module, x, leaves, training=True)
        if not evaluation.returns_tensor:
            raise ConversionError(
                f"The base must return one tensor of shape (N, ...), got {evaluation.returned}. {BY_HAND}"
            )
        if not training.returns_tensor:
            notes = [f"The base returns {training.returned} in training mode; only its prediction is kept."]
            break
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
    traced = evaluation.trace(module, x, notes)
    assert expected is not None
    _check_batch_size(traced, expected)
    return traced


def _record(module: nn.Module, x: Tensor, leaves: set[type[nn.Module]], *, training: bool) -> Recorder:
    """Run the module once under all observers."""
    recorder = Recorder(module, x, leaves)
    module.train(training)
    mode = "training" if training else "evaluation"
    what = f"The base's forward pass in {mode} mode, on an input of shape {tuple(x.shape)},"
    with torch.no_grad(), keeping_state(module, x):
        try:
            recorder.run(x)
        except ConversionError:
            raise
        except Exception as error:
            hint = ""
            if training and len(x) == 1:
                hint = " With batch size 1 some layers cannot train: pass example_inputs with at least 2 examples."
            raise ConversionError(
                f"{what} failed in {recorder.where(error)}: {type(error).__name__}: {error}.{hint}"
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


class _SizeReader(GraphRunner):
    """Runs a graph and notes the sizes that it reads."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.sizes: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node; remember a size."""
        value = super().run_node(n)
        if "scalar" in n.meta:
            self.sizes[n] = value
        return value


def _check_batch_size(traced: Trace, expected: Tensor) -> None:
    """Run the graph on one example: it must give the base's output; sizes that change follow the batch."""
    if not torch.isfinite(expected).all():
        raise ConversionError(
            "The base's outputs are not finite on the example inputs; check its weights and the inputs' range."
        )
    traced.module.eval()
    reader = _SizeReader(fx.GraphModule(traced.module, traced.graph).eval())
    doubt = (
        f"The base cannot be followed from a batch of {len(traced.input)} to one example; does its code turn the "
        f"batch size into a constant, or an example's output depend on the other examples in evaluation mode?"
    )
    with torch.no_grad(), keeping_state(traced.module, traced.input):
        try:
            got = reader.run(traced.input[:1])
        except NodeError as error:
            raise ConversionError(f"{doubt} The first failure is in {error}. {BY_HAND}") from error
    scale = expected.abs().max().clamp(min=1e-6)
    if got.shape[1:] != expected.shape[1:] or ((got - expected[: len(got)]).abs().max() / scale) > 1e-3:
        raise ConversionError(f"{doubt} {BY_HAND}")
    for node, size in reader.sizes.items():
        node.meta["follows_batch"] = size != node.meta["scalar"]
