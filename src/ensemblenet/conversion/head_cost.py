"""What a head costs at any width, without building it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np

from ensemblenet.conversion.equations import Equations
from ensemblenet.cost import ROOFLINE, Cost
from ensemblenet.operations.axes import Axis
from ensemblenet.work import work_of

__all__ = ["HeadCost"]


class HeadCost:
    """The cost of a head as a function of its sizes.

    Every number is a sum of terms: a factor times a product of sizes that can change. The terms are worked out once,
    so that a search for the widest heads asks quickly.

    Args:
        equations: the solved sizes of the head.
        parameters: the axes of each of its parameters.
        num_examples: N, of the traced inputs.
    """

    def __init__(self, equations: Equations, parameters: Iterable[list[Axis]], num_examples: int) -> None:
        self._axes: dict[Axis, int] = {}  # axes that can change, and their places
        self._products: dict[tuple[int, ...], int] = {}  # products of them, and theirs
        self._parameters = [self._term(axes, math.prod(axis.size for axis in axes)) for axes in parameters]
        terms: list[tuple[int, int, float]] = []  # the number that a term adds to, its product and its factor
        for place, (event, grows) in enumerate(equations.work):
            for number, factor, tensor in work_of(event.macs, event.traffic, num_examples, ROOFLINE.batch):
                if tensor is None:
                    product, kept = self._term(grows, event.macs)
                else:
                    axes = equations.inside.get(tensor.id) or equations.axes(tensor)
                    product, kept = self._term(axes, math.prod(tensor.shape))
                terms.append((4 * place + number, product, factor * kept))
        self._length = 4 * len(equations.work)
        self._numbers = np.array([number for number, _, _ in terms], dtype=int)
        self._of = np.array([product for _, product, _ in terms], dtype=int)
        self._factors = np.array([factor for _, _, factor in terms], dtype=float)

    def __call__(self, size_of: Callable[[Axis], int]) -> Cost:
        """The cost when `size_of` gives the size of every unknown."""
        sizes = [axis.value(size_of) for axis in self._axes]
        products = np.array([math.prod(sizes[place] for place in key) for key in self._products], dtype=float)
        parameters = sum(products[product] * kept for product, kept in self._parameters)
        terms = self._factors * products[self._of]
        return ROOFLINE.cost(round(parameters), np.bincount(self._numbers, terms, minlength=self._length))

    def _term(self, axes: Iterable[Axis], whole: float) -> tuple[int, float]:
        """What is `whole` in the base and grows with some axes: a product of sizes, by its place, and its factor."""
        free = [axis.root() for axis in axes if axis.is_free()]
        key = tuple(sorted(self._axes.setdefault(axis, len(self._axes)) for axis in free))
        return self._products.setdefault(key, len(self._products)), whole / math.prod(axis.size for axis in free)
