"""What training makes of damaged data: it is read, counted and skipped, or refused in one line, soon.

    python benchmarks/damaged_data.py --count 2000
    python benchmarks/damaged_data.py --kinds tar parquet

damages copies of small data sets as damaged_directories.py does of models, and takes one pass over the training and
the validation data through the data module, as `fit` does. "sealed" kinds have checksums that fit the damage. It prints
one line of JSON a kind and ends with exit code 1 where a promise was broken.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import struct
import sys
import tarfile
import tempfile
import warnings
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from damaged_directories import damage_bytes, run
from PIL import Image
from tfrecord.writer import TFRecordWriter

from ensemblenet.data import ImageData, Kinetics, ParquetImages, YouTube8M
from ensemblenet.data.module import DataModule

REFUSED = {"DataError", "DamageError", "ClassesError"}
SIZE, CLASSES, IMAGES = 16, ("cat", "dog"), 4

Make = Callable[[Path], None]
Seal = Callable[[bytearray], None]


def main() -> None:
    """Damage, read, count."""
    warnings.simplefilter("ignore")
    made = kinds()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000, help="of each kind (default: %(default)s)")
    parser.add_argument("--kinds", nargs="+", choices=made, default=list(made), metavar="KIND", help=", ".join(made))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    broken = False
    for name in options.kinds:
        make, module, seal = made[name]
        with tempfile.TemporaryDirectory() as folder:
            whole = Path(folder, "whole")
            whole.mkdir()
            make(whole)
            # records have checksums; where they fit, or a format has none, nobody can know
            promised = REFUSED | {"same values", "fewer values"}
            promised |= set() if name in ("video", "frame") else {"other values"}
            read, damage = partial(one_pass, module), partial(damage_one, seal=seal)
            found = run(name, whole, read, damage, promised, options.count, options.seed)
        broken |= found.pop("broken")
        print(json.dumps({"kind": name, **found}), flush=True)
    sys.exit(int(broken))


def kinds() -> dict[str, tuple[Make, Callable[[Path], DataModule], Seal | None]]:
    """How each kind of data is made and opened, and what makes its checksums fit."""
    common: dict[str, Any] = {"batch_size": 2, "num_workers": 0, "on_broken": "skip", "seed": 0}
    images = partial(ImageData, image_size=SIZE, max_broken=10**6, **common)
    shards = partial(images, dataset="wds/", train="train-*.tar", val="val-*.tar")
    records = partial(YouTube8M, num_classes=20, **common)
    video = partial(records, features={"mean_rgb": 6})
    frame = partial(records, level="frame", features={"rgb": 6}, num_frames=4)
    clips = partial(Kinetics, num_frames=2, stride=1, image_size=SIZE, max_broken=10**6, **common)
    return {
        "video": (make_videos, lambda folder: video(str(folder)), None),
        "video sealed": (make_videos, lambda folder: video(str(folder)), seal_records),
        "frame": (make_frames, lambda folder: frame(str(folder)), None),
        "frame sealed": (make_frames, lambda folder: frame(str(folder)), seal_records),
        "segment sealed": (
            partial(make_frames, segments=True),
            lambda folder: records(str(folder), level="segment", features={"rgb": 6}),
            seal_records,
        ),
        "tar": (make_tars, images, None),
        "tar sealed": (make_tars, images, seal_tar),
        "shards": (make_shards, shards, None),
        "shards sealed": (make_shards, shards, seal_tar),
        "parquet": (make_parquet, partial(ParquetImages, image_size=SIZE, batch_size=2, num_val=2), None),
        "lists": (make_lists, partial(clips, train="train.csv", val="val.txt"), None),
        "jpeg": (partial(make_folders, kind="jpg"), images, None),
        "png": (partial(make_folders, kind="png"), images, None),
        "png sealed": (partial(make_folders, kind="png"), images, seal_png),
    }


def one_pass(module: Callable[[Path], DataModule], folder: Path) -> torch.Tensor:
    """The validation examples after a pass over all data; each is in a batch or counted as skipped."""
    data = module(folder)
    data.setup("fit")
    for _ in data.train_dataloader():
        pass
    loader: Any = data.val_dataloader()
    rows = [torch.cat([inputs.flatten(1), targets.view(len(targets), -1)], 1) for inputs, targets in loader]
    total = loader.total if isinstance(data, YouTube8M) else loader.part.total
    if total != sum(map(len, rows)) + loader.skipped:
        raise AssertionError(f"{total} examples: {sum(map(len, rows))} were read and {loader.skipped} skipped.")
    return torch.cat(rows) if rows else torch.zeros(0)


def damage_one(folder: Path, chance: random.Random, seal: Seal | None) -> str:
    """Damage one of a folder's files; of lists of videos the list, not a video."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".mp4")
    path = chance.choice(files)
    return damage_bytes(path, chance, None if path.suffix in (".gz", ".txt") else seal)


# -- data


def make_videos(folder: Path) -> None:
    """Shards of features of videos, one of them compressed."""
    writer = TFRecordWriter
    records = [
        writer.serialize_tf_example(
            {"id": (b"v%03d" % i, "byte"), "labels": ([i % 5, 7], "int"), "mean_rgb": ([i / 8.0] * 6, "float")}
        )
        for i in range(12)
    ]
    write_records(folder, records)


def make_frames(folder: Path, segments: bool = False) -> None:
    """Shards of features of frames, rated or not."""
    records = []
    for i in range(12):
        context = {"id": (b"v%03d" % i, "byte"), "labels": ([i % 5, 7], "int")}
        if segments:
            context |= {"segment_start_times": ([1], "int"), "segment_labels": ([i % 5], "int")}
            context |= {"segment_scores": ([1.0], "float")}
        frames = [bytes([i, frame] * 3) for frame in range(2 + i % 4)]
        records.append(TFRecordWriter.serialize_tf_sequence_example(context, {"rgb": (frames, "byte")}))
    write_records(folder, records)


def write_records(folder: Path, records: list[bytes]) -> None:
    """Shards of four records, one of them compressed."""
    names = ("train0.tfrecord", "train1.tfrecord.gz", "validate0.tfrecord")
    for name, part in zip(names, (records[:4], records[4:8], records[8:]), strict=True):
        data = bytearray().join(struct.pack("<QI", len(record), 0) + record + bytes(4) for record in part)
        seal_records(data)
        if name.endswith(".gz"):
            compress = zlib.compressobj(wbits=31)
            data = compress.compress(data) + compress.flush()
        (folder / name).write_bytes(data)


def encoded(number: int, kind: str) -> bytes:
    """An image of noise, a few hundred bytes."""
    pixels = np.random.default_rng(number).integers(0, 255, (10, 12, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, {"jpg": "JPEG", "png": "PNG"}[kind])
    return buffer.getvalue()


def make_folders(folder: Path, kind: str) -> None:
    """Class folders."""
    for number, (split, name) in enumerate((split, name) for split in ("train", "val") for name in CLASSES):
        (folder / split / name).mkdir(parents=True)
        for image in range(IMAGES):
            (folder / split / name / f"{image}.{kind}").write_bytes(encoded(IMAGES * number + image, kind))


def make_tars(folder: Path) -> None:
    """Class folders in a tar a split, with a long name and a link, which have headers of their own."""
    for split in ("train", "val"):
        form = tarfile.PAX_FORMAT if split == "val" else tarfile.GNU_FORMAT
        with tarfile.open(folder / f"{split}.tar", "w", format=form) as tar:
            for name in CLASSES:
                for image in range(IMAGES):
                    add(tar, f"{name}/{'long' * 30 * (image == 1)}{image}.png", encoded(image, "png"))
                link = tarfile.TarInfo(f"{name}/link.png")
                link.type, link.linkname = tarfile.SYMTYPE, "0.png"
                tar.addfile(link)


def make_shards(folder: Path) -> None:
    """Shards of WebDataset."""
    for split in ("train", "val"):
        with tarfile.open(folder / f"{split}-0.tar", "w") as tar:
            for image in range(2 * IMAGES):
                add(tar, f"{image:03}.jpg", encoded(image, "jpg"))
                add(tar, f"{image:03}.cls", b"%d" % (image % 2))
    (folder / "classes.txt").write_text("\n".join(CLASSES))


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Add a file to a tar."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def make_parquet(folder: Path) -> None:
    """Images in a Parquet file."""
    rows = [{"image": {"bytes": encoded(i, "png")}, "label": i % 2} for i in range(8)]
    table = pa.Table.from_pylist(rows).replace_schema_metadata({"classes": ",".join(CLASSES)})
    for split in ("train", "test"):
        pq.write_table(table, folder / f"{split}.parquet")


def make_lists(folder: Path) -> None:
    """Videos that an annotation and a list name."""
    table, lines = ["label,youtube_id,time_start,time_end,split"], []
    for number in range(4):
        with av.open(str(folder / f"v{number}.mp4"), "w") as file:
            stream = file.add_stream("mpeg4", rate=25, width=32, height=32)
            for _ in range(2):
                file.mux(stream.encode(av.VideoFrame(32, 32, "yuv420p")))
            file.mux(stream.encode(None))
        table.append(f'"{CLASSES[number % 2]}",v{number},0,10,train')
        lines.append(f"v{number}.mp4 {CLASSES[number % 2]}")
    (folder / "train.csv").write_text("\n".join(table))
    (folder / "val.txt").write_text("\n".join(lines))


# -- checksums that fit


def seal_records(data: bytearray) -> None:
    """The two checksums of each record of TFRecord, as far as the lengths lead."""
    begin = 0
    while begin + 16 <= len(data):
        end = begin + 12 + int.from_bytes(data[begin : begin + 8], "little")
        data[begin + 8 : begin + 12] = TFRecordWriter.masked_crc(bytes(data[begin : begin + 8]))
        if end + 4 > len(data):
            return
        data[end : end + 4] = TFRecordWriter.masked_crc(bytes(data[begin + 12 : end]))
        begin = end + 4


def seal_tar(data: bytearray) -> None:
    """The checksum of each header of a tar."""
    for begin in range(0, len(data) - 511, 512):
        if data[begin + 257 : begin + 262] == b"ustar":
            unsigned, _ = tarfile.calc_chksums(bytes(data[begin : begin + 512]))  # pyright: ignore
            data[begin + 148 : begin + 156] = b"%06o\0 " % unsigned


def seal_png(data: bytearray) -> None:
    """The checksum of each chunk of a PNG, as far as the lengths lead."""
    begin = 8
    while begin + 12 <= len(data):
        end = begin + 8 + int.from_bytes(data[begin : begin + 4], "big")
        data[end : end + 4] = zlib.crc32(data[begin + 4 : end]).to_bytes(4, "big") if end + 4 <= len(data) else b""
        begin = end + 4


if __name__ == "__main__":
    main()
