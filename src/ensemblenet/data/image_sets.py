"""Labelled images as timm, torchvision and WebDataset store them, by index."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from ensemblenet.data.classes import in_order, natural_key, refuse_other_classes, refuse_strange_classes
from ensemblenet.errors import ClassesError, DataError

__all__ = ["IMAGE_SUFFIXES", "ImageSet", "decode_image", "open_images"]

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")

_VALIDATION = ("val", "validation", "valid", "test")
_CLASSES = "classes.txt"
_UNDECODABLE = (OSError, EOFError, SyntaxError, ValueError, tarfile.TarError, Image.DecompressionBombError)


@dataclass(frozen=True)
class ImageSet:
    """Labelled images of one split.

    Args:
        where: name of the data, for messages.
        labels: (N,), integers from 0.
        classes: the names of the classes; None where the data names none.
        read: gives an image by index, encoded or decoded.
        name: gives the name of an image by index, for messages.
        numbered: whether the data itself numbers its classes; if not, their names alone count.
    """

    where: str
    labels: np.ndarray
    classes: list[str] | None
    read: Callable[[int], BinaryIO | Image.Image]
    name: Callable[[int], str]
    numbered: bool = True

    def __len__(self) -> int:
        return len(self.labels)

    def labelled(self, classes: Sequence[str], complete: bool) -> ImageSet:
        """The same images with labels by known classes.

        Args:
            classes: the known names, in the order of their labels.
            complete: whether each of them must be here.

        Raises:
            ClassesError: the data has other classes, or numbers them otherwise.
        """
        if self.classes is None:
            if (highest := int(self.labels.max(initial=-1))) >= len(classes):
                raise ClassesError(
                    f"{self.where} has the label {highest}; the training data has {len(classes)} classes."
                )
            return replace(self, classes=list(classes))
        if self.numbered:
            refuse_other_classes(self.where, classes, self.classes)
            return self
        if complete:
            refuse_other_classes(self.where, in_order(classes), in_order(self.classes))
        refuse_strange_classes(self.where, classes, self.classes)
        numbers = {name: number for number, name in enumerate(classes)}
        labels = np.array([numbers[name] for name in self.classes])[self.labels]
        return replace(self, classes=list(classes), labels=labels)

    def image(self, index: int) -> Image.Image:
        """Decode an image to RGB.

        Raises:
            DataError: it cannot be decoded; it names the image.
        """
        return decode_image(lambda: self.read(index), f"{self.where}: the image {self.name(index)}")


def decode_image(source: Callable[[], BinaryIO | Path | Image.Image], what: str, mode: str = "RGB") -> Image.Image:
    """Decode an image, wherever it comes from.

    Args:
        source: gives a file, open or not, or an image that is decoded already.
        what: name of the image, for messages.
        mode: Pillow's name of the colours, such as "RGB" or "L" for grey.

    Raises:
        DataError: it cannot be read or decoded.

    Example:
        >>> decode_image(lambda: io.BytesIO(b"nonsense"), "a.png")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ensemblenet.errors.DataError: a.png cannot be decoded: cannot identify image file ...
    """
    try:
        found = source()
        with found if isinstance(found, Image.Image) else Image.open(found) as image:
            return image.convert(mode)
    except _UNDECODABLE as error:
        raise DataError(f"{what} cannot be decoded: {error}") from error


def open_images(
    folder: Path, dataset: str, split: str, classes: Sequence[str] | None, complete: bool, options: Mapping[str, Any]
) -> ImageSet:
    """Find the images of a split, and their labels.

    Args:
        folder: of the data.
        dataset: "" for class folders, in a folder or a tar; `wds/` for shards of WebDataset; else a name of
            [`timm.data.create_dataset`][], such as `hfds/NAME` or `torch/cifar10`.
        split: its name, a folder or tar in `folder`; for `wds/` a pattern, such as `train-*.tar`.
        classes: the names in the order of their labels; None takes them from the data.
        complete: whether the split must have all of these classes.
        options: arguments of timm's reader.

    Raises:
        ClassesError: the data has other classes.
        DataError: there is no such data, a class is empty, or a label is out of range.
    """
    kind, _, _ = dataset.partition("/")
    openers = {"": _class_folders, "wds": _shards, "torch": _torchvision, "hfds": _hugging_face}
    if kind not in openers:
        raise DataError(f"dataset must begin with one of {', '.join(map(repr, openers))}, got {dataset!r}.")
    images = openers[kind](folder, dataset, split, options)
    images = images if classes is None else images.labelled(classes, complete)
    if not len(images):
        raise DataError(f"{images.where} holds no images.")
    count = len(images.classes) if images.classes is not None else int(images.labels.max()) + 1
    if count < 2:
        raise DataError(f"{images.where} has {count} class; at least 2 are needed, each image in its class's folder.")
    wrong = ((images.labels < 0) | (images.labels >= count)).nonzero()[0]
    if len(wrong):
        index = int(wrong[0])
        raise DataError(
            f"{images.where}: labels must be in [0, {count}), got {int(images.labels[index])} for the image "
            f"{images.name(index)}."
        )
    return images


# -- class folders, in a folder or in a tar


def _class_folders(folder: Path, dataset: str, split: str, options: Mapping[str, Any]) -> ImageSet:
    """Images by timm's reader, sorted here: timm leaves the order of names with equal natural keys to chance."""
    path = _find_split(folder, split)
    is_tar = path.suffix == ".tar"
    in_tar = {"cache_tarinfo": False, "cache_tarfiles": False}  # no pickles; open files must not pass to workers
    reader = _timm_dataset(path, dataset, split, **(in_tar if is_tar else {}), **options).reader
    if not is_tar:
        reader.samples.sort(key=lambda sample: natural_key(sample[0]))
    found = reader.class_name_to_idx if is_tar else reader.class_to_idx
    names = sorted(found, key=found.get)
    if not is_tar:
        _refuse_empty_classes(path, names)
    labels = np.asarray(reader.targets if is_tar else [label for _, label in reader.samples])
    mapped = bool(options.get("class_map"))
    images = ImageSet(str(path), labels, names, lambda index: reader[index][0], reader.filename, numbered=mapped)
    return images if mapped else images.labelled(in_order(names), complete=True)


def _find_split(folder: Path, split: str) -> Path:
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder.")
    names = (split, *_VALIDATION) if split in _VALIDATION else (split,)
    for name in names:
        for path in (folder / name, folder / f"{name}.tar"):
            if path.exists():
                return path
    if list(folder.glob("*.parquet")):
        raise DataError(
            f"{folder} holds Parquet files and neither {split}/ nor {split}.tar: use ensemblenet.data.ParquetImages, "
            f"or dataset=hfds/{folder} for the datasets library."
        )
    raise DataError(f"{folder} holds neither {split}/ nor {split}.tar, with a folder of images for each class.")


def _refuse_empty_classes(path: Path, names: Sequence[str]) -> None:
    """Raise an error for a class folder without images, which timm leaves out silently."""
    for entry in sorted(path.iterdir()):
        is_class = entry.is_dir() and not any(inside.is_dir() for inside in entry.iterdir())
        if is_class and entry.name not in names:
            raise DataError(f"The class {entry} holds no images: fill it or remove it.")


def _timm_dataset(root: Path | None, dataset: str, split: str, **options: Any) -> Any:
    from timm.data.dataset_factory import create_dataset  # slow to import

    try:
        return create_dataset(
            dataset, root=None if root is None else str(root), split=split, search_split=False, **options
        )
    except ImportError as error:
        raise DataError(f"dataset={dataset} needs a library: pip install datasets ({error}).") from error
    except (AssertionError, OSError, RuntimeError, ValueError, TypeError, KeyError, tarfile.TarError) as error:
        raise DataError(f"{dataset or 'Images'} of split {split} in {root}: {error}") from error


# -- data sets of libraries


def _torchvision(folder: Path, dataset: str, split: str, options: Mapping[str, Any]) -> ImageSet:
    images = _timm_dataset(folder, dataset, split, **options)
    labels = getattr(images, "targets", getattr(images, "labels", None))
    if labels is None:
        raise DataError(f"{dataset} does not say its labels; it is none of torchvision's sets for classification.")
    names = getattr(images, "classes", None)
    if names is not None:  # ImageNet's are tuples of synonyms
        names = [name if isinstance(name, str) else ", ".join(name) for name in names]
    return ImageSet(f"{dataset} in {folder}, {split}", np.asarray(labels), names, lambda i: images[i][0], str)


def _hugging_face(folder: Path, dataset: str, split: str, options: Mapping[str, Any]) -> ImageSet:
    reader = _timm_dataset(None, dataset, split, **options).reader
    labels = np.fromiter(reader.iter_targets(), np.int64, len(reader))
    names = sorted(reader.class_to_idx, key=reader.class_to_idx.get) or None
    return ImageSet(f"{dataset}, {split}", labels, names, lambda i: reader[i][0], lambda i: f"in row {i}")


# -- shards of WebDataset


@dataclass(frozen=True)
class _Sample:
    """An image of a shard: its bytes in the file, and its label."""

    shard: Path
    name: str
    begin: int
    size: int
    label: int


def _shards(folder: Path, dataset: str, split: str, options: Mapping[str, Any]) -> ImageSet:
    """Images in tars where the files of one stem are a sample: an image, and its label in `.cls`."""
    shards = sorted(Path(folder).glob(split))
    if not shards:
        raise DataError(f"No shards match {split} in {folder}; dataset=wds/ takes a pattern such as train-*.tar.")
    samples = [sample for shard in shards for sample in _index(shard)]
    names = folder / _CLASSES
    lines = names.read_text(encoding="utf-8").splitlines() if names.is_file() else []

    def read(index: int) -> BinaryIO:
        sample = samples[index]
        with sample.shard.open("rb") as file:
            file.seek(sample.begin)
            return io.BytesIO(file.read(sample.size))

    return ImageSet(
        f"{folder}/{split}",
        np.array([sample.label for sample in samples], np.int64),
        [line.strip() for line in lines if line.strip()] or None,
        read,
        lambda i: f"{samples[i].name} of {samples[i].shard.name}",
    )


def _index(shard: Path) -> list[_Sample]:
    try:
        with tarfile.open(shard, "r:") as tar:
            files = [member for member in tar if member.isfile()]
            grouped = groupby(files, key=lambda member: _stem(member.name))
            return [_sample(shard, tar, stem, list(members)) for stem, members in grouped]
    except tarfile.TarError as error:
        raise DataError(f"{shard} is not a readable tar: {error}") from error


def _stem(name: str) -> str:
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def _sample(shard: Path, tar: tarfile.TarFile, stem: str, members: Sequence[tarfile.TarInfo]) -> _Sample:
    from timm.data.readers.img_extensions import get_img_extensions  # slow to import

    images = [member for member in members if Path(member.name).suffix.lower() in get_img_extensions(as_set=True)]
    labels = [member for member in members if member.name.endswith(".cls")]
    if len(images) != 1 or len(labels) != 1:
        found = ", ".join(member.name for member in members)
        raise DataError(f"{shard}: the sample {stem} must have one image and one label (.cls); it has {found}.")
    file = tar.extractfile(labels[0])
    assert file is not None
    text = file.read().decode(errors="replace").strip()
    if not text.lstrip("-").isdigit():
        raise DataError(f"{shard}: {labels[0].name} must hold a number, got {text[:20]!r}.")
    return _Sample(shard, images[0].name, images[0].offset_data, images[0].size, int(text))
