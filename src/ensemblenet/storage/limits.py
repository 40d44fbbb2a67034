"""What a saved directory may make `load` build: bounded by the header of its weights, before a network is made.

A recipe of a few lines can name a network of any size. So a base is made without memory first, on the device "meta",
and compared with the shapes that the weights have; then it is run there on what the recipe says of its inputs.
"""

from __future__ import annotations

import copy
import math
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as registration
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ensemblenet.errors import LoadError
from ensemblenet.inputs import Inputs, call
from ensemblenet.recipe import Recipe
from ensemblenet.weights import Header

__all__ = ["ACTIVATIONS", "build_within", "check_base", "check_heads", "check_inputs", "written"]

ACTIVATIONS = "activations"  # a note in the header: what an example makes the base write

_MOST_PARTS = 10_000, 64  # layers and tensors of a base: so many, and so many more for each tensor of the weights
_MOST_ELEMENTS = 1 << 20, 1024  # of a base, likewise for each element of the weights
_MOST_WRITTEN = (
    1 << 24,
    2048,
)  # by a batch of two, likewise; in a directory that does not say how much an example writes
_MOST_WRITTEN_SAID = 1 << 22, 32  # likewise for each element that it says
_MOST_CALLS = 100_000
_TRUSTED = "If you trust whoever saved it, pass trust=True (on the command line --trust)."


def check_heads(recipe: Recipe, header: Header) -> dict[str, tuple[int, ...]]:
    """Compare the heads of a recipe with those in the weights.

    Returns:
        The shapes of a head's tensors by name.

    Raises:
        LoadError: there are none, or another number, or they are not alike.
    """
    heads: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in header.shapes.items():
        if name.startswith("heads.") and name.count(".") > 1:
            _, number, inner = name.split(".", 2)
            heads.setdefault(number, {})[inner] = shape
    if "0" not in heads:
        raise LoadError(f"{header.path} holds no heads; it is not one of ensemblenet's.")
    if heads.keys() != {str(k) for k in range(recipe.num_heads)}:
        raise LoadError(f"The recipe has {recipe.num_heads} heads, the weights have {len(heads)}.")
    if other := next((number for number, shapes in heads.items() if shapes != heads["0"]), None):
        raise LoadError(f"{header.path} does not fit its recipe: heads 0 and {other} hold tensors of other shapes.")
    return heads["0"]


def build_within(make: Callable[[], nn.Module], header: Header, recipe: Recipe | None = None) -> nn.Module:
    """Make a network, if the weights are those of such a network.

    Args:
        make: makes it, with known code.
        header: of the weights.
        recipe: of the multi-headed model that has these weights; None where they are the network's own.

    Raises:
        LoadError: it is larger than its weights can be; besides, what `make` raises.
    """
    twin = None
    with _within(header, recipe) as parts:
        try:
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                twin = make()
        except Exception:  # some networks cannot be made there; what else is wrong comes up again
            if parts.refused:
                raise
    if twin is not None:
        check_base(twin, header, recipe)
        if recipe is not None:
            check_inputs(twin, header, recipe.inputs)
    with _within(header, recipe):
        return make()


def check_base(base: nn.Module, header: Header, recipe: Recipe | None = None) -> None:
    """Compare the sizes of a base with those of the trunk and of a head, which keeps a share of them; or with its own.

    Raises:
        LoadError: they cannot be those of this base.
    """
    growth, total = _growth(recipe), 0
    for name, tensor in base.state_dict().items():
        shape = tuple(tensor.shape)
        total += tensor.numel()
        places = ((name, True),) if recipe is None else ((f"trunk.{name}", True), (f"heads.0.{name}", False))
        for stored, is_whole in places:
            kept = header.shapes.get(stored, shape)
            if len(kept) != len(shape) or not all(
                own == size or (not is_whole and size <= growth * own) for own, size in zip(kept, shape, strict=True)
            ):
                raise LoadError(
                    f"{header.path} holds {stored} of shape {kept}, but the base has {shape}; is it the base that was "
                    f"{'trained' if recipe is None else 'converted'}?"
                )
    held = sum(map(math.prod, header.shapes.values()))
    if total > _bound(_MOST_ELEMENTS, held):
        raise LoadError(
            f"{header.path} holds {held:,} numbers, too few for a base of {total:,}: what names it is damaged or "
            f"hostile. {_TRUSTED}"
        )


def check_inputs(network: nn.Module, header: Header, inputs: Inputs) -> None:
    """Run a network without memory on inputs such as a stored description names.

    Args:
        network: on any device; it is not changed.
        header: of the weights, which may say how much an example makes the network write.
        inputs: what they are.

    Raises:
        LoadError: that is more than the weights justify.
    """
    said = header.notes.get(ACTIVATIONS, "")
    held = sum(map(math.prod, header.shapes.values()))
    written(network, inputs, _bound(_MOST_WRITTEN_SAID, int(said)) if said.isdecimal() else _bound(_MOST_WRITTEN, held))


def written(network: nn.Module, inputs: Inputs, most: float = math.inf) -> int:
    """How many elements a batch of two makes a network write, found without memory; 0 where it cannot be run so.

    It is rough, and rather too many: the inputs and views count, too.

    Args:
        network: on any device; it is not changed.
        inputs: what it takes.
        most: end there.

    Raises:
        LoadError: it is more.

    Example:
        >>> written(nn.Linear(8, 3), Inputs.of(torch.zeros(2, 8))) > 16 + 6
        True
    """
    count = _Written(most)
    for spec in inputs.tensors:
        count.add(math.prod(spec.whole(2)))
    try:
        known = {id(tensor): _without_memory(tensor) for tensor in (*network.parameters(), *network.buffers())}
        twin = copy.deepcopy(network, known).eval()
        with torch.no_grad(), torch.device("meta"), warnings.catch_warnings(), count:
            warnings.simplefilter("ignore")
            call(twin, inputs.zeros(2, twin))
    except LoadError:
        raise
    except Exception:  # a network that needs values, or does not take these inputs: a real run will tell
        return 0
    return count.elements


class _Written(TorchDispatchMode):
    """Counts the elements that calls write, and ends them where they are too many."""

    def __init__(self, most: float) -> None:
        super().__init__()
        self.most, self.elements, self.calls = most, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        self.add(sum(tensor.numel() for tensor in tree_leaves(outputs) if isinstance(tensor, Tensor)))
        return outputs

    def add(self, elements: int) -> None:
        """Count a call that wrote so many."""
        self.elements += elements
        self.calls += 1
        if self.elements > self.most or self.calls > _MOST_CALLS:
            raise LoadError(
                f"Inputs of the stored sizes make the network write over {self.most:,.0f} numbers, or call over "
                f"{_MOST_CALLS:,} operators, more than its weights justify. {_TRUSTED}"
            )


def _without_memory(tensor: Tensor) -> Tensor:
    twin = torch.empty_like(tensor, device="meta")
    return nn.Parameter(twin, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else twin


class _Parts:
    """Counts the layers and tensors that modules are given, while they are made; a tensor has no values yet then."""

    def __init__(self, most: float, most_elements: float) -> None:
        self.most, self.most_elements = most, most_elements
        self.count, self.refused, self.thread = 0, False, threading.get_ident()

    def __call__(self, module: nn.Module, name: str, part: Any) -> None:
        if threading.get_ident() != self.thread:
            return
        self.count += 1
        elements = part.numel() if isinstance(part, Tensor) and not is_lazy(part) else 0
        if self.count > self.most or elements > self.most_elements:
            self.refused = True
            what = f"a tensor of {elements:,} numbers" if elements else f"over {self.most:,.0f} layers and tensors"
            raise LoadError(f"it has {what}, more than its weights justify; the recipe is damaged or hostile.")


@contextmanager
def _within(header: Header, recipe: Recipe | None) -> Iterator[_Parts]:
    """Refuse to make a network of many more layers, or much larger ones, than the weights have."""
    largest = max(map(math.prod, header.shapes.values()), default=0)
    parts = _Parts(_bound(_MOST_PARTS, len(header.shapes)), _MOST_ELEMENTS[0] + _growth(recipe) * largest)
    handles = [
        registration.register_module_module_registration_hook(parts),
        registration.register_module_parameter_registration_hook(parts),
        registration.register_module_buffer_registration_hook(parts),
    ]
    try:
        yield parts
    finally:
        for handle in handles:
            handle.remove()


def _growth(recipe: Recipe | None) -> float:
    """By how much a size of the base may exceed that of a head, which is rounded and may be of two that shrank."""
    return 1.0 if recipe is None else (2 / min(recipe.head.width, 1.0)) ** 2


def _bound(limit: tuple[int, int], size: int) -> float:
    least, each = limit
    return least + each * size
