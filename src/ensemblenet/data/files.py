"""Single files as inputs of a trained network, prepared as its test data was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import ensemblenet.data
from ensemblenet.data.listing import find_in
from ensemblenet.errors import DataError

__all__ = ["FileBatch", "FileReader", "InputFiles", "file_reader", "find_files"]

_BY_DIMENSIONS = {3: "ImageData", 4: "Kinetics"}  # for descriptions that do not name their data module


@dataclass(frozen=True)
class FileReader:
    """Reads files of one kind.

    Args:
        read: makes a network's input from a file; raises `DataError` if it is unreadable.
        suffixes: of the files to look for in folders, in small letters.
    """

    read: Callable[[Path], Tensor]
    suffixes: tuple[str, ...]


def file_reader(input_shape: Sequence[int], description: Mapping[str, Any]) -> FileReader | None:
    """The reader of a network's data for single files.

    Args:
        input_shape: of one example, without the batch.
        description: what the data module said of its data when the network was trained.

    Returns:
        The reader, or None where a file is not one example, or nothing is known of the data.

    Example:
        >>> known = {"mean": [0.5] * 3, "std": [0.2] * 3, "crop_pct": 1.0}
        >>> file_reader((3, 32, 32), {"data": "ImageData", "preprocessing": known}).suffixes[0]
        '.avif'
    """
    preprocessing = description.get("preprocessing") or {}
    name = description.get("data")
    if name not in ensemblenet.data.__all__:
        name = _BY_DIMENSIONS.get(len(input_shape)) if {"mean", "std"} <= preprocessing.keys() else None
    if name is None:
        return None
    try:
        return getattr(ensemblenet.data, name).file_reader(tuple(input_shape), preprocessing)
    except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"What is stored of the {name} that the network was trained on does not say how files are read: {error!r}."
        ) from error


class FileBatch(NamedTuple):
    """A batch of files.

    Attributes:
        paths: the N files that could be read.
        inputs: (N, *), in the same order.
        unreadable: a line for each of the others, which names it and says what is wrong.
    """

    paths: list[str]
    inputs: Tensor
    unreadable: list[str]


class InputFiles(Dataset[Any]):
    """A map-style data set of files; an unreadable one gives a message in place of an input.

    Args:
        paths: the files.
        read: makes an input from a file; raises `DataError` if it is unreadable.

    Example:
        >>> def read(path):
        ...     raise DataError(f"{path} is broken.")
        >>> next(iter(InputFiles([Path("a.jpg")], read).batches(batch_size=2, num_workers=0))).unreadable
        ['a.jpg is broken.']
    """

    def __init__(self, paths: Sequence[Path], read: Callable[[Path], Tensor]) -> None:
        self.paths = paths
        self.read = read

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[str, Tensor | str]:
        path = self.paths[index]
        try:
            return str(path), self.read(path)
        except DataError as error:  # as a value it reaches the user without the worker's traceback
            return str(path), str(error)

    def batches(self, batch_size: int, num_workers: int) -> DataLoader[FileBatch]:
        """Batches of files, in their order."""
        return DataLoader(self, batch_size, num_workers=num_workers, collate_fn=_joined)


def _joined(items: Sequence[tuple[str, Tensor | str]]) -> FileBatch:
    read = [(path, inputs) for path, inputs in items if isinstance(inputs, Tensor)]
    unreadable = [reason for _, reason in items if isinstance(reason, str)]
    inputs = torch.stack([inputs for _, inputs in read]) if read else torch.empty(0)
    return FileBatch([path for path, _ in read], inputs, unreadable)


def find_files(paths: Sequence[str], suffixes: Sequence[str]) -> list[Path]:
    """The files that are named, and those with some suffixes anywhere in the folders that are named; hidden ones aside.

    Args:
        paths: files and folders.
        suffixes: in small letters; capitals in a file's name do not matter.

    Returns:
        The files in the order of `paths`, sorted within each folder.

    Raises:
        DataError: a path that does not exist, or a folder without such files.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> for name in ("b.PNG", "a.png", "notes.txt"):
        ...     (folder / name).touch()
        >>> [path.name for path in find_files([str(folder)], [".png"])]
        ['a.png', 'b.PNG']
    """
    return [file for path in paths for file in _files_of(Path(path), suffixes)]


def _files_of(path: Path, suffixes: Sequence[str]) -> Iterator[Path]:
    if path.is_file():
        yield path
        return
    if not path.is_dir():
        raise DataError(f"{path} is neither a file nor a folder.")
    found = find_in(path, suffixes)
    if not found:
        raise DataError(f"{path} holds no files that end in {', '.join(suffixes)}.")
    yield from found
