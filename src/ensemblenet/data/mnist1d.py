"""MNIST-1D (Greydanus and Kobak 2020), generated on this machine: no download."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import SimpleNamespace

import numpy as np
import torch
from mnist1d.data import get_dataset_args, make_dataset
from torch import Tensor

from ensemblenet.data.module import DataModule, Split
from ensemblenet.data.tensors import TensorExamples
from ensemblenet.errors import DataError

__all__ = ["MNIST1D", "generate_mnist1d"]


class MNIST1D(DataModule):
    """MNIST-1D in three splits: signals of shape (N, 40), float32, and digits of shape (N,), int64.

    The data set as published has 4,000 training examples and 1,000 test examples, and training uses as many.
    Since examples cost nothing, validation and test are larger here: their noise hides small differences.

    Args:
        batch_size: training examples of a batch, of each process; an epoch leaves out those that fill no batch.
        num_train: training examples.
        num_val: validation examples.
        num_test: test examples.
        data_seed: seed of the generator; 42 gives the published data set.

    Example:
        >>> data = MNIST1D(num_train=100, num_val=50, num_test=50, batch_size=20)
        >>> data.setup()
        >>> [tuple(x.shape) for x in next(iter(data.train_dataloader()))]
        [(20, 40), (20,)]
    """

    finds_classes = False  # they are always the digits

    def __init__(
        self,
        batch_size: int = 100,
        num_train: int = 4000,
        num_val: int = 2000,
        num_test: int = 5000,
        data_seed: int = 42,
    ) -> None:
        super().__init__(batch_size, eval_batch_size=1000)
        if min(num_train, num_val, num_test, batch_size) < 1 or batch_size > num_train:
            raise DataError(
                "MNIST1D needs 1 <= batch_size <= num_train, num_val >= 1 and num_test >= 1; got "
                f"batch_size={batch_size}, num_train={num_train}, num_val={num_val}, num_test={num_test}."
            )
        self.sizes = (num_train, num_val, num_test)
        self.classes = [str(digit) for digit in range(10)]
        self.data_seed = data_seed

    def setup(self, stage: str | None = None) -> None:
        """Generate the examples; takes about a second for 3,000."""
        self.train, self.val, self.test = generate_mnist1d(self.sizes, self.data_seed)
        super().setup(stage)

    def open_split(self, split: Split) -> TensorExamples:
        """The examples of a split."""
        return TensorExamples(*getattr(self, split))


@lru_cache(maxsize=2)
def generate_mnist1d(sizes: tuple[int, ...], seed: int = 42) -> list[tuple[Tensor, Tensor]]:
    """Generate one data set and cut it into splits of the given sizes.

    Args:
        sizes: examples of each split.
        seed: seed of the generator. Python's and NumPy's global generators are left as they were.

    Returns:
        For each split the signals (N, 40), float32, and the digits (N,), int64.

    Example:
        >>> [(tuple(x.shape), tuple(y.shape)) for x, y in generate_mnist1d((30, 20))]
        [((30, 40), (30,)), ((20, 40), (20,))]
    """
    samples = 10 * -(-sum(sizes) // 10)  # the generator draws equally many of each digit
    options = vars(get_dataset_args()) | {"seed": seed, "num_samples": samples, "train_split": 1.0}
    with _global_generators_kept():
        data = make_dataset(SimpleNamespace(**options))
    x, y = torch.from_numpy(data["x"]).float(), torch.from_numpy(data["y"]).long()
    total = sum(sizes)
    return list(zip(x[:total].split(sizes), y[:total].split(sizes), strict=True))


@contextmanager
def _global_generators_kept() -> Iterator[None]:
    """Undo what `make_dataset` does to the global generators: it seeds them."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
