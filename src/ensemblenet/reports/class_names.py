"""Names of classes for people."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["readable_names"]


def readable_names(classes: Sequence[str]) -> list[str]:
    """Names of ImageNet's class folders by their first English word; other names as they are.

    Two classes of one word keep their folder's name behind it.

    Example:
        >>> readable_names(["n01440764", "n02102040"]), readable_names(["cat", "dog"])
        (['tench', 'English springer'], ['cat', 'dog'])
    """
    if not classes or not all(re.fullmatch(r"n\d{8}", name) for name in classes):
        return list(classes)
    from timm.data.imagenet_info import ImageNetInfo  # slow to import

    info = ImageNetInfo("imagenet-22k")
    known = set(info.label_names())
    words = [info.label_name_to_description(name).partition(",")[0] if name in known else name for name in classes]
    return [word if words.count(word) == 1 else f"{word}, {name}" for word, name in zip(words, classes, strict=True)]
