"""Clips of labelled videos in the layouts of Kinetics.

Shapes: N clips of T frames of S x S pixels are (N, 3, T, S, S); with V views of each video (N, V, 3, T, S, S).
"""

from __future__ import annotations

import csv
import os
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from ensemblenet.data.classes import (
    KnownClasses,
    in_order,
    refuse_other_classes,
    refuse_strange_classes,
    training_data_if_any,
)
from ensemblenet.data.loading import ExampleLoader, OnBroken, Part
from ensemblenet.data.tensors import DataError
from ensemblenet.data.video import ClipSampling, Decoder, Short, Video, reader

__all__ = ["Kinetics", "LabelledVideos", "find_videos"]

_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov")
_COLUMNS = {"label", "youtube_id"}
_KINETICS_MEAN, _KINETICS_STD = (0.432, 0.395, 0.376), (0.228, 0.221, 0.217)


Span = tuple[float, float]


@dataclass(frozen=True)
class LabelledVideos:
    """Videos of one split.

    Args:
        where: what names them, for messages.
        paths: N files.
        labels: N names of classes.
        spans: N pairs of seconds that an annotation names, or None.
        missing: how many an annotation names that are not there.
    """

    where: str
    paths: list[Path]
    labels: list[str]
    spans: list[Span | None]
    missing: int = 0


def find_videos(folder: Path, split: str) -> LabelledVideos:
    """The videos of a split, whichever way they lie.

    Args:
        folder: of the data.
        split: an annotation of Kinetics within it (`train.csv` with the columns `label`, `youtube_id` and, for most
            downloaders, `time_start` and `time_end`), a list with a line `PATH LABEL` for each video, or a folder of
            class folders. Files that an annotation names are looked for in all of `folder`, as
            `ID_000010_000020.mp4` or `ID.mp4`, in the class's folder if there are several; class folders may have
            underscores for spaces, and lack quotes and brackets. Some videos of Kinetics are gone for ever, so those
            that are missing are counted.

    Raises:
        DataError: there is no such split, its lines make no sense, or none of its videos is there.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / "train" / "high_jump").mkdir(parents=True)
        >>> (folder / "train" / "high_jump" / "a.mp4").touch()
        >>> find_videos(folder, "train").labels
        ['high jump']
    """
    place = Path(folder, split)
    if place.is_dir():
        found = _of_class_folders(place)
    elif not place.is_file():
        raise DataError(f"{place} is neither a folder of class folders nor a file that lists videos.")
    else:
        lines = place.read_text(encoding="utf-8").splitlines()
        header = set(next(csv.reader(lines[:1]), []))
        found = _of_annotation(place, lines, folder) if header >= _COLUMNS else _of_list(place, lines)
    if not found.paths:
        raise DataError(f"None of the {found.missing:,} videos of {place} is in {folder}.")
    return found


def _of_class_folders(place: Path) -> LabelledVideos:
    paths = sorted(path for path in place.glob("*/*") if path.suffix.lower() in _SUFFIXES)
    if not paths:
        raise DataError(f"{place} holds no class folders with videos ({', '.join(_SUFFIXES)}).")
    return LabelledVideos(str(place), paths, [_class_name(path.parent.name) for path in paths], [None] * len(paths))


def _of_annotation(place: Path, lines: Sequence[str], folder: Path) -> LabelledVideos:
    by_name: dict[str, list[Path]] = defaultdict(list)
    for path in _videos_within(folder):
        by_name[path.stem].append(path)
    paths, labels, spans, missing = [], [], [], 0
    for number, row in enumerate(csv.DictReader(lines), 2):
        try:
            span, label = _span(row), _class_name(row["label"])
            files = [path for name in _file_names(row["youtube_id"], span) for path in by_name.get(name, ())]
        except (ValueError, TypeError, AttributeError) as error:
            raise DataError(f"{place}, line {number} is no row of Kinetics: {error}") from error
        own = [path for path in files if _plain(path.parent.name) == _plain(label)] or files
        if own:
            paths.append(own[0])
            labels.append(label)
            spans.append(span)
        missing += not own
    return LabelledVideos(str(place), paths, labels, spans, missing)


def _videos_within(folder: Path) -> list[Path]:
    walk = os.walk(folder, followlinks=True)  # videos often lie on another disk
    paths = (Path(parent, name) for parent, _, names in walk for name in names)
    return sorted(path for path in paths if path.suffix.lower() in _SUFFIXES)


def _span(row: dict[str, str]) -> Span | None:
    start, end = row.get("time_start"), row.get("time_end")
    return (float(start), float(end)) if start and end else None


def _file_names(video: str, span: Span | None) -> list[str]:
    """The names that downloaders give to a clip, the more particular first."""
    if not video:
        raise ValueError("youtube_id is empty.")
    return [*([f"{video}_{int(span[0]):06d}_{int(span[1]):06d}"] if span else []), video]


def _of_list(place: Path, lines: Sequence[str]) -> LabelledVideos:
    paths, labels = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        path, _, label = line.strip().replace("\t", " ").rpartition("," if "," in line else " ")
        if not path.strip() or not label.strip():
            raise DataError(f"{place}, line {number} must be a path and a label, got {line!r}.")
        paths.append(place.parent / path.strip())
        labels.append(_class_name(label))
    kept = [k for k, path in enumerate(paths) if path.is_file()]
    missing = len(paths) - len(kept)
    return LabelledVideos(str(place), [paths[k] for k in kept], [labels[k] for k in kept], [None] * len(kept), missing)


def _class_name(name: str) -> str:
    return name.strip().strip('"').replace("_", " ")


def _plain(name: str) -> str:
    """A class's name without what downloaders leave out of the names of folders."""
    return re.sub(r"[^\w\s-]", "", _class_name(name)).lower()


def _in_order(names: Sequence[str]) -> list[str]:
    """By number if all are numbers, else by name as it is written, which is the usual order of Kinetics."""
    return in_order(names) if all(name.isdecimal() for name in names) else sorted(set(names))


class Kinetics(KnownClasses, LightningDataModule):
    """Clips of labelled videos (Kay et al. 2017, arXiv 1705.06950), decoded by workers as they are needed.

    Training batches hold a random clip of each video, cut out at random, and in validation the clip in the middle:
    (N, 3, T, S, S), normalised, float32, with labels (N,), int64. For the test each video is seen V = `num_clips` x
    `num_crops` times, (N, V, 3, T, S, S), and what the network says of the views is averaged.

    Args:
        folder: where annotations and videos lie, see [`ensemblenet.data.kinetics.find_videos`][].
        train: the training split: an annotation, a list or a folder.
        val: the validation split.
        test: the test split; None takes the validation split.
        num_frames: T.
        stride: from one frame of a clip to the next.
        seconds: the span of a clip, in place of a stride.
        short: whether a clip that reaches behind the end of a short video begins again ("loop") or stays at its last
            frame ("pad").
        untrimmed: whether files are whole videos, of which only the seconds that the annotation names count.
        image_size: S.
        num_clips: clips of a test video, from its first frames to its last.
        num_crops: 1 for the centre, 3 for both ends of the longer side too.
        batch_size: training clips a step, of each process; an epoch leaves out what fills no batch.
        eval_batch_size: videos of a batch in evaluation; None takes as many as in training.
        num_workers: processes that decode; 0 decodes in the main process.
        decoder: "pyav", or "torchcodec" where that is installed.
        scale: the least and the largest share of a frame that a training crop takes.
        flip: whether half of the training clips are mirrored; not for classes such as "turning left".
        color_jitter: how far brightness, contrast and saturation of a training clip change, the same in all frames.
        crop_pct: in evaluation the shorter side is resized to S / crop_pct.
        mean: of each channel, to normalise with.
        std: standard deviation of each channel.
        cache: keep all frames in memory once they are decoded, at the size of evaluation; for small sets, and
            with `num_workers=0`.
        on_broken: whether a video that cannot be decoded is an "error", or "skip": left out, counted and named.
        max_broken: how many videos of a split may be skipped.
        seed: of order, clips and augmentation; None takes the run's own.

    Raises:
        DataError: at setup, what is wrong with the data; while loading, which video is broken.
    """

    def __init__(
        self,
        folder: Path,
        train: str = "train.csv",
        val: str = "val.csv",
        test: str | None = None,
        num_frames: int = 16,
        stride: int = 4,
        seconds: float | None = None,
        short: Short = "loop",
        untrimmed: bool = False,
        image_size: int = 224,
        num_clips: int = 10,
        num_crops: int = 3,
        batch_size: int = 16,
        eval_batch_size: int | None = None,
        num_workers: int = 2,
        decoder: Decoder = "pyav",
        scale: tuple[float, float] = (0.4, 1.0),
        flip: bool = True,
        color_jitter: float = 0.0,
        crop_pct: float = 0.875,
        mean: tuple[float, float, float] = _KINETICS_MEAN,
        std: tuple[float, float, float] = _KINETICS_STD,
        cache: bool = False,
        on_broken: OnBroken = "error",
        max_broken: int = 100,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if num_crops not in (1, 3) or num_clips < 1 or not 0 < crop_pct <= 1:
            raise DataError(
                "Kinetics needs num_crops of 1 or 3, num_clips >= 1 and 0 < crop_pct <= 1; got "
                f"num_crops={num_crops}, num_clips={num_clips}, crop_pct={crop_pct}."
            )
        if cache and num_workers:
            raise DataError("cache=true needs num_workers=0: each worker would fill a cache of its own, every epoch.")
        self.folder = Path(folder)
        self.names = {"train": train, "val": val, "test": test or val}
        self.sampling = ClipSampling(num_frames, stride, seconds, short)
        self.untrimmed = untrimmed
        self.short_side = round(image_size / crop_pct)
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.num_workers = num_workers
        self.decoder: Decoder = decoder
        self.on_broken: OnBroken = on_broken
        self.max_broken = max_broken
        self.cache = cache
        self.seed = seed
        self.preprocessing = {
            "input_shape": [3, num_frames, image_size, image_size],
            "num_frames": num_frames,
            "stride": stride,
            "seconds": seconds,
            "short": short,
            "mean": list(mean),
            "std": list(std),
            "crop_pct": crop_pct,
        }
        look = _Look(image_size, mean, std)
        self._views = {
            "train": _Augmented(look, scale, flip, color_jitter),
            "val": _Crops(look, 1, 1),
            "test": _Crops(look, num_clips, num_crops),
        }
        self._found: dict[str, LabelledVideos] = {}
        self._examples: dict[str, _Clips] = {}
        self._train_loader: ExampleLoader | None = None
        self._state: dict[str, Any] = {}

    def setup(self, stage: str | None = None) -> None:
        """Find the videos and their labels, once, by the expected classes, or else those of the training split."""
        if self.seed is None:
            self.seed = torch.initial_seed() % 2**32
        wanted = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}.get(stage or "", tuple(self.names))
        if "train" not in wanted:
            with training_data_if_any():
                self._videos("train")
        for split in wanted:
            self._videos(split)

    def description(self) -> dict[str, Any]:
        """What a trained network needs to be told of its data."""
        return {"classes": self.classes, "preprocessing": self.preprocessing}

    def example_name(self, split: str, place: int) -> str:
        """What to call a video of a split ("train", "val" or "test"): its file, from `folder`."""
        path = self._videos(split).paths[place]
        return str(path.relative_to(self.folder) if path.is_relative_to(self.folder) else path)

    def train_dataloader(self) -> ExampleLoader:
        """Shuffled and augmented clips, in an order that depends on the seed and the epoch."""
        if self._train_loader is None or self._train_loader.part.seed != self.seed:
            self._train_loader = self._loader("train")
            if self._state:
                self._train_loader.load_state_dict(self._state)
        return self._train_loader

    def val_dataloader(self) -> ExampleLoader:
        """The clip in the middle of each validation video."""
        return self._loader("val")

    def test_dataloader(self) -> ExampleLoader:
        """All views of each test video."""
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

    def _videos(self, split: str) -> LabelledVideos:
        if split not in self._found:
            videos = find_videos(self.folder, self.names[split])
            self.classes = self.classes or _in_order(videos.labels)
            if split == "train":
                refuse_other_classes(videos.where, _in_order(self.classes), _in_order(videos.labels))
            refuse_strange_classes(videos.where, self.classes, videos.labels)
            if videos.missing:
                total = videos.missing + len(videos.paths)
                rank_zero_info(f"{videos.missing:,} of the {total:,} videos of {videos.where} are not there.")
            self._found[split] = videos
        return self._found[split]

    def _loader(self, split: str) -> ExampleLoader:
        if split not in self._examples:
            videos = self._videos(split)
            numbers = {name: number for number, name in enumerate(self.classes or [])}
            labels = [numbers[label] for label in videos.labels]
            self._examples[split] = _Clips(
                videos.paths,
                labels,
                videos.spans if self.untrimmed else [None] * len(labels),
                self.sampling,
                self._views[split],
                partial(reader(self.decoder), short_side=self.short_side),
                {} if self.cache else None,
            )
        processes = {}
        if self.trainer is not None:
            processes = {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}
        train, examples = split == "train", self._examples[split]
        size = self.batch_size if train else self.eval_batch_size
        part = Part(len(examples), size, train, seed=self.seed or 0, **processes)
        return ExampleLoader(examples, part, self.num_workers, self.on_broken, self.max_broken)


@dataclass(frozen=True)
class _Look:
    """Frames to the numbers that a network reads."""

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def normalised(self, frames: Tensor) -> Tensor:
        """(T, 3, S, S), uint8, to (3, T, S, S), float32."""
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return ((frames / 255 - mean) / std).transpose(0, 1).contiguous()


@dataclass(frozen=True)
class _Augmented:
    """One random clip, cut out, mirrored and coloured in all its frames alike."""

    look: _Look
    scale: tuple[float, float]
    flip: bool
    color_jitter: float

    def clips(self, sampling: ClipSampling, times: np.ndarray) -> list[np.ndarray]:
        return [sampling.random(times)]

    def views(self, frames: Tensor) -> list[Tensor]:
        return [self.look.normalised(self._transform()(frames))]

    def together(self, views: list[Tensor]) -> Tensor:
        return views[0]

    def _transform(self) -> Any:
        from torchvision.transforms import v2  # slow to import

        strength = self.color_jitter
        steps = [v2.RandomResizedCrop(self.look.image_size, scale=self.scale, antialias=True)]
        steps += [v2.RandomHorizontalFlip()] if self.flip else []
        steps += [v2.ColorJitter(strength, strength, strength)] if strength else []
        return v2.Compose(steps)


@dataclass(frozen=True)
class _Crops:
    """Clips spread over the video, and squares spread over the longer side."""

    look: _Look
    num_clips: int
    num_crops: int

    def clips(self, sampling: ClipSampling, times: np.ndarray) -> list[np.ndarray]:
        return sampling.uniform(times, self.num_clips)

    def views(self, frames: Tensor) -> list[Tensor]:
        size = self.look.image_size
        *_, height, width = frames.shape
        upright = height > width
        cut = []
        for place in (0.5,) if self.num_crops == 1 else (0.0, 0.5, 1.0):
            top = round((height - size) * (place if upright else 0.5))
            left = round((width - size) * (0.5 if upright else place))
            cut.append(self.look.normalised(frames[..., top : top + size, left : left + size]))
        return cut

    def together(self, views: list[Tensor]) -> Tensor:
        return views[0] if self.num_clips * self.num_crops == 1 else torch.stack(views)


@dataclass(frozen=True)
class _Clips:
    """Views of videos, with labels, by index."""

    paths: list[Path]
    labels: list[int]
    spans: Sequence[Span | None]
    sampling: ClipSampling
    views: _Augmented | _Crops
    open: Callable[[Path], Video]
    cache: dict[int, tuple[np.ndarray, Tensor]] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        views = [view for frames in self._read(index) for view in self.views.views(frames)]
        return self.views.together(views), self.labels[index]

    def _read(self, index: int) -> Sequence[Tensor]:
        """The frames of each clip."""
        if self.cache is None:
            with self.open(self.paths[index]) as video:
                return self._cut(index, video.times, video.frames)
        if index not in self.cache:
            with self.open(self.paths[index]) as video:
                self.cache[index] = video.times, video.frames(range(len(video)))
        times, frames = self.cache[index]
        return self._cut(index, times, frames.__getitem__)

    def _cut(self, index: int, times: np.ndarray, read: Callable[[np.ndarray], Tensor]) -> Sequence[Tensor]:
        """All clips, read at once: they may share frames."""
        first, last = self._bounds(index, times)
        clips = np.stack(self.views.clips(self.sampling, times[first:last])) + first
        return read(clips.ravel()).unflatten(0, clips.shape).unbind(0)

    def _bounds(self, index: int, times: np.ndarray) -> tuple[int, int]:
        """From which frame on to before which one the labelled part of the video reaches."""
        span = self.spans[index]
        if span is None:
            return 0, len(times)
        first, last = np.searchsorted(times - times[0], span)
        if first == len(times):
            raise DataError(f"{self.paths[index]} ends before {span[0]:g} s, where its clip begins.")
        return int(first), max(int(first) + 1, int(last))
