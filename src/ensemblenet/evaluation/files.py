"""Files as inputs of a trained network: images and videos, prepared as its data was for testing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ensemblenet.data.tensors import DataError
from ensemblenet.data.video import ClipSampling, Video
from ensemblenet.storage.restore import Restored

__all__ = ["FileBatch", "InputFiles", "find_files", "reader_of"]

_CLIPS = 10

Read = Callable[[Path], Tensor]

VIDEOS = (".avi", ".mkv", ".mov", ".mp4", ".webm")
IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


class FileBatch(NamedTuple):
    """A batch of files.

    Attributes:
        paths: of those that could be read.
        inputs: (N, *), in the same order.
        unreadable: why others could not be, a line for each that names it.
    """

    paths: list[str]
    inputs: Tensor
    unreadable: list[str]


@dataclass(frozen=True)
class Reader:
    """What reads the files that a network takes.

    Args:
        read: from a file to an input.
        suffixes: of such files.
    """

    read: Read
    suffixes: tuple[str, ...]


def reader_of(restored: Restored) -> Reader | None:
    """What reads inputs of a network from files, by its data's `preprocessing`; None where that is of no pictures."""
    preprocessing = restored.description.get("preprocessing") or {}
    shape = restored.input_shape
    if not {"mean", "std"} <= preprocessing.keys():
        return None
    if len(shape) == 3:
        return Reader(_ImageReader(shape, preprocessing), IMAGES)
    if len(shape) == 4:
        return Reader(_VideoReader(shape, preprocessing), VIDEOS)
    return None


class _ImageReader:
    """Reads an image: resized, its centre cut out, normalised."""

    def __init__(self, input_shape: Sequence[int], preprocessing: Mapping[str, Any]) -> None:
        from timm.data.transforms_factory import create_transform

        channels, height, width = input_shape
        self.mode = {1: "L", 3: "RGB"}[channels]
        self.transform = create_transform(
            (channels, height, width),
            mean=tuple(preprocessing["mean"]),
            std=tuple(preprocessing["std"]),
            interpolation=preprocessing.get("interpolation") or "bilinear",
            crop_pct=preprocessing.get("crop_pct"),
        )

    def __call__(self, path: Path) -> Tensor:
        try:
            with Image.open(path) as image:
                return self.transform(image.convert(self.mode))  # pyright: ignore
        except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"{path}: the image cannot be decoded: {error}") from error


class _VideoReader:
    """Reads clips spread over a video, (V, 3, T, S, S): the centre of its frames, normalised."""

    def __init__(self, input_shape: Sequence[int], preprocessing: Mapping[str, Any]) -> None:
        _, num_frames, self.size, _ = input_shape
        self.short_side = round(self.size / preprocessing["crop_pct"])
        self.sampling = ClipSampling(
            num_frames, preprocessing["stride"], preprocessing["seconds"], preprocessing.get("short", "loop")
        )
        self.mean, self.std = (torch.tensor(preprocessing[name]).view(3, 1, 1) for name in ("mean", "std"))

    def __call__(self, path: Path) -> Tensor:
        with Video(path, self.short_side) as video:
            clips = [video.frames(clip) for clip in self.sampling.uniform(video.times, _CLIPS)]
        return torch.stack([self._prepared(clip) for clip in clips])

    def _prepared(self, frames: Tensor) -> Tensor:
        top, left = (round((side - self.size) / 2) for side in frames.shape[-2:])
        centre = frames[..., top : top + self.size, left : left + self.size]
        return ((centre / 255 - self.mean) / self.std).transpose(0, 1)


class InputFiles(Dataset[Any]):
    """Files, read one by one; what cannot be read is told, not raised: an error in a worker would lose its line.

    Args:
        paths: of the files.
        read: from a file to an input; raises DataError.
    """

    def __init__(self, paths: Sequence[Path], read: Read) -> None:
        self.paths = paths
        self.read = read

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[str, Tensor | str]:
        path = self.paths[index]
        try:
            return str(path), self.read(path)
        except DataError as error:
            return str(path), str(error)

    def batches(self, batch_size: int, num_workers: int) -> DataLoader[FileBatch]:
        """Batches of files in their order."""
        return DataLoader(self, batch_size, num_workers=num_workers, collate_fn=_joined)


def _joined(items: Sequence[tuple[str, Tensor | str]]) -> FileBatch:
    read = [(path, inputs) for path, inputs in items if isinstance(inputs, Tensor)]
    unreadable = [reason for _, reason in items if isinstance(reason, str)]
    inputs = torch.stack([inputs for _, inputs in read]) if read else torch.empty(0)
    return FileBatch([path for path, _ in read], inputs, unreadable)


def find_files(paths: Sequence[str], suffixes: Sequence[str]) -> list[Path]:
    """Files, and those of some suffixes anywhere in folders, sorted within each folder.

    Raises:
        DataError: a path that is not there, or a folder without such files.
    """
    return [file for path in paths for file in _files_of(Path(path), suffixes)]


def _files_of(path: Path, suffixes: Sequence[str]) -> Iterator[Path]:
    if path.is_file():
        yield path
        return
    if not path.is_dir():
        raise DataError(f"{path} is neither a file nor a folder.")
    found = sorted(file for file in path.rglob("*") if file.suffix.lower() in suffixes and file.is_file())
    if not found:
        raise DataError(f"{path} holds no files that end in {', '.join(suffixes)}.")
    yield from found
