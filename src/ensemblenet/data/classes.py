"""The order of classes, which gives them their labels, and comparison with the classes of the training."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from ensemblenet.errors import ClassesError, DataError

__all__ = [
    "MAX_CLASSES",
    "KnownClasses",
    "class_name",
    "in_order",
    "natural_key",
    "numbered_classes",
    "refuse_other_classes",
    "refuse_strange_classes",
    "training_data_if_any",
]


MAX_CLASSES = 1_000_000  # of data that numbers its classes: one label of 2^40 must not fill the memory with names


class KnownClasses:
    """Part of a data module: the names of its classes, found in the data or given by a trained network.

    Attributes:
        classes: the names in the order of their labels; None until `setup` finds them.

    Example:
        >>> data = KnownClasses()
        >>> data.expect_classes(["cat", "dog"])
        >>> data.classes
        ['cat', 'dog']
    """

    classes: list[str] | None = None

    def expect_classes(self, classes: Sequence[str]) -> None:
        """Label examples as a trained network does; `setup` then refuses data with other classes.

        Args:
            classes: the names in the order of the network's outputs.
        """
        self.classes = [class_name(name) for name in classes]


@contextmanager
def training_data_if_any() -> Iterator[None]:
    """Ignore errors of the training data, which evaluation alone may lack, except for other classes than expected.

    Example:
        >>> with training_data_if_any():
        ...     raise DataError("train does not exist.")
    """
    try:
        yield
    except ClassesError:
        raise
    except DataError:
        pass


def class_name(name: str) -> str:
    """A class's name in one encoding: systems write an accent as part of its letter (NFC) or behind it (NFD).

    Example:
        >>> class_name("e\u0301clair") == class_name("\u00e9clair") == "\u00e9clair"
        True

    Raises:
        DataError: bytes that are no UTF-8, which no table or page could show.
    """
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"The class {name!r} has a name that is not UTF-8: give it another.") from error
    return unicodedata.normalize("NFC", name)


def numbered_classes(where: str, labels: np.ndarray) -> list[str]:
    """The names of classes that have numbers only, up to the highest label.

    Args:
        where: name of the data, for messages.
        labels: (N,), integers.

    Raises:
        DataError: a label of `MAX_CLASSES` or more.

    Example:
        >>> numbered_classes("train", np.array([0, 2]))
        ['0', '1', '2']
    """
    highest = int(labels.max(initial=-1))
    if highest >= MAX_CLASSES:
        raise DataError(f"{where} has the label {highest:,}; labels must be below {MAX_CLASSES:,}, one for each class.")
    return [str(label) for label in range(highest + 1)]


def natural_key(name: str) -> tuple[tuple[str | tuple[int, str], ...], str]:
    """The sort key of timm's natural order: numbers count as numbers, and capitals as small letters.

    Names that are equal in it, such as `1` and `01`, are sorted by their characters. Otherwise they would keep the
    order of the set or folder listing that they come from, which differs between processes.

    Example:
        >>> sorted(["img10", "img9", "IMG1"], key=natural_key)
        ['IMG1', 'img9', 'img10']
    """
    parts = re.split(r"(\d+)", name.lower())
    return tuple(_number(part) if place % 2 else part for place, part in enumerate(parts)), name


def _number(digits: str) -> tuple[int, str]:
    """Sorts as the number does; Python makes none of thousands of digits."""
    digits = digits.lstrip("0")
    return len(digits), digits


def in_order(names: Iterable[str]) -> list[str]:
    """Sort the names of classes in the order of their labels, each once.

    Example:
        >>> in_order(["dog", "10", "cat", "1", "2", "Cat", "01", "cat"])
        ['01', '1', '2', '10', 'Cat', 'cat', 'dog']
    """
    return sorted(set(names), key=natural_key)


def refuse_other_classes(where: str, known: Sequence[str], found: Sequence[str]) -> None:
    """Compare the classes of data with those that a network was trained on.

    Args:
        where: name of the data, for messages.
        known: the classes of the network, in the order of its outputs.
        found: the classes of the data.

    Raises:
        ClassesError: they or their order differ; it names the first difference.

    Example:
        >>> refuse_other_classes("data/train", ["cat", "dog"], ["cat", "cow", "dog"])  # doctest: +NORMALIZE_WHITESPACE
        Traceback (most recent call last):
            ...
        ensemblenet.errors.ClassesError: data/train does not have the classes of the training data: 1 class more:
        'cow'. Give the data that was trained on, or train a new network.
    """
    if list(known) != list(found):
        raise ClassesError(
            f"{where} does not have the classes of the training data: {_difference(known, found)}. Give the data that "
            "was trained on, or train a new network."
        )


def refuse_strange_classes(where: str, known: Sequence[str], found: Sequence[str]) -> None:
    """Compare the classes of a split, which may lack some, with those that a network was trained on.

    Raises:
        ClassesError: the split has a class that the network does not know.

    Example:
        >>> refuse_strange_classes("data/val", ["cat", "dog"], ["dog"])
    """
    if strangers := set(found) - set(known):
        raise ClassesError(
            f"{where} has the class {min(strangers)!r}, which the training data does not have: remove it, or train on "
            "it too."
        )


def _difference(known: Sequence[str], found: Sequence[str]) -> str:
    before, now = set(known), set(found)
    more, fewer = ([name for name in names if name not in others] for names, others in ((found, before), (known, now)))
    if bool(more) != bool(fewer):
        names = more or fewer
        count, etc = ("1 class", "") if len(names) == 1 else (f"{len(names)} classes", ", ...")
        return f"{count} {'more' if more else 'fewer'}: {names[0]!r}{etc}"
    for place, (was, name) in enumerate(zip(known, found, strict=False)):
        if was != name:
            return f"class {place} is {name!r} and was {was!r}"
    return f"{len(found)} names in place of {len(known)}, some of them twice"
