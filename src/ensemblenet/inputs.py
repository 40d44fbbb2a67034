"""What a network's inputs are: their tree, their shapes and dtypes, and examples of them.

Shapes: N examples, * any further dimensions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ensemblenet.errors import ConversionError, DataError, InputError

__all__ = [
    "DTYPES",
    "CheckSizes",
    "InputSpec",
    "Inputs",
    "call",
    "first_batches",
    "inputs_and_targets",
    "map_tensors",
    "num_examples",
    "one_example",
    "resized",
    "tensors_in",
    "to_device",
]

DTYPES = (
    *("float64", "float32", "float16", "bfloat16", "complex128", "complex64", "bool"),
    *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"),
)

Tree = Any  # a tensor; or a tuple, a list or a mapping of trees


@dataclass(frozen=True)
class InputSpec:
    """One input tensor of a network, as plain data.

    Attributes:
        shape: of one example; the whole shape of a tensor that has no row for each example.
        dtype: its dtype's name, such as "float32".
        is_batched: whether it has one row for each example.
        fixed: its dimensions that must have the size of the example inputs, counted in the whole tensor.

    Example:
        >>> spec = InputSpec.of(torch.zeros(4, 3, 8, 8))
        >>> spec.shape, spec.dtype, spec.zeros(2).shape
        ((3, 8, 8), 'float32', torch.Size([2, 3, 8, 8]))
        >>> print(spec)
        float32 (N, 3, 8, 8)
    """

    shape: tuple[int, ...]
    dtype: str = "float32"
    is_batched: bool = True
    fixed: tuple[int, ...] = ()

    @classmethod
    def of(cls, tensor: Tensor, is_batched: bool = True) -> InputSpec:
        """The specification of a batch, (N, *), or of a tensor that serves all examples."""
        shape = tuple(tensor.shape[1:] if is_batched else tensor.shape)
        return cls(shape, str(tensor.dtype).removeprefix("torch."), is_batched)

    def whole(self, size: int) -> tuple[int, ...]:
        """The shape of the tensor for so many examples."""
        return (size, *self.shape) if self.is_batched else self.shape

    def zeros(self, size: int = 1, like: nn.Module | None = None) -> Tensor:
        """A batch of zeros, (size, *).

        Args:
            size: N.
            like: a network, whose device and floating-point precision the batch gets.
        """
        dtype, device = getattr(torch, self.dtype), None
        for parameter in [] if like is None else like.parameters():
            if parameter.is_floating_point() or parameter.is_complex():
                precision, device = parameter.dtype.to_real(), parameter.device
                if dtype.is_floating_point:
                    dtype = precision
                elif dtype.is_complex:
                    dtype = torch.promote_types(precision, torch.complex64)
                break
        return torch.zeros(self.whole(size), dtype=dtype, device=device)

    def __str__(self) -> str:
        sizes = (*(("N",) if self.is_batched else ()), *self.shape)
        return f"{self.dtype} ({', '.join(map(str, sizes))})"

    def random(self, size: int = 2) -> Tensor:
        """A batch of numbers in [0, 1), (size, *), the same every time; integers are zeros, flags are tossed."""
        dtype = getattr(torch, self.dtype)
        drawn = torch.complex64 if dtype.is_complex else torch.float32
        values = torch.rand(self.whole(size), generator=torch.Generator().manual_seed(0), dtype=drawn)
        return values < 0.5 if dtype == torch.bool else values.to(dtype)


@dataclass(frozen=True)
class Inputs:
    """All inputs of a network: how it is called, and each tensor, as plain data.

    Attributes:
        tensors: what each tensor is, in order.
        tree: how the network is called. 0 is one tensor; a list holds the arguments by position, a dictionary those
            by name; inside them stand the tensors' numbers, or lists and dictionaries of them.

    Example:
        >>> inputs = Inputs.of({"ids": torch.zeros(4, 12, dtype=torch.int64), "mask": torch.ones(4, 12)})
        >>> inputs.tree, [spec.dtype for spec in inputs.tensors], inputs.zeros(2)["mask"].shape
        ({'ids': 0, 'mask': 1}, ['int64', 'float32'], torch.Size([2, 12]))
    """

    tensors: tuple[InputSpec, ...]
    tree: Any = 0

    @classmethod
    def of(cls, inputs: Tree) -> Inputs:
        """The specification of example inputs.

        Raises:
            ConversionError: there is something else than tensors in them, or no tensor with examples.
        """
        found: list[Tensor] = []

        def number(value: Any) -> Any:
            if isinstance(value, Tensor):
                found.append(value)
                return len(found) - 1
            if isinstance(value, Mapping):
                return {str(key): number(part) for key, part in value.items()}
            if isinstance(value, (tuple, list)):
                return [number(part) for part in value]
            raise ConversionError(
                f"example_inputs must be a tensor, or a tuple or a dictionary of tensors, got {type(value).__name__} "
                "in them; leave out what has a default, or wrap the base in a module that passes it on."
            )

        tree = number(inputs)
        size = next((len(tensor) for tensor in found if tensor.ndim), 0)
        if not size or (tree == 0 and found[0].ndim < 2 and found[0].is_floating_point()):
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in found)
            raise ConversionError(f"example_inputs must have the shape (N, ...) with N > 0, got {shapes or 'none'}.")
        specs = tuple(InputSpec.of(tensor, tensor.ndim > 0 and len(tensor) == size) for tensor in found)
        if unknown := {spec.dtype for spec in specs}.difference(DTYPES):
            kinds = ", ".join(f"torch.{dtype}" for dtype in sorted(unknown))
            raise ConversionError(f"example_inputs are of {kinds}; a conversion takes {', '.join(DTYPES)}.")
        return cls(specs, tree)

    @property
    def is_batched(self) -> bool:
        """Whether all tensors have one row for each example."""
        return all(spec.is_batched for spec in self.tensors)

    @property
    def only(self) -> InputSpec:
        """The one tensor.

        Raises:
            ConversionError: there are several.
        """
        if self.tree != 0:
            raise ConversionError(f"The model takes several inputs, {self.tree}; this needs a model of one tensor.")
        return self.tensors[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one example of the one tensor."""
        return self.only.shape

    @property
    def dtype(self) -> str:
        """The dtype of the one tensor."""
        return self.only.dtype

    def names(self, network: nn.Module) -> list[str]:
        """What each tensor is called: by the network's argument, with the keys and positions inside that.

        Example:
            >>> Inputs.of((torch.zeros(4, 8), {"left": torch.zeros(4, 3)})).names(nn.Bilinear(8, 3, 2))
            ['input1', 'input2_left']
        """
        found: list[str] = []

        def visit(name: str, part: Any) -> None:
            if isinstance(part, int):
                found.append(name)
                return
            for key, value in part.items() if isinstance(part, dict) else enumerate(part):
                visit(f"{name}_{key}", value)

        for name, part in self.arguments(network, range(len(self.tensors))).items():
            visit(name, part)
        return found

    def arguments(self, network: nn.Module, values: Sequence[Any]) -> dict[str, Any]:
        """The network's arguments by name, with values in the places of tensors; a lone tensor is "input".

        Args:
            network: whose signature names the arguments that are given by position.
            values: one for each tensor.

        Example:
            >>> Inputs.of((torch.zeros(4, 8), torch.zeros(4, 3))).arguments(nn.Bilinear(8, 3, 2), "ab")
            {'input1': 'a', 'input2': 'b'}
        """
        built = self.build(values)
        if isinstance(self.tree, dict):
            return built
        if self.tree == 0:
            return {"input": built}
        forward = getattr(network, "trunk", network).forward
        names = [p.name for p in inspect.signature(forward).parameters.values() if p.kind is not p.VAR_POSITIONAL]
        if len(names) < len(built):  # it takes any number
            names = [f"input_{index}" for index in range(len(built))]
        return dict(zip(names, built, strict=False))

    def describe(self, network: nn.Module) -> str:
        """In words, what a network takes.

        Example:
            >>> Inputs.of((torch.zeros(4, 8), torch.zeros(4, 3))).describe(nn.Bilinear(8, 3, 2))
            'input1: float32 (N, 8); input2: float32 (N, 3)'
        """
        return "; ".join(f"{name}: {spec}" for name, spec in zip(self.names(network), self.tensors, strict=True))

    def build(self, tensors: Sequence[Any]) -> Tree:
        """The tree with values in the places of the tensors' numbers."""

        def place(part: Any) -> Any:
            if isinstance(part, dict):
                return {key: place(value) for key, value in part.items()}
            return tuple(map(place, part)) if isinstance(part, list) else tensors[part]

        return place(self.tree)

    def zeros(self, size: int = 1, like: nn.Module | None = None) -> Tree:
        """Inputs of zeros for so many examples; see `InputSpec.zeros`."""
        return self.build([spec.zeros(size, like) for spec in self.tensors])

    def random(self, size: int = 2) -> Tree:
        """Inputs of random numbers for so many examples; see `InputSpec.random`."""
        return self.build([spec.random(size) for spec in self.tensors])


def tensors_in(inputs: Tree) -> list[Tensor]:
    """The tensors of a tree, in order.

    Example:
        >>> [len(tensor) for tensor in tensors_in((torch.zeros(2), {"mask": torch.zeros(3)}))]
        [2, 3]
    """
    if isinstance(inputs, Tensor):
        return [inputs]
    parts = inputs.values() if isinstance(inputs, Mapping) else inputs
    return [tensor for part in parts for tensor in tensors_in(part)]


def num_examples(inputs: Tree) -> int:
    """N: the rows of the first tensor that has any.

    Example:
        >>> num_examples({"ids": torch.zeros(4, 12), "mask": torch.zeros(4, 12)})
        4
    """
    return next(len(tensor) for tensor in tensors_in(inputs) if tensor.ndim)


def first_batches(loader: Iterable[Any], examples: int) -> Iterator[Any]:
    """Batches of a loader until they hold so many examples; one that is None, as all of it was damaged, is left out.

    Example:
        >>> loader = [None, *((torch.zeros(4, 8), torch.zeros(4)) for _ in range(5))]
        >>> len(list(first_batches(loader, examples=10)))
        3
    """
    count = 0
    for batch in loader:
        if batch is not None:
            yield batch
            count += num_examples(inputs_and_targets(batch)[0])
        if count >= examples:
            return


def one_example(inputs: Tree) -> Tree:
    """The first example alone; the inputs as they are where a tensor of them serves all examples.

    Example:
        >>> one_example({"ids": torch.zeros(4, 12), "mask": torch.zeros(4, 12)})["mask"].shape
        torch.Size([1, 12])
    """
    return map_tensors(lambda tensor: tensor[:1], inputs) if Inputs.of(inputs).is_batched else inputs


def inputs_and_targets(batch: Any) -> tuple[Tree, Tensor]:
    """The two parts of a batch: the first two of a tuple; of a dictionary, the targets are under "labels" or "label".

    Raises:
        DataError: a dictionary without targets.

    Example:
        >>> inputs_and_targets({"ids": torch.zeros(4, 12), "labels": torch.zeros(4)})[0].keys()
        dict_keys(['ids'])
    """
    if not isinstance(batch, Mapping):
        inputs, targets, *_ = batch
        return inputs, targets
    name = next((name for name in ("labels", "label") if name in batch), None)
    if name is None:
        raise DataError(f"A batch that is a dictionary must hold its targets as 'labels', got {list(batch)}.")
    return {key: value for key, value in batch.items() if key != name}, batch[name]


def map_tensors(function: Callable[[Tensor], Tensor], inputs: Tree) -> Tree:
    """The tree with a function applied to each tensor.

    Example:
        >>> map_tensors(len, (torch.zeros(2), [torch.zeros(3)]))
        (2, (3,))
    """
    if isinstance(inputs, Tensor):
        return function(inputs)
    if isinstance(inputs, Mapping):
        return {key: map_tensors(function, part) for key, part in inputs.items()}
    return tuple(map_tensors(function, part) for part in inputs)


def resized(tensor: Tensor, dim: int, size: int) -> Tensor:
    """The tensor with another size in one dimension: cut, or repeated.

    Example:
        >>> resized(torch.arange(3), 0, 5)
        tensor([0, 1, 2, 0, 1])
    """
    index = torch.arange(size, device=tensor.device) % tensor.shape[dim]
    return tensor.index_select(dim, index)


def to_device(inputs: Tree, device: torch.device | str) -> Tree:
    """The tree with its tensors on a device.

    Example:
        >>> to_device({"ids": torch.zeros(4, 12)}, "meta")["ids"].device
        device(type='meta')
    """
    return map_tensors(lambda tensor: tensor.to(device), inputs)


def call(network: Callable[..., Any], inputs: Tree, **options: Any) -> Any:
    """Call a network on its inputs: a tuple by position, a mapping by name.

    Example:
        >>> call(nn.Linear(8, 3), {"input": torch.zeros(2, 8)}).shape
        torch.Size([2, 3])
    """
    if isinstance(inputs, Mapping):
        return network(**inputs, **options)
    return network(*inputs, **options) if isinstance(inputs, (tuple, list)) else network(inputs, **options)


class CheckSizes(nn.Module):
    """The identity, which refuses an input whose sizes a model cannot follow.

    Args:
        name: what the input is called.
        sizes: by dimension, the size that it must have.

    Raises:
        InputError: on a call, the input has another.

    Example:
        >>> CheckSizes("x", {1: 3})(torch.zeros(4, 3, 32, 32)).shape
        torch.Size([4, 3, 32, 32])
    """

    def __init__(self, name: str, sizes: Mapping[int, int]) -> None:
        super().__init__()
        self.name = name
        self.sizes = dict(sizes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the input."""
        if x.ndim <= max(self.sizes) or any(x.shape[dim] != size for dim, size in self.sizes.items()):
            expected = ", ".join(str(self.sizes.get(dim, "any")) for dim in range(max(max(self.sizes) + 1, x.ndim)))
            raise InputError(
                f"Input {self.name!r} must have the shape ({expected}), got {tuple(x.shape)}: the model was converted "
                "for these sizes; convert the base again with example inputs of the sizes that you need."
            )
        return x

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{self.name}, {self.sizes}"
