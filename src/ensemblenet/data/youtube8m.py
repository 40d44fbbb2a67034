"""YouTube-8M: the data module."""

from __future__ import annotations

import random
import warnings
from dataclasses import dataclass, replace

from torch import Tensor

from ensemblenet._moved import renamed
from ensemblenet.data.loading import OnBroken
from ensemblenet.data.module import DataModule, Split
from ensemblenet.data.records import RecordLoader, Share
from ensemblenet.data.remote import checked_place
from ensemblenet.data.tfrecord import Record, Shard, find_shards, index_shards
from ensemblenet.data.youtube8m_levels import NUM_CLASSES, FrameLevel, Level, VideoLevel, make_level

__all__ = ["YouTube8M"]

__getattr__ = renamed(
    __name__, {name: f"ensemblenet.data.youtube8m_levels.{name}" for name in ("SegmentLevel", "VideoBatch")}
)


class YouTube8M(DataModule):
    """YouTube-8M (Abu-El-Haija et al. 2016, arXiv 1609.08675) in TFRecord files, from a disk or a server.

    Batches hold inputs, (N, D) for videos or (N, T, D) for frames, float32, and targets (N, C), int8; see
    [`VideoBatch`][ensemblenet.data.youtube8m_levels.VideoBatch]. Setup reads the headers of all records, which counts
    them and finds truncated files early; for that it reads gzip files from end to end, and fetches remote ones; see
    [`ensemblenet.data.remote`][].

    Args:
        folder: of the files, to which patterns are relative; or its URL (`https://`, `s3://`, `gs://`, `hf://`).
        level: "video" for features averaged over each video, "frame" for those of frames, "segment" for the
            rated segments of 2019.
        train: files to train on: a pattern, a folder, or a list of them, such as `train00*.tfrecord`.
        val: files to validate on. Level "segment" needs validation shards of 2019 here and in `train`.
        test: files to test on; by default the validation shards, as the official test shards have no labels.
        num_classes: C; 3862 since 2018, 4716 before.
        features: names and sizes of the features, in the order of the inputs; None for
            `mean_rgb: 1024, mean_audio: 128` of videos or `rgb: 1024, audio: 128` of frames.
        num_frames: T, for level "frame"; 300 by default. Longer videos are cut, shorter ones are padded with zeros.
        sample_frames: whether to take T frames spread over the whole video instead; random ones in training.
        batch_size: training videos of a batch, of each process; an epoch leaves out those that fill no batch.
        shuffle_buffer: number of records from which each worker draws the next. A video takes 5 KB, its frames take up
            to 350 KB.
        num_workers: processes that read; 0 reads in the main process.
        on_broken: "error" or "skip", for a record whose checksum does not fit; a skipped one is left out, counted and
            named.
        max_broken: how many records of a split may be skipped; None for any number.
        seed: of the order of training; None takes the run's own.
        on_damage: the old name of `on_broken`.

    Raises:
        DataError: at setup or while reading; it names the file, and where in it.

    Example:
        >>> import tempfile
        >>> from tfrecord import TFRecordWriter
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("train0000", "validate0000"):
        ...         writer = TFRecordWriter(f"{folder}/{name}.tfrecord")
        ...         for label in range(4):
        ...             video = {"id": (b"ab12", "byte"), "labels": (label, "int"), "mean_rgb": ([0.5] * 6, "float")}
        ...             writer.write(video)
        ...         writer.close()
        ...     data = YouTube8M(folder, features={"mean_rgb": 6}, num_classes=10, batch_size=4, num_workers=0)
        ...     data.setup("fit")
        ...     [tuple(x.shape) for x in next(iter(data.train_dataloader()))]
        [(4, 6), (4, 10)]
    """

    finds_classes = False  # classes have numbers only

    def __init__(
        self,
        folder: str,
        level: Level = "video",
        train: str | list[str] = "train*.tfrecord*",
        val: str | list[str] = "validate*.tfrecord*",
        test: str | list[str] = "validate*.tfrecord*",
        num_classes: int = NUM_CLASSES,
        features: dict[str, int] | None = None,
        num_frames: int | None = None,
        sample_frames: bool = False,
        batch_size: int = 128,
        shuffle_buffer: int = 1000,
        num_workers: int = 1,
        on_broken: OnBroken = "error",
        max_broken: int | None = None,
        seed: int | None = None,
        on_damage: OnBroken = "error",  # stored configurations of version 0.1 have it
    ) -> None:
        if on_damage != "error":
            warnings.warn("YouTube8M's on_damage is now on_broken.", DeprecationWarning, stacklevel=2)
            on_broken = on_damage
        super().__init__(batch_size, None, num_workers, on_broken, max_broken, seed)
        self.folder = str(checked_place(folder))
        self.level = replace(make_level(level, features, num_classes, num_frames, sample_frames), needs_labels=True)
        self.preprocessing = {
            "level": level,
            "features": features,
            "num_classes": num_classes,
            "num_frames": num_frames,
            "sample_frames": sample_frames,
        }
        self.patterns: dict[Split, str | list[str]] = {"train": train, "val": val, "test": test}
        for patterns in self.patterns.values():
            for pattern in [patterns] if isinstance(patterns, str) else patterns:
                checked_place(pattern)
        self.share = Share(batch_size, shuffle_buffer=shuffle_buffer, num_workers=num_workers)

    def open_split(self, split: Split) -> list[Shard]:
        """Find the shards of a split and their records."""
        return index_shards(find_shards(self.patterns[split], self.folder), self.on_broken)

    @property
    def tests_on_validation(self) -> bool:
        """Whether `test` names the shards of `val`."""
        return self.patterns["test"] == self.patterns["val"]

    def make_loader(self, split: Split, **process: int) -> RecordLoader:
        """A loader of a split, see [`ensemblenet.data.module.DataModule.make_loader`][]."""
        train = split == "train"
        share = replace(self.share, train=train, **process)
        level = replace(self.level, train=train) if isinstance(self.level, FrameLevel) else self.level
        return RecordLoader(self.examples(split), _Pairs(level), share, self.on_broken, self.max_broken)


@dataclass(frozen=True)
class _Pairs:
    """Decodes records to inputs and targets, without ids."""

    level: VideoLevel | FrameLevel

    def __call__(self, records: list[Record], chance: random.Random) -> tuple[Tensor, Tensor]:
        _, inputs, targets = self.level.decode(records, chance)
        return inputs, targets
