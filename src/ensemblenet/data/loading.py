"""Batches of examples that can be read in any order: split over processes, shuffled, and resumable at any batch.

Which examples a batch holds, and what random augmentation does to each, depends on the seed, the epoch and the example
alone: neither on the number of workers, nor on how a batch is split over processes, nor on whether the run was killed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from ensemblenet.data.tensors import DataError

__all__ = ["ExampleLoader", "Examples", "OnBroken", "Part", "seed_generators"]

OnBroken = Literal["error", "skip"]


class Examples(Protocol):
    """What is loaded: tuples of tensors or numbers, by index; a `DataError` says that one cannot be read."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Any, ...]: ...


@dataclass(frozen=True)
class Part:
    """Which examples one process takes in an epoch, and in which batches.

    Args:
        total: N, examples of all processes.
        batch_size: examples of a batch, of one process.
        train: shuffle, and leave out what does not fill a batch on every process; else every example comes once, in
            order, and all processes take the same number of batches.
        seed: of the shuffling.
        rank: which process this is.
        world_size: of how many.

    Raises:
        DataError: too few examples for one batch, or one example, on every process.

    Example:
        >>> [Part(7, batch_size=2, rank=rank, world_size=2).batches(0) for rank in (0, 1)]
        [[[0, 1], [2, 3]], [[4, 5], [6]]]
    """

    total: int
    batch_size: int
    train: bool = False
    seed: int = 0
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise DataError(f"batch_size must be at least 1, got {self.batch_size}.")
        if self.total < (self.batch_size if self.train else 1) * self.world_size:
            wanted = f"fill one batch of {self.batch_size}" if self.train else "give one"
            raise DataError(f"{self.total:,} examples do not {wanted} on each of {self.world_size} process(es).")

    def __len__(self) -> int:
        if self.train:
            return self.total // (self.batch_size * self.world_size)
        largest = -(-self.total // self.world_size)
        return min(-(-largest // self.batch_size), self.total // self.world_size)

    def batches(self, epoch: int) -> list[list[int]]:
        """The indices of each batch of an epoch."""
        if not self.train:
            own = np.array_split(np.arange(self.total), self.world_size)[self.rank]
            return [part.tolist() for part in np.array_split(own, len(self))]
        order = np.random.default_rng((self.seed, epoch)).permutation(self.total)
        whole = order[: len(self) * self.world_size * self.batch_size]
        return whole.reshape(len(self), self.world_size, self.batch_size)[:, self.rank].tolist()


class ExampleLoader:
    """Batches of an epoch; Lightning calls `set_epoch`. A loader whose state was restored goes on at the next batch.

    Args:
        examples: what to load.
        part: which of them, in which batches.
        num_workers: processes that load; 0 loads in the process itself.
        on_broken: whether an example that cannot be read is an error, or is left out of its batch and counted.
        max_broken: how many may be left out; one more is an error.

    Raises:
        DataError: while iterating: what is wrong with an example.

    Example:
        >>> from ensemblenet.data.tensors import TensorExamples
        >>> loader = ExampleLoader(TensorExamples(torch.zeros(10, 3), torch.arange(10)), Part(10, batch_size=4))
        >>> [targets.tolist() for inputs, targets in loader]
        [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9]]
    """

    batch_sampler = None  # Lightning reads it of whatever has a sampler

    def __init__(
        self, examples: Examples, part: Part, num_workers: int = 0, on_broken: OnBroken = "error", max_broken: int = 100
    ) -> None:
        self.part = part
        self.on_broken: OnBroken = on_broken
        self.max_broken = max_broken
        self.broken: dict[int, str] = {}
        self.epoch = 0
        self.consumed = 0
        self._resumes = False
        self._keys = _Keys(part)
        self._loader = DataLoader(
            _Seeded(examples, part.seed),
            batch_sampler=self._keys,
            num_workers=num_workers,
            collate_fn=_collate,
            generator=torch.Generator(),  # else it would draw from the global one
            pin_memory=torch.cuda.is_available(),
            persistent_workers=part.train and num_workers > 0,
        )

    def __len__(self) -> int:
        """Batches in an epoch, of this process."""
        return len(self.part)

    @property
    def sampler(self) -> ExampleLoader:
        """What Lightning calls `set_epoch` of."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration reads; another one than before begins at its first batch."""
        if epoch != self.epoch:
            self.epoch, self._resumes = epoch, False

    def state_dict(self) -> dict[str, Any]:
        """Where it is: plain data, the same on every process."""
        return {"epoch": self.epoch, "consumed": self.consumed, **self._fixed()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another loader was.

        Raises:
            DataError: that loader had other data, or other batches.
        """
        mine = self._fixed()
        changed = [f"{name} was {state[name]} and is {mine[name]}" for name in mine if mine[name] != state[name]]
        if changed:
            raise DataError(f"The run cannot go on in the middle of an epoch: {', '.join(changed)}.")
        self.epoch, self.consumed, self._resumes = state["epoch"], state["consumed"], True

    def _fixed(self) -> dict[str, int]:
        """What must not change within an epoch; the number of processes may."""
        part = self.part
        return {"examples": part.total, "seed": part.seed, "global_batch_size": part.batch_size * part.world_size}

    def __iter__(self) -> Iterator[Any]:
        """The batches of the epoch, or what is left of it."""
        # a generator: Lightning makes the iterator before it sets the epoch
        self.consumed = self.consumed if self._resumes and self.consumed < len(self) else 0
        self._resumes = False
        self._keys.epoch, self._keys.start = self.epoch, self.consumed
        for batch, broken in self._loader:
            self._count(broken)
            self.consumed += 1
            if batch is not None:
                yield batch

    def _count(self, broken: Sequence[_Broken]) -> None:
        for example in broken:
            if self.on_broken == "error":
                raise DataError(example.message)
            if example.index in self.broken:
                continue
            self.broken[example.index] = example.message
            if len(self.broken) > self.max_broken:
                raise DataError(f"More than max_broken={self.max_broken} broken examples; the last: {example.message}")
            rank_zero_warn(f"Skipped {len(self.broken)} of at most {self.max_broken}: {example.message}")


class _Keys:
    """What the loader asks for: the epoch and the index of each example of each batch."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self.epoch = 0
        self.start = 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in self.part.batches(self.epoch)[self.start :]:
            yield [(self.epoch, index) for index in batch]

    def __len__(self) -> int:
        return len(self.part)


@dataclass(frozen=True)
class _Broken:
    """An example that cannot be read: a value, since an exception would bring the worker's traceback along."""

    index: int
    message: str


class _Seeded(Dataset[Any]):
    """Examples by epoch and index, each with random numbers of its own."""

    def __init__(self, examples: Examples, seed: int) -> None:
        self.examples = examples
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        with _own_chance(self.seed, epoch, index):
            try:
                return self.examples[index]
            except DataError as error:
                return _Broken(index, str(error))


@contextmanager
def _own_chance(*key: int) -> Iterator[None]:
    """All global generators begin from the key; those of the main process are afterwards as they were."""
    if get_worker_info() is not None:
        seed_generators(*key)
        yield
        return
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed_generators(*key)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def seed_generators(*key: int) -> None:
    """Begin the global generators of Python, NumPy and PyTorch's CPU from a key; a hundredth of a millisecond."""
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would touch GPUs, which a worker must not


def _collate(items: Sequence[Any]) -> tuple[Any, list[_Broken]]:
    whole = [item for item in items if not isinstance(item, _Broken)]
    broken = [item for item in items if isinstance(item, _Broken)]
    return default_collate(whole) if whole else None, broken
