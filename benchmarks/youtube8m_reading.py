"""How fast YouTube-8M records are read, side by side with the tfrecord package; whether training waits; memory.

    python benchmarks/youtube8m_reading.py --data FOLDER      # with video-level shards

Frame-level shards are made in the official format: 300 frames of 1024 and 128 bytes. Files are read once before, so
they lie in the page cache, and the two readers take turns. Rates are per second of one core's processor time, median
over rounds with the lowest and the highest. Three kinds of work:

- raw: the records' fields as they are stored (arrays of floats, or of bytes a frame), ids and labels; of video-level
  records one by one with the general parser, which batches need for few;
- batches: tensors of 128 videos or 32 times 300 frames, dequantised and padded, with multi-hot labels. The package has
  no batches of this kind; what it gives is stacked by the plain NumPy code below.

This project compares both checksums of every record; the package reads over them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tagging_memory import resident
from tfrecord.reader import tfrecord_loader
from tfrecord.writer import TFRecordWriter

from ensemblenet import CoDistillationLoss
from ensemblenet.data.records import RecordLoader, Share
from ensemblenet.data.tfexample import bytes_of, floats_of, integers_of, read_fields
from ensemblenet.data.tfrecord import Shard, find_shards, index_shards
from ensemblenet.data.youtube8m_levels import NUM_CLASSES, FrameLevel, VideoLevel, make_level
from ensemblenet.models import MLPTagger
from ensemblenet.training.optimization import Optimization, build_optimizer

RESULTS = Path(__file__).parent / "results" / "youtube8m_reading.json"
FRAMES = 300
BATCH = {"video": 128, "frame": 32}
FEATURES = {"video": {"mean_rgb": 1024, "mean_audio": 128}, "frame": {"rgb": 1024, "audio": 128}}


def make_frames(path: Path, number: int) -> None:
    """A frame-level shard of random bytes."""
    rng = np.random.default_rng(0)
    writer = TFRecordWriter(str(path))
    for index in range(number):
        frames = {
            name: rng.integers(256, size=(FRAMES, size), dtype=np.uint8) for name, size in FEATURES["frame"].items()
        }
        writer.write(
            {"id": (b"%04d" % index, "byte"), "labels": (rng.integers(NUM_CLASSES, size=3).tolist(), "int")},
            {name: ([row.tobytes() for row in rows], "byte") for name, rows in frames.items()},
        )
    writer.close()


# -- the work, for this project and for the package


def our_raw(shards: list[Shard], level: str) -> int:
    """Fields of every record."""
    reader = make_level(level)  # type: ignore[arg-type]
    count = 0
    for shard in shards:
        for record in shard.read():
            assert record is not None
            fields, lists = read_fields(record.data)
            bytes_of(record.data, fields["id"])
            integers_of(record.data, fields["labels"])
            if isinstance(reader, FrameLevel):
                reader.frames(record, fields, lists)
            else:
                for name in FEATURES[level]:
                    floats_of(record.data, fields[name])
            count += 1
    return count


def their_records(shards: list[Shard], level: str) -> Iterator[dict[str, Any]]:
    """Every record as the package gives it; byte strings of frames as arrays."""
    context = {"id": "byte", "labels": "int"}
    for shard in shards:
        if level == "video":
            yield from tfrecord_loader(shard.path, None, context | dict.fromkeys(FEATURES[level], "float"))
        else:
            sequences = dict.fromkeys(FEATURES[level], "byte")
            for fields, lists in tfrecord_loader(shard.path, None, context, sequence_description=sequences):
                frames = {
                    name: np.frombuffer(b"".join(rows), np.uint8).reshape(-1, FEATURES[level][name])
                    for name, rows in lists.items()
                }
                yield fields | frames


def their_raw(shards: list[Shard], level: str) -> int:
    """Fields of every record."""
    return sum(1 for _ in their_records(shards, level))


def our_batches(shards: list[Shard], level: str) -> int:
    """Batches in order."""
    reader: VideoLevel | FrameLevel = make_level(level)  # type: ignore[arg-type]
    return sum(len(batch.inputs) for batch in RecordLoader(shards, reader.decode, Share(BATCH[level])))


def their_batches(shards: list[Shard], level: str) -> int:
    """The same batches from what the package gives."""
    count = 0
    held: list[dict[str, Any]] = []
    for record in their_records(shards, level):
        held.append(record)
        if len(held) == BATCH[level]:
            count += len(stack(held, level)[0])
            held = []
    return count + (len(stack(held, level)[0]) if held else 0)


def stack(records: list[dict[str, Any]], level: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Tensors of inputs and targets."""
    parts = [np.concatenate([record[name] for name in FEATURES[level]], axis=-1) for record in records]
    if level == "frame":
        parts = [part.astype(np.float32) * np.float32(4 / 255) + np.float32(4 / 512 - 2) for part in parts]
        parts = [np.pad(part[:FRAMES], ((0, FRAMES - len(part[:FRAMES])), (0, 0))) for part in parts]
    targets = np.zeros((len(records), NUM_CLASSES), np.int8)
    for target, record in zip(targets, records, strict=True):
        target[record["labels"]] = 1
    return torch.from_numpy(np.stack(parts)), torch.from_numpy(targets)


# -- measuring


def rates(shards: list[Shard], level: str, rounds: int) -> dict[str, Any]:
    """Records and MB a second of both, and the ratio, for both kinds of work."""
    size = sum(int(shard.offsets[-1]) for shard in shards) / 1e6
    found: dict[str, Any] = {"records": sum(map(len, shards)), "megabytes": round(size, 1)}
    works: dict[str, tuple[Callable[[list[Shard], str], int], Callable[[list[Shard], str], int]]] = {
        "raw": (our_raw, their_raw),
        "batches": (our_batches, their_batches),
    }
    for kind, both in works.items():
        for work in both:
            assert work(shards, level) == found["records"]
        seconds: list[list[float]] = [[], []]
        for _ in range(rounds):
            for times, work in zip(seconds, both, strict=True):
                began = time.process_time()
                work(shards, level)
                times.append(time.process_time() - began)
        ratios = [theirs / ours for ours, theirs in zip(*seconds, strict=True)]
        found[kind] = {
            "ensemblenet": {
                "records_s": spread([found["records"] / s for s in seconds[0]]),
                "mb_s": spread([size / s for s in seconds[0]]),
            },
            "tfrecord": {
                "records_s": spread([found["records"] / s for s in seconds[1]]),
                "mb_s": spread([size / s for s in seconds[1]]),
            },
            "ratio": spread(ratios),
        }
        print(level, kind, json.dumps(found[kind]), flush=True)
    return found


def spread(values: list[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": round(statistics.median(values), 2), "low": round(min(values), 2), "high": round(max(values), 2)}


def memory_over_an_epoch(shards: list[Shard], level: str, repeats: int) -> dict[str, float]:
    """Resident memory while a shuffled epoch is read, from shards repeated to make it long."""
    reader = make_level(level)  # type: ignore[arg-type]
    share = Share(BATCH[level], train=True, shuffle_buffer=100)
    loader = RecordLoader(shards * repeats, reader.decode, share)
    samples = [resident() for _ in loader]
    tenth = max(1, len(samples) // 10)
    return {
        "batches": len(samples),
        "first_tenth_mb": round(max(samples[tenth : 2 * tenth]), 1),
        "last_tenth_mb": round(max(samples[-tenth:]), 1),
    }


def waiting(shards: list[Shard]) -> dict[str, float]:
    """One epoch of the MLP with one worker: seconds in all, and waiting for data after the first batch."""
    reader = make_level("video")
    loader = RecordLoader(shards, Pairs(reader), Share(256, train=True, shuffle_buffer=1000, num_workers=1))
    network = MLPTagger(hidden=[512, 1024])
    optimizer = build_optimizer(network, Optimization())
    criterion = CoDistillationLoss(1.0, "multilabel")
    batches = iter(loader)
    next(batches)
    waits: list[float] = []
    began = time.perf_counter()
    while True:
        asked = time.perf_counter()
        batch = next(batches, None)
        waits.append(time.perf_counter() - asked)
        if batch is None:
            break
        loss = criterion(network(batch[0])[None], batch[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    total = time.perf_counter() - began
    return {
        "batches": len(waits),
        "seconds": round(total, 2),
        "waiting_seconds": round(sum(waits), 3),
        "waiting_share": round(sum(waits) / total, 4),
        "longest_wait_ms": round(1000 * max(waits), 1),
    }


class Pairs:
    """Decodes what training takes."""

    def __init__(self, reader: VideoLevel | FrameLevel) -> None:
        self.reader = reader

    def __call__(self, records: Any, chance: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
        batch = self.reader.decode(records, chance)
        return batch.inputs, batch.targets


def main() -> None:
    """Measure everything and write it down."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="the folder of video-level shards")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--frames", type=int, default=100, help="frame-level records to make")
    args = parser.parse_args()
    torch.set_num_threads(1)
    videos = index_shards(find_shards(args.data))
    record: dict[str, Any] = {
        "command": "python benchmarks/youtube8m_reading.py --data FOLDER",
        "environment": {
            "python": platform.python_version(),
            "packages": {name: version(name) for name in ("torch", "numpy", "tfrecord", "protobuf", "google-crc32c")},
            "cpus": os.cpu_count(),
            "threads": 1,
        },
        "rounds": args.rounds,
    }
    with tempfile.TemporaryDirectory() as folder:
        make_frames(Path(folder, "frames.tfrecord"), args.frames)
        frames = index_shards(find_shards(folder))
        record["video"] = rates(videos, "video", args.rounds)
        record["frame"] = rates(frames, "frame", args.rounds)
        record["memory"] = {
            "video": memory_over_an_epoch(videos, "video", 3),
            "frame": memory_over_an_epoch(frames, "frame", 20),
        }
    record["training"] = waiting(videos[:28])
    print(json.dumps({name: record[name] for name in ("memory", "training")}, indent=1))
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
