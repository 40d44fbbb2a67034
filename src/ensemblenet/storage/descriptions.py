"""What is known of a trained network's data, plain data in `data.json`; it may come from anyone, so it is checked."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

from ensemblenet.errors import LoadError
from ensemblenet.functional import Task
from ensemblenet.inputs import DTYPES
from ensemblenet.storage.atomic import read_json

__all__ = ["DESCRIPTION", "check_classes", "read_description", "write_description"]

DESCRIPTION = "data.json"  # in a run's folder as in that of a model

Known = dict[str, tuple[str, Callable[[Any], bool]]]  # what an entry must be, and whether it is

_LARGEST = 1 << 24  # of sizes


def write_description(folder: Path, description: Mapping[str, Any]) -> None:
    """Keep a description in a folder.

    Raises:
        LoadError: it is not plain data.
    """
    try:
        text = json.dumps(description, indent=2, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise LoadError(f"The description must be plain data that JSON can hold: {error}") from error
    (folder / DESCRIPTION).write_text(text + "\n")


def read_description(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What [`ensemblenet.save`][] was told about the data; empty where that was nothing.

    What this package reads of it is checked; users may keep more there.

    Raises:
        LoadError: `data.json` is damaged; which entry, and what it must be.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> write_description(folder, {"classes": "cat"})
        >>> read_description(folder)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ensemblenet.errors.LoadError: ...data.json: classes must be a list of names, got 'cat'.
    """
    path = Path(folder, DESCRIPTION)
    if not path.is_file():
        return {}
    description = read_json(path)
    _check(description, _ENTRIES, path)
    _check(description.get("preprocessing") or {}, _PREPROCESSING, path, "preprocessing.")
    return description


def check_classes(description: Mapping[str, Any], num_outputs: int, where: object = "The description") -> None:
    """Refuse names of classes that are not one for each output.

    Raises:
        LoadError: there are more, or fewer.

    Example:
        >>> check_classes({"classes": ["cat", "dog"]}, 3)
        Traceback (most recent call last):
        ensemblenet.errors.LoadError: The description names 2 classes, but the model has 3 outputs.
    """
    classes = description.get("classes")
    if classes is not None and len(classes) != num_outputs:
        raise LoadError(f"{where} names {len(classes):,} classes, but the model has {num_outputs:,} outputs.")


def _check(
    data: Mapping[str, Any], known: Mapping[str, tuple[str, Callable[[Any], bool]]], path: Path, at: str = ""
) -> None:
    for name, (expected, is_valid) in known.items():
        if data.get(name) is not None and not is_valid(data[name]):
            raise LoadError(f"{path}: {at}{name} must be {expected}, got {repr(data[name])[:60]}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -_LARGEST <= value <= _LARGEST


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _LARGEST


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _list_of(is_valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(is_valid, value))


def _is_shape(value: Any) -> bool:
    return _list_of(_is_size)(value) and math.prod(value) <= _LARGEST


_TASKS = get_args(Task)
_SIZE = ("a positive integer", _is_size)
_SHAPE = (f"a list of sizes, together at most {_LARGEST:,}", _is_shape)
_TEXT = ("a name", _is_text)

_ENTRIES: Known = {
    "task": (f"one of {_TASKS}", lambda value: value in _TASKS),
    "data": _TEXT,
    "classes": ("a list of names", _list_of(lambda name: isinstance(name, str | int) and not isinstance(name, bool))),
    "input_shape": _SHAPE,
    "input_dtype": ("a dtype's name", lambda value: value in DTYPES),
    "preprocessing": ("an object", lambda value: isinstance(value, dict)),
}
_PREPROCESSING: Known = {
    "input_shape": _SHAPE,
    "mean": ("a list of numbers", _list_of(_is_number)),
    "std": ("a list of positive numbers", _list_of(_is_positive)),
    **dict.fromkeys(("crop_pct", "seconds"), ("a positive number", _is_positive)),
    **dict.fromkeys(("stride", "num_frames", "num_clips", "num_crops"), _SIZE),
    **dict.fromkeys(("interpolation", "crop_mode", "short", "level"), _TEXT),
}
