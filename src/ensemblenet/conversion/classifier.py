"""Give a network a classifier of other classes, and leave all else as it is."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils._pytree import tree_leaves

from ensemblenet.conversion.trace import Output, keeping_state, pick
from ensemblenet.errors import ConversionError, first_line
from ensemblenet.inputs import Tree, call, tensors_in
from ensemblenet.models.sources import note_classes
from ensemblenet.recipe import Recipe

__all__ = ["with_classes", "with_classes_of"]


def with_classes(
    base: nn.Module, example_inputs: Tree, num_classes: int, output: Output = None, seed: int = 0
) -> tuple[nn.Module, set[str]]:
    """A network whose classifier is a fresh one of other classes.

    Networks that have `reset_classifier`, as timm's do, are asked for it. Of others it is the last linear layer or
    convolution whose number of outputs decides that of the network, which is tried out with one more.

    Args:
        base: a network; it is not changed, and all but the classifier shares its tensors.
        example_inputs: for it, see [`ensemblenet.convert`][].
        num_classes: outputs of the new classifier.
        output: which tensor of what the network returns, see [`ensemblenet.convert`][].
        seed: of the new weights.

    Returns:
        The network, and the names of its new parameters.

    Raises:
        ConversionError: the base fails on the inputs, or has no such layer.

    Example:
        >>> base = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        >>> network, fresh = with_classes(base, torch.zeros(2, 8), 5)
        >>> network(torch.zeros(2, 8)).shape, sorted(fresh), network[0].weight is base[0].weight
        (torch.Size([2, 5]), ['2.bias', '2.weight'], True)
    """
    base = getattr(base, "_orig_mod", base)  # of torch.compile
    attributes = [value for module in base.modules() for value in tree_leaves([*vars(module).values()])]
    tensors = [*base.parameters(), *base.buffers(), *(value for value in attributes if isinstance(value, Tensor))]
    shared: dict[int, Any] = {id(tensor): tensor for tensor in tensors}
    network = copy.deepcopy(base, dict(shared))

    def run() -> tuple[int, ...]:
        with torch.no_grad(), keeping_state(network, tensors_in(example_inputs)[0]):
            outputs = pick(call(network.eval(), example_inputs), output)
        if len(outputs) > 1:
            raise ConversionError("num_classes needs one output: name it by output=.")
        return tuple(outputs[0].shape)

    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(seed)
        if not callable(reset := getattr(network, "reset_classifier", None)):
            _replace_last(network, num_classes, run)
        else:
            reset(num_classes)
            _move_new(network, shared)
            if run()[1:2] != (num_classes,):
                raise _not_found(base, run(), num_classes)
    note_classes(network, num_classes)
    network.train(base.training)
    return network, {name for name, own in network.named_parameters() if id(own) not in shared}


def with_classes_of(recipe: Recipe, base: nn.Module) -> nn.Module:
    """A fresh instance of a recipe's base, with the classifier that took the place of its own, if one did.

    Raises:
        ConversionError: as for `with_classes`.
    """
    if recipe.num_classes is None:
        return base
    return with_classes(base, recipe.inputs.random(), recipe.num_classes, recipe.output)[0]


def _replace_last(network: nn.Module, num_classes: int, run: Any) -> None:
    """Replace the layer whose outputs are the network's, in place."""
    called: list[nn.Module] = []
    layers = [layer for layer in network.modules() if _can_grow(layer)]
    handles = [layer.register_forward_hook(lambda layer, *_: called.append(layer)) for layer in layers]
    try:
        before = run()
    except ConversionError:
        raise
    except Exception as error:  # whatever a network makes of inputs that are none
        raise ConversionError(
            f"The base does not take the example inputs: {type(error).__name__}: {first_line(error)}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    times = Counter(map(id, called))
    owners = Counter(id(own) for _, own in network.named_parameters(remove_duplicate=False))
    for layer in reversed(called):
        weight, bias = layer.get_parameter("weight"), layer.bias
        if len(weight) not in before[1:] or times[id(layer)] > 1 or owners[id(weight)] > 1:
            continue
        _resize(layer, len(weight) + 1, weight)
        try:
            after = run()
        except Exception:  # whatever the network makes of one class more: it is not the classifier
            after = ()
        changes = [sizes for sizes in zip(before, after, strict=False) if sizes[0] != sizes[1]]
        if len(after) == len(before) and changes == [(len(weight), len(weight) + 1)]:
            _resize(layer, num_classes, weight)
            return
        layer.weight, layer.bias = weight, bias
        _say_size(layer, len(weight))
    raise _not_found(network, before, num_classes)


def _not_found(network: nn.Module, shape: tuple[int, ...], num_classes: int) -> ConversionError:
    return ConversionError(
        f"The classifier of {type(network).__name__} cannot be found: no linear layer or convolution that is called "
        f"once decides alone how many outputs there are, of shape {shape}. Give the base {num_classes} classes "
        "yourself, and leave num_classes out."
    )


def _can_grow(layer: nn.Module) -> bool:
    """Whether it is a plain linear layer or convolution, each of whose outputs has weights of its own."""
    is_linear = isinstance(layer, nn.Linear) or (isinstance(layer, _ConvNd) and layer.groups == 1)
    return is_linear and not isinstance(layer, _ConvTransposeNd) and layer._parameters.get("weight") is not None


def _resize(layer: Any, outputs: int, like: Tensor) -> None:
    """Give a layer new weights for so many outputs, drawn on the CPU as PyTorch does."""
    layer.weight = nn.Parameter(torch.empty(outputs, *like.shape[1:], device="cpu"))
    if layer.bias is not None:
        layer.bias = nn.Parameter(torch.empty(outputs, device="cpu"))
    _say_size(layer, outputs)
    kind: Any = nn.Linear if isinstance(layer, nn.Linear) else _ConvNd
    kind.reset_parameters(layer)
    layer.to(like)


def _say_size(layer: Any, outputs: int) -> None:
    setattr(layer, "out_features" if isinstance(layer, nn.Linear) else "out_channels", outputs)


def _move_new(network: nn.Module, shared: dict[int, Any]) -> None:
    """Put new parameters where the others are."""
    like = next((own for own in shared.values() if own.is_floating_point()), None)
    for module in network.modules():
        for name, own in module.named_parameters(recurse=False):
            if id(own) not in shared and like is not None:
                setattr(module, name, nn.Parameter(own.detach().to(like)))
