"""Validation data in two halves, where there is no test split: one tunes, the other tests."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from hashlib import sha256

from ensemblenet.data import DataModule
from ensemblenet.errors import DataError

__all__ = ["halve_validation", "halves"]


def halve_validation(data: DataModule) -> tuple[int, int]:
    """Leave one half of the validation examples to `val`, and the other one to `test`.

    Args:
        data: a data module after `setup`, whose test examples are its validation examples.

    Returns:
        The number of examples in each.

    Raises:
        DataError: its examples have no names or no labels by which to part them, or each half would not have some.
    """
    examples = data.examples("val")
    labels = getattr(examples, "labels", None)
    if labels is None or len(labels) < 2:
        raise DataError(
            f"{type(data).__name__} tests on its validation examples, and they cannot be parted by name and label: "
            "give it a test split of its own."
        )
    names = [data.example_name("val", place) for place in range(len(labels))]
    tuned, tested = halves(names, labels)
    data.keep_examples("val", tuned)
    data.keep_examples("test", tested)
    return len(tuned), len(tested)


def halves(names: Sequence[str], labels: Sequence[int]) -> tuple[list[int], list[int]]:
    """The places of two halves that have as many examples of each class, give or take one.

    Which half an example belongs to depends on the names and labels alone: of each class, by turns in the order of a
    hash of the names.

    Example:
        >>> halves(["a.png", "b.png", "c.png", "d.png"], [0, 0, 1, 1])
        ([1, 2], [0, 3])
    """
    of_class: dict[int, list[int]] = defaultdict(list)
    for place in sorted(range(len(names)), key=lambda place: sha256(names[place].encode()).digest()):
        of_class[int(labels[place])].append(place)
    by_turns = [place for label in sorted(of_class) for place in of_class[label]]
    return sorted(by_turns[::2]), sorted(by_turns[1::2])
