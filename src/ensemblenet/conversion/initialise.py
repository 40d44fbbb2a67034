"""First values of a head's parameters: redrawn at the base's scale, or inherited from the base."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ensemblenet.conversion.equations import Equations
from ensemblenet.operations import operation_of
from ensemblenet.operations.axes import Axis
from ensemblenet.recipe import Init

if TYPE_CHECKING:
    from ensemblenet.conversion.importance import Inheritance

__all__ = ["Initialiser"]

SizeOf = Callable[[Axis], int]


class Initialiser:
    """Makes the tensors of one part of the model.

    `"fresh"` takes the base's values as a sample of its initialisation, whatever that was: every entry of a weight
    or bias is drawn anew from the entries of the base's, and scaled with the root of the fan-in's change so that
    signals keep their spread in narrower layers; segments of a weight's rows, such as the gates of a recurrent layer,
    are drawn each from its own. Parameters that do not multiply features (normalisations, layer
    scales, position embeddings) have structure rather than chance in them; they keep the values of the channels
    that the head keeps. `"inherit"` keeps the values of those channels for all tensors.

    Which channels a part keeps is its own choice by chance, if nothing is said of what it inherits.

    Args:
        init: `"fresh"` or `"inherit"`.
        generator: the source of chance, on the CPU.
        inheritance: what each head inherits.
        head: which of the heads it is.

    Attributes:
        lost: names of frozen weights and biases that were drawn anew or cut, which no training would mend.
    """

    def __init__(
        self, init: Init, generator: torch.Generator, inheritance: Inheritance | None = None, head: int = 0
    ) -> None:
        self.init: Init = init
        self.generator = generator
        self._inheritance = inheritance
        self._head = head
        self.lost: set[str] = set()
        self._choices: dict[Axis, list[int]] = {}

    def tensor(self, name: str, base: Tensor, axes: list[Axis], size_of: SizeOf, equations: Equations) -> Tensor:
        """A new parameter or buffer in the place of the base's."""
        fan_in = equations.contracted.get(name)
        is_learned = isinstance(base, nn.Parameter) and (fan_in is not None or name in equations.biases)
        if fan_in == [] and _is_frozen(base):  # a fixed table, such as of positions, that nothing sums over
            is_learned = False
        is_cut = any(axis.value(size_of) != axis.size for axis in axes)
        if is_learned and _is_frozen(base) and (self.init == "fresh" or is_cut):
            self.lost.add(name)
        is_new = self.init == "fresh" or (self._inheritance is not None and name in self._inheritance.anew)
        if is_new and axes and is_learned:
            shrunk = math.prod(axis.size / axis.value(size_of) for axis in fan_in or [])
            rows, *others = axes
            columns = [axis.value(size_of) for axis in others]
            # the gates of a recurrent layer, or queries, keys and values in one weight: each at a scale of its own
            segments = rows.segments()
            drawn = zip(segments, base.detach().split([segment.size for segment in segments]), strict=True)
            scale = math.sqrt(shrunk) if fan_in else 1.0
            new = torch.cat([self._redraw(part, [rows.value(size_of), *columns], scale) for rows, part in drawn])
        else:
            source = base if self._inheritance is None else self._inheritance.tensor(self._head, name, base)
            new = source.detach().clone()
            for dim, axis in enumerate(axes):
                if axis.value(size_of) != axis.size:
                    new = new.index_select(dim, self.chosen(axis, size_of).to(base.device))
        if layout := _channels_last(base):
            new = new.contiguous(memory_format=layout)
        return nn.Parameter(new, base.requires_grad) if isinstance(base, nn.Parameter) else new

    def projection(self, weight: Tensor, axis: Axis, size_of: SizeOf) -> None:
        """Fill the projection's weight, of shape (narrow, base, ...), in place."""
        with torch.no_grad():
            if self.init == "fresh":
                weight.normal_(0, axis.size**-0.5, generator=self.generator)
            else:
                weight.zero_()
                chosen = self.chosen(axis, size_of)
                weight[torch.arange(len(chosen)), chosen] = 1

    def finish(self, part: nn.Module) -> None:
        """Reset what new weights do not: running statistics."""
        if self.init != "fresh":
            return
        frozen = {name: own.detach().clone() for name, own in part.named_parameters() if _is_frozen(own)}
        for layer in part.modules():
            operation_of(type(layer)).reset(layer, self.generator)
        self.lost |= {name for name, before in frozen.items() if not torch.equal(part.get_parameter(name), before)}

    def _redraw(self, base: Tensor, shape: list[int], scale: float) -> Tensor:
        """Entries drawn with replacement from the base's, times a scale; a constant stays as it is."""
        values = base.detach().flatten()
        if (values == values[0]).all():
            return values[0].expand(shape).clone()
        new = torch.empty(math.prod(shape), dtype=base.dtype, device=base.device)
        for block in new.split(1 << 22):  # in blocks: the positions take more memory than the values
            picks = torch.randint(len(values), (len(block),), generator=self.generator)
            block.copy_(values[picks.to(base.device)])
        return new.mul_(scale).view(shape)

    def chosen(self, axis: Axis, size_of: SizeOf) -> Tensor:
        """The positions in the base that the part keeps of an axis."""
        return torch.tensor(axis.indices(lambda unknown: self._choice(unknown, size_of)))

    def _choice(self, unknown: Axis, size_of: SizeOf) -> list[int]:
        if unknown not in self._choices:
            size = size_of(unknown)
            if self._inheritance is not None:
                self._choices[unknown] = self._inheritance.positions(self._head, unknown, size)
                return self._choices[unknown]
            rounds = math.ceil(size / unknown.size)  # more than one where there are more channels than in the base
            order = torch.cat([torch.randperm(unknown.size, generator=self.generator) for _ in range(rounds)])
            self._choices[unknown] = order[:size].sort().values.tolist()
        return self._choices[unknown]


def _channels_last(tensor: Tensor) -> torch.memory_format | None:
    """The memory format of the weight of a convolution, where its channels come last."""
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim())
    if layout is None or tensor.is_contiguous() or not tensor.is_contiguous(memory_format=layout):
        return None
    return layout


def _is_frozen(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) and not tensor.requires_grad
