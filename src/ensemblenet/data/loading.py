"""Loaders that a killed run resumes at any batch: what they have in common, and the one for examples by index.

Which examples a batch holds, and what random augmentation does to each, depends on the seed, the epoch and the example
alone: neither on the number of workers, nor on how a batch is split over processes, nor on whether the run was killed.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, Protocol

import numpy as np
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from ensemblenet.data.shards import Shards
from ensemblenet.data.tensors import TensorExamples
from ensemblenet.errors import DataError, FetchError

__all__ = [
    "Broken",
    "ExampleLoader",
    "Examples",
    "OnBroken",
    "Part",
    "ResumableLoader",
    "seed_epoch",
    "seed_generators",
]

OnBroken = Literal["error", "skip"]


@dataclass(frozen=True)
class Broken:
    """An example that cannot be read: a value, since an exception would bring the worker's traceback along.

    Args:
        key: tells it from others.
        message: names it, and says what is wrong.
        may_be_whole: its server did not give it, which is no reason to leave it out.
    """

    key: Hashable
    message: str
    may_be_whole: bool = False


class ResumableLoader(ABC):
    """Base class of loaders whose place in an epoch can be stored and restored.

    Lightning calls `sampler.set_epoch`; without such a call each iteration reads the epoch after the last one. A loader
    whose state was restored goes on at the next batch.

    Args:
        on_broken: "error" raises at the first broken example; "skip" leaves it out of its batch, counts it and warns.
        max_broken: how many different examples may be skipped before it is an error; None for any number.

    Attributes:
        broken: the skipped examples: what is wrong with each.
        skipped: how many examples were skipped; one that is skipped in two epochs counts twice.
    """

    batch_sampler = None  # Lightning reads this attribute of a loader that has a sampler

    def __init__(self, on_broken: OnBroken, max_broken: int | None) -> None:
        self.on_broken: OnBroken = on_broken
        self.max_broken = max_broken
        self.broken: dict[Hashable, str] = {}
        self.skipped = 0
        self.epoch = 0
        self.consumed = 0
        self._resumes = False

    @abstractmethod
    def __len__(self) -> int:
        """Batches in an epoch, of this process."""

    @abstractmethod
    def fixed(self) -> dict[str, Any]:
        """What must not change while an epoch is resumed, by name, as plain data."""

    @abstractmethod
    def read(self, epoch: int, start: int) -> Iterator[tuple[Any, Sequence[Broken]]]:
        """The batches of an epoch from number `start` on, None for one without examples; and what is broken in each."""

    @property
    def sampler(self) -> ResumableLoader:
        """The object whose `set_epoch` Lightning calls."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration reads. Another epoch than before starts at its first batch."""
        if epoch != self.epoch:
            self.epoch, self._resumes = epoch, False

    def state_dict(self) -> dict[str, Any]:
        """The place in the epoch, as plain data; the same on every process."""
        return {"epoch": self.epoch, "consumed": self.consumed, **self.fixed()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another loader was.

        Raises:
            DataError: that loader had other data, or other batches.
        """
        changed = {name: now for name, now in self.fixed().items() if state.get(name) != now}
        if changed:
            changes = ", ".join(f"{name} was {state.get(name)} and is {now}" for name, now in changed.items())
            raise DataError(f"The run cannot go on in the middle of an epoch: {changes}.")
        self.epoch, self.consumed, self._resumes = state["epoch"], state["consumed"], True

    def __iter__(self) -> Iterator[Any]:
        """The batches of the epoch, or the rest of them; the next iteration then reads the next epoch."""
        # a generator: Lightning makes the iterator before it sets the epoch
        self.consumed = self.consumed if self._resumes and self.consumed < len(self) else 0
        self._resumes = False
        is_empty = self.consumed == 0
        for batch, broken in self.read(self.epoch, self.consumed):
            for example in broken:
                self._skip(example)
            self.consumed += 1
            if batch is not None:
                is_empty = False
                yield batch
        if is_empty:
            *_, last = ["", *self.broken.values()]
            raise DataError(f"None of the examples can be read; the last: {last}")
        self.epoch, self.consumed = self.epoch + 1, 0

    def _skip(self, example: Broken) -> None:
        if self.on_broken == "error" or example.may_be_whole:
            raise DataError(example.message)
        self.skipped += 1
        if example.key in self.broken:
            return
        self.broken[example.key] = example.message
        if self.max_broken is None:
            rank_zero_warn(f"Skipped {len(self.broken):,}: {example.message}")
        elif len(self.broken) <= self.max_broken:
            rank_zero_warn(f"Skipped {len(self.broken)} of at most {self.max_broken}: {example.message}")
        else:
            raise DataError(f"More than max_broken={self.max_broken} broken examples; the last: {example.message}")


class Examples(Protocol):
    """A map-style data set; `examples[i]` raises `DataError` if example i is unreadable.

    Those of [`TensorExamples`][ensemblenet.data.tensors.TensorExamples] are taken and transformed a batch at a time.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Any, ...]: ...


@dataclass(frozen=True)
class Part:
    """The part of N examples that one process takes in an epoch, in batches.

    Args:
        total: N, the number of examples of all processes together.
        batch_size: examples of a batch, of one process.
        train: whether to shuffle, and leave out the examples that do not fill a batch on every process. If not, every
            example comes once, in order, and all processes take the same number of batches.
        seed: of the shuffling.
        rank: number of this process.
        world_size: number of processes.
        shards: the files of the examples, to be read one after another; None shuffles all examples together.

    Raises:
        DataError: there are too few examples for one batch (in evaluation: one example) on every process.

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
    shards: Shards | None = None

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
        chance, taken = np.random.default_rng((self.seed, epoch)), len(self) * self.world_size * self.batch_size
        if self.shards is None:
            whole = chance.permutation(self.total)[:taken]
            return whole.reshape(len(self), self.world_size, self.batch_size)[:, self.rank].tolist()
        # each process has files of its own, so that machines need not all fetch all files
        batches = self.shards.order(chance)[:taken].reshape(self.world_size, len(self), self.batch_size)[self.rank]
        for window in self.windows():
            batches[window] = chance.permutation(batches[window].ravel()).reshape(-1, self.batch_size)
        return batches.tolist()

    def windows(self, start: int = 0) -> list[slice]:
        """The batches whose examples are shuffled together, from number `start` on; without shards all of them."""
        size = len(self) if self.shards is None else max(1, self.shards.buffer // self.batch_size)
        firsts = range(start // size * size, len(self), size)
        return [slice(max(start, first), min(first + size, len(self))) for first in firsts]


class ExampleLoader(ResumableLoader):
    """Loads batches of examples by index.

    Args:
        examples: the data set.
        part: the examples of each batch.
        num_workers: processes that load; 0 loads in the process itself.
        on_broken: "error" or "skip", for an example that raises `DataError`.
        max_broken: how many may be skipped; None for any number.
        beside: what batches hold of each example behind inputs and targets, (N, *).
        finish: what is left to be done with a whole batch, in the process that takes it, see `trainer`.

    Attributes:
        trainer: of Lightning. Batches of the loaders that it holds are left unfinished: it finishes them on its device,
            see [`ensemblenet.data.module.DataModule.on_after_batch_transfer`][].

    Raises:
        DataError: while iterating: what is wrong with an example.

    Example:
        >>> loader = ExampleLoader(TensorExamples(torch.zeros(10, 3), torch.arange(10)), Part(10, batch_size=4))
        >>> [targets.tolist() for inputs, targets in loader]
        [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9]]
    """

    def __init__(
        self,
        examples: Examples,
        part: Part,
        num_workers: int = 0,
        on_broken: OnBroken = "error",
        max_broken: int | None = 100,
        beside: Tensor | None = None,
        finish: Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__(on_broken, max_broken)
        self.part = part
        self.finish = finish
        self.trainer: Any = None
        self._keys = _Keys(part, in_process=num_workers > 0)
        self._loader = DataLoader(
            _Seeded(examples, part.seed, beside),
            batch_sampler=self._keys,
            num_workers=num_workers,
            collate_fn=as_it_is,
            generator=torch.Generator(),  # else it would draw from the global one
            pin_memory=torch.cuda.is_available(),
            persistent_workers=part.train and num_workers > 0,
        )

    def __len__(self) -> int:
        return len(self.part)

    def fixed(self) -> dict[str, Any]:
        """Data, seed and the batches of all processes; without shards the number of processes may change."""
        part = self.part
        fixed = {"examples": part.total, "seed": part.seed, "global_batch_size": part.batch_size * part.world_size}
        near = part.shards and {"shuffle_buffer": part.shards.buffer, "processes": part.world_size}
        return fixed | (near or {"shuffle_buffer": None})

    def read(self, epoch: int, start: int) -> Iterator[tuple[Any, Sequence[Broken]]]:
        """The batches of an epoch from number `start` on, and what is broken in each."""
        self._keys.epoch, self._keys.start = epoch, start
        if self.finish is None or self._is_held():
            return iter(self._loader)
        return ((batch and self.finish(batch), broken) for batch, broken in self._loader)

    def close(self) -> None:
        """End the workers; the next iteration starts others.

        Where a collector of garbage ends them, PyTorch may wait 5 seconds for each: their queues can be gone by then.
        """
        iterator, self._loader._iterator = self._loader._iterator, None
        if isinstance(iterator, _MultiProcessingDataLoaderIter):
            iterator._shutdown_workers()  # what stopped within an epoch may still hold it

    def _is_held(self) -> bool:
        """Whether it is the trainer that iterates."""
        held = ("train_dataloader", "val_dataloaders", "test_dataloaders")
        return any(getattr(self.trainer, name, None) is self for name in held)


class _Keys:
    """The batch sampler: the epoch and the index of each example of each batch."""

    def __init__(self, part: Part, in_process: bool) -> None:
        self.part = part
        self.in_process = in_process
        self.epoch = 0
        self.start = 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        batches = self.part.batches(self.epoch)
        windows = [batches[window] for window in self.part.windows(self.start)]
        here: Iterable[None] = [None] * len(windows)
        if self.part.shards is not None:
            here = self.part.shards.ahead([list(chain(*window)) for window in windows], self.in_process)
        for window, _ in zip(windows, here, strict=True):
            for batch in window:
                yield [(self.epoch, index) for index in batch]

    def __len__(self) -> int:
        return len(self.part)


@dataclass(frozen=True)
class _Seeded(Dataset[Any]):
    """Batches of examples by epoch and index, each example with random numbers of its own."""

    examples: Any
    seed: int
    beside: Tensor | None = None

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> tuple[Any, list[Broken]]:
        if isinstance(self.examples, TensorExamples):
            is_random = self.examples.transform is not None  # seeding costs more than taking a batch
            indices = [index for _, index in keys]
            with _generators_seeded(self.seed, *keys[0]) if is_random else nullcontext():
                return self._with_beside(self.examples.__getitems__(indices), indices), []
        items = [self._read(epoch, index) for epoch, index in keys]
        whole = [item for item in items if not isinstance(item, Broken)]
        return default_collate(whole) if whole else None, [item for item in items if isinstance(item, Broken)]

    def _read(self, epoch: int, index: int) -> Any:
        with _generators_seeded(self.seed, epoch, index):
            try:
                return self._with_beside(self.examples[index], index)
            except DataError as error:
                return Broken(index, str(error), may_be_whole=isinstance(error, FetchError))

    def _with_beside(self, item: Any, which: int | list[int]) -> Any:
        return item if self.beside is None else (*item, self.beside[which])


@contextmanager
def _generators_seeded(*key: int) -> Iterator[None]:
    """Seed all global generators with the key, and in the main process restore them afterwards."""
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
    """Seed the global generators of Python, NumPy and PyTorch's CPU with a key, in a hundredth of a millisecond.

    Example:
        >>> seed_generators(7, 0, 3)
        >>> first = random.random(), torch.rand(()).item()
        >>> seed_generators(7, 0, 3)
        >>> first == (random.random(), torch.rand(()).item())
        True
    """
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would touch GPUs, which a worker must not


def seed_epoch(seed: int, epoch: int) -> None:
    """Seed all global generators, those of GPUs too, for an epoch of a run; alike on all of its processes."""
    seed_everything((seed * 1_000_003 + epoch) % 2**32, verbose=False)


def as_it_is(batch: Any) -> Any:
    """For a data set that gives whole batches: nothing to collate."""
    return batch
