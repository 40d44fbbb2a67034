"""Labelled images as timm, torchvision and WebDataset store them, by index."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image

from ensemblenet.data.classes import (
    class_name,
    in_order,
    natural_key,
    numbered_classes,
    refuse_other_classes,
    refuse_strange_classes,
)
from ensemblenet.data.image_files import IMAGE_SUFFIXES, decode_image
from ensemblenet.data.listing import class_folders, find_shards
from ensemblenet.data.remote import (
    MissingError,
    RemoteFile,
    find_whole,
    folder_of,
    in_threads,
    joined,
    remote_file,
)
from ensemblenet.data.tars import TarFile, by_class, files_of_tar
from ensemblenet.errors import ClassesError, DataError, first_line

__all__ = ["ImageSet", "open_images"]

_VALIDATION = ("val", "validation", "valid", "test")
_CLASSES = "classes.txt"
_LABEL = ".cls"


@dataclass(frozen=True)
class ImageSet:
    """Labelled images of one split.

    Args:
        where: name of the data, for messages.
        labels: (N,), integers from 0.
        classes: the names of the classes; None where the data names none.
        read: gives an image by index: a file, open or not, or decoded.
        name: gives the name of an image by index, for messages.
        numbered: whether the data itself numbers its classes; if not, their names alone count.
        files: what each image lies in, (N,); None where a library reads.
    """

    where: str
    labels: np.ndarray
    classes: list[str] | None
    read: Callable[[int], BinaryIO | Path | Image.Image]
    name: Callable[[int], str]
    numbered: bool = True
    files: Sequence[Path | RemoteFile | TarFile] | None = None

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

    def image(self, index: int, at_least: int | None = None) -> Image.Image:
        """Decode an image to RGB.

        Args:
            index: its place.
            at_least: what its shorter side may be decoded to at least; None decodes all of its pixels.

        Raises:
            DataError: it cannot be decoded; it names the image.
        """
        return decode_image(lambda: self.read(index), f"{self.where}: the image {self.name(index)}", at_least=at_least)


def open_images(
    folder: Path | str,
    dataset: str,
    split: str,
    classes: Sequence[str] | None,
    complete: bool,
    options: Mapping[str, Any],
    fit: bool = True,
) -> ImageSet:
    """Find the images of a split, and their labels.

    Args:
        folder: of the data, or its URL.
        dataset: "" for class folders, in a folder or a tar; `wds/` for shards of WebDataset; else a name of
            `timm.data.create_dataset`, such as `hfds/NAME` or `torch/cifar10`.
        split: its name, a folder or tar in `folder`; for `wds/` a pattern, such as `train-*.tar` or
            `train-{0000..1023}.tar`.
        classes: the names in the order of their labels; None takes them from the data.
        complete: whether the split must have all of these classes.
        options: arguments of timm's reader.
        fit: whether shards must all fit on this machine at once.

    Raises:
        ClassesError: the data has other classes.
        DataError: there is no such data, a class is empty, or a label is out of range.
        FetchError: its server fails.
    """
    kind, _, _ = dataset.partition("/")
    hugging_face = _parquet_shards if dataset == "hfds/" and not fit else _hugging_face
    openers = {"": _class_folders, "wds": partial(_shards, fit=fit), "torch": _torchvision, "hfds": hugging_face}
    if kind not in openers:
        raise DataError(f"dataset must begin with one of {', '.join(map(repr, openers))}, got {dataset!r}.")
    images = openers[kind](folder, dataset, split, options)
    images = images if classes is None else images.labelled(classes, complete)
    if images.classes is None:
        images = replace(images, classes=numbered_classes(images.where, images.labels))
    count = len(images.classes or ())
    if count < 2:
        raise DataError(
            f"{images.where} has {count} class{'' if count == 1 else 'es'}; at least 2 are needed, each image in its "
            "class's folder."
        )
    if not len(images):
        raise DataError(f"{images.where} holds no images.")
    wrong = ((images.labels < 0) | (images.labels >= count)).nonzero()[0]
    if len(wrong):
        index = int(wrong[0])
        raise DataError(
            f"{images.where}: labels must be in [0, {count}), got {int(images.labels[index])} for the image "
            f"{images.name(index)}."
        )
    return images


# -- class folders, in a folder or in a tar


def _class_folders(folder: Path | str, dataset: str, split: str, options: Mapping[str, Any]) -> ImageSet:
    """Images in the order of their names; those of one class lie in one folder, at any depth."""
    path = _find_split(folder, split)
    class_map = _class_map(path, options)
    found: Mapping[str, Sequence[tuple[str, Path | TarFile]]]
    if isinstance(path, Path) and path.is_dir():
        folders = class_folders(path, IMAGE_SUFFIXES)
        found = {of: [(file.relative_to(path).as_posix(), file) for file in files] for of, files in folders.items()}
    else:
        found = by_class(files_of_tar(path, IMAGE_SUFFIXES))
    if loose := [name for name, _ in found.get("", [])]:
        rank_zero_info(f"{len(loose):,} images of {path} lie in no class's folder and are left out: {loose[0]}, ...")
        found = {of: files for of, files in found.items() if of}
    numbers = class_map or {name: number for number, name in enumerate(in_order(found))}
    for name, files in sorted(found.items()):
        if name in numbers and not files:
            raise DataError(f"The class {path}/{name} holds no images: fill it or remove it.")
    samples = [(name, file, numbers[of]) for of, files in found.items() if of in numbers for name, file in files]
    samples.sort(key=lambda sample: natural_key(sample[0]))
    return ImageSet(
        str(path),
        np.array([label for *_, label in samples], np.int64),
        sorted(numbers, key=numbers.__getitem__),
        lambda index: _opened(samples[index][1]),
        lambda index: samples[index][0],
        numbered=class_map is not None,
        files=[file for _, file, _ in samples],
    )


def _opened(file: Path | TarFile) -> Path | BinaryIO:
    return file.open() if isinstance(file, TarFile) else file


def _class_map(split: Path | RemoteFile, options: Mapping[str, Any]) -> dict[str, int] | None:
    """The numbers of classes that the user gives: by name, or as a file with a name a line."""
    if unknown := set(options) - {"class_map"}:
        given = ", ".join(sorted(unknown))
        raise DataError(f"Of the reader's arguments class folders take class_map alone, got {given}.")
    given = options.get("class_map")
    if not given:
        return None
    if isinstance(given, Mapping) and all(type(number) is int for number in given.values()):
        return {class_name(str(name)): number for name, number in given.items()}
    if not isinstance(given, str | Path):
        raise DataError(
            f"class_map must be numbers by the names of classes, or a file with a name a line, got {given}."
        )
    for path in (Path(given), *([split / given] if isinstance(split, Path) else [])):
        if (names := _named_classes(path)) is not None:
            return {name: number for number, name in enumerate(names)}
    raise DataError(f"class_map={given} is neither a file with the name of a class in each line, nor in {split}.")


def _find_split(folder: Path | str, split: str) -> Path | RemoteFile:
    if isinstance(folder, str):
        return _remote_tar(folder, split)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder.")
    for name in _names_of(split):
        for path in (folder / name, folder / f"{name}.tar"):
            if path.exists():
                return path
    if list(folder.glob("*.parquet")):
        raise DataError(
            f"{folder} holds Parquet files and neither {split}/ nor {split}.tar: use ensemblenet.data.ParquetImages, "
            f"or dataset=hfds/{folder} for the datasets library."
        )
    raise DataError(f"{folder} holds neither {split}/ nor {split}.tar, with a folder of images for each class.")


def _names_of(split: str) -> tuple[str, ...]:
    return (split, *_VALIDATION) if split in _VALIDATION else (split,)


def _remote_tar(folder: str, split: str) -> RemoteFile:
    for name in _names_of(split):
        with suppress(MissingError):
            return find_whole(f"{joined(folder, name)}.tar")[0]
    raise DataError(
        f"{folder} holds no {split}.tar: at a URL, images lie in a tar of class folders or, for dataset=wds/, in "
        "shards of WebDataset; single files are read from a disk only."
    )


def _timm_dataset(root: Path | None, dataset: str, split: str, **options: Any) -> Any:
    from timm.data.dataset_factory import create_dataset  # slow to import

    try:
        return create_dataset(
            dataset, root=None if root is None else str(root), split=split, search_split=False, **options
        )
    except ImportError as error:
        raise DataError(f"dataset={dataset} needs a library: pip install datasets ({error}).") from error
    except (AssertionError, OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{dataset} of split {split} in {root}: {error}") from error


# -- data sets of libraries


def _torchvision(folder: Path | str, dataset: str, split: str, options: Mapping[str, Any]) -> ImageSet:
    if isinstance(folder, str):
        raise DataError(f"dataset={dataset} is read from a disk, not from {folder}.")
    images = _timm_dataset(folder, dataset, split, **options)
    labels = getattr(images, "targets", getattr(images, "labels", None))
    if labels is None:
        raise DataError(f"{dataset} does not say its labels; it is none of torchvision's sets for classification.")
    names = getattr(images, "classes", None)
    if names is not None:  # ImageNet's are tuples of synonyms
        names = [name if isinstance(name, str) else ", ".join(name) for name in names]
    if hasattr(images, "loader"):
        images.loader = Path  # else torchvision itself decodes, without a look at how the image is to be turned
    return ImageSet(f"{dataset} in {folder}, {split}", np.asarray(labels), names, lambda i: images[i][0], str)


def _hugging_face(folder: Path | str, dataset: str, split: str, options: Mapping[str, Any]) -> ImageSet:
    if dataset == "hfds/":
        place = folder
        if isinstance(folder, str):
            place = folder_of({file.name: file for file in find_whole(f"{folder}/*.parquet")})
        reader = _timm_dataset(None, f"{dataset}{place}", split, **options).reader
        dataset = str(folder)
    else:
        reader = _timm_dataset(None, dataset, split, **options).reader
    try:
        labels = np.fromiter(reader.iter_targets(), np.int64, len(reader))
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{dataset}, {split}: labels must be integers: {first_line(error)}") from error
    names = sorted(reader.class_to_idx, key=reader.class_to_idx.get) or None
    return ImageSet(f"{dataset}, {split}", labels, names, lambda i: reader[i][0], lambda i: f"in row {i}")


# -- shards of Parquet and of WebDataset


def _parquet_shards(folder: Path | str, dataset: str, split: str, options: Mapping[str, Any]) -> ImageSet:
    """Images in Parquet files as `datasets` writes and finds them, without `datasets`, which needs them all at once."""
    from ensemblenet.data.parquet_shards import ParquetShard  # pyarrow is needed for nothing else here

    if unknown := set(options) - {"input_key", "target_key"}:
        raise DataError(f"With shuffle_buffer dataset=hfds/ takes input_key and target_key, got {', '.join(unknown)}.")
    where, columns = str(joined(folder, split)), (options.get("input_key", "image"), options.get("target_key", "label"))
    shards = [ParquetShard.of(file, *columns) for file in _parquet_files(folder, split)]
    found = in_threads(ParquetShard.labels, shards, "Reading labels")
    named = {shard: names for shard, (_, names) in zip(shards, found, strict=True) if names is not None}
    classes = next(iter(named.values()), None)
    for shard, names in named.items():
        refuse_other_classes(str(shard), classes or [], names)
    rows = [(shard, row) for shard, (labels, _) in zip(shards, found, strict=True) for row in range(len(labels))]
    return ImageSet(
        where,
        np.array([label for labels, _ in found for label in labels], np.int64),
        classes,
        lambda index: rows[index][0].open_row(rows[index][1]),
        lambda index: f"in row {rows[index][1]} of {rows[index][0].name}",
        files=[shard for shard, _ in rows],
    )


def _parquet_files(folder: Path | str, split: str) -> Sequence[Path | RemoteFile]:
    """Those of a pattern; or those whose names hold the split's, as `datasets` reads them: `train-00000-of-00010`."""
    if split.endswith(".parquet"):
        return find_shards(folder, split, fit=False)
    files = find_shards(folder, "*.parquet", fit=False)
    for name in _names_of(split):
        of_split = re.compile(rf"(?:.*[-._ 0-9])?{re.escape(name)}[-._ 0-9].*")
        if found := [file for file in files if of_split.fullmatch(file.name)]:
            return found
    raise DataError(f"None of the {len(files)} Parquet files in {folder}, such as {files[0].name}, is named {split}-*.")


def _shards(folder: Path | str, dataset: str, split: str, options: Mapping[str, Any], fit: bool) -> ImageSet:
    """Images in tars where the files of one stem are a sample: an image, and its label in `.cls`."""
    shards = find_shards(folder, split, fit)
    samples = [sample for found in in_threads(_samples, shards, "Reading shards") for sample in found]
    return ImageSet(
        str(joined(folder, split)),
        np.array([label for _, label in samples], np.int64),
        _named_classes(joined(folder, _CLASSES)),
        lambda index: samples[index][0].open(),
        lambda index: f"{samples[index][0].name} of {samples[index][0].tar.name}",
        files=[file for file, _ in samples],
    )


def _named_classes(path: Path | str) -> list[str] | None:
    """The names in a file, one a line: neither spaces nor rarer characters end a line. None if there is no file."""
    try:
        with path.open("rb") if isinstance(path, Path) else remote_file(path).open() as file:
            lines = [line.strip() for line in file.read().decode("utf-8-sig").rstrip().split("\n")]
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, MissingError):
        return None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text in UTF-8: {error}.") from error
    if "" in lines[1:]:
        raise DataError(f"{path}, line {lines.index('', 1) + 1} is empty: each line must name a class.")
    return [class_name(line) for line in lines] if lines[0] else None


def _samples(shard: Path | RemoteFile) -> list[tuple[TarFile, int]]:
    """The images of a shard, and their labels."""
    grouped = groupby(files_of_tar(shard, IMAGE_SUFFIXES, _LABEL), key=lambda file: _stem(file.name))
    return [_sample(shard, stem, list(files)) for stem, files in grouped]


def _stem(name: str) -> str:
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def _sample(shard: Path | RemoteFile, stem: str, files: Sequence[TarFile]) -> tuple[TarFile, int]:
    labels = [file for file in files if file.name.endswith(_LABEL)]
    images = [file for file in files if file not in labels]
    if len(images) != 1 or len(labels) != 1:
        found = ", ".join(file.name for file in files)
        raise DataError(f"{shard}: the sample {stem} must have one image and one label (.cls); it has {found}.")
    text = labels[0].text.strip()
    try:
        return images[0], int(np.int64(int(text)))
    except (ValueError, OverflowError):
        raise DataError(f"{shard}: {labels[0].name} must hold a number, got {text[:20]!r}.") from None
