"""Inputs for a network to be exported with: named, at random, of any sizes that it takes."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from ensemblenet.ensemble import EnsembleNet
from ensemblenet.errors import ExportError, first_line
from ensemblenet.functional import combine_heads, head_spread
from ensemblenet.inputs import Inputs, Tree, call, resized, tensors_in

__all__ = ["ALL_ANSWERS", "AllAnswers", "NetworkInputs", "Places", "shapes_of"]

Places = Mapping[tuple[int, int], int]  # sizes of some dimensions: by the tensor's number and the dimension

_FEWEST_TRACED = 2  # a size of 1 would be taken for a constant
ALL_ANSWERS = ("output", "heads", "spread")  # what `AllAnswers` gives, in order


class AllAnswers(nn.Module):
    """A multi-headed model that gives its prediction, what each head says, and how far heads differ.

    Shape:
        - output: (N, C, *); heads: (K, N, C, *); spread: of the most likely class, (N, *), for "multiclass"; else of
          each label or output, (N, C, *). See [`ensemblenet.functional.head_spread`][].

    Example:
        >>> model = EnsembleNet(nn.Linear(8, 16), [nn.Linear(16, 3) for _ in range(4)]).eval()
        >>> {name: tuple(answer.shape) for name, answer in AllAnswers(model)(torch.zeros(5, 8)).items()}
        {'output': (5, 3), 'heads': (4, 5, 3), 'spread': (5,)}
    """

    def __init__(self, model: EnsembleNet) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """All answers, by the names in `ALL_ANSWERS`."""
        heads = self.model(*args, per_head=True, **kwargs)
        prediction = combine_heads(heads, self.model.combine, self.model.task)
        spread = head_spread(heads, self.model.task)
        if self.model.task == "multiclass":
            spread = spread.gather(1, prediction.argmax(1, keepdim=True)).squeeze(1)
        return dict(zip(ALL_ANSWERS, (prediction, heads, spread), strict=True))


@dataclass(frozen=True)
class NetworkInputs:
    """A network, and what its inputs are.

    Attributes:
        network: in evaluation mode.
        inputs: what they are.
        example: the user's own; may be empty.
        all_answers: whether the file gives more than the prediction, see `AllAnswers`.

    Example:
        >>> layer = nn.Linear(8, 3)
        >>> given = NetworkInputs(layer, Inputs.of(torch.zeros(2, 8)), [])
        >>> given.batch(5).shape, given.unlike_other_sizes()
        (torch.Size([5, 8]), 2)
    """

    network: nn.Module
    inputs: Inputs
    example: Sequence[Tensor]
    all_answers: bool = False

    @property
    def written(self) -> nn.Module:
        """The function that the file holds."""
        return AllAnswers(self.network) if self.all_answers and isinstance(self.network, EnsembleNet) else self.network

    @property
    def names(self) -> list[str]:
        """Of the inputs."""
        return self.inputs.names(self.network)

    def batch(self, size: int, seed: int = 0, sizes: Places | None = None) -> Tree:
        """Random inputs for N examples, on which the network's outputs are finite.

        Floats are normal; integers are 0 and 1, which every embedding knows, or all 1 or all 0: a mask may not hide
        all of an example, and an index must exist. The last resort are the user's own examples.

        Args:
            size: N.
            seed: of the random numbers.
            sizes: of some dimensions, where they are not those of the specification.

        Raises:
            ExportError: the network takes none of them.
        """
        shapes = [list(spec.whole(size)) for spec in self.inputs.tensors]
        for (index, dim), other in (sizes or {}).items():
            shapes[index][dim] = other
        kinds = [spec.zeros(like=self.network) for spec in self.inputs.tensors]
        problem = ""
        for tensors in self._fillings(shapes, seed):
            x = self.inputs.build([tensor.to(kind) for tensor, kind in zip(tensors, kinds, strict=True)])
            try:
                with redirect_stderr(io.StringIO()):  # torch.fx prints the line that fails
                    outputs = tensors_in(call(self.network, x))
            except Exception as error:  # whatever a network objects to
                problem = problem or f"The model fails on random inputs of shape {shapes_of(x)}: {first_line(error)}"
                continue
            if all(torch.isfinite(output).all() for output in outputs):
                return x
            problem = problem or f"The model's own outputs are not finite on random inputs of shape {shapes_of(x)}."
        raise ExportError(problem)

    def _fillings(self, shapes: Sequence[Sequence[int]], seed: int) -> Iterator[list[Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        kinds = [getattr(torch, spec.dtype) for spec in self.inputs.tensors]
        normal = [
            torch.randn(shape, generator=generator, dtype=torch.complex64 if kind.is_complex else torch.float32)
            for shape, kind in zip(shapes, kinds, strict=True)
        ]
        is_exact = [not (kind.is_floating_point or kind.is_complex) for kind in kinds]
        for integers in (lambda values: values > 0, torch.ones_like, torch.zeros_like):
            yield [integers(values) if exact else values for values, exact in zip(normal, is_exact, strict=True)]
            if not any(is_exact):
                break
        if self.example:
            yield [_repeated(tensor, shape) for tensor, shape in zip(self.example, shapes, strict=True)]

    def unlike_other_sizes(self) -> int:
        """A number of examples that is no other size, so that none is taken for it."""
        sizes = {size for spec in self.inputs.tensors for size in spec.shape}
        return next(size for size in count(_FEWEST_TRACED) if size not in sizes)

    def other_sizes(self) -> list[Places]:
        """Sizes unlike those of the specification that the network takes; inputs of one size change together."""
        groups: dict[tuple[int, int], list[int]] = {}
        for index, spec in enumerate(self.inputs.tensors):
            for dim, size in enumerate(spec.whole(0)):
                if size > 1:
                    groups.setdefault((dim, size), []).append(index)
        found: list[Places] = []
        for (dim, size), members in groups.items():
            if any(dim in self.inputs.tensors[index].fixed for index in members):
                continue
            for other in {size // 2, 2 * size, size + 1} - {0, 1, size}:
                places = {(index, dim): other for index in members}
                try:
                    self.batch(2, sizes=places)
                except ExportError:
                    continue
                found.append(places)
                break
        return found

    def describe(self, description: Mapping[str, Any] | None) -> dict[str, Any]:
        """What the file says of itself."""
        described: dict[str, Any] = {"num_heads": 1}
        if self.inputs.tree == 0:
            described["input_shape"] = list(self.inputs.shape)
        else:
            kinds = zip(self.names, self.inputs.tensors, strict=True)
            described["inputs"] = {name: {"dtype": spec.dtype, "shape": list(spec.shape)} for name, spec in kinds}
        if isinstance(self.network, EnsembleNet):
            described |= {"task": self.network.task, "num_heads": self.network.num_heads}
        return described | dict(description or {})


def _repeated(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """The first so many elements of each dimension, over and over."""
    for dim, size in enumerate(shape):
        tensor = resized(tensor, dim, size)
    return tensor


def shapes_of(x: Tree) -> str:
    """The shapes of inputs, in words.

    Example:
        >>> shapes_of((torch.zeros(2, 8), torch.zeros(2)))
        '(2, 8), (2,)'
    """
    return ", ".join(str(tuple(tensor.shape)) for tensor in tensors_in(x))
