"""The algebra of sizes: which dimensions of which tensors are one and the same number.

Every dimension of every tensor in a head has an `Axis`. An axis is an unknown of a known base size, or a product of
axes (attention heads times their width, groups times channels of a group), or a sum of axes (what a concatenation
makes). Operators are equations between axes, solved by unification. To narrow a network is to give its free unknowns
smaller values: whatever values they get, all equations hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

__all__ = ["Axis", "concatenated", "free", "kept", "multiplied", "settle", "unify"]


class Axis:
    """One size in the equations.

    Attributes:
        size: the size in the base.
        parts: the axes that it is the product or the sum of, or none for an unknown.
        is_sum: whether `parts` add up rather than multiply.
        is_kept: whether an unknown must keep its size.
        cause: for an unknown that is kept, what asks for that, in words; None where nothing but the algebra does.
        role: for an unknown of a product, when it narrows: "count" where blocks (groups, attention heads) become fewer,
            "instead" where they become narrower, "inner" either way, being the width of few blocks; None otherwise.
        block: for an unknown that counts blocks (groups, attention heads), how many channels a block has.

    Example:
        >>> axis = multiplied([free(12), kept(64)])
        >>> axis.size, axis.value(lambda unknown: 6)
        (768, 384)
    """

    __slots__ = ("_link", "block", "cause", "is_kept", "is_sum", "parts", "role", "size")

    def __init__(self, size: int, parts: tuple[Axis, ...] = (), *, is_sum: bool = False, is_kept: bool = False) -> None:
        self.size = size
        self.parts = parts
        self.is_sum = is_sum
        self.is_kept = is_kept
        self.cause: str | None = None
        self.role: Literal["count", "instead", "inner"] | None = None
        self.block = 1
        self._link: Axis | None = None

    def __repr__(self) -> str:
        axis = self.root()
        if axis.parts:
            return "(" + (" + " if axis.is_sum else " * ").join(map(repr, axis.parts)) + ")"
        return f"{axis.size}" if axis.is_kept else f"{axis.size}?"

    def root(self) -> Axis:
        """The axis that stands for this one after unification."""
        axis = self
        while axis._link is not None:
            axis = axis._link
        return axis

    def unknowns(self) -> Iterator[Axis]:
        """The unknowns that it is made of; a repeated one comes repeatedly."""
        axis = self.root()
        if not axis.parts:
            yield axis
        for part in axis.parts:
            yield from part.unknowns()

    def segments(self) -> list[Axis]:
        """The axes that it is the sum of, or itself.

        Example:
            >>> concatenated([free(16), free(48)]).segments(), free(64).segments()
            ([16?, 48?], [64?])
        """
        axis = self.root()
        return [segment.root() for segment in axis.parts] if axis.is_sum else [axis]

    def is_free(self) -> bool:
        """Whether its size can change."""
        return any(not unknown.is_kept for unknown in self.unknowns())

    def keep(self, cause: str | None = None) -> None:
        """Give it its base size for good, for a cause in words."""
        for unknown in self.unknowns():
            if not unknown.is_kept:
                unknown.is_kept, unknown.cause = True, cause

    def value(self, size_of: Callable[[Axis], int]) -> int:
        """Its size, when `size_of` gives the size of every unknown."""
        axis = self.root()
        if not axis.parts:
            return axis.size if axis.is_kept else size_of(axis)
        values = (part.value(size_of) for part in axis.parts)
        return sum(values) if axis.is_sum else math.prod(values)

    def indices(self, indices_of: Callable[[Axis], list[int]]) -> list[int]:
        """The positions in the base that it keeps, when `indices_of` gives those of every free unknown."""
        axis = self.root()
        if not axis.parts:
            return list(range(axis.size)) if axis.is_kept else indices_of(axis)
        positions: list[int] = []
        if axis.is_sum:
            offset = 0
            for part in axis.parts:
                positions += [offset + index for index in part.indices(indices_of)]
                offset += part.size
            return positions
        positions = [0]
        for part in axis.parts:
            inner = part.indices(indices_of)
            positions = [outer * part.size + index for outer in positions for index in inner]
        return positions

    def coordinates(self, unknown: Axis) -> list[int]:
        """For each position in the base, the position of an unknown that it belongs to; -1 where it belongs to none.

        Example:
            >>> heads, width = free(3), free(2)
            >>> multiplied([heads, width]).coordinates(heads), multiplied([heads, width]).coordinates(width)
            ([0, 0, 1, 1, 2, 2], [0, 1, 0, 1, 0, 1])
        """
        axis = self.root()
        if axis is unknown:
            return list(range(axis.size))
        if not axis.parts:
            return [-1] * axis.size
        if axis.is_sum:
            return [place for part in axis.parts for place in part.coordinates(unknown)]
        found = [-1]
        for part in axis.parts:
            inner = part.coordinates(unknown)
            found = [max(outer, own) for outer in found for own in inner]
        return found

    def position(self, offset: int, size_of: Callable[[Axis], int]) -> int | None:
        """Where a position in the base lies after narrowing; None if it lies inside a part that is narrowed."""
        if offset == self.size:
            return self.value(size_of)
        if offset == 0 or all(unknown.value(size_of) == unknown.size for unknown in self.unknowns()):
            return offset
        axis = self.root()
        if not axis.is_sum:
            return None
        start = moved = 0
        for part in axis.parts:
            if offset < start + part.size:
                inside = part.position(offset - start, size_of)
                return None if inside is None else moved + inside
            start += part.size
            moved += part.value(size_of)
        return None

    def _become(self, other: Axis) -> None:
        if self.root() is not other.root():
            self.root()._link = other.root()


def free(size: int) -> Axis:
    """A new unknown; a size of one is never narrowed.

    Example:
        >>> free(64), free(1)
        (64?, 1)
    """
    return Axis(size, is_kept=size <= 1)


def kept(size: int, cause: str | None = None) -> Axis:
    """A new axis that keeps its size, for a cause in words.

    Example:
        >>> kept(64)
        64
    """
    axis = Axis(size, is_kept=True)
    axis.cause = cause
    return axis


def multiplied(axes: Iterable[Axis]) -> Axis:
    """The product of axes, outermost first.

    Example:
        >>> multiplied([free(12), kept(64)])
        (12? * 64)
    """
    factors = _flat(axes, is_sum=False)
    factors = [factor for factor in factors if factor.size != 1]
    if len(factors) <= 1:
        return factors[0] if factors else kept(1)
    return Axis(math.prod(factor.size for factor in factors), tuple(factors))


def concatenated(axes: Iterable[Axis]) -> Axis:
    """The sum of axes, in order.

    Example:
        >>> concatenated([free(16), free(48)])
        (16? + 48?)
    """
    segments = [segment for segment in _flat(axes, is_sum=True) if segment.size]
    if len(segments) <= 1:
        return segments[0] if segments else kept(0)
    return Axis(sum(segment.size for segment in segments), tuple(segments), is_sum=True)


def _flat(axes: Iterable[Axis], *, is_sum: bool) -> list[Axis]:
    flat: list[Axis] = []
    for axis in axes:
        root = axis.root()
        flat += _flat(root.parts, is_sum=is_sum) if root.parts and root.is_sum == is_sum else [root]
    return flat


def unify(left: Axis, right: Axis) -> None:
    """State that two axes are one; where the two forms cannot be reconciled, both keep their sizes.

    Example:
        >>> channels, heads, width = free(768), free(12), free(64)
        >>> unify(channels, multiplied([heads, width]))
        >>> channels
        (12? * 64?)
    """
    left, right = left.root(), right.root()
    if left is right:
        return
    if left.size != right.size:
        raise ValueError(f"axes of sizes {left.size} and {right.size} cannot be one")
    if left.parts and not right.parts:
        left, right = right, left
    if not left.parts:
        if left.is_kept:
            right.keep(left.cause)
    elif not _unify_parts(left, right):
        left.keep()
        right.keep()
    left._become(right)


def _unify_parts(left: Axis, right: Axis) -> bool:
    """Unify two products, two sums, or a sum with a product; False if that cannot be."""
    if left.is_sum and right.is_sum:
        return _align(left, right, _cut_sum)
    if not left.is_sum and not right.is_sum:
        return _align(left, right, _cut_product)
    total, product = (left, right) if left.is_sum else (right, left)
    segments = _flat([total], is_sum=True)
    outer, *inner = _flat([product], is_sum=False)
    block = multiplied(inner)
    if any(segment.size % block.size for segment in segments):
        return False
    pieces = [free(segment.size // block.size) for segment in segments]
    unify(outer, concatenated(pieces))
    for segment, piece in zip(segments, pieces, strict=True):
        unify(segment, multiplied([piece, block]))
    return True


def _align(left: Axis, right: Axis, cut: Callable[[Axis, Axis], tuple[Axis, Axis] | None]) -> bool:
    """Unify two lists of parts from the left, cutting the larger part where two do not match."""
    lefts = _flat([left], is_sum=left.is_sum)[::-1]
    rights = _flat([right], is_sum=left.is_sum)[::-1]
    while lefts and rights:
        a, b = lefts.pop().root(), rights.pop().root()
        if a.size == b.size:
            unify(a, b)
            continue
        large, small, rest = (a, b, lefts) if a.size > b.size else (b, a, rights)
        pieces = cut(large, small)
        if pieces is None:
            return False
        unify(pieces[0], small)
        rest.append(pieces[1])
    return not lefts and not rights


def _cut_sum(large: Axis, small: Axis) -> tuple[Axis, Axis] | None:
    """Cut an unknown in two segments, the first as long as `small`."""
    return _cut(large, small.size, large.size - small.size, is_sum=True)


def _cut_product(large: Axis, small: Axis) -> tuple[Axis, Axis] | None:
    """Cut an unknown in two factors, the first as large as `small`."""
    if large.size % small.size:
        return None
    return _cut(large, small.size, large.size // small.size, is_sum=False)


def _cut(large: Axis, first: int, second: int, *, is_sum: bool) -> tuple[Axis, Axis] | None:
    if large.parts:
        return None
    pieces = tuple(kept(size, large.cause) if large.is_kept else free(size) for size in (first, second))
    large._become(Axis(large.size, pieces, is_sum=is_sum))
    return pieces[0], pieces[1]


def settle(axes: Iterable[Axis]) -> None:
    """Leave every product one free factor, so that a width counts once in it.

    The outermost factor of at least four stays free (groups, attention heads), else the largest. Where the former is
    so, the largest of the others stays free too, to narrow instead: one or the other, by their roles.

    Example:
        >>> heads, width = free(12), free(64)
        >>> settle([multiplied([heads, width])])
        >>> heads.role, width.role
        ('count', 'instead')
    """
    for axis in axes:
        _settle(axis.root())


def _settle(axis: Axis) -> None:
    for part in axis.parts:
        _settle(part.root())
    if axis.is_sum:
        return
    factors = [factor for factor in _flat([axis], is_sum=False) if factor.is_free()]
    instead = [factor for factor in factors if factor.role == "instead"]
    others = [factor for factor in factors if factor.role != "instead"]
    choice = None
    if len(others) > 1:
        choice = next((factor for factor in others if factor.size >= 4), None)
        choice = choice or max(others, key=lambda factor: factor.size)
        _choose(choice, others, has_instead=bool(instead))
    elif others:
        (choice,) = others
    if choice is not None:
        for factor in instead[0 if choice.role != "count" else 1 :]:
            factor.role = None
            factor.keep()
    for factor in factors:
        if factor.is_free() and not factor.parts:
            factor.block = max(factor.block, axis.size // factor.size)


def _choose(choice: Axis, factors: list[Axis], *, has_instead: bool) -> None:
    """Keep the other factors of a product, but for one inside of the chosen one, which may narrow in its place."""
    position = factors.index(choice)
    inside = max(factors[position + 1 :], key=lambda factor: factor.size, default=None)
    others = {*factors} - {choice}
    if not choice.parts and choice.role is None and inside is None:
        choice.role = "inner"
    can_choose = not choice.parts and choice.role in (None, "count") and not has_instead
    if can_choose and inside is not None and not inside.parts and inside.role is None:
        choice.role, inside.role = "count", "instead"
        others -= {inside}
    for factor in others:
        factor.keep()
