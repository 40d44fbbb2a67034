"""Batches from shards of records: split over processes and workers, shuffled, and resumable at any batch.

The shards of an epoch, in the epoch's order, are one sequence of records. It is cut into equal parts, one for each
process and in it for each worker, wherever the files' borders lie; so no record comes twice, none is left out, and
all processes take the same number of training steps.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice, pairwise
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ensemblenet.data.tensors import DataError
from ensemblenet.data.tfrecord import OnDamage, Record, Shard

__all__ = ["RecordLoader", "Share"]

Decode = Callable[[list[Record], random.Random], Any]


@dataclass(frozen=True)
class Share:
    """Which part of the records one process takes, in batches.

    Args:
        batch_size: records in a batch.
        train: shuffle, and leave out what does not fill a batch on every process; else keep every record, in
            order, in as many batches on every process.
        shuffle_buffer: how many records a worker holds to choose the next from; 1 keeps the order in a shard.
        seed: of the shuffling.
        rank: which process this is.
        world_size: of how many.
        num_workers: how many workers read for it; 0 reads in the process itself.
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
        """The first and the last but one of this process's records, of so many in all."""
        if self.train:
            own = total // (self.batch_size * self.world_size) * self.batch_size
            return self.rank * own, (self.rank + 1) * own
        return self.rank * total // self.world_size, (self.rank + 1) * total // self.world_size

    def borders(self, total: int) -> list[int]:
        """Where this process's batches begin and end; all processes have the same number of them."""
        start, stop = self.records(total)
        largest = -(-total // self.world_size) if not self.train else stop - start
        number = min(-(-largest // self.batch_size), total // self.world_size)
        return [start + (stop - start) * batch // number for batch in range(number + 1)] if number else [start]

    def batches(self, total: int) -> list[int]:
        """How many batches each worker reads."""
        number, workers = len(self.borders(total)) - 1, max(1, self.num_workers)
        firsts = [number * worker // workers for worker in range(workers + 1)]
        return [end - begin for begin, end in pairwise(firsts)]

    def worker_borders(self, total: int, worker: int) -> list[int]:
        """Those of a worker's batches."""
        before, own = sum(self.batches(total)[:worker]), self.batches(total)[worker]
        return self.borders(total)[before : before + own + 1]


class RecordLoader:
    """Batches of an epoch; Lightning calls `set_epoch`.

    The order depends on the seed, the epoch and the number of workers alone. A loader whose state was restored
    goes on at the very next batch: what came before is read once more but not decoded.

    Args:
        shards: what to read.
        decode: turns the records of a batch, and a source of chance, into the batch; runs in the worker.
        share: which part of it, and how.
        on_damage: whether a damaged record is an error, or is skipped and counted.

    Raises:
        DataError: there are too few records for one batch on every process; while iterating: a damaged record, or
            what `decode` finds.
    """

    def __init__(self, shards: Sequence[Shard], decode: Decode, share: Share, on_damage: OnDamage = "error") -> None:
        self.shards = list(shards)
        self.decode = decode
        self.share = share
        self.on_damage: OnDamage = on_damage
        self.epoch = 0
        self.consumed = 0
        self._resumes = False
        self._skipped = torch.zeros(max(1, share.num_workers), dtype=torch.int64).share_memory_()
        self.total = sum(map(len, self.shards))
        if len(self) == 0:
            raise DataError(
                f"{self.total:,} records do not fill one batch of {share.batch_size} on {share.world_size} process(es)."
            )

    def __len__(self) -> int:
        """Batches in an epoch, of this process."""
        return sum(self.share.batches(self.total))

    @property
    def sampler(self) -> RecordLoader:
        """What Lightning calls `set_epoch` of."""
        return self

    batch_sampler = None  # Lightning reads it of whatever has a sampler

    @property
    def skipped(self) -> int:
        """How many damaged records were passed over so far."""
        return int(self._skipped.sum())

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration reads; another one than before begins at its first batch."""
        if epoch != self.epoch:
            self.epoch, self._resumes = epoch, False

    def state_dict(self) -> dict[str, Any]:
        """Where it is: plain data."""
        return {"epoch": self.epoch, "consumed": self.consumed, "total": self.total, "share": asdict(self.share)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another loader was.

        Raises:
            DataError: that loader had other data, or split it otherwise.
        """
        mine = asdict(self.share) | {"total": self.total, "rank": 0}
        theirs = state["share"] | {"total": state["total"], "rank": 0}
        changed = [f"{name} was {theirs[name]} and is {mine[name]}" for name in mine if mine[name] != theirs[name]]
        if changed:
            raise DataError(f"The run cannot go on in the middle of an epoch: {', '.join(changed)}.")
        self.epoch, self.consumed, self._resumes = state["epoch"], state["consumed"], True

    def __iter__(self) -> Iterator[Any]:
        """The batches of the epoch, or what is left of it."""
        # a generator: Lightning makes the iterator before it sets the epoch
        self.consumed = self.consumed if self._resumes and self.consumed < len(self) else 0
        self._resumes = False
        stream = _Stream(self, self.epoch, self.consumed)
        loader = DataLoader(
            stream,
            batch_size=None,
            num_workers=self.share.num_workers,
            collate_fn=_as_it_is,
            generator=torch.Generator(),  # else it would draw from the global one
            pin_memory=torch.cuda.is_available(),
        )
        for batch in loader:
            if isinstance(batch, DataError):
                raise batch
            self.consumed += 1
            yield batch


class _Stream(IterableDataset[Any]):
    """The batches that one worker reads."""

    def __init__(self, loader: RecordLoader, epoch: int, consumed: int) -> None:
        self.loader = loader
        self.epoch = epoch
        self.consumed = consumed

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self._batches()
        except DataError as error:  # as a value it reaches the user without the worker's traceback
            yield error

    def _batches(self) -> Iterator[Any]:
        loader, share = self.loader, self.loader.share
        info = get_worker_info()
        counts = share.batches(loader.total)
        done, following = _progress(counts, self.consumed)
        worker = 0 if info is None else (info.id + following) % len(counts)
        key = f"{share.seed}/{self.epoch}/{share.rank}/{worker}"
        borders = share.worker_borders(loader.total, worker)
        records = self._records(borders[0], borders[-1])
        if share.train:
            records = _shuffled(records, share.shuffle_buffer, random.Random(key))
        for number, (begin, end) in enumerate(pairwise(borders)):
            batch = list(islice(records, end - begin))
            whole = [record for record in batch if record is not None]
            if number >= done[worker]:
                loader._skipped[worker] += len(batch) - len(whole)
                if whole:
                    yield loader.decode(whole, random.Random(f"{key}/{number}"))

    def _records(self, start: int, stop: int) -> Iterator[Record | None]:
        """A range of the epoch's sequence."""
        shards = self.loader.shards
        order: Iterable[int] = range(len(shards))
        if self.loader.share.train:
            order = np.random.default_rng((self.loader.share.seed, self.epoch)).permutation(len(shards))
        first = 0
        for index in order:
            shard = shards[index]
            begin, end = max(start - first, 0), min(stop - first, len(shard))
            if begin < end:
                yield from shard.read(begin, end, self.loader.on_damage)
            first += len(shard)


def _progress(counts: Sequence[int], consumed: int) -> tuple[list[int], int]:
    """How many batches each worker has given, of `consumed` ones in turn, and whose turn it is."""
    done, turn = [0] * len(counts), 0
    while consumed:
        if done[turn] < counts[turn]:
            done[turn] += 1
            consumed -= 1
        turn = (turn + 1) % len(counts)
    return done, turn


def _shuffled(items: Iterator[Any], size: int, chance: random.Random) -> Iterator[Any]:
    """Each item is drawn at random from a buffer, which the next item refills."""
    held = list(islice(items, size))
    for item in items:
        chosen = chance.randrange(size)
        held[chosen], item = item, held[chosen]
        yield item
    chance.shuffle(held)
    yield from held


def _as_it_is(batch: Any) -> Any:
    return batch
