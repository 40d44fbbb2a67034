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

from typing import Any

import torch
from torch import Tensor, fx, nn

from ensemblenet.conversion.trace.attributes import Attributes
from ensemblenet.conversion.trace.chance import CHANCE, keeping_state, line_of_draw
from ensemblenet.conversion.trace.check import check_training
from ensemblenet.conversion.trace.graph import BY_HAND, GraphRunner, NodeError, Trace, depends_on_input
from ensemblenet.conversion.trace.modes import BY_MODE, ByMode, merge_modes
from ensemblenet.conversion.trace.recorder import Recorder
from ensemblenet.conversion.trace.refusals import KEEP_WHOLE, copy_base, refuse_parameter_hooks
from ensemblenet.conversion.trace.watch import keep_contexts
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
    "check_training",
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
    refuse_parameter_hooks(base)
    module, computed = copy_base(base)
    if len(example_input) == 1:  # with two examples, sizes that follow the batch tell themselves from sizes of one
        _record(module, example_input, set(), computed, training=True)
        example_input = example_input.repeat_interleave(2, dim=0)
    x = example_input[:2]
    leaves: set[type[nn.Module]] = set()
    tried: set[str] = set()
    notes: list[str] = []
    expected: Tensor | None = None
    while True:
        evaluation = _record(module, x, leaves, computed, training=False)
        expected = evaluation.output if expected is None else expected  # of the base as it came
        training = _record(module, x, leaves, computed, training=True)
        assigned = evaluation.assigned or training.assigned
        if assigned is not None:
            leaves.add(type(module.get_submodule(assigned)))
            continue
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
    notes += dict.fromkeys(evaluation.notes + training.notes)
    traced = evaluation.trace(module, x, notes)
    mixed = keep_contexts(module, traced.graph)
    if mixed is not None:
        raise ConversionError(
            f"{mixed.meta['line']} calls a layer in other contexts (no_grad, autocast) than elsewhere; one layer can "
            f"have one. {BY_HAND}"
        )
    assert expected is not None
    check_training(traced, base)
    _check_batch_size(traced, expected)
    return traced


def _record(
    module: nn.Module, x: Tensor, leaves: set[type[nn.Module]], computed: dict[int, str], *, training: bool
) -> Recorder:
    """Run the module once under all observers, and leave it as it was."""
    module.train(training)
    attributes = Attributes(module)
    recorder = Recorder(module, x, leaves)
    _run(recorder, x, training)
    if recorder.chance.drew:
        _refuse_draws(Recorder(module, x, leaves), x, training)
    assigned = attributes.assigned(recorder)
    for one in assigned:
        owner = module.get_submodule(one.module)
        if one.is_buffer and (one.module == "" or any(owner.children())):
            raise ConversionError(
                f"{one.module or type(module).__name__} assigns a tensor to its buffer {one.attribute!r} in forward; "
                f"update the buffer in place (copy_, mul_, add_) in a layer of its own. {KEEP_WHOLE}"
            )
        if one.is_buffer:
            recorder.assigned = one.module
    if assigned and recorder.assigned is None:
        again = Recorder(module, x, leaves)
        again.left_behind = {id(one.tensor): str(one) for one in assigned}
        _run(again, x, training)
    held = {id(value): value for part in module.modules() for value in vars(part).values() if isinstance(value, Tensor)}
    for key, name in computed.items():
        if key in held:
            raise ConversionError(
                f"{name} is a computed tensor that the forward pass does not compute anew, so no copy can have it: set "
                f"it to None before the conversion, or make it a parameter or a buffer."
            )
    attributes.restore(recorder)
    return recorder


def _run(recorder: Recorder, x: Tensor, training: bool) -> None:
    mode = "training" if training else "evaluation"
    what = f"The base's forward pass in {mode} mode, on an input of shape {tuple(x.shape)},"
    with torch.enable_grad(), keeping_state(recorder.root, x):
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


def _refuse_draws(recorder: Recorder, x: Tensor, training: bool) -> None:
    """Run once more to find where the network draws numbers of Python or NumPy."""
    line = line_of_draw(lambda: _run(recorder, x, training), recorder.chance, lambda: recorder.paused)
    raise ConversionError(
        f"{line or 'The base'} draws random numbers in Python or NumPy, which a graph would freeze. {CHANCE} {KEEP_WHOLE}"
    )


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
