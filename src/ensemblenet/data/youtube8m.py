"""YouTube-8M: features of videos and of their frames, from the official TFRecord files."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from ensemblenet.data.records import RecordLoader, Share
from ensemblenet.data.tensors import DataError
from ensemblenet.data.tfexample import Fields, bytes_of, floats_of, frames_of, integers_of, read_fields
from ensemblenet.data.tfrecord import OnDamage, Record, Shard, find_shards, index_shards

__all__ = ["NUM_CLASSES", "FrameLevel", "Level", "SegmentLevel", "VideoBatch", "VideoLevel", "YouTube8M", "make_level"]

NUM_CLASSES = 3862
SEGMENT_FRAMES = 5

Level = Literal["video", "frame", "segment"]


class VideoBatch(NamedTuple):
    """What the records of a batch hold.

    Attributes:
        ids: of the N videos; for segments with the start time behind a colon.
        inputs: (N, D) features of videos, or (N, T, D) of frames, float32; frames that are not there are zero
            throughout, which no frame that is there can be.
        targets: (N, C), int8: 1 for a label, 0 for none, -1 where nobody looked (segments only).
    """

    ids: list[str]
    inputs: Tensor
    targets: Tensor


@dataclass(frozen=True)
class VideoLevel:
    """Reads records of features averaged over each video: `tf.train.Example`.

    Args:
        features: names of features and their sizes, which add up to D.
        num_classes: C.
    """

    features: Mapping[str, int]
    num_classes: int = NUM_CLASSES
    default_features: ClassVar[Mapping[str, int]] = {"mean_rgb": 1024, "mean_audio": 128}

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one video's inputs."""
        return (sum(self.features.values()),)

    def decode(self, records: Sequence[Record], chance: random.Random) -> VideoBatch:
        """Decode a batch.

        Raises:
            DataError: a record that is no such example; which, and why.
        """
        inputs = np.empty((len(records), *self.input_shape), np.float32)
        targets = np.zeros((len(records), self.num_classes), np.int8)
        ids = []
        for row, target, record in zip(inputs, targets, records, strict=True):
            fields, lists = _read(record)
            begin = 0
            for name, size in self.features.items():
                if name not in fields:
                    raise _lacks(record, name, fields, lists, "video")
                values = _decoded(record, name, floats_of, fields[name])
                if len(values) != size:
                    raise record.error(f"has {len(values)} values of {name}, where {size} were expected.")
                row[begin : begin + size] = values
                begin += size
            ids.append(_video_id(record, fields))
            target[_labels(record, fields, "labels", self.num_classes)] = 1
        return VideoBatch(ids, torch.from_numpy(inputs), torch.from_numpy(targets))


@dataclass(frozen=True)
class FrameLevel:
    """Reads records of features of frames: `tf.train.SequenceExample`.

    Bytes q stand for numbers in [-2, 2]; as in the challenge's code they become 4 q / 255 + 4 / 512 - 2, which is
    never 0.

    Args:
        features: names of features and their sizes in bytes, which add up to D.
        num_classes: C.
        num_frames: T. Of longer videos the first T frames are taken, shorter ones are padded with zeros.
        sample: take T frames of every video instead, one from each of T equal stretches, and none twice where
            there are enough: a random one in training, else the one in the middle.
        train: whether it is for training.
    """

    features: Mapping[str, int]
    num_classes: int = NUM_CLASSES
    num_frames: int = 300
    sample: bool = False
    train: bool = False
    default_features: ClassVar[Mapping[str, int]] = {"rgb": 1024, "audio": 128}

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one video's inputs."""
        return (self.num_frames, sum(self.features.values()))

    def decode(self, records: Sequence[Record], chance: random.Random) -> VideoBatch:
        """Decode a batch.

        Raises:
            DataError: a record that is no such example; which, and why.
        """
        inputs = np.zeros((len(records), *self.input_shape), np.float32)
        targets = np.zeros((len(records), self.num_classes), np.int8)
        ids = []
        for video, target, record in zip(inputs, targets, records, strict=True):
            fields, lists = _read(record)
            frames = self.frames(record, fields, lists)
            chosen = self._choose(len(frames[0]), chance)
            _dequantise([feature[chosen] for feature in frames], video)
            ids.append(_video_id(record, fields))
            target[_labels(record, fields, "labels", self.num_classes)] = 1
        return VideoBatch(ids, torch.from_numpy(inputs), torch.from_numpy(targets))

    def frames(self, record: Record, fields: Fields, lists: Fields) -> list[np.ndarray]:
        """The frames of each feature, (frames, size), uint8."""
        found = []
        for name, size in self.features.items():
            if name not in lists:
                raise _lacks(record, name, fields, lists, "frame")
            found.append(_decoded(record, name, frames_of, lists[name], size))
        lengths = {name: len(frames) for name, frames in zip(self.features, found, strict=True)}
        if len(set(lengths.values())) > 1:
            raise record.error(f"has features of different lengths: {lengths}.")
        if not len(found[0]):
            raise record.error("has no frames.")
        return found

    def _choose(self, length: int, chance: random.Random) -> np.ndarray | slice:
        if not self.sample:
            return slice(self.num_frames)
        within = [chance.random() for _ in range(self.num_frames)] if self.train else 0.5
        return ((np.arange(self.num_frames) + within) * (length / self.num_frames)).astype(np.int64)


@dataclass(frozen=True)
class SegmentLevel(FrameLevel):
    """Reads the segments of five frames that people rated in 2019; a video's rated segments are as many examples.

    A segment has few ratings, most often of one class: the others' targets are -1.
    """

    num_frames: int = SEGMENT_FRAMES

    def decode(self, records: Sequence[Record], chance: random.Random) -> VideoBatch:
        """Decode the segments of a batch of videos.

        Raises:
            DataError: a record that is no such example; which, and why.
        """
        ids, inputs, targets = [], [], []
        for record in records:
            fields, lists = _read(record)
            frames = self.frames(record, fields, lists)
            for start, ratings in self._ratings(record, fields).items():
                segment = np.zeros(self.input_shape, np.float32)
                _dequantise([feature[start : start + self.num_frames] for feature in frames], segment)
                target = np.full(self.num_classes, -1, np.int8)
                for label, score in ratings:
                    target[label] = score > 0
                ids.append(f"{_video_id(record, fields)}:{start}")
                inputs.append(segment)
                targets.append(target)
        return VideoBatch(ids, torch.from_numpy(np.stack(inputs)), torch.from_numpy(np.stack(targets)))

    def _ratings(self, record: Record, fields: Fields) -> dict[int, list[tuple[int, float]]]:
        """By start: the classes that were rated there, and how."""
        if "segment_start_times" not in fields:
            raise record.error("has no segments; they are in the validation shards of 2019 only.")
        starts = _decoded(record, "segment_start_times", integers_of, fields["segment_start_times"])
        labels = _labels(record, fields, "segment_labels", self.num_classes)
        scores = _decoded(record, "segment_scores", floats_of, fields.get("segment_scores", (0, 0)))
        if not len(starts) == len(labels) == len(scores):
            raise record.error(
                f"has {len(starts)} segment_start_times, {len(labels)} segment_labels and {len(scores)} segment_scores."
            )
        found: dict[int, list[tuple[int, float]]] = {}
        for start, label, score in zip(starts, labels, scores, strict=True):
            found.setdefault(start, []).append((label, float(score)))
        return found


def _dequantise(parts: Sequence[np.ndarray], out: np.ndarray) -> None:
    """Write the features of frames side by side; rows that they do not reach stay as they are."""
    begin, there = 0, out[: len(parts[0])]
    for part in parts:
        there[:, begin : begin + part.shape[1]] = part
        begin += part.shape[1]
    there *= np.float32(4 / 255)
    there += np.float32(4 / 512 - 2)


# -- the fields of one record, with errors that say where


def _read(record: Record) -> tuple[Fields, Fields]:
    try:
        return read_fields(record.data)
    except ValueError as error:  # also of a name that is no UTF-8
        raise record.error(f"is neither a tf.train.Example nor a SequenceExample: it {error}.") from error


def _decoded(record: Record, name: str, decode: Any, *arguments: Any) -> Any:
    try:
        return decode(record.data, *arguments)
    except ValueError as error:
        raise record.error(f"has a feature {name!r} that {error}.") from error


def _video_id(record: Record, fields: Fields) -> str:
    name = "id" if "id" in fields else "video_id"
    values = _decoded(record, name, bytes_of, fields[name]) if name in fields else []
    if len(values) != 1:
        raise record.error(f"has {len(values)} ids of a video, where 1 was expected.")
    return values[0].decode(errors="replace")


def _labels(record: Record, fields: Fields, name: str, num_classes: int) -> list[int]:
    if name not in fields:  # test shards have none
        return []
    labels = _decoded(record, name, integers_of, fields[name])
    wrong = next((label for label in labels if not 0 <= label < num_classes), None)
    if wrong is not None:
        raise record.error(f"has the label {wrong} in {name}; num_classes={num_classes} allows 0 to {num_classes - 1}.")
    return labels


def _lacks(record: Record, name: str, fields: Fields, lists: Fields, level: Level) -> DataError:
    here, other, what = (fields, lists, "frame") if level == "video" else (lists, fields, "video")
    if not here.keys() - {"id", "video_id", "labels"} and other.keys() - {"id", "video_id", "labels"}:
        return record.error(f"is of a {what}-level shard (it has {', '.join(sorted(other))}); set level to {what!r}.")
    return record.error(f"has no feature {name!r}; it has {', '.join(sorted([*fields, *lists])) or 'none'}.")


# -- the data module


def make_level(
    level: Level,
    features: Mapping[str, int] | None = None,
    num_classes: int = NUM_CLASSES,
    num_frames: int | None = None,
    sample_frames: bool = False,
) -> VideoLevel | FrameLevel:
    """What reads the records of a level; its arguments are those of [`YouTube8M`][ensemblenet.data.YouTube8M].

    Raises:
        DataError: an argument that the level does not have, or a number out of its range.

    Example:
        >>> make_level("frame", num_frames=30).input_shape
        (30, 1152)
    """
    kinds = {"video": VideoLevel, "frame": FrameLevel, "segment": SegmentLevel}
    if level not in kinds:
        raise DataError(f"level must be one of {', '.join(map(repr, kinds))}, got {level!r}.")
    reader = kinds[level](dict(features or kinds[level].default_features), num_classes)
    if min(num_classes, *reader.features.values()) < 1:
        raise DataError(f"Class counts and feature sizes must be positive, got {num_classes} and {reader.features}.")
    if num_frames is not None or sample_frames:
        if level != "frame":
            raise DataError(f"num_frames and sample_frames are for level 'frame', not {level!r}.")
        if num_frames is not None and num_frames < 1:
            raise DataError(f"num_frames must be at least 1, got {num_frames}.")
        reader = replace(reader, num_frames=num_frames or FrameLevel.num_frames, sample=sample_frames)  # pyright: ignore
    return reader


class YouTube8M(LightningDataModule):
    """YouTube-8M (Abu-El-Haija et al. 2016, arXiv 1609.08675) as its TFRecord files, streamed from where they lie.

    Batches hold inputs, (N, D) for videos or (N, T, D) for frames, float32, and targets (N, C), int8; see
    [`VideoBatch`][ensemblenet.data.youtube8m.VideoBatch]. At the start the headers of all records are read, which
    finds truncated files early and tells how many records there are; gzip and remote files are read through for it.

    Args:
        folder: where patterns start from; local or with a protocol that fsspec knows, such as `s3://`.
        level: "video" for features averaged over each video, "frame" for those of frames, "segment" for the
            rated segments of 2019.
        train: files to train on: a pattern, a folder, or a list of them, such as `train00*.tfrecord`.
        val: files to validate on. In level "segment" only validation shards of 2019 can stand here and in `train`.
        test: files to test on; the official test shards have no labels, so these are the validation shards.
        num_classes: C; 3862 since 2018, 4716 before.
        features: names and sizes of the features, in the order in which they stand side by side; None for
            `mean_rgb: 1024, mean_audio: 128` of videos or `rgb: 1024, audio: 128` of frames.
        num_frames: T, for level "frame"; 300 by default. Longer videos are cut, shorter ones are padded with zeros.
        sample_frames: take T frames spread over the whole video instead; random ones in training.
        batch_size: videos a batch; a training epoch leaves out what fills none.
        shuffle_buffer: how many records each worker holds to choose the next from. A video takes 5 KB, its
            frames take up to 350 KB.
        num_workers: processes that read; 0 reads in the main process.
        on_damage: what to do with records whose checksum does not fit: "error", or "skip" and count them.
        seed: of the order of training; None takes the run's own.

    Raises:
        DataError: at setup or while reading; it names the file, and where in it.
    """

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
        on_damage: OnDamage = "error",
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.folder = folder
        self.level = make_level(level, features, num_classes, num_frames, sample_frames)
        self.reads = {
            "level": level,
            "features": features,
            "num_classes": num_classes,
            "num_frames": num_frames,
            "sample_frames": sample_frames,
        }
        self.patterns = {"train": train, "val": val, "test": test}
        self.share = Share(batch_size, shuffle_buffer=shuffle_buffer, num_workers=num_workers)
        self.on_damage: OnDamage = on_damage
        self.seed = seed
        self._found: dict[str, list[Shard]] = {}
        self._train_loader: RecordLoader | None = None
        self._state: dict[str, Any] = {}

    def setup(self, stage: str | None = None) -> None:
        """Find the shards and their records, once."""
        if self.seed is None:
            self.seed = torch.initial_seed() % 2**32
        splits = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}
        for split in splits.get(stage or "", tuple(self.patterns)):
            self._shards(split)

    def description(self) -> dict[str, Any]:
        """What a trained network needs to be told of its data; the classes have numbers only."""
        return {"classes": None, "preprocessing": self.reads}

    def train_dataloader(self) -> RecordLoader:
        """Shuffled batches, in an order that depends on the seed and the epoch."""
        self._train_loader = self._loader("train")
        if self._state:
            self._train_loader.load_state_dict(self._state)
        return self._train_loader

    def val_dataloader(self) -> RecordLoader:
        """Validation batches, in order."""
        return self._loader("val")

    def test_dataloader(self) -> RecordLoader:
        """Test batches, in order."""
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

    def _shards(self, split: str) -> list[Shard]:
        if split not in self._found:
            self._found[split] = index_shards(find_shards(self.patterns[split], self.folder), self.on_damage)
        return self._found[split]

    def _loader(self, split: str) -> RecordLoader:
        train = split == "train"
        processes = {}
        if self.trainer is not None:
            processes = {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}
        share = replace(self.share, train=train, seed=self.seed or 0, **processes)
        level = replace(self.level, train=train) if isinstance(self.level, FrameLevel) else self.level
        return RecordLoader(self._shards(split), _Pairs(level), share, self.on_damage)


@dataclass(frozen=True)
class _Pairs:
    """Decodes inputs and targets only."""

    level: VideoLevel | FrameLevel

    def __call__(self, records: list[Record], chance: random.Random) -> tuple[Tensor, Tensor]:
        _, inputs, targets = self.level.decode(records, chance)
        return inputs, targets
