"""Labelled images in Parquet files, as the Hugging Face hub stores them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from lightning.pytorch import LightningDataModule
from PIL import Image, ImageOps, UnidentifiedImageError
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader

from ensemblenet.data.classes import KnownClasses, refuse_other_classes
from ensemblenet.data.tensors import DataError, TensorExamples, batch_loader

__all__ = ["Normalise", "ParquetImages", "RandomCropFlip", "count_rows", "read_parquet_images"]


class ParquetImages(KnownClasses, LightningDataModule):
    """Images from `train.parquet` and `test.parquet`, decoded once into memory.

    Each file has the columns `image` (a struct of `bytes`, an encoded image, and `path`) and `label`
    (integers from 0). The schema's metadata may name the classes under `classes`, separated by commas.
    Batches hold normalised images (N, 3, S, S), float32, and labels (N,), int64.

    Args:
        folder: where the two files lie.
        image_size: S; images are cut to a centred square and resized to it. Without it they must all have one
            size already.
        batch_size: training examples a step; the last, smaller batch of an epoch is left out.
        num_val: examples taken from the end of the training file for validation.
        limit_train: use only the first so many training examples.
        augment: crop at random after padding an eighth of the size, and flip half of the images.

    Raises:
        DataError: a missing file, a wrong column, a label out of range or an image that cannot be decoded.
    """

    def __init__(
        self,
        folder: Path,
        image_size: int | None = None,
        batch_size: int = 128,
        num_val: int = 5000,
        limit_train: int | None = None,
        augment: bool = True,
    ) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.image_size = image_size
        self.batch_size = batch_size
        self.num_val = num_val
        self.limit_train = limit_train
        self.augment = augment

    def setup(self, stage: str | None = None) -> None:
        """Decode what has not been decoded yet."""
        if not hasattr(self, "train"):
            self._read()

    def _read(self) -> None:
        path = self.folder / "train.parquet"
        rows = count_rows(path)
        num_train = min(rows - self.num_val, self.limit_train or rows)
        if num_train < self.batch_size or self.num_val < 1:
            raise DataError(
                f"{path} has {rows:,} rows: too few for num_val={self.num_val}, "
                f"limit_train={self.limit_train} and batch_size={self.batch_size}."
            )
        images, labels, self.classes = read_parquet_images(path, self.image_size, slice(num_train), self.classes)
        normalise = Normalise(images)
        self.preprocessing = {
            "input_shape": list(images.shape[1:]),
            "mean": (normalise.mean.flatten() / 255).tolist(),
            "std": (normalise.deviation.flatten() / 255).tolist(),
            "interpolation": "box",
            "crop_pct": 1.0,
        }
        crop = RandomCropFlip(padding=images.shape[-1] // 8)
        augmented = (lambda batch: normalise(crop(batch))) if self.augment else normalise
        self.train = TensorExamples(images, labels, augmented)
        val = read_parquet_images(path, self.image_size, slice(rows - self.num_val, rows))
        test = read_parquet_images(self.folder / "test.parquet", self.image_size, classes=self.classes)
        self.val, self.test = (TensorExamples(*split[:2], normalise) for split in (val, test))

    def description(self) -> dict[str, Any]:
        """What a trained network needs to be told of its data; levels of pixels are shares of 255."""
        return {"classes": self.classes, "preprocessing": self.preprocessing}

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled and augmented batches."""
        return batch_loader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Validation batches, in order."""
        return batch_loader(self.val, 500)

    def test_dataloader(self) -> DataLoader[Any]:
        """Test batches, in order."""
        return batch_loader(self.test, 500)


class Normalise:
    """Bytes to numbers of mean 0 and standard deviation 1 in each channel.

    Args:
        images: what to take mean and deviation from, (N, C, H, W), uint8.
    """

    def __init__(self, images: Tensor) -> None:
        levels = torch.arange(256.0)
        counts = torch.stack([channel.flatten().bincount(minlength=256) for channel in images.unbind(1)])
        share = counts / counts.sum(1, keepdim=True)
        mean = (share * levels).sum(1)
        deviation = (share * (levels - mean[:, None]) ** 2).sum(1).sqrt().clamp(min=1.0)
        self.mean, self.deviation = mean.view(-1, 1, 1), deviation.view(-1, 1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        """(N, C, H, W), uint8, to the same shape in float32."""
        return (images - self.mean) / self.deviation


class RandomCropFlip:
    """Pad with black, cut out the original size at random, and flip every other image, all in one gather.

    Args:
        padding: pixels on each side.

    Example:
        >>> RandomCropFlip(padding=4)(torch.zeros(8, 3, 32, 32, dtype=torch.uint8)).shape
        torch.Size([8, 3, 32, 32])
    """

    def __init__(self, padding: int) -> None:
        self.padding = padding

    def __call__(self, images: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape; each image gets its own crop."""
        n, channels, height, width = images.shape
        padded = torch.nn.functional.pad(images, [self.padding] * 4)
        top, left = torch.randint(2 * self.padding + 1, (2, n, 1))
        rows = top + torch.arange(height)
        columns = left + torch.arange(width)
        columns = torch.where(torch.rand(n, 1) < 0.5, columns.flip(1), columns)
        return padded[
            torch.arange(n).view(-1, 1, 1, 1),
            torch.arange(channels).view(1, -1, 1, 1),
            rows.view(n, 1, height, 1),
            columns.view(n, 1, 1, width),
        ]


def count_rows(path: Path) -> int:
    """The number of rows of a Parquet file, without reading them.

    Raises:
        DataError: no such file, or not a Parquet file.
    """
    return _open(path).metadata.num_rows


def read_parquet_images(
    path: Path, image_size: int | None = None, rows: slice = slice(None), classes: Sequence[str] | None = None
) -> tuple[Tensor, Tensor, list[str]]:
    """Decode a file of images.

    Args:
        path: a Parquet file with the columns `image` and `label`.
        image_size: S, the size to bring images to; None keeps them as they are.
        rows: which rows to decode, without a step.
        classes: of the training data, where they are known: the names that the file must have, if it has any.

    Returns:
        Images (N, 3, S, S), uint8; labels (N,), int64; the classes' names, or their numbers if neither the file nor
        `classes` names any.

    Raises:
        ClassesError: the file names other classes.
        DataError: what is wrong with the file.
    """
    table = _read_table(path)
    labels = torch.tensor(table["label"].to_pylist(), dtype=torch.int64)
    named = _class_names(table)
    if named is not None and classes is not None:
        refuse_other_classes(str(path), classes, named)
    classes = list(named or classes or map(str, range(int(labels.max()) + 1)))
    wrong = ((labels < 0) | (labels >= len(classes))).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise DataError(
            f"{path}: labels must be in [0, {len(classes)}), as its metadata or the training data names "
            f"{len(classes)} classes; got {int(labels[row])} in row {row}."
        )
    chosen = range(table.num_rows)[rows]
    encoded = table["image"].slice(chosen.start, len(chosen)).to_pylist()
    images = [
        _decode(image, f"{path}, row {row}", image_size)
        for row, image in track(
            zip(chosen, encoded, strict=True), f"Decoding {path.name}", total=len(chosen), transient=True
        )
    ]
    sizes = {image.shape for image in images}
    if len(sizes) > 1:
        raise DataError(f"{path}: images of {len(sizes)} sizes; give image_size to bring them to one.")
    return torch.stack(images), labels[rows], classes


def _open(path: Path) -> pq.ParquetFile:
    if not path.is_file():
        raise DataError(f"{path} does not exist; the data folder must hold train.parquet and test.parquet.")
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file: {error}") from error


def _read_table(path: Path) -> pa.Table:
    file = _open(path)
    schema = file.schema_arrow
    columns = {field.name: field.type for field in schema}
    image, label = columns.get("image", pa.null()), columns.get("label", pa.null())
    has_bytes = pa.types.is_struct(image) and "bytes" in [field.name for field in image]
    if not has_bytes or not pa.types.is_integer(label):
        raise DataError(
            f"{path} must have the columns image (a struct with the field bytes) and label (integers); "
            f"it has {', '.join(f'{name}: {kind}' for name, kind in columns.items())}."
        )
    try:
        table = file.read(["image", "label"])
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is damaged: {error}") from error
    if table.num_rows == 0 or table["label"].null_count:
        raise DataError(f"{path} must hold at least one row, and a label in each.")
    return table


def _class_names(table: pa.Table) -> list[str] | None:
    names = (table.schema.metadata or {}).get(b"classes")
    return names.decode().split(",") if names else None


def _decode(encoded: dict[str, Any] | None, where: str, image_size: int | None) -> Tensor:
    try:
        with Image.open(io.BytesIO((encoded or {}).get("bytes") or b"")) as opened:
            image = opened.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise DataError(f"{where}: the image cannot be decoded: {error}") from error
    if image_size is not None and image.size != (image_size, image_size):
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BOX)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1)
