"""Files that hold many examples each, where not all of them fit on this machine: read near each other, fetched ahead.

An epoch takes the files in an order of its own, and shuffles so many examples together as `buffer` says. Which examples
come when is known from the seed alone, before anything is read; so a run goes on at any batch without reading again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset

from ensemblenet.data.remote import RemoteFile, cache_folder, cache_limit, in_threads
from ensemblenet.data.tars import TarFile
from ensemblenet.errors import DataError

__all__ = ["Shards", "shards_of"]


@dataclass(frozen=True, eq=False)
class Shards:
    """The files that hold the examples of a split.

    Args:
        files: on a disk or on a server.
        of: (N,), the number of the file that holds each example.
        buffer: how many examples are shuffled together.

    Example:
        >>> shards = Shards([Path("a.tar"), Path("b.tar")], np.array([0, 0, 0, 1, 1, 1]), buffer=2)
        >>> order = shards.order(np.random.default_rng(0)).tolist()
        >>> sorted(order[:3]) in ([0, 1, 2], [3, 4, 5])
        True
    """

    files: Sequence[Path | RemoteFile]
    of: np.ndarray
    buffer: int

    def order(self, chance: np.random.Generator) -> np.ndarray:
        """The examples of all files, one file after another, the files in a random order; (N,)."""
        place = chance.permutation(len(self.files))
        return np.argsort(place[self.of], kind="stable")

    def ahead(self, windows: Sequence[Sequence[int]], in_process: bool) -> Iterator[None]:
        """Fetch the files of the examples of each window; while one is used, those of the next.

        Args:
            windows: the examples that are read near each other.
            in_process: whether a process of its own does it; if not, each window waits for its files.

        Returns:
            Something for each window, when its files are here.

        Raises:
            DataError: two windows do not fit in the folder of copies.
            FetchError: a server does not give a file.
        """
        numbers = [np.unique(self.of[window]) for window in windows]
        files = [{file for n in window if isinstance(file := self.files[n], RemoteFile)} for window in numbers]
        if not any(files):
            yield from [None] * len(windows)
            return
        loader = DataLoader(
            _Windows(files, self.buffer),
            batch_size=None,
            num_workers=int(in_process),
            prefetch_factor=1 if in_process else None,
            generator=torch.Generator(),  # else it would draw from the global one
        )
        for problem in loader:
            if isinstance(problem, DataError):
                raise problem
            yield


@dataclass(frozen=True)
class _Windows(Dataset[Any]):
    """Fetches the files of a window; what is wrong comes as a value, without the traceback of a worker."""

    files: Sequence[set[RemoteFile]]
    buffer: int

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> DataError | int:
        try:
            both = set[RemoteFile]().union(*self.files[max(0, number - 1) : number + 1])
            needed, limit = sum(file.size or 0 for file in both), cache_limit()
            if needed > limit:
                return DataError(
                    f"Two times shuffle_buffer={self.buffer:,} examples lie in files of {needed / 1e9:,.3g} GB; "
                    f"{cache_folder()} may hold {limit / 1e9:,.3g} GB: set ENSEMBLENET_CACHE_GB, name a folder with "
                    "room in ENSEMBLENET_CACHE, or lower shuffle_buffer."
                )
            in_threads(RemoteFile.fetch, sorted(self.files[number], key=str), "")
        except DataError as error:
            return error
        return number


def shards_of(examples: Any, buffer: int) -> Shards:
    """The files that hold the examples of a data set with the attribute `files`: one for each example.

    Raises:
        DataError: they do not lie in files that are known.
    """
    chosen = slice(None)
    if isinstance(examples, Subset):
        examples, chosen = examples.dataset, examples.indices
    files = getattr(examples, "files", None)
    if files is None:
        raise DataError(
            "shuffle_buffer is for shards (dataset=wds/, or hfds/ with data.folder) and other files, not for data of a "
            "library."
        )
    holders = [file.tar if isinstance(file, TarFile) else file for file in files]
    numbers: dict[Path | RemoteFile, int] = {}
    of = np.array([numbers.setdefault(holder, len(numbers)) for holder in holders], np.int64)[chosen]
    return Shards(list(numbers), of, buffer)
