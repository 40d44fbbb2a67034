"""Small image data sets, made for tests."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

CLASSES = ("cat", "dog", "owl")


def picture(label: int, number: int, size: tuple[int, int] = (20, 16)) -> Image.Image:
    """An image of noise whose brightest channel is the label's, and whose first pixel is the number."""
    pixels = np.random.default_rng((label, number)).integers(0, 100, (size[1], size[0], 3), dtype=np.uint8)
    pixels[..., label % 3] += 120
    pixels[0, 0] = number
    return Image.fromarray(pixels)


def encoded(label: int, number: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    picture(label, number).save(buffer, kind)
    return buffer.getvalue()


def make_folders(root: Path, train: int = 8, val: int = 5) -> Path:
    """Class folders `train/` and `val/` with so many images of each class."""
    for split, count, first in (("train", train, 0), ("val", val, 100)):
        for label, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(first, first + count):
                (folder / f"{number:03}.png").write_bytes(encoded(label, number))
    return root


def make_tars(root: Path, **counts: int) -> Path:
    """The same as `train.tar` and `val.tar`."""
    make_folders(root / "loose", **counts)
    for split in ("train", "val"):
        with tarfile.open(root / f"{split}.tar", "w") as tar:
            tar.add(root / "loose" / split, split)
    return root


def make_shards(root: Path, train: int = 8, val: int = 5, shards: int = 2) -> Path:
    """The same as shards of WebDataset, their classes in turn."""
    for split, count, first in (("train", train, 0), ("val", val, 100)):
        for shard in range(shards):
            with tarfile.open(root / f"{split}-{shard:04}.tar", "w") as tar:
                for number in range(first + shard, first + count, shards):
                    for label in range(len(CLASSES)):
                        for end, data in ((".png", encoded(label, number)), (".cls", str(label).encode())):
                            member = tarfile.TarInfo(f"{label}_{number:03}{end}")
                            member.size = len(data)
                            tar.addfile(member, io.BytesIO(data))
    (root / "classes.txt").write_text("\n".join(CLASSES))
    return root


def make_parquet(root: Path, train: int = 8, val: int = 5, shards: int = 2, names: bool = True) -> Path:
    """The same as Parquet files that `datasets` writes, each of several row groups."""
    labels = {"names": CLASSES, "_type": "ClassLabel"}
    features = {"image": {"_type": "Image"}, "label": labels if names else {"dtype": "int64", "_type": "Value"}}
    written = {"huggingface": json.dumps({"info": {"features": features}})}
    for split, count, first in (("train", train, 0), ("validation", val, 100)):
        for shard in range(shards):
            numbers = range(first + shard, first + count, shards)
            rows = [(label, number) for number in numbers for label in range(len(CLASSES))]
            images = [{"bytes": encoded(*row), "path": f"{row}.png"} for row in rows]
            table = pa.table({"image": images, "label": [label for label, _ in rows]}).replace_schema_metadata(written)
            pq.write_table(table, root / f"{split}-{shard:05}-of-{shards:05}.parquet", row_group_size=5)
    return root
