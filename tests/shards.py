"""Shards of YouTube-8M made for tests, written by the tfrecord package and its compiled protocol buffers."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tfrecord import example_pb2
from tfrecord.writer import TFRecordWriter

RGB, AUDIO, CLASSES = 16, 8, 20


@dataclass(frozen=True)
class Video:
    """What is written of a video, for comparison."""

    id: str
    labels: list[int]
    rgb: np.ndarray  # (RGB,) float32, or (frames, RGB) uint8
    audio: np.ndarray
    segments: Sequence[tuple[int, int, float]] = ()  # start, label, score


def videos(number: int, frames: int | None = None, seed: int = 0, num_classes: int = CLASSES) -> list[Video]:
    """Videos of chance; with `frames`, of up to so many frames."""
    rng = np.random.default_rng(seed)
    made = []
    for index in range(number):
        labels = rng.choice(num_classes, rng.integers(0, 4), replace=False).tolist()
        if frames is None:
            rgb, audio = (rng.normal(size=size).astype(np.float32) for size in (RGB, AUDIO))
        else:
            length = int(rng.integers(1, frames + 1))
            rgb, audio = (rng.integers(256, size=(length, size), dtype=np.uint8) for size in (RGB, AUDIO))
        made.append(Video(f"v{seed}_{index}", labels, rgb, audio))
    return made


def serialized(video: Video) -> bytes:
    """The record of a video, as its features say."""
    writer = TFRecordWriter
    context = {"id": (video.id.encode(), "byte"), "labels": (video.labels, "int")}
    if video.segments:
        starts, labels, scores = zip(*video.segments, strict=True)
        context |= {"segment_start_times": (starts, "int"), "segment_end_times": ([s + 5 for s in starts], "int")}
        context |= {"segment_labels": (labels, "int"), "segment_scores": (scores, "float")}
    if video.rgb.ndim == 1:
        floats = {"mean_rgb": (video.rgb, "float"), "mean_audio": (video.audio, "float")}
        return writer.serialize_tf_example(context | floats) + b"\x12\x00"  # as the official shards end
    frames = {"rgb": [row.tobytes() for row in video.rgb], "audio": [row.tobytes() for row in video.audio]}
    return writer.serialize_tf_sequence_example(context, {name: (rows, "byte") for name, rows in frames.items()})


def framed(record: bytes) -> bytes:
    """A record between its length and its checksums."""
    length = len(record).to_bytes(8, "little")
    return length + TFRecordWriter.masked_crc(length) + record + TFRecordWriter.masked_crc(record)


def write(path: Path, records: Sequence[Video | bytes]) -> Path:
    """Write a shard; one whose name ends in .gz is compressed."""
    data = b"".join(framed(record if isinstance(record, bytes) else serialized(record)) for record in records)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


__all__ = ["AUDIO", "CLASSES", "RGB", "Video", "example_pb2", "framed", "serialized", "videos", "write"]
