"""What a head costs at any width, without building it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np

from ensemblenet.conversion.equations import Equations
from ensemblenet.conversion.trace import TensorRef
from ensemblenet.cost import ROOFLINE, Cost
from ensemblenet.operations.axes import Axis
from ensemblenet.work import work_of

__all__ = ["HeadCost"]


class HeadCost:
    """The cost of a head as a function of its sizes.

    Every number is a sum of products of sizes. What the sizes are multiplied by is worked out once, so that a search
    for the widest heads asks quickly.

    Args:
        equations: the solved sizes of the head.
        parameters: the axes of each of its parameters.
        num_examples: N, of the traced inputs.
    """

    def __init__(self, equations: Equations, parameters: Iterable[list[Axis]], num_examples: int) -> None:
        self._axes: dict[Axis, int] = {}  # the axes that can change, and their places
        self._products: dict[tuple[int, ...], int] = {}  # the same of their products
        self._parameters = [self._product(axes) for axes in parameters]
        terms: list[tuple[int, int, float]] = []  # where a term is added, its product and its factor
        for place, (event, grows) in enumerate(equations.work):
            for number, factor, tensor in work_of(event.macs, event.traffic, num_examples, ROOFLINE.batch):
                if tensor is None:
                    product, _ = self._product(grows)
                    whole = event.macs / math.prod(axis.size for axis in grows if axis.is_free())
                else:
                    product, whole = self._product(_axes(equations, tensor))
                terms.append((4 * place + number, product, factor * whole))
        self._num_calls = len(equations.work)
        self._places, self._of, self._factors = map(np.array, zip(*terms, strict=True)) if terms else [np.array([])] * 3

    def __call__(self, size_of: Callable[[Axis], int]) -> Cost:
        """The cost when `size_of` gives the size of every unknown."""
        sizes = [axis.value(size_of) for axis in self._axes]
        products = [math.prod(sizes[place] for place in key) for key in self._products]
        parameters = sum(products[product] * kept for product, kept in self._parameters)
        terms = self._factors * np.array(products, dtype=float)[self._of]
        return ROOFLINE.cost(parameters, np.bincount(self._places, terms, minlength=4 * self._num_calls))

    def _product(self, axes: Iterable[Axis]) -> tuple[int, int]:
        """The product of some axes: the place of the part that can change, and the rest as a number."""
        free, kept = [], 1
        for axis in axes:
            if axis.is_free():
                free.append(self._axes.setdefault(axis.root(), len(self._axes)))
            else:
                kept *= axis.size
        return self._products.setdefault(tuple(sorted(free)), len(self._products)), kept


def _axes(equations: Equations, tensor: TensorRef) -> list[Axis]:
    return equations.axes(tensor)
