"""MNIST-1D, generated."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from ensemblenet.data import MNIST1D
from ensemblenet.data.mnist1d import generate_mnist1d
from ensemblenet.errors import DataError


def test_splits_have_their_sizes_and_share_no_example() -> None:
    splits = generate_mnist1d((60, 25, 33))
    assert [tuple(x.shape) for x, _ in splits] == [(60, 40), (25, 40), (33, 40)]
    assert len(torch.cat([x for x, _ in splits]).unique(dim=0)) == 118
    assert all(y.dtype == torch.int64 and int(y.min()) >= 0 and int(y.max()) <= 9 for _, y in splits)


def test_the_same_seed_gives_the_same_examples() -> None:
    first, again = generate_mnist1d((50,), seed=1), generate_mnist1d.__wrapped__((50,), seed=1)
    assert torch.equal(first[0][0], again[0][0])
    assert not torch.equal(first[0][0], generate_mnist1d((50,), seed=2)[0][0])


def test_global_generators_are_left_alone() -> None:
    random.seed(1)
    np.random.seed(1)
    expected = random.Random(1).random(), np.random.RandomState(1).rand()
    generate_mnist1d.__wrapped__((20,))
    assert (random.random(), np.random.rand()) == expected


def test_training_batches_are_full_and_shuffled() -> None:
    data = MNIST1D(batch_size=20, num_train=50, num_val=10, num_test=10)
    data.setup()
    torch.manual_seed(0)
    batches = list(data.train_dataloader())
    assert [tuple(x.shape) for x, _ in batches] == [(20, 40), (20, 40)]
    assert not torch.equal(torch.cat([y for _, y in batches]), data.train[1][:40])
    assert torch.equal(torch.cat([y for _, y in data.val_dataloader()]), data.val[1])


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"num_val": 0}, {"num_train": 50}])
def test_bad_sizes(options: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"MNIST1D needs 1 <= batch_size <= num_train.*; got batch_size="):
        MNIST1D(**options)
