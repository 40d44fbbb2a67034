"""Kinetics and other labelled videos: the data module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from ensemblenet._moved import renamed
from ensemblenet.data.classes import refuse_other_classes, refuse_strange_classes
from ensemblenet.data.files import FileReader
from ensemblenet.data.image_files import check_view
from ensemblenet.data.loading import OnBroken
from ensemblenet.data.module import DataModule, Split
from ensemblenet.data.normalizing import NormalizeBytes
from ensemblenet.data.remote import checked_place
from ensemblenet.data.video import ClipSampling, Decoder, Short, VideoFile
from ensemblenet.data.video_sets import VIDEO_SUFFIXES, find_videos, order_of_labels
from ensemblenet.data.views import RandomView, Span, UniformViews, ViewReader, Views, view_reader
from ensemblenet.errors import DataError

__all__ = ["Kinetics"]

__getattr__ = renamed(__name__, {"LabelledVideos": "ensemblenet.data.video_sets.LabelledVideos"})

_KINETICS_MEAN, _KINETICS_STD = (0.432, 0.395, 0.376), (0.228, 0.221, 0.217)


class Kinetics(DataModule):
    """Clips of labelled videos (Kay et al. 2017, arXiv 1705.06950), decoded by workers when they are needed.

    Training batches hold a random clip of each video, cut out at random, and validation batches the clip in the middle:
    (N, 3, T, S, S), normalized, float32, with labels (N,), int64. Test batches hold V = `num_clips` x `num_crops` views
    of each video, (N, V, 3, T, S, S), whose predictions are averaged.

    Args:
        folder: of annotations and videos, or its URL (`https://`, `s3://`, `gs://`, `hf://`), see
            [`ensemblenet.data.video_sets.find_videos`][].
        train: the training split: an annotation, a list, a folder, or tars.
        val: the validation split.
        test: the test split; None takes the validation split.
        num_frames: T.
        stride: from one frame of a clip to the next.
        seconds: the length of a clip, in place of a stride.
        short: what follows the last frame where a clip is longer than the video: the first frames again ("loop"), or
            the last frame ("pad").
        untrimmed: whether files are whole videos, of which only the seconds that the annotation names are used.
        image_size: S.
        num_clips: clips of a test video, and of a file of `predict`, from its first frames to its last.
        num_crops: 1 for the centre, 3 for both ends of the longer side too.
        batch_size: training clips of a batch, of each process; an epoch leaves out those that fill no batch.
        eval_batch_size: videos of a batch in evaluation; None takes as many as in training.
        num_workers: processes that decode; 0 decodes in the main process.
        decoder: "pyav", or "torchcodec" where that is installed.
        scale: the least and the largest share of a frame's area that a training crop takes.
        flip: whether to mirror half of the training clips; not for classes such as "turning left".
        color_jitter: largest relative change of brightness, contrast and saturation of a training clip; all frames of
            a clip change alike.
        crop_pct: in evaluation the shorter side is resized to S / crop_pct.
        mean: of each channel, to normalize with.
        std: standard deviation of each channel.
        cache: whether to keep all decoded frames in memory, at the size of evaluation; for small sets, with
            `num_workers=0`.
        on_broken: "error" or "skip", for a video that cannot be decoded; a skipped one is left out, counted and named.
        max_broken: how many videos of a split may be skipped.
        seed: of order, clips and augmentation; None takes the run's own.
        shuffle_buffer: how many training videos are shuffled together, of each process: tars, or other files, are then
            read one after another, in a new order each epoch, and need not all fit on this machine. None shuffles all.

    Raises:
        DataError: at setup, what is wrong with the data; while loading, which video is broken.

    Example:
        >>> import tempfile
        >>> import av
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for split in ("train", "val"):
        ...         Path(folder, split, "high_jump").mkdir(parents=True)
        ...         with av.open(f"{folder}/{split}/high_jump/a.mp4", "w") as file:
        ...             stream = file.add_stream("mpeg4", rate=25, width=32, height=32)
        ...             for _ in range(8):
        ...                 file.mux(stream.encode(av.VideoFrame(32, 32, "yuv420p")))
        ...             file.mux(stream.encode(None))
        ...     small = {"num_frames": 4, "stride": 1, "image_size": 16, "batch_size": 1, "num_workers": 0}
        ...     data = Kinetics(Path(folder), "train", "val", **small)
        ...     data.setup("fit")
        ...     data.classes, [tuple(x.shape) for x in next(iter(data.train_dataloader()))]
        (['high jump'], [(1, 3, 4, 16, 16), (1,)])
    """

    def __init__(
        self,
        folder: str | Path,
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
        shuffle_buffer: int | None = None,
    ) -> None:
        check_view(image_size, crop_pct, std)
        if num_crops not in (1, 3) or num_clips < 1:
            raise DataError(
                f"Kinetics needs num_crops of 1 or 3 and num_clips >= 1; got {num_crops=} and {num_clips=}."
            )
        if cache and num_workers:
            raise DataError("cache=true needs num_workers=0: each worker would fill a cache of its own, every epoch.")
        ClipSampling(num_frames, stride, seconds, short)  # refuses numbers out of range
        super().__init__(batch_size, eval_batch_size, num_workers, on_broken, max_broken, seed, shuffle_buffer)
        self.folder = checked_place(folder)
        self.splits: dict[Split, str] = {"train": train, "val": val, "test": test or val}
        for split in self.splits.values():
            checked_place(split)
        self.untrimmed = untrimmed
        self.decoder: Decoder = decoder
        self.cache = cache
        self.preprocessing = {
            "input_shape": [3, num_frames, image_size, image_size],
            "num_frames": num_frames,
            "stride": stride,
            "seconds": seconds,
            "short": short,
            "num_clips": num_clips,
            "num_crops": num_crops,
            "mean": list(mean),
            "std": list(std),
            "crop_pct": crop_pct,
        }
        self.finish = NormalizeBytes.of(self.preprocessing, behind=3)
        self.views: dict[Split, Views] = {
            "train": RandomView(image_size, scale, flip, color_jitter),
            "val": UniformViews(image_size, num_clips=1, num_crops=1),
            "test": UniformViews.of(self.preprocessing),
        }

    def open_split(self, split: Split) -> LabelledViews:
        """Find the videos of a split and their labels."""
        assert self.preprocessing is not None
        videos = find_videos(self.folder, self.splits[split], fit=self.shuffle_buffer is None)
        classes = self.classes or order_of_labels(videos.labels)
        if split == "train":
            refuse_other_classes(videos.where, order_of_labels(classes), order_of_labels(videos.labels))
        refuse_strange_classes(videos.where, classes, videos.labels)
        if videos.missing:
            total = videos.missing + len(videos.paths)
            rank_zero_info(
                f"{videos.missing:,} of the {total:,} videos of {videos.where} do not exist, such as {videos.example}."
            )
        self.classes = classes
        numbers = {name: number for number, name in enumerate(classes)}
        return LabelledViews(
            videos.paths,
            [numbers[label] for label in videos.labels],
            videos.spans if self.untrimmed else [None] * len(videos.paths),
            view_reader(self.preprocessing, self.views[split], self.decoder, self.cache),
        )

    @property
    def tests_on_validation(self) -> bool:
        """Whether `test` names the videos of `val`."""
        return self.splits["test"] == self.splits["val"]

    def example_name(self, split: Split, place: int) -> str:
        """The file of a video after `setup`, relative to `folder` where it lies there."""
        path = self.examples(split).paths[place]
        is_in = isinstance(path, Path) and path.is_relative_to(self.folder)
        return str(path.relative_to(self.folder) if is_in else path)

    @classmethod
    def file_reader(cls, input_shape: Sequence[int], preprocessing: Mapping[str, Any]) -> FileReader:
        """The reader for video files, by PyAV."""
        known = {**preprocessing, "input_shape": input_shape}
        read = view_reader(known, UniformViews.of(known))
        return FileReader(NormalizeBytes.of(known, behind=3).reader(read), VIDEO_SUFFIXES)


@dataclass(frozen=True)
class LabelledViews:
    """A map-style data set of views of videos, with labels.

    Args:
        paths: N files.
        labels: N numbers of classes.
        spans: N pairs of seconds in which clips may lie; None allows all of the video.
        read: reads a video.
    """

    paths: list[VideoFile]
    labels: list[int]
    spans: Sequence[Span | None]
    read: ViewReader

    @property
    def files(self) -> list[VideoFile]:
        """What each video lies in, (N,)."""
        return self.paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.read(self.paths[index], self.spans[index]), self.labels[index]
