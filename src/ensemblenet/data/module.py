"""The base class of all data modules: what does not depend on the format of the data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import Subset

from ensemblenet.data.classes import KnownClasses, training_data_if_any
from ensemblenet.data.files import FileReader
from ensemblenet.data.loading import ExampleLoader, OnBroken, Part, ResumableLoader
from ensemblenet.data.shards import shards_of
from ensemblenet.data.tensors import TensorExamples
from ensemblenet.errors import DataError

__all__ = ["DataModule", "Split"]

Split = Literal["train", "val", "test"]

_NEEDED: dict[str | None, tuple[Split, ...]] = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}


class DataModule(KnownClasses, LightningDataModule, ABC):
    """Base class of all data modules.

    A data format is a subclass with `open_split`. All the rest is here: which splits a stage needs, the order of
    training by seed and epoch, shares of processes, resuming within an epoch, and the description for the trained
    network. Batches are pairs of inputs and targets.

    Args:
        batch_size: training examples of a batch, of each process; an epoch leaves out those that fill no batch.
        eval_batch_size: examples of a batch in evaluation; None takes as many as in training.
        num_workers: processes that load; 0 loads in the main process.
        on_broken: "error" or "skip", for an example that raises `DataError`.
        max_broken: how many examples of a split may be skipped; None for any number.
        seed: of order and augmentation; None takes the run's own.
        shuffle_buffer: how many examples of training are shuffled together, of each process, where the files are read
            one after another, in a new order each epoch; see [`ensemblenet.data.shards`][]. None shuffles all.

    Attributes:
        preprocessing: how inputs were made, as plain data; None where there is nothing to say.
        finish: what is left to be done with a batch on the device that uses it, such as to normalize bytes; it leaves a
            finished one as it is. None where workers do all.
        finds_classes: whether the data names its classes. Labels then follow the names that a trained network knows, or
            else those of the training split.

    Example:
        >>> from ensemblenet.data.tensors import TensorExamples
        >>> class Squares(DataModule):
        ...     finds_classes = False
        ...
        ...     def open_split(self, split):
        ...         x = torch.arange(6.0)[:, None]
        ...         return TensorExamples(x, x.square())
        >>> data = Squares(batch_size=2, seed=0)
        >>> data.setup("fit")
        >>> [x.flatten().tolist() for x, y in data.train_dataloader()]
        [[3.0, 2.0], [5.0, 4.0], [0.0, 1.0]]
    """

    finds_classes: ClassVar[bool] = True

    def __init__(
        self,
        batch_size: int,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        on_broken: OnBroken = "error",
        max_broken: int | None = 100,
        seed: int | None = None,
        shuffle_buffer: int | None = None,
    ) -> None:
        super().__init__()
        least = {"num_workers": (num_workers, 0), "max_broken": (max_broken, 0), "shuffle_buffer": (shuffle_buffer, 1)}
        for name, (number, lowest) in least.items():
            if number is not None and number < lowest:
                raise DataError(f"{name} must be at least {lowest}, got {number}.")
        self.shuffle_buffer = shuffle_buffer
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.num_workers = num_workers
        self.on_broken: OnBroken = on_broken
        self.max_broken = max_broken
        self.preprocessing: dict[str, Any] | None = None
        self.finish: Callable[[Any], Any] | None = None
        self._opened: dict[Split, Any] = {}
        self._train_loader: ResumableLoader | None = None
        self._beside: Tensor | None = None
        self._run_seed: int | None = None
        self.seed = seed

    @property
    def seed(self) -> int | None:
        """The seed of order and augmentation; None takes the run's own. Assigning one begins the training data anew."""
        return self._seed

    @seed.setter
    def seed(self, seed: int | None) -> None:
        self._seed = seed
        self._begin_anew()

    def reseed(self, seed: int) -> None:
        """Begin the training data anew for a run of another seed; a seed that the module was given stays."""
        self._run_seed = seed
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._close()
        self._train_loader = None
        self._state: dict[str, Any] = {}

    # -- what a format says

    @abstractmethod
    def open_split(self, split: Split) -> Any:
        """Find the examples of a split; called once for each split.

        Returns:
            A map-style data set, see [`ensemblenet.data.loading.Examples`][]; or what else the format's own
            `make_loader` reads.

        Raises:
            DataError: there is no such split, or it is damaged.
        """

    def make_loader(self, split: Split, **process: int) -> ResumableLoader:
        """A loader of a split.

        Args:
            split: shuffled and augmented if it is "train", else in order.
            process: `seed`, `rank` and `world_size`.
        """
        train, examples = split == "train", self.examples(split)
        shards = None if self.shuffle_buffer is None else shards_of(examples, self.shuffle_buffer)
        part = Part(len(examples), self.batch_size if train else self.eval_batch_size, train, **process, shards=shards)
        beside = self._beside if train else None
        return self._examples_loader(examples, part, beside)

    def _examples_loader(self, examples: Any, part: Part, beside: Tensor | None) -> ExampleLoader:
        return ExampleLoader(examples, part, self.num_workers, self.on_broken, self.max_broken, beside, self.finish)

    @property
    def repeats_training(self) -> bool:
        """Whether an example of training, found by its place, has the same inputs in every epoch: nothing is random."""
        examples, is_usual = self.examples("train"), type(self).make_loader is DataModule.make_loader
        return is_usual and isinstance(examples, TensorExamples) and examples.transform is None

    def example_name(self, split: Split, place: int) -> str:
        """The name of an example after `setup`, such as its file; its number where it has none."""
        return str(place)

    @classmethod
    def file_reader(cls, input_shape: Sequence[int], preprocessing: Mapping[str, Any]) -> FileReader | None:
        """The reader for single files, which makes of a file what the test split would; None where it can be none.

        Args:
            input_shape: of one example, without the batch.
            preprocessing: of this data module or one of an earlier version, as a trained network keeps it.
        """
        return None

    # -- what Lightning and trained networks ask

    def setup(self, stage: str | None = None) -> None:
        """Open the splits that a stage needs, once; for the classes also the training split, if it exists."""
        if stage == "fit":
            self._state = {}  # of an earlier training; a checkpoint is restored after setup
        if stage in ("fit", None) or self._run_seed is None:
            self._run_seed = torch.initial_seed() % 2**32
        needed = _NEEDED.get(stage, ("train", "val", "test"))
        if "train" not in needed and self.finds_classes:
            with training_data_if_any():
                self.examples("train")
        for split in needed:
            self.examples(split)

    def examples(self, split: Split) -> Any:
        """The examples of a split, opened at the first call."""
        if split not in self._opened:
            self._opened[split] = self.open_split(split)
        return self._opened[split]

    @property
    def tests_on_validation(self) -> bool:
        """Whether the test examples are the validation examples, as where the data has no test split."""
        return False

    def keep_examples(self, split: Split, places: Sequence[int]) -> None:
        """Leave only some examples of a split, by their places."""
        self._opened[split] = Subset(self.examples(split), places)

    def expect_classes(self, classes: Sequence[str]) -> None:
        """Give examples the labels that a network was trained on; see [`ensemblenet.data.classes.KnownClasses`][]."""
        if self.finds_classes:
            super().expect_classes(classes)

    def description(self) -> dict[str, Any]:
        """What a trained network keeps of its data, as plain data: `data`, `classes` and `preprocessing`."""
        return {"data": type(self).__name__, "classes": self.classes, "preprocessing": self.preprocessing}

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled and augmented batches, which depend on the seed and the epoch."""
        self._train_loader = self._loader("train")
        if self._state:
            self._train_loader.load_state_dict(self._state)
        return self._train_loader

    def training_in_order(self, rank: int = 0, world_size: int = 1) -> ExampleLoader:
        """Every training example once, in order, with its place in the data as the third part of a batch.

        Only for data that `repeats_training`.

        Args:
            rank: number of this process, which gets its share.
            world_size: number of processes.
        """
        examples = self.examples("train")
        part = Part(len(examples), self.batch_size, rank=rank, world_size=world_size)
        places = torch.arange(len(examples))
        return self._examples_loader(examples, part, places)

    def put_beside(self, values: Tensor) -> None:
        """Have batches of training hold a third part from now on: of each example, by its place, one of `values`.

        Only for data that `repeats_training`.

        Args:
            values: (N, *).

        Example:
            >>> from ensemblenet.data import MNIST1D
            >>> data = MNIST1D(num_train=20, num_val=1, num_test=1, batch_size=5)
            >>> data.setup("fit")
            >>> data.put_beside(data.train[1] % 2)
            >>> all(torch.equal(y % 2, odd) for x, y, odd in data.train_dataloader())
            True
        """
        self._beside = values

    def val_dataloader(self) -> ResumableLoader:
        """Validation batches, in order."""
        return self._loader("val")

    def test_dataloader(self) -> ResumableLoader:
        """Test batches, in order."""
        return self._loader("test")

    def _loader(self, split: Split) -> ResumableLoader:
        process = {"seed": (self._run_seed or 0) if self.seed is None else self.seed}
        if self.trainer is not None:
            process |= {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}
        loader = self.make_loader(split, **process)
        if isinstance(loader, ExampleLoader):
            loader.trainer = self.trainer
        return loader

    def teardown(self, stage: str | None = None) -> None:
        """End the workers of training: Lightning calls it when a stage has ended."""
        if stage in ("fit", None):
            self._close()

    def _close(self) -> None:
        if isinstance(self._train_loader, ExampleLoader):
            self._train_loader.close()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Finish a batch where it is used: Lightning calls it when a batch has arrived on the device."""
        return batch if self.finish is None else self.finish(batch)

    # Lightning restores a loader's own state only if nothing has asked for the loader before, as schedules do.

    def state_dict(self) -> dict[str, Any]:
        """The place of training in the data, for a checkpoint."""
        return {} if self._train_loader is None else self._train_loader.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on at a stored place, also in the middle of an epoch."""
        self._state = state_dict
        if self._train_loader is not None and state_dict:
            self._train_loader.load_state_dict(state_dict)
