"""The records of YouTube-8M: features of videos, of their frames, and of rated segments."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ensemblenet.data.tfexample import (
    BYTES_LIST,
    FLOAT_LIST,
    INT64_LIST,
    Fields,
    Layout,
    bytes_of,
    floats_of,
    frames_of,
    integers_of,
    only_value,
    packed_integers,
    read_fields,
)
from ensemblenet.data.tfrecord import Record
from ensemblenet.errors import DataError

__all__ = ["NUM_CLASSES", "FrameLevel", "Level", "SegmentLevel", "VideoBatch", "VideoLevel", "make_level"]

NUM_CLASSES = 3862
SEGMENT_FRAMES = 5
_LAYOUTS = 256  # kept of records; official shards have about 60

Level = Literal["video", "frame", "segment"]


class VideoBatch(NamedTuple):
    """A batch of decoded records.

    Attributes:
        ids: of the N videos; for segments with the start time behind a colon.
        inputs: (N, D) features of videos, or (N, T, D) of frames, float32; padding is zero, which no feature of a
            frame can be.
        targets: (N, C), int8: 1 for a label, 0 for none, -1 for unrated (segments only).
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
        needs_labels: whether a record without labels is an error; if not, it counts as one of no class.
    """

    features: Mapping[str, int]
    num_classes: int = NUM_CLASSES
    needs_labels: bool = False
    default_features: ClassVar[Mapping[str, int]] = {"mean_rgb": 1024, "mean_audio": 128}
    _layouts: dict[int, list[Layout]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one video's inputs."""
        return (sum(self.features.values()),)

    def decode(self, records: Sequence[Record], chance: random.Random) -> VideoBatch:
        """Decode a batch.

        Raises:
            DataError: a record of another form; it names the record and the fault.
        """
        return self._decode_at_once(records) or self._decode_each(records)

    def _decode_at_once(self, records: Sequence[Record]) -> VideoBatch | None:
        """A batch whose records all have a known layout; None if one has not, or a label is wrong."""
        values = [self._values(record.data) for record in records]
        if not values or None in values:
            return None
        *features, ids, labels = zip(*values, strict=True)  # pyright: ignore
        numbers, owners = packed_integers(labels) or (np.array([self.num_classes]), ())
        if numbers.max(initial=0) >= self.num_classes:
            return None
        floats = bytearray().join(chain.from_iterable(zip(*features, strict=True)))  # of each record side by side
        inputs = np.frombuffer(floats, "<f4").astype(np.float32, copy=False).reshape(-1, *self.input_shape)
        targets = np.zeros((len(records), self.num_classes), np.int8)
        targets[owners, numbers] = 1
        names = [str(name, errors="replace") for name in ids]
        return VideoBatch(names, torch.from_numpy(inputs), torch.from_numpy(targets))

    def _values(self, data: bytes) -> tuple[memoryview, ...] | None:
        """The bytes of each feature, of the id and of the labels; None of a record for the general parser."""
        for layout in self._layouts.get(len(data), []):
            if layout.fits(data):
                return layout.values(memoryview(data))
        layout = self._learn(data)
        return None if layout is None else layout.values(memoryview(data))

    def _learn(self, data: bytes) -> Layout | None:
        """The layout of a record in which each wanted feature is one value of the right kind and size."""
        if sum(map(len, self._layouts.values())) == _LAYOUTS:
            return None
        try:
            fields, _ = read_fields(data)
            found = {name: only_value(data, span) for name, span in fields.items()}
        except ValueError:
            return None
        if not self.needs_labels:
            found.setdefault("labels", (INT64_LIST, (0, 0)))
        wanted = [*self.features, "id" if "id" in fields else "video_id", "labels"]
        values = [value for value in map(found.get, wanted) if value is not None]
        if [kind for kind, _ in values] != [FLOAT_LIST] * len(self.features) + [BYTES_LIST, INT64_LIST]:
            return None
        spans = [span for _, span in values]
        if [end - begin for begin, end in spans[:-2]] != [4 * size for size in self.features.values()]:
            return None
        unread = [value[1] for name, value in found.items() if value is not None and name not in wanted]
        layout = Layout.of(data, spans, unread)
        self._layouts.setdefault(len(data), []).append(layout)
        return layout

    def _decode_each(self, records: Sequence[Record]) -> VideoBatch:
        """The same for any records."""
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
            target[_labels(record, fields, "labels", self.num_classes, self.needs_labels)] = 1
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
        sample: whether to spread the T frames over the video instead, one in each of T equal parts: a random one in
            training, else the one in the middle.
        train: whether sampled frames are random.
        needs_labels: whether a record without labels is an error; if not, it counts as one of no class.
    """

    features: Mapping[str, int]
    num_classes: int = NUM_CLASSES
    num_frames: int = 300
    sample: bool = False
    train: bool = False
    needs_labels: bool = False
    default_features: ClassVar[Mapping[str, int]] = {"rgb": 1024, "audio": 128}

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one video's inputs."""
        return (self.num_frames, sum(self.features.values()))

    def decode(self, records: Sequence[Record], chance: random.Random) -> VideoBatch:
        """Decode a batch.

        Raises:
            DataError: a record of another form; it names the record and the fault.
        """
        inputs = np.zeros((len(records), *self.input_shape), np.float32)
        targets = np.zeros((len(records), self.num_classes), np.int8)
        ids = []
        for video, target, record in zip(inputs, targets, records, strict=True):
            fields, lists = _read(record)
            frames = self.frames(record, fields, lists)
            chosen: Any = slice(self.num_frames)
            if self.sample:
                within = [chance.random() for _ in range(self.num_frames)] if self.train else 0.5
                places = (np.arange(self.num_frames) + within) * (len(frames[0]) / self.num_frames)
                chosen = places.astype(np.int64)
            _dequantise([feature[chosen] for feature in frames], video)
            ids.append(_video_id(record, fields))
            target[_labels(record, fields, "labels", self.num_classes, self.needs_labels)] = 1
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


@dataclass(frozen=True)
class SegmentLevel(FrameLevel):
    """Reads the segments of five frames that people rated in 2019; a video's rated segments are as many examples.

    A segment has few ratings, most often of one class: the others' targets are -1.
    """

    num_frames: int = SEGMENT_FRAMES

    def decode(self, records: Sequence[Record], chance: random.Random) -> VideoBatch:
        """Decode the segments of a batch of videos.

        Raises:
            DataError: a record of another form; it names the record and the fault.
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
        """The rated classes and their scores, by the start of the segment."""
        if "segment_start_times" not in fields:
            raise record.error("has no segments; they are in the validation shards of 2019 only.")
        starts = _decoded(record, "segment_start_times", integers_of, fields["segment_start_times"])
        if not starts:
            raise record.error("has no segments.")
        labels = _labels(record, fields, "segment_labels", self.num_classes, needed=True)
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
    """Write the features of frames side by side into the first rows of `out`."""
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


def _labels(record: Record, fields: Fields, name: str, num_classes: int, needed: bool) -> list[int]:
    if name not in fields:  # test shards have none
        if needed:
            raise record.error(f"has no {name}: it can be predicted, and neither trained nor tested on.")
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


# -- by name


def make_level(
    level: Level,
    features: Mapping[str, int] | None = None,
    num_classes: int = NUM_CLASSES,
    num_frames: int | None = None,
    sample_frames: bool = False,
) -> VideoLevel | FrameLevel:
    """The decoder of a level's records; its arguments are those of [`YouTube8M`][ensemblenet.data.YouTube8M].

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
