"""Which examples the batches of an epoch hold, on one process and on several, whole and resumed."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ensemblenet.data.loading import ExampleLoader, Part
from ensemblenet.data.shards import Shards, shards_of
from ensemblenet.errors import DataError


class Numbers:
    """Examples that are their own index, and what each kind of generator draws; some cannot be read."""

    def __init__(self, total=20, broken=()):
        self.total, self.broken = total, broken

    def __len__(self):
        return self.total

    def __getitem__(self, index):
        if index in self.broken:
            raise DataError(f"number {index} is broken")
        return index, random.random(), float(np.random.rand()), torch.rand(3)


def loader(total=20, batch_size=4, workers=0, train=True, broken=(), rank=0, world_size=1, seed=5, **options):
    part = Part(total, batch_size, train, seed, rank, world_size)
    return ExampleLoader(Numbers(total, broken), part, workers, **options)


def drawn(loader, epoch=0):
    loader.set_epoch(epoch)
    return [[column.tolist() for column in batch] for batch in loader]


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 4))
def test_evaluation_takes_every_example_once_and_as_many_batches_everywhere(
    total: int, batch_size: int, world_size: int
) -> None:
    if total < world_size:
        with pytest.raises(DataError, match="do not give one on each"):
            Part(total, batch_size, world_size=world_size)
        return
    ranks = [Part(total, batch_size, rank=rank, world_size=world_size).batches(3) for rank in range(world_size)]
    assert sorted(index for batches in ranks for batch in batches for index in batch) == list(range(total))
    assert len({len(batches) for batches in ranks}) == 1
    assert all(1 <= len(batch) <= max(2, batch_size) for batches in ranks for batch in batches)


def test_processes_share_the_batches_of_one_process() -> None:
    alone = Part(50, 8, train=True, seed=1).batches(2)
    two = [Part(50, 4, train=True, seed=1, rank=rank, world_size=2).batches(2) for rank in (0, 1)]
    assert [a + b for a, b in zip(*two, strict=True)] == alone
    assert len(alone) == 6
    assert len({index for batch in alone for index in batch}) == 48
    assert Part(50, 8, train=True, seed=1).batches(3) != alone


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 4), st.integers(1, 3), st.integers(1, 30))
def test_files_are_read_one_after_another_and_every_example_once(
    sizes: list[int], batch_size: int, world_size: int, buffer: int
) -> None:
    total = sum(sizes)
    if total < batch_size * world_size:
        return
    of = np.repeat(np.arange(len(sizes)), sizes)
    shards = Shards([Path(f"{number}.tar") for number in range(len(sizes))], of, buffer)
    parts = [Part(total, batch_size, True, 1, rank, world_size, shards) for rank in range(world_size)]
    taken = [[index for batch in part.batches(2) for index in batch] for part in parts]
    whole = [index for own in taken for index in own]
    assert len(set(whole)) == len(whole) == total // (batch_size * world_size) * batch_size * world_size
    size = max(1, buffer // batch_size) * batch_size
    files = [[set(of[own[first : first + size]].tolist()) for first in range(0, len(own), size)] for own in taken]
    for windows in files:  # neighbours share at most one file
        assert sum(map(len, windows)) <= len(set().union(*windows)) + len(windows) - 1
    assert sum(len(set().union(*windows)) for windows in files) <= len(sizes) + world_size - 1


def test_the_order_of_files_and_of_their_examples_is_new_in_each_epoch() -> None:
    shards = Shards([Path(name) for name in "abcde"], np.repeat(np.arange(5), 8), buffer=16)
    part = Part(40, 4, train=True, seed=1, shards=shards)
    first, second = part.batches(0), part.batches(1)
    files = [
        [sorted({index // 8 for batch in epoch[at : at + 4] for index in batch}) for at in (0, 4, 8)]
        for epoch in (first, second)
    ]
    assert [len(window) for epoch in files for window in epoch] == [2, 2, 1] * 2
    assert files[0] != files[1]
    assert [index for batch in first for index in batch][:16] != sorted(index for batch in first[:4] for index in batch)
    assert part.batches(0) == first
    assert [part.windows(start)[0] for start in (0, 5)] == [slice(0, 4), slice(5, 8)]
    with pytest.raises(DataError, match="shuffle_buffer is for shards"):
        shards_of(Numbers(), 16)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_drawn_depends_on_seed_epoch_and_example_alone(workers: int) -> None:
    whole = drawn(loader(), 1)
    mine = loader(workers=workers)
    drawn(mine, 0)
    assert drawn(mine, 1) == whole
    assert drawn(mine, 0) != whole
    assert drawn(loader(seed=6), 1) != whole
    by_example = {index: chance for batch in whole for index, *chance in zip(*batch, strict=True)}
    halves = [batch for rank in (0, 1) for batch in drawn(loader(batch_size=2, rank=rank, world_size=2), 1)]
    assert {index: chance for batch in halves for index, *chance in zip(*batch, strict=True)} == by_example
    assert len({chance[0] for chance in by_example.values()}) == 20


def test_global_generators_are_left_alone() -> None:
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    drawn(loader())
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_restored_loader_goes_on_at_the_next_batch(workers: int) -> None:
    whole = drawn(loader(), 4)
    first = loader(workers=workers)
    first.set_epoch(4)
    for _, _ in zip(range(2), first, strict=False):
        pass
    state = first.state_dict()
    second = loader(batch_size=2, world_size=2, workers=workers) if workers else loader()
    second.load_state_dict(state)
    if not workers:  # as many processes as before
        assert drawn(second, 4) == whole[2:]
        assert drawn(second, 5) == drawn(loader(), 5)
    else:  # on two processes: the first half of each batch
        assert drawn(second, 4) == [[column[:2] for column in batch] for batch in whole[2:]]


def test_a_state_of_other_batches_is_refused() -> None:
    with pytest.raises(DataError, match=r"middle of an epoch: global_batch_size was 4 and is 5\."):
        loader(batch_size=5).load_state_dict(loader().state_dict())


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_example_is_an_error(workers: int) -> None:
    with pytest.raises(DataError, match=r"^number 7 is broken$"):
        drawn(loader(broken=[7], workers=workers))


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_examples_are_skipped_up_to_a_limit(workers: int) -> None:
    mine = loader(broken=[7, 3], workers=workers, on_broken="skip", max_broken=2)
    with pytest.warns(UserWarning, match=r"Skipped 2 of at most 2: number \d is broken"):
        first = drawn(mine)
    assert {index for batch in first for index in batch[0]} == set(range(20)) - {3, 7}
    drawn(mine, 1)  # the same ones do not count again
    assert set(mine.broken) == {3, 7}
    mine = loader(broken=[7, 3], workers=workers, on_broken="skip", max_broken=1)
    with pytest.raises(DataError, match=r"More than max_broken=1 broken examples; the last: number"):
        drawn(mine)


def test_a_batch_without_a_whole_example_is_left_out() -> None:
    mine = loader(train=False, broken=[4, 5, 6, 7], on_broken="skip")
    assert [batch[0] for batch in drawn(mine)] == [[*range(4)], *([*range(i, i + 4)] for i in (8, 12, 16))]


@pytest.mark.parametrize("batch_size", [0, 21])
def test_too_few_examples(batch_size: int) -> None:
    with pytest.raises(
        DataError, match=r"batch_size must be at least 1|20 examples do not fill one batch of 21 on each"
    ):
        loader(batch_size=batch_size)


@pytest.mark.parametrize("train", [True, False])
def test_data_of_which_nothing_can_be_read_is_an_error(train: bool) -> None:
    with pytest.raises(DataError, match=r"None of the examples can be read; the last: number \d+ is broken"):
        drawn(loader(train=train, broken=range(20), on_broken="skip", max_broken=None))
