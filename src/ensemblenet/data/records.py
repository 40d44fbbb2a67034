"""Batches from shards of records: split over processes and workers, shuffled, and resumable at any batch.

The shards of an epoch, in the epoch's order, are one sequence of records. It is cut into equal parts, one for each
process and in it for each worker, wherever the files' borders lie; so no record comes twice, none is left out, and
all processes take the same number of training steps.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice, pairwise
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ensemblenet.data.loading import Broken, OnBroken, ResumableLoader, as_it_is
from ensemblenet.data.tfrecord import DamageError, Record, Shard
from ensemblenet.errors import DataError

__all__ = ["RecordLoader", "Share"]

Decode = Callable[[list[Record], random.Random], Any]


@dataclass(frozen=True)
class Share:
    """The part of the records that one process takes, in batches.

    Args:
        batch_size: records of a batch.
        train: whether to shuffle, and leave out the records that do not fill a batch on every process. If not, every
            record comes once, in order, and all processes take the same number of batches.
        shuffle_buffer: number of records from which a worker draws the next; 1 keeps the order of the shard.
        seed: of the shuffling.
        rank: number of this process.
        world_size: number of processes.
        num_workers: workers that read for this process; 0 reads in the process itself.

    Example:
        >>> [Share(batch_size=2, rank=rank, world_size=2).borders(7) for rank in (0, 1)]
        [[0, 1, 3], [3, 5, 7]]
    """

    batch_size: int
    train: bool = False
    shuffle_buffer: int = 1
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    num_workers: int = 0

    def __post_init__(self) -> None:
        for name, least in [("batch_size", 1), ("shuffle_buffer", 1), ("num_workers", 0)]:
            if getattr(self, name) < least:
                raise DataError(f"{name} must be at least {least}, got {getattr(self, name)}.")

    def records(self, total: int) -> tuple[int, int]:
        """This process's range of `total` records: its first one, and the one behind its last."""
        if self.train:
            own = total // (self.batch_size * self.world_size) * self.batch_size
            return self.rank * own, (self.rank + 1) * own
        return self.rank * total // self.world_size, (self.rank + 1) * total // self.world_size

    def borders(self, total: int) -> list[int]:
        """The first record of each of this process's batches, and the end of the last; as many on every process."""
        start, stop = self.records(total)
        largest = -(-total // self.world_size) if not self.train else stop - start
        number = min(-(-largest // self.batch_size), total // self.world_size)
        return [start + (stop - start) * batch // number for batch in range(number + 1)] if number else [start]

    def batches(self, total: int) -> list[int]:
        """The number of batches that each worker reads."""
        number, workers = len(self.borders(total)) - 1, max(1, self.num_workers)
        firsts = [number * worker // workers for worker in range(workers + 1)]
        return [end - begin for begin, end in pairwise(firsts)]

    def worker_borders(self, total: int, worker: int) -> list[int]:
        """The same as `borders`, of the batches of one worker."""
        before, own = sum(self.batches(total)[:worker]), self.batches(total)[worker]
        return self.borders(total)[before : before + own + 1]


class RecordLoader(ResumableLoader):
    """Loads batches of records from shards.

    The order depends on the seed, the epoch and the number of workers alone. A loader that was restored reads the
    earlier records of the epoch once more but does not decode them.

    Args:
        shards: the files.
        decode: makes a batch from a list of records and a random generator; runs in the worker.
        share: the records of this process, and the batches.
        on_broken: "error" or "skip", for a damaged record.
        max_broken: how many may be skipped; None for any number.

    Raises:
        DataError: there are too few records for one batch on every process; while iterating: a damaged record, or
            an error of `decode`.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        decode: Decode,
        share: Share,
        on_broken: OnBroken = "error",
        max_broken: int | None = None,
    ) -> None:
        super().__init__(on_broken, max_broken)
        self.shards = list(shards)
        self.decode = decode
        self.share = share
        self.total = sum(map(len, self.shards))
        if len(self) == 0:
            raise DataError(
                f"{self.total:,} records do not fill one batch of {share.batch_size} on {share.world_size} process(es)."
            )

    def __len__(self) -> int:
        return sum(self.share.batches(self.total))

    def fixed(self) -> dict[str, Any]:
        """The number of records, and how they are divided."""
        share = asdict(self.share)
        del share["rank"]
        return {**share, "records": self.total}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another loader was, see [`ensemblenet.data.loading.ResumableLoader.load_state_dict`][]."""
        if "share" in state:
            warnings.warn(
                "A RecordLoader's state has no 'share' and 'total' now, but their values under their own names: "
                "'batch_size', 'seed', ... and 'records'.",
                DeprecationWarning,
                stacklevel=2,
            )
            state = {**state, **state["share"], "records": state["total"]}
        super().load_state_dict(state)

    def read(self, epoch: int, start: int) -> Iterator[tuple[Any, Sequence[Broken]]]:
        """The batches of an epoch from number `start` on, and what is broken in each."""
        loader = DataLoader(
            _Stream(self.shards, self.decode, self.share, self.on_broken, epoch, start),
            batch_size=None,
            num_workers=self.share.num_workers,
            collate_fn=as_it_is,
            generator=torch.Generator(),  # else it would draw from the global one
            pin_memory=torch.cuda.is_available(),
        )
        for batch in loader:
            if isinstance(batch, DataError):
                raise batch
            yield batch


@dataclass(frozen=True)
class _Stream(IterableDataset[Any]):
    """The batches that one worker reads, from the number that the loader has `consumed` on."""

    shards: Sequence[Shard]
    decode: Decode
    share: Share
    on_broken: OnBroken
    epoch: int
    consumed: int

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self._batches()
        except DataError as error:  # as a value it reaches the user without the worker's traceback
            yield error

    def _batches(self) -> Iterator[tuple[Any, list[Broken]]]:
        share, total = self.share, sum(map(len, self.shards))
        info = get_worker_info()
        counts = share.batches(total)
        done, following = _progress(counts, self.consumed)
        worker = 0 if info is None else (info.id + following) % len(counts)
        key = f"{share.seed}/{self.epoch}/{share.rank}/{worker}"
        borders = share.worker_borders(total, worker)
        records = self._records(borders[0], borders[-1])
        if share.train:
            records = _shuffled(records, share.shuffle_buffer, random.Random(key))
        for number, (begin, end) in enumerate(pairwise(borders)):
            batch = list(islice(records, end - begin))
            if number >= done[worker]:
                whole = [record for record in batch if isinstance(record, Record)]
                broken = [Broken(str(error), str(error)) for error in batch if isinstance(error, DamageError)]
                yield self.decode(whole, random.Random(f"{key}/{number}")) if whole else None, broken

    def _records(self, start: int, stop: int) -> Iterator[Record | DamageError]:
        """A range of the epoch's sequence."""
        order: Iterable[int] = range(len(self.shards))
        if self.share.train:
            order = np.random.default_rng((self.share.seed, self.epoch)).permutation(len(self.shards))
        first = 0
        for index in order:
            shard = self.shards[index]
            begin, end = max(start - first, 0), min(stop - first, len(shard))
            if begin < end:
                for record in shard.records(begin, end):
                    if isinstance(record, DamageError) and self.on_broken == "error":
                        raise record  # at once, not when its batch is due
                    yield record
            first += len(shard)


def _progress(counts: Sequence[int], consumed: int) -> tuple[list[int], int]:
    """After `consumed` batches from workers in turn: how many each has given, and which worker is next."""
    done, turn = [0] * len(counts), 0
    while consumed:
        if done[turn] < counts[turn]:
            done[turn] += 1
            consumed -= 1
        turn = (turn + 1) % len(counts)
    return done, turn


def _shuffled(items: Iterator[Any], size: int, chance: random.Random) -> Iterator[Any]:
    """Draw each item at random from a buffer of `size` items, which the next item refills."""
    held = list(islice(items, size))
    for item in items:
        chosen = chance.randrange(size)
        held[chosen], item = item, held[chosen]
        yield item
    chance.shuffle(held)
    yield from held
