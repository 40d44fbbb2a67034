"""Shards split over processes and workers, shuffled, resumed in the middle of an epoch."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shards import write

from ensemblenet.data.records import RecordLoader, Share
from ensemblenet.data.tfrecord import Shard, index_shards
from ensemblenet.errors import DataError


def decode(records, chance):
    return [int(record.data) for record in records]


def make(folder, sizes):
    numbers = itertools.count()
    paths = [write(folder / f"{i:03}.tfrecord", [b"%d" % next(numbers) for _ in range(n)]) for i, n in enumerate(sizes)]
    return index_shards([str(path) for path in paths])


@pytest.fixture
def shards(tmp_path):
    return make(tmp_path, [7, 0, 13, 1, 9, 20])  # 50 records


def epoch(loader, number=0):
    loader.set_epoch(number)
    return list(loader)


def flat(batches):
    return [number for batch in batches for number in batch]


@settings(deadline=None, max_examples=200)
@given(
    total=st.integers(0, 200),
    batch_size=st.integers(1, 9),
    world_size=st.integers(1, 5),
    num_workers=st.integers(0, 4),
    train=st.booleans(),
)
def test_shares_are_disjoint_and_complete(
    total: int, batch_size: int, world_size: int, num_workers: int, train: bool
) -> None:
    shares = [Share(batch_size, train, 1, 0, rank, world_size, num_workers) for rank in range(world_size)]
    taken = []
    for share in shares:
        borders = [share.worker_borders(total, worker) for worker in range(max(1, num_workers))]
        sizes = [end - begin for own in borders for begin, end in itertools.pairwise(own)]
        assert [len(own) - 1 for own in borders] == share.batches(total)
        assert all(0 < size <= max(batch_size, 2) for size in sizes)
        assert not train or set(sizes) <= {batch_size}
        assert max(share.batches(total)) - min(share.batches(total)) <= 1
        taken += [number for own in borders for number in range(own[0], own[-1])]
    assert len({sum(share.batches(total)) for share in shares}) == 1  # else a reduction would wait for ever
    assert len(set(taken)) == len(taken)
    if train:
        assert total - len(taken) < batch_size * world_size
    elif total >= world_size:
        assert sorted(taken) == list(range(total))
    else:
        assert not taken  # the loader says so


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 0), (1, 2), (3, 0), (2, 3)])
def test_every_record_is_read_once_over_ranks_and_workers(
    shards: list[Shard], world_size: int, num_workers: int
) -> None:
    share = Share(4, world_size=world_size, num_workers=num_workers)
    loaders = [RecordLoader(shards, decode, replace(share, rank=rank)) for rank in range(world_size)]
    batches = [epoch(loader) for loader in loaders]
    assert [len(found) for found in batches] == [len(loader) for loader in loaders]
    assert sorted(flat(itertools.chain(*batches))) == list(range(50))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_shuffles_and_takes_whole_batches(shards: list[Shard], num_workers: int) -> None:
    loader = RecordLoader(shards, decode, Share(8, train=True, shuffle_buffer=10, num_workers=num_workers))
    first, again, second = epoch(loader, 0), epoch(loader, 0), epoch(loader, 1)
    assert first == again
    assert first != second
    assert [len(batch) for batch in first] == [8] * 6
    assert len(set(flat(first))) == 48
    assert flat(first) != sorted(flat(first))


def test_the_order_depends_on_the_seed(shards: list[Shard]) -> None:
    orders = [epoch(RecordLoader(shards, decode, Share(8, True, 10, seed))) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_a_buffer_larger_than_the_data_mixes_all_of_it(tmp_path: Path) -> None:
    shards = make(tmp_path, [400])
    order = flat(epoch(RecordLoader(shards, decode, Share(400, True, shuffle_buffer=1000))))
    assert sorted(order) == list(range(400))
    moved = sum(abs(place - number) for place, number in enumerate(order)) / 400
    assert moved == pytest.approx(400 / 3, rel=0.15)  # what a uniform permutation has on average


def test_a_buffer_moves_a_record_forward_by_no_more_than_its_size(tmp_path: Path) -> None:
    order = flat(epoch(RecordLoader(make(tmp_path, [400]), decode, Share(400, True, shuffle_buffer=20))))
    assert all(number < place + 20 for place, number in enumerate(order))


@pytest.mark.parametrize("num_workers", [0, 1, 3])
@pytest.mark.parametrize("consumed", [0, 5, 11, 12])
def test_a_restored_loader_goes_on_at_the_next_batch(shards: list[Shard], num_workers: int, consumed: int) -> None:
    share = Share(4, train=True, shuffle_buffer=5, seed=3, num_workers=num_workers)
    loader = RecordLoader(shards, decode, share)
    loader.set_epoch(2)
    batches = iter(loader)
    before = list(itertools.islice(batches, consumed))
    state = loader.state_dict()
    assert state["consumed"] == consumed
    rest = list(batches)

    restored = RecordLoader(shards, decode, share)
    restored.load_state_dict(state)
    restored.set_epoch(2)
    if consumed < 12:
        assert list(restored) == rest
    whole = epoch(RecordLoader(shards, decode, share), 2)
    assert before + rest == whole
    assert epoch(restored, 3) == epoch(loader, 3)


def test_a_state_of_other_data_is_refused(shards: list[Shard]) -> None:
    loader = RecordLoader(shards, decode, Share(4, True))
    other = RecordLoader(shards, decode, Share(5, True, num_workers=1))
    with pytest.raises(DataError, match="batch_size was 4 and is 5, num_workers was 0 and is 1"):
        other.load_state_dict(loader.state_dict())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_damaged_records_are_errors_or_skipped_and_counted(shards: list[Shard], num_workers: int) -> None:
    path, offset = shards[2].path, int(shards[2].offsets[5])
    data = bytearray(Path(path).read_bytes())
    data[offset + 12] ^= 1
    Path(path).write_bytes(data)
    share = Share(5, num_workers=num_workers)
    with pytest.raises(DataError, match=rf"^{path}: the record at byte {offset} is damaged: [^\n]*$"):
        epoch(RecordLoader(shards, decode, share))
    loader = RecordLoader(shards, decode, share, "skip")
    warns = pytest.warns(UserWarning, match="Skipped") if num_workers == 0 else nullcontext()  # workers warn elsewhere
    with warns:
        assert sorted(flat(epoch(loader))) == [number for number in range(50) if number != 12]
    assert loader.skipped == 1


def test_too_few_records(shards: list[Shard]) -> None:
    with pytest.raises(DataError, match="50 records do not fill one batch of 30 on 2 process"):
        RecordLoader(shards, decode, Share(30, True, world_size=2))


@pytest.mark.parametrize("option", [{"batch_size": 0}, {"shuffle_buffer": 0}, {"num_workers": -1}])
def test_numbers_out_of_range(option: dict[str, Any]) -> None:
    [name] = option
    with pytest.raises(DataError, match=f"{name} must be at least"):
        Share(**{"batch_size": 1} | option)
