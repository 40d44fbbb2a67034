"""Views of videos as inputs of networks: which frames, how cut, mirrored and coloured; for training, test and files.

Shapes: T frames of S x S pixels are an input (3, T, S, S); V views of a video are (V, 3, T, S, S).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ensemblenet.data.video import ClipSampling, Decoder, Video, VideoFile, reader
from ensemblenet.errors import DataError

__all__ = ["RandomView", "Span", "UniformViews", "ViewReader", "Views", "view_reader"]

Span = tuple[float, float]  # seconds


class Views(Protocol):
    """How a video is seen."""

    def clips(self, sampling: ClipSampling, times: np.ndarray) -> list[np.ndarray]:
        """The frames of each clip, as indices of a video whose frames are shown at these seconds."""
        ...

    def cut(self, frames: Tensor) -> list[Tensor]:
        """The views of a clip: from (T, 3, H, W) to (T, 3, S, S) each."""
        ...


@dataclass(frozen=True)
class RandomView:
    """One random clip; all its frames are cut, mirrored and coloured alike.

    Args:
        image_size: S.
        scale: the least and the largest share of a frame's area that is cut out.
        flip: whether to mirror half of the clips.
        color_jitter: largest relative change of brightness, contrast and saturation.

    Example:
        >>> view = RandomView(image_size=8, scale=(0.4, 1.0), flip=True, color_jitter=0.0)
        >>> [clip.shape for clip in view.cut(torch.zeros(4, 3, 12, 20, dtype=torch.uint8))]
        [torch.Size([4, 3, 8, 8])]
    """

    image_size: int
    scale: tuple[float, float]
    flip: bool
    color_jitter: float

    def clips(self, sampling: ClipSampling, times: np.ndarray) -> list[np.ndarray]:
        """One clip, at a random place."""
        return [sampling.random(times)]

    def cut(self, frames: Tensor) -> list[Tensor]:
        """One random view."""
        from torchvision.transforms import v2  # slow to import

        strength = self.color_jitter
        steps = [v2.RandomResizedCrop(self.image_size, scale=self.scale, antialias=True)]
        steps += [v2.RandomHorizontalFlip()] if self.flip else []
        steps += [v2.ColorJitter(strength, strength, strength)] if strength else []
        return [v2.Compose(steps)(frames)]


@dataclass(frozen=True)
class UniformViews:
    """Clips spread evenly over the video, and in each squares spread evenly over the longer side.

    Args:
        image_size: S, at most the shorter side of the frames.
        num_clips: clips from the first frames to the last; a single one lies in the middle.
        num_crops: 1 for the centre, 3 for both ends of the longer side too.

    Example:
        >>> UniformViews(image_size=2, num_clips=1, num_crops=3).cut(torch.arange(8.0).view(1, 1, 2, 4))[2].flatten()
        tensor([2., 3., 6., 7.])
    """

    image_size: int
    num_clips: int
    num_crops: int

    @classmethod
    def of(cls, preprocessing: Mapping[str, Any]) -> UniformViews:
        """Those of the test videos; version 0.1 stored no numbers and read files in 10 clips of the centre."""
        size = preprocessing["input_shape"][-1]
        return cls(size, preprocessing.get("num_clips", 10), preprocessing.get("num_crops", 1))

    def clips(self, sampling: ClipSampling, times: np.ndarray) -> list[np.ndarray]:
        """The clips, in order."""
        return sampling.uniform(times, self.num_clips)

    def cut(self, frames: Tensor) -> list[Tensor]:
        """The squares, from the upper or left end to the other."""
        size = self.image_size
        *_, height, width = frames.shape
        found = []
        for place in (0.5,) if self.num_crops == 1 else (0.0, 0.5, 1.0):
            along, across = (height, width) if height > width else (width, height)
            begins = round((along - size) * place), round((across - size) * 0.5)
            top, left = begins if height > width else begins[::-1]
            found.append(frames[..., top : top + size, left : left + size])
        return found


@dataclass(frozen=True)
class ViewReader:
    """Reads a video file as bytes: one view (3, T, S, S), or several (V, 3, T, S, S), uint8.

    Args:
        sampling: the frames of a clip.
        views: which clips, and how they are cut.
        open: opens a file.
        cache: keeps the frames of videos that were read; None keeps none.
    """

    sampling: ClipSampling
    views: Views
    open: Callable[[VideoFile], Video]
    cache: dict[VideoFile, tuple[np.ndarray, Tensor]] | None = field(default=None, repr=False)

    def __call__(self, path: VideoFile, span: Span | None = None) -> Tensor:
        """Read a file.

        Args:
            path: the file.
            span: the seconds in which clips may lie; None allows all of the video.

        Raises:
            DataError: it is unreadable, or ends before the span; the error names it.
        """
        clips = self._clips(path, span)
        views = [view.transpose(0, 1).contiguous() for frames in clips for view in self.views.cut(frames)]
        return views[0] if len(views) == 1 else torch.stack(views)

    def _clips(self, path: VideoFile, span: Span | None) -> Sequence[Tensor]:
        """The frames of each clip."""
        if self.cache is None:
            with self.open(path) as video:
                return self._read(path, span, video.times, video.frames)
        if path not in self.cache:
            with self.open(path) as video:
                self.cache[path] = video.times, video.frames(range(len(video)))
        times, frames = self.cache[path]
        return self._read(path, span, times, frames.__getitem__)

    def _read(
        self, path: VideoFile, span: Span | None, times: np.ndarray, read: Callable[[np.ndarray], Tensor]
    ) -> Sequence[Tensor]:
        """All clips, read at once: they may share frames."""
        first, last = 0, len(times)
        if span is not None:
            first, last = map(int, np.searchsorted(times - times[0], span))
            if first == len(times):
                raise DataError(f"{path} ends before {span[0]:g} s, where its clip begins.")
            last = max(first + 1, last)
        clips = np.stack(self.views.clips(self.sampling, times[first:last])) + first
        return read(clips.ravel()).unflatten(0, clips.shape).unbind(0)


def view_reader(
    preprocessing: Mapping[str, Any], views: Views, decoder: Decoder = "pyav", cache: bool = False
) -> ViewReader:
    """The reader that a description of preprocessing stands for.

    Args:
        preprocessing: `input_shape` (3, T, S, S), `stride`, `seconds`, `short` and `crop_pct`, as
            [`ensemblenet.data.Kinetics`][] describes them.
        views: how a video is seen.
        decoder: "pyav" or "torchcodec".
        cache: whether to keep all frames in memory.

    Raises:
        DataError: the decoder is not installed, or a clip has no frames.
    """
    _, num_frames, _, size = preprocessing["input_shape"]
    return ViewReader(
        ClipSampling(num_frames, preprocessing["stride"], preprocessing["seconds"], preprocessing.get("short", "loop")),
        views,
        partial(reader(decoder), short_side=round(size / preprocessing["crop_pct"])),
        {} if cache else None,
    )
