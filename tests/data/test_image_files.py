"""Images of every kind that is read: what becomes of their pixels, and what is refused in one line."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from made_images import make_folders
from PIL import Image, features

from ensemblenet.data import ImageData
from ensemblenet.data.files import file_reader
from ensemblenet.data.image_files import IMAGE_SUFFIXES, decode_image
from ensemblenet.data.parquet_images import read_parquet_images
from ensemblenet.errors import DataError

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str, **options: Any) -> io.BytesIO:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    buffer.seek(0)
    return buffer


def decoded(buffer: io.BytesIO, mode: str = "RGB") -> np.ndarray:
    return np.asarray(decode_image(lambda: buffer, "a", mode))


@pytest.mark.parametrize("kind", ["BMP", "PNG", "PPM", "TIFF", "WEBP", "GIF", "JPEG2000"])
def test_lossless_formats_keep_their_pixels(kind: str) -> None:
    options = {"WEBP": {"lossless": True}, "JPEG2000": {"irreversible": False}}.get(kind, {})
    image = Image.fromarray(PIXELS)
    image = image.quantize(256).convert("RGB") if kind == "GIF" else image
    assert np.array_equal(decoded(encoded(image, kind, **options)), np.asarray(image))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_sixteen_bits_of_grey_become_eight(kind: str, mode: str) -> None:
    levels = np.linspace(0, 65535, 256 * 40).astype(np.uint16).reshape(256, 40)
    pixels = decoded(encoded(Image.fromarray(levels), kind), mode)
    assert np.array_equal(pixels if mode == "L" else pixels[..., 1], levels // 256)


def test_pixels_whose_range_nobody_knows_are_refused() -> None:
    for values in (np.full((4, 4), 0.5, np.float32), np.full((4, 4), 70000, np.int32)):
        with pytest.raises(DataError, match=r"a cannot be decoded: its pixels are 32-bit numbers, whose range"):
            decoded(encoded(Image.fromarray(values), "TIFF"))


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """The EXIF standard: which edge of the scene the first row and the first column are."""
    row, column = {
        1: ("top", "left"),
        2: ("top", "right"),
        3: ("bottom", "right"),
        4: ("bottom", "left"),
        5: ("left", "top"),
        6: ("right", "top"),
        7: ("right", "bottom"),
        8: ("left", "bottom"),
    }[orientation]
    if row in ("left", "right"):
        pixels, row, column = pixels.swapaxes(0, 1), column, row
    pixels = pixels[::-1] if row == "bottom" else pixels
    return pixels[:, ::-1] if column == "right" else pixels


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_all_eight_orientations(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.kron(PIXELS[:2, :3], np.ones((16, 16, 1), np.uint8))
    buffer = encoded(Image.fromarray(pixels), kind, exif=exif, **{"WEBP": {"lossless": True}}.get(kind, {}))
    with Image.open(buffer) as image:
        stored = pixels if kind != "JPEG" else np.asarray(image)
    assert np.array_equal(decoded(buffer), turned(stored, orientation))


@pytest.mark.parametrize("exif", [b"Exif\0\0nonsense", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 40, b""])
def test_damaged_exif_data_spoils_no_image(exif: bytes) -> None:
    assert decoded(encoded(Image.fromarray(PIXELS), "JPEG", exif=exif)).shape == PIXELS.shape


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
@pytest.mark.parametrize("target", ["RGB", "L"])
def test_all_colours_become_those_of_the_network(mode: str, target: str) -> None:
    original = Image.fromarray(PIXELS).convert(mode)
    kind = "TIFF" if mode in ("CMYK", "YCbCr") else "PNG"
    assert np.array_equal(decoded(encoded(original, kind), target), np.asarray(original.convert(target)))


def test_a_palette_with_transparency_gives_no_warning(recwarn: pytest.WarningsRecorder) -> None:
    image = Image.fromarray(PIXELS).quantize(16)
    pixels = decoded(encoded(image, "PNG", transparency=bytes(range(16))))
    assert np.array_equal(pixels, np.asarray(image.convert("RGB")))
    assert not recwarn.list


def test_other_formats_are_refused_whatever_their_name() -> None:
    eps = io.BytesIO(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    with pytest.raises(DataError, match="cannot identify image file"):
        decoded(eps)


def bomb() -> bytes:
    """A PNG of a few bytes that says it has 40,000 x 40,000 pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 40000, 40000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


def broken(rng: np.random.Generator, whole: bytes) -> bytes:
    data = bytearray(whole[: rng.integers(1, len(whole) + 1)])
    for place in rng.integers(0, len(data), rng.integers(1, 20)):
        data[place] = rng.integers(256)
    return bytes(data)


def test_a_bomb_is_one_line_for_every_reader(tmp_path: Path) -> None:
    (make_folders(tmp_path) / "train" / "dog" / "003.png").write_bytes(bomb())
    data = ImageData(tmp_path, image_size=16, batch_size=4, num_workers=0)
    data.setup("fit")
    with pytest.raises(DataError, match=r"dog/003\.png cannot be decoded: Image size \(1600000000 pixels\) exceeds"):
        list(data.train_dataloader())
    reader = file_reader((3, 16, 16), data.description())
    assert reader is not None
    with pytest.raises(DataError, match=r"003\.png: the image cannot be decoded"):
        reader.read(tmp_path / "train" / "dog" / "003.png")
    pq.write_table(pa.table({"image": [{"bytes": bomb(), "path": ""}], "label": [0]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"x\.parquet, row 0: the image cannot be decoded"):
        read_parquet_images(tmp_path / "x.parquet")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"])
def test_damaged_files_raise_nothing_but_data_errors(kind: str) -> None:
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("This Pillow has no AVIF.")
    rng = np.random.default_rng(0)
    exif = {} if kind in ("BMP", "GIF", "PPM", "JPEG2000") else {"exif": Image.Exif().tobytes()}
    whole, messages = encoded(Image.fromarray(PIXELS), kind, **exif).getvalue(), []
    for _ in range(60):
        data = broken(rng, whole)
        try:
            decode_image(lambda data=data: io.BytesIO(data), "a")
        except DataError as error:
            messages.append(str(error))
    assert messages
    assert all(message.startswith("a cannot be decoded: ") and "\n" not in message for message in messages)


@pytest.mark.parametrize("size", [(20000, 1), (1, 20000), (3000, 2)])
@pytest.mark.parametrize("augmentation", [None, {"no_aug": True}])
def test_extremely_long_images_take_little_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], augmentation: dict[str, Any] | None
) -> None:
    row = np.arange(max(size)) % 256
    pixels = np.broadcast_to(row[None, :, None] if size[0] > size[1] else row[:, None, None], (*size[::-1], 3))
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / split / name / "x.png")
    data = ImageData(tmp_path, image_size=224, batch_size=2, num_workers=0, augmentation=augmentation)
    data.setup("fit")
    resize, largest = Image.Image.resize, []
    monkeypatch.setattr(
        Image.Image, "resize", lambda image, to, *more, **named: largest.append(to) or resize(image, to, *more, **named)
    )
    batches = [next(iter(load())) for load in (data.train_dataloader, data.val_dataloader)]
    assert max(map(max, largest)) <= 17 * 256
    assert [inputs.shape for inputs, _ in batches] == [(2, 3, 224, 224)] * 2


def test_the_middle_of_a_long_image_is_what_is_evaluated(tmp_path: Path) -> None:
    image = Image.new("RGB", (400, 10), (255, 0, 0))
    image.paste((0, 0, 255), (190, 0, 210, 10))
    image.save(tmp_path / "long.png")
    described = {"preprocessing": {"mean": [0.0] * 3, "std": [1.0] * 3, "crop_pct": 1.0, "interpolation": "bilinear"}}
    reader = file_reader((3, 20, 20), described)
    assert reader is not None
    assert torch.equal(reader.read(tmp_path / "long.png")[2], torch.ones(20, 20))


def test_every_suffix_that_predict_reads_is_read_in_training(tmp_path: Path) -> None:
    kinds = {".jp2": "JPEG2000", ".jfif": "JPEG", ".pbm": "PPM", ".pgm": "PPM"}
    suffixes = [suffix for suffix in IMAGE_SUFFIXES if suffix != ".avif" or features.check("avif")]
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            for suffix in suffixes:
                path = tmp_path / split / name / f"x{suffix.upper()}"
                Image.fromarray(PIXELS).convert("1" if suffix == ".pbm" else "RGB").save(path, kinds.get(suffix))
    data = ImageData(tmp_path, image_size=8, batch_size=2, num_workers=0)
    data.setup("fit")
    assert sum(len(labels) for _, labels in data.val_dataloader()) == 2 * len(suffixes)
