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

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from ensemblenet.conversion.parametrised import refuse_pruned, refuse_quantised
from ensemblenet.conversion.trace.attributes import Attributes, keeping_state
from ensemblenet.conversion.trace.chance import CHANCE, keeping_values, place_of_draw
from ensemblenet.conversion.trace.check import check_training
from ensemblenet.conversion.trace.graph import (
    BY_HAND,
    GraphRunner,
    NodeError,
    Trace,
    Trial,
    arguments,
    depends_on_input,
    parameter_names,
)
from ensemblenet.conversion.trace.modes import BY_MODE, ByMode, merge_modes
from ensemblenet.conversion.trace.outputs import Output, describe, pick
from ensemblenet.conversion.trace.recorder import Recorder
from ensemblenet.conversion.trace.refusals import (
    KEEP_WHOLE,
    copy_base,
    refuse_assigned_buffer,
    refuse_parameter_hooks,
    refuse_uncomputed,
)
from ensemblenet.conversion.trace.trials import differs, examples, try_sizes
from ensemblenet.conversion.trace.watch import keep_contexts
from ensemblenet.errors import ConversionError
from ensemblenet.inputs import Inputs, Tree, call, num_examples, tensors_in
from ensemblenet.operations import Event, TensorRef, refs
from ensemblenet.operations.contexts import always_in_evaluation
from ensemblenet.work import without_fast_path

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
    "arguments",
    "check_training",
    "depends_on_input",
    "differs",
    "examples",
    "keeping_state",
    "pick",
    "refs",
    "trace",
]


_WITH_FAST_PATH = (nn.MultiheadAttention, nn.TransformerEncoder, nn.TransformerEncoderLayer)


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
    base = getattr(base, "_orig_mod", base)  # of torch.compile
    refuse_parameter_hooks(base)
    refuse_pruned(base)
    refuse_quantised(base)
    module, computed = copy_base(base)
    if isinstance(example_inputs, Mapping):
        example_inputs = _in_order(base, example_inputs)
    is_known = inputs is not None
    inputs = inputs or Inputs.of(example_inputs)
    tensors = [tensor.detach() for tensor in tensors_in(example_inputs)]
    if num_examples(tensors) == 1:  # with two examples, sizes that follow the batch tell themselves from sizes of one
        _record(module, inputs, tensors, set(), computed, training=True)
    few = (
        examples(inputs, tensors, 2)
        if inputs.is_batched and (is_known or _takes_two(base, inputs, tensors))
        else tensors
    )
    leaves: set[type[nn.Module]] = set()
    tried: set[str] = set()
    notes: list[str] = []
    while True:
        evaluation = _record(module, inputs, few, leaves, computed, training=False)
        outputs = pick(evaluation.returned, output)
        if any(tensor not in evaluation.nodes for tensor in outputs):
            raise ConversionError(f"The base's output does not come from its input. {BY_HAND}")
        training = _record(module, inputs, few, leaves, computed, training=True)
        assigned = evaluation.assigned or training.assigned
        if assigned is not None:  # a graph assigns nothing, the module's own code does
            leaves.add(type(module.get_submodule(assigned)))
            continue
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
    notes += dict.fromkeys(evaluation.notes + training.notes)
    traced = evaluation.trace(module, inputs, few, notes)
    for name in training.in_evaluation:
        always_in_evaluation(module.get_submodule(name))
    mixed = keep_contexts(module, traced.graph)
    if mixed is not None:
        raise ConversionError(
            f"{mixed.meta['line']} calls a layer in another context (no_grad, autocast) than elsewhere, and a layer "
            f"has only one; detach() can take the place of no_grad. {BY_HAND}"
        )
    _try(traced, base, tensors, output, is_known)
    return traced


def _takes_two(base: nn.Module, inputs: Inputs, tensors: list[Tensor]) -> bool:
    """Whether the base takes two of the examples; a tensor of N rows may also hold indices into all of another."""
    if len(tensors) == 1 or all(tensor.is_floating_point() for tensor in tensors):
        return True
    with torch.no_grad(), keeping_values(base, tensors[0]):
        try:
            call(copy_base(base)[0].eval(), inputs.build(examples(inputs, tensors, 2)))
        except Exception:  # if it is another failure, all examples show it too
            return False
    return True


def _in_order(base: nn.Module, named: Mapping[str, Any]) -> dict[str, Any]:
    """Named inputs in the order in which the base takes them by position."""
    order = parameter_names(base)
    return dict(sorted(named.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))


def _try(traced: Trace, base: nn.Module, tensors: list[Tensor], output: Output, is_known: bool) -> None:
    """Compare the graph with the base, at the sizes of the examples and at others."""
    module = traced.module.eval()
    with keeping_state(module, tensors[0]), without_fast_path():
        if is_known:
            try_sizes(traced, tensors, None)
            return
        check_training(traced, base, output)
        twin = copy_base(base)[0].eval()  # the traced copy has caches of the run, which may hold its sizes

        def run(tensors: list[Tensor]) -> list[Tensor]:
            return pick(call(twin, traced.inputs.build(tensors)), output)

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
    if not any(isinstance(module, _WITH_FAST_PATH) for module in base.modules()):
        return
    twin = copy_base(base)[0].eval()  # what ran at other sizes may remember them
    with torch.no_grad():
        if differs(expected, tuple(run(traced.tensors))):
            traced.notes.append(
                "In evaluation mode PyTorch's fast path of nn.TransformerEncoder gives other values than in training, "
                "such as zeros at padding; the model gives in both modes what the base gives in training."
            )


def _record(
    module: nn.Module,
    inputs: Inputs,
    tensors: list[Tensor],
    leaves: set[type[nn.Module]],
    computed: dict[int, str],
    *,
    training: bool,
) -> Recorder:
    """Run the module once under all observers, and leave its attributes as they were."""
    module.train(training)
    attributes = Attributes(module)

    def run(left_behind: dict[int, str]) -> Recorder:
        recorder = Recorder(module, leaves, tensors[0].device)
        recorder.left_behind = left_behind
        _run(recorder, inputs, tensors, training)
        return recorder

    recorder = run({})
    if recorder.chance.drew:
        _refuse_draws(Recorder(module, leaves, tensors[0].device), inputs, tensors, training)
    assigned = attributes.assigned(recorder)
    for one in assigned:
        if one.is_buffer:
            refuse_assigned_buffer(module, one.module, one.attribute)
            recorder.assigned = one.module
    if assigned and recorder.assigned is None:
        run({id(one.tensor): str(one) for one in assigned})  # it objects if that is read
    refuse_uncomputed(module, computed)
    attributes.restore(recorder)
    return recorder


def _run(recorder: Recorder, inputs: Inputs, tensors: list[Tensor], training: bool) -> None:
    """Run a recorder; with gradients on, to see where the network turns them off."""
    mode = "training" if training else "evaluation"
    with torch.enable_grad(), keeping_values(recorder.root, tensors[0]):
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


def _refuse_draws(recorder: Recorder, inputs: Inputs, tensors: list[Tensor], training: bool) -> None:
    """Run once more to find where the network draws numbers of Python or NumPy."""
    run = lambda: _run(recorder, inputs, tensors, training)  # noqa: E731
    place = place_of_draw(run, recorder.chance, lambda: recorder.paused, recorder.where)
    raise ConversionError(
        f"{place} draws random numbers in Python or NumPy, which a graph would freeze. {CHANCE} {KEEP_WHOLE}"
    )
