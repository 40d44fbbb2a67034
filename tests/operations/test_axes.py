import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemblenet.operations.axes import Axis, concatenated, free, kept, multiplied, settle, unify
from ensemblenet.recipe import HeadShape

factors = st.lists(st.integers(1, 6), min_size=1, max_size=4)


def half(axis: Axis) -> int:
    """Half of every size; of blocks, half as many of the same width."""
    return axis.size if axis.role == "instead" else max(axis.size // 2, 1)


@given(factors, factors)
def test_unified_products_have_one_size_whatever_the_unknowns_become(left: list[int], right: list[int]) -> None:
    a = multiplied([free(size) for size in left])
    b = multiplied([free(size) for size in right])
    if a.size != b.size:
        with pytest.raises(ValueError, match="cannot be one"):
            unify(a, b)
        return
    unify(a, b)
    settle([a, b])
    assert a.value(half) == b.value(half)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_unified_sums_have_one_size_whatever_the_unknowns_become(left: list[int], right: list[int]) -> None:
    short, long = sorted([left, right], key=sum)
    short = [*short, sum(long) - sum(short)]
    a, b = concatenated([free(size) for size in short]), concatenated([free(size) for size in long])
    unify(a, b)
    settle([a, b])
    assert a.value(half) == b.value(half)


def test_attention_narrows_whole_heads_and_keeps_their_width() -> None:
    inner = free(768)
    unify(inner, multiplied([free(12), free(64)]))
    settle([inner])
    assert inner.value(half) == 6 * 64


def test_attention_heads_become_fewer_or_narrower() -> None:
    inner, other = free(256), free(256)
    heads, width = free(4), free(64)
    unify(inner, multiplied([heads, width]))
    unify(other, multiplied([kept(4), width]))  # the heads' width is met again, alone
    settle([inner, other])
    shapes = [HeadShape(0.6), HeadShape(0.6, blocks="narrower")]
    assert [(heads.value(shape.size), width.value(shape.size)) for shape in shapes] == [(2, 64), (4, 40)]
    assert [inner.value(shape.size) for shape in shapes] == [128, 160]


def test_a_segment_that_stays_keeps_its_positions() -> None:
    heads, width = free(8), free(16)
    channels = concatenated([free(4), width])
    settle([multiplied([heads, width]), channels])
    assert channels.position(4 + 8, half) == 2 + 8


def test_few_groups_narrow_their_width_instead() -> None:
    inner = free(96)
    unify(inner, multiplied([free(2), free(48)]))
    settle([inner])
    assert inner.value(half) == 2 * 24


def test_a_kept_factor_leaves_the_other_one_to_narrow() -> None:
    inner = free(96)
    unify(inner, multiplied([kept(3), free(32)]))
    settle([inner])
    assert inner.value(half) == 3 * 16


def test_heads_of_different_windows() -> None:
    """Channels that are heads times width, and also three segments of whole heads."""
    channels = multiplied([free(8), free(19)])
    segments = [free(2 * 19), free(3 * 19), free(3 * 19)]
    unify(channels, concatenated(segments))
    settle([channels, *segments])
    assert channels.value(half) == sum(segment.value(half) for segment in segments) == 8 * 9


def test_what_cannot_be_reconciled_keeps_its_size() -> None:
    a, b = multiplied([free(2), free(6)]), multiplied([free(3), free(4)])
    unify(a, b)
    assert a.value(half) == b.value(half) == 12


def test_keeping_reaches_through_unification() -> None:
    a, b = free(8), free(8)
    unify(a, b)
    b.keep()
    assert a.value(half) == 8


def choose_even(axis: Axis) -> list[int]:
    return list(range(0, axis.size, 2))


def test_indices_of_products_and_sums_are_positions_in_the_base() -> None:
    heads, width = free(4), kept(3)
    assert multiplied([heads, width]).indices(choose_even) == [0, 1, 2, 6, 7, 8]
    assert concatenated([free(4), kept(2), free(2)]).indices(choose_even) == [0, 2, 4, 5, 6]


@given(st.lists(st.integers(1, 6), min_size=2, max_size=5))
def test_segment_boundaries_move_with_the_segments(sizes: list[int]) -> None:
    axis = concatenated([free(size) for size in sizes])
    for k in range(len(sizes) + 1):
        expected = sum(half(Axis(size)) if size > 1 else 1 for size in sizes[:k])
        assert axis.position(sum(sizes[:k]), half) == expected


def test_a_position_inside_a_narrowed_segment_has_no_place() -> None:
    assert concatenated([free(4), free(4)]).position(2, half) is None


def test_flat_products_multiply() -> None:
    axis = multiplied([multiplied([free(2), free(3)]), free(5)])
    assert axis.size == 30
    assert math.prod(part.size for part in axis.parts) == 30
    assert len(axis.parts) == 3
