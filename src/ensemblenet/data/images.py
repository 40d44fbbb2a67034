"""Labelled images of any size, read from where they lie: class folders, tars, WebDataset, Hugging Face, torchvision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from PIL import Image
from torch import Tensor

from ensemblenet.data.classes import KnownClasses, training_data_if_any
from ensemblenet.data.image_sets import ImageSet, open_images
from ensemblenet.data.loading import ExampleLoader, OnBroken, Part
from ensemblenet.data.tensors import DataError

__all__ = ["ImageData"]

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ImageData(KnownClasses, LightningDataModule):
    """Labelled images through timm's readers and transforms, decoded by workers as they are needed.

    Batches hold images (N, 3, S, S), normalised, float32, and labels (N,), int64. What a batch holds depends on the
    seed, the epoch and the number of the batch alone; several processes share a global batch of their number times
    `batch_size`, and in evaluation no image comes twice.

    Args:
        folder: where the data lies.
        dataset: "" for class folders: `train/CLASS/*.jpg` and `val/CLASS/*.jpg`, or `train.tar` and `val.tar` that hold
            the same; `wds/` for WebDataset shards on a local disk (an image and a `.cls` for each sample; `classes.txt`
            may name the classes, one a line); `hfds/NAME` for what `datasets.load_dataset` knows, a folder of Parquet
            files too; `torch/NAME` for torchvision's sets, see `timm.data.create_dataset`.
        train: the training split: a name, or for `wds/` a pattern such as `train-*.tar`.
        val: the validation split.
        test: the test split; None takes the validation split.
        image_size: S.
        batch_size: training images a step, of each process; an epoch leaves out what fills no batch.
        eval_batch_size: images of a batch in evaluation; None takes twice as many as in training.
        num_workers: processes that decode; 0 decodes in the main process.
        augmentation: arguments of `timm.data.create_transform` for training, such as `auto_augment`, `color_jitter`,
            `scale`, `re_prob` or `no_aug`. Without any: random resized crops, flips, and timm's colour jitter.
        crop_pct: in evaluation the shorter side is resized to S / crop_pct, and a centred square is cut out.
        interpolation: of resizing in evaluation, and in training unless `augmentation` names another.
        mean: of each channel, to normalise with; those of ImageNet by default.
        std: standard deviation of each channel.
        on_broken: whether an image that cannot be decoded is an "error", or "skip": left out, counted and named.
        max_broken: how many images of a split may be skipped.
        reader: arguments of timm's reader, such as `input_key` and `target_key` for `hfds/`.
        seed: of order and augmentation; None takes the run's own.

    Raises:
        DataError: at setup, what is wrong with the data; while loading, which image is broken.
    """

    def __init__(
        self,
        folder: Path,
        dataset: str = "",
        train: str = "train",
        val: str = "val",
        test: str | None = None,
        image_size: int = 224,
        batch_size: int = 256,
        eval_batch_size: int | None = None,
        num_workers: int = 2,
        augmentation: dict[str, Any] | None = None,
        crop_pct: float = 0.875,
        interpolation: Literal["bilinear", "bicubic"] = "bicubic",
        mean: tuple[float, float, float] = _IMAGENET_MEAN,
        std: tuple[float, float, float] = _IMAGENET_STD,
        on_broken: OnBroken = "error",
        max_broken: int = 100,
        reader: dict[str, Any] | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.dataset = dataset
        self.splits = {"train": train, "val": val, "test": test or val}
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or 2 * batch_size
        self.num_workers = num_workers
        self.on_broken: OnBroken = on_broken
        self.max_broken = max_broken
        self.reader = reader or {}
        self.seed = seed
        self.preprocessing = {
            "input_shape": [3, image_size, image_size],
            "mean": list(mean),
            "std": list(std),
            "interpolation": interpolation,
            "crop_pct": crop_pct,
        }
        self.transforms = {
            "eval": _transform(self.preprocessing, is_training=False),
            "train": _transform(self.preprocessing, is_training=True, **(augmentation or {})),
        }
        self._found: dict[str, ImageSet] = {}
        self._train_loader: ExampleLoader | None = None
        self._state: dict[str, Any] = {}

    def setup(self, stage: str | None = None) -> None:
        """Find the images and their labels, once, by the expected classes, or else those of the training split."""
        if self.seed is None:
            self.seed = torch.initial_seed() % 2**32
        wanted = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}.get(stage or "", tuple(self.splits))
        if "train" not in wanted:
            with training_data_if_any():
                self._images("train")
        for split in wanted:
            self._images(split)

    def _images(self, split: str) -> ImageSet:
        name = self.splits[split]
        if name not in self._found:
            images = open_images(self.folder, self.dataset, name, self.classes, split == "train", self.reader)
            classes = images.classes or [str(label) for label in range(int(images.labels.max()) + 1)]
            if split == "train":
                _refuse_unseen(images, classes)
            self.classes, self._found[name] = classes, images
        return self._found[name]

    def description(self) -> dict[str, Any]:
        """What a trained network needs to be told of its data."""
        return {"classes": self.classes, "preprocessing": self.preprocessing}

    def example_name(self, split: str, place: int) -> str:
        """What to call an image of a split ("train", "val" or "test"): its file, where it has one of its own."""
        return self._images(split).name(place)

    def train_dataloader(self) -> ExampleLoader:
        """Shuffled and augmented batches, in an order that depends on the seed and the epoch."""
        if self._train_loader is None:
            self._train_loader = self._loader("train")
            if self._state:
                self._train_loader.load_state_dict(self._state)
        return self._train_loader

    def val_dataloader(self) -> ExampleLoader:
        """Validation batches, in order."""
        return self._loader("val")

    def test_dataloader(self) -> ExampleLoader:
        """Test batches, in order."""
        return self._loader("test")

    # Lightning restores a loader's own state only if nothing has asked for the loader before, as schedules do.

    def state_dict(self) -> dict[str, Any]:
        """Where training is in the data, for a checkpoint."""
        return {} if self._train_loader is None else self._train_loader.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there, also in the middle of an epoch."""
        self._state = state_dict
        if self._train_loader is not None and state_dict:
            self._train_loader.load_state_dict(state_dict)

    def _loader(self, split: str) -> ExampleLoader:
        train = split == "train"
        images = self._images(split)
        processes = {}
        if self.trainer is not None:
            processes = {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}
        part = Part(
            len(images), self.batch_size if train else self.eval_batch_size, train, seed=self.seed or 0, **processes
        )
        examples = _Transformed(images, self.transforms["train" if train else "eval"])
        return ExampleLoader(examples, part, self.num_workers, self.on_broken, self.max_broken)


@dataclass(frozen=True)
class _Transformed:
    """Images as tensors, with their labels."""

    images: ImageSet
    transform: Callable[[Image.Image], Tensor] = field(repr=False)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images.image(index)), int(self.images.labels[index])


def _transform(preprocessing: dict[str, Any], **options: Any) -> Callable[[Image.Image], Tensor]:
    from timm.data.transforms_factory import create_transform  # slow to import

    known = {**preprocessing, "input_size": tuple(preprocessing["input_shape"])}
    del known["input_shape"]
    try:
        return create_transform(**(known | options))  # pyright: ignore[reportReturnType]  in no mode that we ask for
    except (AssertionError, TypeError, ValueError) as error:
        raise DataError(f"timm.data.create_transform does not take {options}: {error}") from error


def _refuse_unseen(images: ImageSet, classes: Sequence[str]) -> None:
    unseen = sorted(set(range(len(classes))) - set(images.labels.tolist()))
    if unseen:
        raise DataError(f"{images.where} holds no images of the class {classes[unseen[0]]!r}.")
