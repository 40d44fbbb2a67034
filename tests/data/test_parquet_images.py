"""Images from Parquet files made on the fly."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from ensemblenet.data.parquet_images import Normalize, ParquetImages, RandomCropFlip, read_parquet_images
from ensemblenet.errors import DataError


def encoded(shade: int, size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade, 0, 255 - shade)).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, images: list[bytes], labels: list[int], classes: str | None = "cat,dog") -> Path:
    table = pa.table({"image": [{"bytes": data, "path": f"{i}.png"} for i, data in enumerate(images)], "label": labels})
    pq.write_table(table.replace_schema_metadata({"classes": classes} if classes else None), path)
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    write(tmp_path / "train.parquet", [encoded(i) for i in range(40)], [i % 2 for i in range(40)])
    write(tmp_path / "test.parquet", [encoded(100 + i) for i in range(10)], [i % 2 for i in range(10)])
    return tmp_path


def test_images_are_decoded_in_order(folder: Path) -> None:
    images, labels, classes = read_parquet_images(folder / "train.parquet", rows=slice(5, 8))
    assert images.shape == (3, 3, 8, 8)
    assert images.dtype == torch.uint8
    assert images[:, 0, 0, 0].tolist() == [5, 6, 7]
    assert images[:, 2, 4, 4].tolist() == [250, 249, 248]
    assert labels.tolist() == [1, 0, 1]
    assert classes == ["cat", "dog"]


def test_image_size_cuts_a_centred_square(tmp_path: Path) -> None:
    image = Image.new("RGB", (24, 8))
    image.paste((255, 0, 0), (8, 0, 16, 8))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    images, _, _ = read_parquet_images(write(tmp_path / "x.parquet", [buffer.getvalue()], [0]), image_size=4)
    assert images.shape == (1, 3, 4, 4)
    assert (images[0, 0] == 255).all()


def test_splits_take_their_rows(folder: Path) -> None:
    data = ParquetImages(folder, batch_size=4, num_val=10, limit_train=20, augment=False)
    data.setup()
    assert [len(data.examples(split)) for split in ("train", "val", "test")] == [20, 10, 10]
    assert data.examples("val").inputs[:, 0, 0, 0].tolist() == list(range(30, 40))
    inputs, labels = next(iter(data.train_dataloader()))
    assert inputs.shape == (4, 3, 8, 8)
    assert labels.dtype == torch.int64


def test_training_images_are_normalized(folder: Path) -> None:
    data = ParquetImages(folder, batch_size=4, num_val=8, augment=False)
    data.setup()
    inputs = data.examples("train").__getitems__(list(range(32)))[0]
    assert inputs[:, 0].mean().item() == pytest.approx(0, abs=1e-5)
    assert inputs[:, 0].std().item() == pytest.approx(1, abs=0.01)


def test_normalize_agrees_with_the_plain_formula() -> None:
    images = torch.randint(256, (10, 3, 5, 5), dtype=torch.uint8)
    normalize = Normalize.of(images)
    torch.testing.assert_close(normalize.mean.flatten(), images.float().mean((0, 2, 3)))
    torch.testing.assert_close(normalize.std.flatten(), images.float().std((0, 2, 3), correction=0))


def test_crops_are_windows_of_the_padded_image_or_of_its_mirror() -> None:
    torch.manual_seed(0)
    images = torch.arange(1, 65, dtype=torch.uint8).view(1, 1, 8, 8).repeat(200, 1, 1, 1)
    padded = torch.nn.functional.pad(images[0, 0], [2] * 4)
    windows = padded.unfold(0, 8, 1).unfold(1, 8, 1).flatten(0, 1)
    known = {tuple(window.flatten().tolist()) for window in torch.cat([windows, windows.flip(2)])}
    crops = {tuple(crop.flatten().tolist()) for crop in RandomCropFlip(2)(images)}
    assert crops <= known
    assert len(crops) > 40


def test_without_class_names_labels_count_from_the_largest(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", [encoded(1), encoded(2)], [0, 4], classes=None)
    assert read_parquet_images(path)[2] == ["0", "1", "2", "3", "4"]


def test_a_missing_folder() -> None:
    with pytest.raises(DataError, match=r"nowhere/train.parquet does not exist; the data folder must hold"):
        ParquetImages(Path("nowhere")).setup()


def test_a_file_that_is_no_parquet(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"nonsense")
    with pytest.raises(DataError, match="is not a readable Parquet file"):
        read_parquet_images(tmp_path / "x.parquet")


@pytest.mark.parametrize("columns", [{"label": [1]}, {"image": [b"x"], "label": [1]}, {"image": [{"bytes": b""}]}])
def test_wrong_columns(tmp_path: Path, columns: dict[str, Any]) -> None:
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"must have the columns image .* and label .*; it has "):
        read_parquet_images(tmp_path / "x.parquet")


@pytest.mark.parametrize("label", [-1, 2])
def test_a_label_out_of_range(tmp_path: Path, label: int) -> None:
    path = write(tmp_path / "x.parquet", [encoded(0)] * 3, [0, label, 1])
    with pytest.raises(DataError, match=rf"labels must be in \[0, 2\).*names 2 classes; got {label} in row 1"):
        read_parquet_images(path)


def test_an_image_that_cannot_be_decoded(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", [encoded(0), b"broken"], [0, 1])
    with pytest.raises(DataError, match=r"x.parquet, row 1: the image cannot be decoded"):
        read_parquet_images(path)


def test_images_of_several_sizes(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", [encoded(0), encoded(0, (9, 9))], [0, 1])
    with pytest.raises(DataError, match="images of 2 sizes; give image_size"):
        read_parquet_images(path)
    assert read_parquet_images(path, image_size=6)[0].shape == (2, 3, 6, 6)


def test_too_few_images(folder: Path) -> None:
    with pytest.raises(DataError, match="has 40 rows: too few for num_val=5000"):
        ParquetImages(folder).setup()
