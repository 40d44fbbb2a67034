"""Labelled images in Parquet files, as the Hugging Face hub stores them, decoded into memory."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageOps
from rich.progress import track
from torch import Tensor

from ensemblenet.data.classes import class_name, numbered_classes, refuse_other_classes
from ensemblenet.data.files import FileReader
from ensemblenet.data.image_files import IMAGE_SUFFIXES, check_view, decode_image
from ensemblenet.data.module import DataModule, Split
from ensemblenet.data.remote import checked_place, joined, remote_file
from ensemblenet.data.tensors import TensorExamples
from ensemblenet.errors import DataError, first_line

__all__ = ["Normalize", "ParquetImages", "RandomCropFlip", "count_rows", "read_parquet_images"]


class ParquetImages(DataModule):
    """Images from `train.parquet` and `test.parquet`, decoded once into memory.

    Each file has the columns `image` (a struct of `bytes`, an encoded image, and `path`) and `label`
    (integers from 0). The schema's metadata may name the classes under `classes`, separated by commas.
    Batches hold normalized images (N, 3, S, S), float32, and labels (N,), int64.

    Args:
        folder: of the two files, or its URL; see [`ensemblenet.data.remote`][].
        image_size: S; images are cut to a centred square and resized to it. Without it they must all have one
            size already.
        batch_size: training examples of a batch, of each process; an epoch leaves out those that fill no batch.
        num_val: validation examples, which are the last ones of the training file.
        limit_train: number of training examples, which are the first ones of the file; None takes all.
        augment: whether to crop at random, after padding by an eighth of the size, and flip half of the images.

    Raises:
        DataError: at setup: a missing file, a wrong column, a label out of range or an image that cannot be decoded.

    Example:
        >>> import tempfile
        >>> buffer, folder = io.BytesIO(), Path(tempfile.mkdtemp())
        >>> Image.new("RGB", (12, 8)).save(buffer, "PNG")
        >>> rows = [{"image": {"bytes": buffer.getvalue()}, "label": number % 2} for number in range(6)]
        >>> for split in ("train", "test"):
        ...     pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}.parquet")
        >>> data = ParquetImages(folder, image_size=8, batch_size=4, num_val=2)
        >>> data.setup()  # doctest: +NORMALIZE_WHITESPACE
        <BLANKLINE>
        >>> data.classes, [tuple(x.shape) for x in next(iter(data.train_dataloader()))]
        (['0', '1'], [(4, 3, 8, 8), (4,)])
    """

    def __init__(
        self,
        folder: str | Path,
        image_size: int | None = None,
        batch_size: int = 128,
        num_val: int = 5000,
        limit_train: int | None = None,
        augment: bool = True,
    ) -> None:
        if image_size is not None:
            check_view(image_size)
        super().__init__(batch_size, eval_batch_size=500)
        self.folder = checked_place(folder)
        self.image_size = image_size
        self.num_val = num_val
        self.limit_train = limit_train
        self.augment = augment

    def open_split(self, split: Split) -> TensorExamples:
        """Decode the images of a split, and normalize them as the training images."""
        if split == "train":
            return self._open_train()
        normalize = self.examples("train").transform.normalize
        if split == "test":
            path, rows, classes = joined(self.folder, "test.parquet"), slice(None), self.classes
        else:
            path, rows, classes = joined(self.folder, "train.parquet"), slice(-self.num_val, None), None
        images, labels, _ = read_parquet_images(path, self.image_size, rows, classes)
        return TensorExamples(images, labels, _Transform(normalize))

    def _open_train(self) -> TensorExamples:
        path = joined(self.folder, "train.parquet")
        rows = count_rows(path)
        num_train = min(rows - self.num_val, rows if self.limit_train is None else self.limit_train)
        if num_train < self.batch_size or self.num_val < 1:
            raise DataError(
                f"{path} has {rows:,} rows: too few for num_val={self.num_val}, "
                f"limit_train={self.limit_train} and batch_size={self.batch_size}."
            )
        images, labels, self.classes = read_parquet_images(path, self.image_size, slice(num_train), self.classes)
        normalize = Normalize.of(images)
        self.preprocessing = {
            "input_shape": list(images.shape[1:]),
            "mean": (normalize.mean.flatten() / 255).tolist(),
            "std": (normalize.std.flatten() / 255).tolist(),
            "interpolation": "box",
            "crop_pct": 1.0,
        }
        crop = RandomCropFlip(padding=images.shape[-1] // 8) if self.augment else None
        return TensorExamples(images, labels, _Transform(normalize, crop))

    @property
    def repeats_training(self) -> bool:
        """Whether images are not cut out at random."""
        return not self.augment

    @classmethod
    def file_reader(cls, input_shape: Sequence[int], preprocessing: Mapping[str, Any]) -> FileReader:
        """The reader for image files, which cuts and resizes them as it does those of Parquet files."""
        mean, std = (255 * torch.tensor(preprocessing[name]).view(-1, 1, 1) for name in ("mean", "std"))
        _, height, width = input_shape
        return FileReader(partial(_read_file, size=(width, height), normalize=Normalize(mean, std)), IMAGE_SUFFIXES)


def _read_file(path: Path, size: tuple[int, int], normalize: Normalize) -> Tensor:
    return normalize(_pixels(decode_image(lambda: path, f"{path}: the image"), size))


@dataclass(frozen=True)
class _Transform:
    """Cut out at random, if asked, and normalize."""

    normalize: Normalize
    crop: RandomCropFlip | None = None

    def __call__(self, images: Tensor) -> Tensor:
        return self.normalize(images if self.crop is None else self.crop(images))


@dataclass(frozen=True)
class Normalize:
    """Bytes to numbers of mean 0 and standard deviation 1 in each channel.

    Args:
        mean: of each channel, (C, 1, 1), in [0, 255].
        std: standard deviation of each channel, (C, 1, 1).

    Example:
        >>> images = torch.tensor([0, 200], dtype=torch.uint8).view(2, 1, 1, 1)
        >>> Normalize.of(images)(images).flatten()
        tensor([-1.,  1.])
    """

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, images: Tensor) -> Normalize:
        """With the mean and the standard deviation of images, (N, C, H, W), uint8."""
        levels = torch.arange(256.0)
        counts = torch.stack([channel.flatten().bincount(minlength=256) for channel in images.unbind(1)])
        share = counts / counts.sum(1, keepdim=True)
        mean = (share * levels).sum(1)
        std = (share * (levels - mean[:, None]) ** 2).sum(1).sqrt().clamp(min=1.0)
        return cls(mean.view(-1, 1, 1), std.view(-1, 1, 1))

    def __call__(self, images: Tensor) -> Tensor:
        """(*, C, H, W), uint8, to the same shape in float32."""
        return (images - self.mean) / self.std


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


def __getattr__(name: str) -> Any:
    if name == "Normalise":
        warnings.warn("Normalise(images) is now Normalize.of(images).", DeprecationWarning, stacklevel=2)
        return Normalize.of
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def count_rows(path: Path | str) -> int:
    """The number of rows of a Parquet file, without reading them.

    Raises:
        DataError: no such file, or not a Parquet file.
    """
    return _open(path).metadata.num_rows


def read_parquet_images(
    path: Path | str, image_size: int | None = None, rows: slice = slice(None), classes: Sequence[str] | None = None
) -> tuple[Tensor, Tensor, list[str]]:
    """Decode the images of a file.

    Args:
        path: a Parquet file, or its URL, with the columns `image` and `label`.
        image_size: S, the size to bring images to; None keeps them as they are.
        rows: the rows to decode; a slice without a step.
        classes: names of the training data's classes, where they are known: the file must have the same, if it has any.

    Returns:
        Images (N, 3, S, S), uint8; labels (N,), int64; the classes' names, or their numbers if neither the file nor
        `classes` names any.

    Raises:
        ClassesError: the file names other classes.
        DataError: the file is missing or damaged, or a label or an image of it is.
    """
    table = _read_table(path)
    try:
        labels = torch.tensor(table["label"].to_pylist(), dtype=torch.int64)
    except (RuntimeError, ValueError) as error:  # beyond 64 bits
        raise DataError(f"{path}: a label: {first_line(error)}") from error
    names = (table.schema.metadata or {}).get(b"classes")
    named = [class_name(name) for name in names.decode(errors="replace").split(",")] if names else None
    if named is not None and classes is not None:
        refuse_other_classes(str(path), classes, named)
    classes = list(named or classes or numbered_classes(str(path), labels.numpy()))
    wrong = ((labels < 0) | (labels >= len(classes))).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise DataError(
            f"{path}: labels must be in [0, {len(classes)}), as its metadata or the training data names "
            f"{len(classes)} classes; got {int(labels[row])} in row {row}."
        )
    chosen = range(table.num_rows)[rows]
    encoded = table["image"].slice(chosen.start, len(chosen)).to_pylist()
    images = []
    for row, image in track(
        zip(chosen, encoded, strict=True), f"Decoding {PurePosixPath(path).name}", total=len(chosen), transient=True
    ):
        data = io.BytesIO((image or {}).get("bytes") or b"")
        decoded = decode_image(lambda data=data: data, f"{path}, row {row}: the image")
        images.append(_pixels(decoded, (image_size, image_size) if image_size else decoded.size))
    sizes = {image.shape for image in images}
    if len(sizes) > 1:
        raise DataError(f"{path}: images of {len(sizes)} sizes; give image_size to bring them to one.")
    return torch.stack(images), labels[rows], classes


def _open(path: Path | str) -> pq.ParquetFile:
    if isinstance(path, Path) and not path.is_file():
        raise DataError(f"{path} does not exist; the data folder must hold train.parquet and test.parquet.")
    source = path if isinstance(path, Path) else remote_file(path).open()
    try:
        return pq.ParquetFile(source)
    except Exception as error:  # of damaged bytes Arrow raises nearly any
        raise DataError(f"{path} is not a readable Parquet file: {first_line(error)}") from error


def _read_table(path: Path | str) -> pa.Table:
    file = _open(path)
    schema = file.schema_arrow
    columns = {field.name: field.type for field in schema}
    image, label = columns.get("image", pa.null()), columns.get("label", pa.null())
    kinds = {field.name: field.type for field in image} if pa.types.is_struct(image) else {}
    has_bytes = pa.types.is_binary(kind := kinds.get("bytes", pa.null())) or pa.types.is_large_binary(kind)
    if not has_bytes or not pa.types.is_integer(label):
        raise DataError(
            f"{path} must have the columns image (a struct with the field bytes) and label (integers); "
            f"it has {', '.join(f'{name}: {kind}' for name, kind in columns.items())}."
        )
    try:
        table = file.read(["image", "label"])
    except Exception as error:
        raise DataError(f"{path} is damaged: {first_line(error)}") from error
    if table.num_rows == 0 or table["label"].null_count:
        raise DataError(f"{path} must hold at least one row, and a label in each.")
    return table


def _pixels(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """A centred cut of an image, resized to (width, height): (3, H, W), uint8."""
    if image.size != size:
        image = ImageOps.fit(image, size, Image.Resampling.BOX)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1)
