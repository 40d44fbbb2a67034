"""Labelled images of any size from class folders, tars, WebDataset, Hugging Face and torchvision, read when needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from ensemblenet.data.files import FileReader
from ensemblenet.data.image_files import IMAGE_SUFFIXES, check_view, decode_image
from ensemblenet.data.image_sets import ImageSet, open_images
from ensemblenet.data.loading import OnBroken
from ensemblenet.data.module import DataModule, Split
from ensemblenet.data.normalizing import Erased, NormalizeBytes
from ensemblenet.data.remote import RemoteFile, checked_place
from ensemblenet.data.tars import TarFile
from ensemblenet.errors import DataError

__all__ = ["ImageData"]

_LONGEST = 16  # times the shorter side
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ImageData(DataModule):
    """Labelled images with timm's readers and transforms, decoded by workers when they are needed.

    Batches hold normalized images (N, 3, S, S), float32, and labels (N,), int64. Workers give bytes, a quarter of the
    memory, and they are normalized where they are used: by Lightning's trainer on its device. A batch depends on the
    seed, the epoch and its number alone. Several processes share a global batch of `batch_size` times their number, and
    in evaluation no image comes twice.

    Args:
        folder: of the data, or its URL (`https://`, `s3://`, `gs://`, `hf://`), whose files are kept on this machine;
            see [`ensemblenet.data.remote`][].
        dataset: "" for class folders: `train/CLASS/*.jpg` and `val/CLASS/*.jpg` at any depth, or `train.tar` and
            `val.tar` that hold the same; `wds/` for WebDataset shards (an image and a `.cls` for each sample;
            `classes.txt` may name the classes, one a line); `hfds/NAME` for a name that `datasets.load_dataset` takes,
            or a folder; `hfds/` alone for Parquet files in `folder`; `torch/NAME` for torchvision's sets, see
            `timm.data.create_dataset`.
        train: the training split: a name, or for `wds/` a pattern such as `train-*.tar` or `train-{0000..1023}.tar`;
            also a URL.
        val: the validation split.
        test: the test split; None takes the validation split.
        image_size: S.
        batch_size: training images of a batch, of each process; an epoch leaves out those that fill no batch.
        eval_batch_size: images of a batch in evaluation; None takes twice as many as in training.
        num_workers: processes that decode; 0 decodes in the main process.
        augmentation: arguments of `timm.data.create_transform` for training, such as `auto_augment`, `color_jitter`,
            `scale`, `re_prob` or `no_aug`. Without any: random resized crops, flips, and timm's colour jitter.
        crop_pct: in evaluation the shorter side is resized to S / crop_pct, and a centred square is cut out.
        interpolation: of resizing in evaluation, and in training unless `augmentation` names another.
        mean: of each channel, to normalize with; those of ImageNet by default.
        std: standard deviation of each channel.
        on_broken: "error" or "skip", for an image that cannot be decoded; a skipped one is left out, counted and named.
        max_broken: how many images of a split may be skipped.
        reader: arguments of timm's reader, such as `input_key` and `target_key` for `hfds/`; for class folders
            `class_map` alone: numbers of classes by name, or a file with a name a line.
        seed: of order and augmentation; None takes the run's own.
        shuffle_buffer: how many training images are shuffled together, of each process: the files are then read one
            after another, in a new order each epoch, and need not all fit on this machine. None shuffles all images.
        draft: whether JPEGs of training are decoded at a half, a quarter or an eighth of their size, where the shorter
            side is still S / crop_pct: less work for large images, and coarser small crops.

    Raises:
        DataError: at setup, what is wrong with the data; while loading, which image is broken.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> for name in ("train/cat/0.png", "train/dog/0.png", "val/cat/1.png", "val/dog/1.png"):
        ...     (folder / name).parent.mkdir(parents=True, exist_ok=True)
        ...     Image.new("RGB", (40, 30)).save(folder / name)
        >>> data = ImageData(folder, image_size=16, batch_size=2, num_workers=0)
        >>> data.setup("fit")
        >>> data.classes, [tuple(x.shape) for x in next(iter(data.train_dataloader()))]
        (['cat', 'dog'], [(2, 3, 16, 16), (2,)])
    """

    def __init__(
        self,
        folder: str | Path,
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
        shuffle_buffer: int | None = None,
        draft: bool = False,
    ) -> None:
        check_view(image_size, crop_pct, std)
        super().__init__(
            batch_size, eval_batch_size or 2 * batch_size, num_workers, on_broken, max_broken, seed, shuffle_buffer
        )
        self.folder = checked_place(folder)
        self.dataset = dataset
        self.splits: dict[Split, str] = {"train": train, "val": val, "test": test or val}
        for split in self.splits.values():
            checked_place(split)
        self.reader = reader or {}
        self.preprocessing = {
            "input_shape": [3, image_size, image_size],
            "mean": list(mean),
            "std": list(std),
            "interpolation": interpolation,
            "crop_pct": crop_pct,
        }
        shape = (3, image_size, image_size)
        evaluation = _transform(shape, self.preprocessing, is_training=False)
        training = _transform(shape, self.preprocessing, is_training=True, **(augmentation or {}))
        self.finish = NormalizeBytes.of(self.preprocessing)
        self.at_least = math.ceil(image_size / crop_pct) if draft else None
        self.augments = not (augmentation or {}).get("no_aug")
        self.transforms = {"train": training, "val": evaluation, "test": evaluation}

    def open_split(self, split: Split) -> TransformedImages:
        """Find the images of a split and their labels."""
        if split == "test" and self.splits["test"] == self.splits["val"]:
            return self.examples("val")
        place, fit = self.splits[split], self.shuffle_buffer is None
        images = open_images(self.folder, self.dataset, place, self.classes, split == "train", self.reader, fit)
        classes = images.classes
        assert classes is not None
        unseen = set(range(len(classes))) - set(images.labels.tolist())
        if split == "train" and unseen:
            raise DataError(f"{images.where} holds no images of the class {classes[min(unseen)]!r}.")
        self.classes = classes
        return TransformedImages(images, self.transforms[split], self.at_least if split == "train" else None)

    @property
    def repeats_training(self) -> bool:
        """Whether `augmentation` is `no_aug`."""
        return not self.augments

    @property
    def tests_on_validation(self) -> bool:
        """Whether `test` finds the images of `val`."""
        return self.examples("test").images.where == self.examples("val").images.where

    def example_name(self, split: Split, place: int) -> str:
        """The file of an image after `setup`, or its place in the data where it has no file of its own."""
        return self.examples(split).images.name(place)

    @classmethod
    def file_reader(cls, input_shape: Sequence[int], preprocessing: Mapping[str, Any]) -> FileReader | None:
        """The reader for image files, in grey for a network of one channel."""
        mode = {1: "L", 3: "RGB"}.get(input_shape[0])
        if mode is None:
            return None
        transform = _transform(input_shape, preprocessing, is_training=False)
        read = partial(_read_file, transform=transform, mode=mode)
        return FileReader(NormalizeBytes.of(preprocessing).reader(read), IMAGE_SUFFIXES)


def _read_file(path: Path, transform: Callable[[Image.Image], Tensor], mode: str) -> Tensor:
    return transform(decode_image(lambda: path, f"{path}: the image", mode))


@dataclass(frozen=True)
class TransformedImages:
    """A map-style data set of images as tensors of bytes, with their labels.

    Args:
        images: the images.
        transform: makes a tensor of bytes of one, (C, H, W), with what erases pixels where that is asked for.
        at_least: what the shorter side may be decoded to at least, see [`ensemblenet.data.image_files.decode_image`][].
    """

    images: ImageSet
    transform: Callable[[Image.Image], Tensor | Erased] = field(repr=False)
    at_least: int | None = None

    @property
    def labels(self) -> list[int]:
        """(N,)."""
        return self.images.labels.tolist()

    @property
    def files(self) -> Sequence[Path | RemoteFile | TarFile] | None:
        """What each image lies in, (N,); None where a library reads."""
        return self.images.files

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor | Erased, int]:
        return self.transform(self.images.image(index, self.at_least)), int(self.images.labels[index])


def _transform(
    input_shape: Sequence[int], preprocessing: Mapping[str, Any], **options: Any
) -> Callable[[Image.Image], Any]:
    from timm.data.random_erasing import RandomErasing
    from timm.data.transforms import MaybePILToTensor
    from timm.data.transforms_factory import create_transform  # slow to import

    known = {
        "mean": tuple(preprocessing["mean"]),
        "std": tuple(preprocessing["std"]),
        "interpolation": preprocessing.get("interpolation") or "bilinear",
        "crop_pct": preprocessing.get("crop_pct"),
        "normalize": False,
    }
    shape: Any = tuple(input_shape)
    names = {"re_prob": "probability", "re_mode": "mode", "re_count": "max_count", "re_num_splits": "num_splits"}
    erasing = {to: options[name] for name, to in names.items() if name in options}
    others = {name: option for name, option in options.items() if name not in names}
    erases = erasing.get("probability") and not options.get("no_aug")  # as timm's own transform
    try:
        erase = _Erase(RandomErasing(device="cpu", **erasing)) if erases else None
        transform: Any = create_transform(shape, **(known | others))
        if isinstance(transform.transforms[-1], MaybePILToTensor):
            transform.transforms[-1] = _to_bytes
        return partial(_transformed, transform=transform, erase=erase)
    except (AssertionError, TypeError, ValueError) as error:
        raise DataError(f"timm.data.create_transform does not take {options}: {error}") from error


def _to_bytes(image: Image.Image) -> Tensor:
    """(C, H, W), uint8, as torchvision's `pil_to_tensor` gives it, in half the time.

    The memory is that of (H, C, W): a batch is put together row by row, not pixel by pixel.
    """
    channels = len(image.getbands())
    rows = image.tobytes("raw", f"{image.mode};L" if channels > 1 else image.mode)
    return torch.frombuffer(bytearray(rows), dtype=torch.uint8).view(image.height, channels, -1).transpose(0, 1)


@dataclass(frozen=True)
class _Erase:
    """Draws what timm's random erasing puts into a normalized image, and leaves the image as bytes."""

    erase: Callable[[Tensor], Tensor]

    def __call__(self, pixels: Tensor) -> Erased:
        drawn = self.erase(torch.full(pixels.shape, math.nan)).flatten(1)  # (C, H W)
        where = drawn[0].isnan().logical_not_().nonzero().flatten()
        return Erased(pixels, where.int(), drawn[:, where].T.contiguous())


def _transformed(
    image: Image.Image, transform: Callable[[Image.Image], Tensor], erase: _Erase | None = None
) -> Tensor | Erased:
    """An image as an input; of one that is extremely long the middle, which is all that evaluation looks at.

    Resizing the shorter side would else make 5 million pixels of a row of 20,000, for each pixel of the height. Random
    crops of usual shape do not fit such images: there, too, the middle is what training gets.
    """
    width, height = image.size
    longest = _LONGEST * min(width, height)
    if max(width, height) > longest:
        left, top = max(0, width - longest) // 2, max(0, height - longest) // 2
        image = image.crop((left, top, width - left, height - top))
    pixels = transform(image)
    return pixels if erase is None else erase(pixels)
