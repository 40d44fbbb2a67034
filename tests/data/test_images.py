"""Images in class folders, tars, shards and libraries' data sets: the same images, and what is wrong with bad ones."""

from __future__ import annotations

import multiprocessing
import shutil
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from made_images import CLASSES, encoded, make_folders, make_parquet, make_shards, make_tars, picture
from timm.data.transforms_factory import create_transform
from torch import nn
from torchvision.transforms.functional import pil_to_tensor

from ensemblenet.data import ImageData
from ensemblenet.data.images import TransformedImages
from ensemblenet.data.loading import ExampleLoader, Part
from ensemblenet.data.normalizing import Erased
from ensemblenet.data.parquet_shards import ParquetShard
from ensemblenet.errors import DataError

PLAIN = {"image_size": 16, "batch_size": 6, "num_workers": 0, "augmentation": {"no_aug": True}, "crop_pct": 1.0}
RAW = {**PLAIN, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def data(folder, **options):
    made = ImageData(folder, **{**PLAIN, **options})
    made.setup()
    return made


def as_parquet(folder, **options):
    make_parquet(folder)
    return {"dataset": "hfds/", "val": "validation", **options}


def as_shards(folder):
    make_shards(folder)
    return {"dataset": "wds/", "train": "train-*.tar", "val": "val-*.tar"}


def as_torchvision(folder):
    make_folders(folder)
    return {"dataset": "torch/folder"}


FORMATS = {
    "folders": lambda folder: make_folders(folder) and {},
    "tars": lambda folder: make_tars(folder) and {},
    "shards": as_shards,
    "parquet": as_parquet,
    "parquet, one after another": partial(as_parquet, shuffle_buffer=7),
}


def content(loader):
    """The label and the pixels of each image."""
    pairs = [(image, label) for images, labels in loader for image, label in zip(images, labels.tolist(), strict=True)]
    return sorted((label, (255 * image).round().to(torch.uint8).numpy().tobytes()) for image, label in pairs)


def expected(first, count):
    """The middle of each image: 20 x 16 pixels, cut to a square."""
    numbers = [(label, number) for label in range(3) for number in range(first, first + count)]
    return sorted((label, pil_to_tensor(picture(label, n))[:, :, 2:18].numpy().tobytes()) for label, n in numbers)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("workers", [0, 2])
def test_every_format_gives_the_same_images(
    tmp_path: Path, form: str, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENSEMBLENET_CACHE", str(tmp_path / "cache"))
    if form == "parquet":
        pytest.importorskip("datasets")
    made = data(tmp_path, **{**RAW, "num_workers": workers, **FORMATS[form](tmp_path)})
    assert made.description()["classes"] == list(CLASSES)
    images, labels = next(iter(made.val_dataloader()))
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert content(made.val_dataloader()) == expected(100, 5)
    batches = list(made.train_dataloader())
    assert [len(labels) for _, labels in batches] == [6] * 4
    assert sorted(torch.cat([labels for _, labels in batches]).tolist()) == sorted([0, 1, 2] * 8)


def test_torchvision_sets(tmp_path: Path) -> None:
    folder = make_folders(tmp_path) / "train"
    made = ImageData(folder, **{**PLAIN, "dataset": "torch/folder", "train": ".", "val": "."})
    made.setup()
    assert made.classes == list(CLASSES)
    assert sorted(torch.cat([labels for _, labels in made.val_dataloader()]).tolist()) == sorted([0, 1, 2] * 8)


def test_evaluation_is_timms_resize_and_crop(tmp_path: Path) -> None:
    made = data(make_folders(tmp_path), **RAW)
    images, _ = next(iter(made.val_dataloader()))
    pixels = pil_to_tensor(picture(0, 100)) / 255  # 20 x 16: the shorter side is the size already
    torch.testing.assert_close(images[0], pixels[:, :, 2:18])
    normalised, _ = next(iter(data(tmp_path).val_dataloader()))
    mean, std = (torch.tensor(made_of).view(3, 1, 1) for made_of in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(normalised[0], (images[0] - mean) / std)
    described = data(tmp_path).description()["preprocessing"]
    assert described["input_shape"] == [3, 16, 16]
    assert described["crop_pct"] == 1.0


class Sums(LightningModule):
    """Adds up the pixels of each batch that it is given."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.given: list[tuple[str, torch.Tensor]] = []

    def training_step(self, batch, batch_index):
        self.given.append(("train", batch[0]))
        return self.layer(torch.ones(1)).sum()

    def validation_step(self, batch, batch_index):
        self.given.append(("val", batch[0]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters())


ERASING = [
    {"re_prob": 1.0, "re_mode": "pixel"},
    {"re_prob": 0.5, "re_mode": "rand", "re_count": 2},
    {"re_prob": 0.8, "re_count": 3},
    {"re_prob": 0.5, "auto_augment": "rand-m7-mstd0.5-inc1"},
]


@pytest.mark.parametrize("augmentation", [{}, *ERASING])
def test_bytes_are_normalized_after_the_transfer_and_equal_to_timms_to_the_bit(
    tmp_path: Path, augmentation: dict[str, Any]
) -> None:
    made = data(make_folders(tmp_path), augmentation=augmentation, seed=1, num_workers=1)
    timms = create_transform((3, 16, 16), is_training=True, interpolation="bicubic", **augmentation)
    plain = TransformedImages(made.examples("train").images, timms)
    expected = list(ExampleLoader(plain, Part(24, 6, train=True, seed=1)))
    assert all(torch.equal(x, given) for (x, _), (given, _) in zip(expected, made.train_dataloader(), strict=True))
    if augmentation.get("re_mode", "const") == "const" and augmentation:
        assert 0.01 < (torch.cat([x for x, _ in expected]) == 0).float().mean() < 0.5

    module, seen = Sums(), []
    transferred = made.on_after_batch_transfer
    made.on_after_batch_transfer = lambda batch, index: seen.append(batch[0]) or transferred(batch, index)
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(module, datamodule=made)
    images = [x for split, x in module.given if split == "train"]
    assert all(torch.equal(x, given) for (x, _), given in zip(expected, images, strict=True))
    assert {x.dtype for _, x in module.given} == {torch.float32}
    assert [isinstance(x, Erased) for x in seen].count(True) == (4 if "re_prob" in augmentation else 0)
    assert {(x.pixels if isinstance(x, Erased) else x).dtype for x in seen} == {torch.uint8}
    evaluated = torch.cat([x for split, x in module.given if split == "val"][-2:])
    assert torch.equal(evaluated, torch.cat([x for x, _ in made.val_dataloader()]))


def test_nothing_is_erased_where_nothing_is_augmented(tmp_path: Path) -> None:
    made = data(make_folders(tmp_path), augmentation={"no_aug": True, "re_prob": 1.0})
    assert made.repeats_training
    assert torch.equal(made.examples("train")[0][0], data(tmp_path).examples("train")[0][0])


def test_workers_of_training_end_with_it(tmp_path: Path) -> None:
    made = data(make_folders(tmp_path), num_workers=2)
    made.itself = made  # as where an error was caught, whose frames hold it: no count of references ends it
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    Trainer(max_epochs=2, accelerator="cpu", **quiet).fit(Sums(), datamodule=made)
    assert not multiprocessing.active_children()
    loader = made.train_dataloader()
    assert content(loader) == content(loader)  # the same workers twice
    begun = iter(loader)
    next(begun)
    assert len(multiprocessing.active_children()) == 2
    made.reseed(5)
    assert not multiprocessing.active_children()


def test_large_jpegs_are_decoded_smaller_for_training_if_asked(tmp_path: Path) -> None:
    for split, name, kind in (("train", "cat", "JPEG"), ("train", "dog", "PNG"), ("val", "cat", "JPEG")):
        (tmp_path / split / name).mkdir(parents=True)
        picture(0, 1, (5, 4)).resize((400, 320), 2).save(tmp_path / split / name / f"0.{kind.lower()}", kind)
    made, drafted = (data(tmp_path, image_size=64, crop_pct=0.8, batch_size=2, draft=draft) for draft in (False, True))
    (jpeg, _), (png, _) = (drafted.examples("train")[index] for index in (0, 1))
    images = made.examples("train").images
    assert [images.image(index, 80).size for index in (0, 1)] == [(100, 80), (400, 320)]
    assert images.image(0, 81).size == (200, 160)
    assert torch.equal(png, made.examples("train")[1][0])
    apart = (jpeg.int() - made.examples("train")[0][0].int()).abs().float()
    assert 0 < apart.mean() < 2
    assert torch.equal(drafted.examples("val")[0][0], made.examples("val")[0][0])


def test_augmentation_is_drawn_anew_each_epoch_and_the_same_each_time(tmp_path: Path) -> None:
    made, again = (data(make_folders(tmp_path) if first else tmp_path, augmentation=None, seed=1) for first in (1, 0))

    def epoch(loader, number):
        loader.set_epoch(number)
        return torch.cat([images for images, _ in loader])

    first = epoch(made.train_dataloader(), 0)
    assert not torch.equal(first, epoch(made.train_dataloader(), 1))
    assert torch.equal(first, epoch(again.train_dataloader(), 0))


def test_a_split_may_lack_a_class(tmp_path: Path) -> None:
    shutil.rmtree(make_folders(tmp_path) / "val" / "cat")
    labels = torch.cat([labels for _, labels in data(tmp_path).val_dataloader()])
    assert set(labels.tolist()) == {1, 2}


def test_test_data_alone_is_enough_to_evaluate(tmp_path: Path) -> None:
    shutil.rmtree(make_folders(tmp_path) / "train")
    made = ImageData(tmp_path, **PLAIN)
    made.setup("test")
    assert made.classes == list(CLASSES)
    assert len(list(made.test_dataloader())) == 2


def break_image(folder):
    (folder / "train" / "dog" / "003.png").write_bytes(encoded(1, 3)[:60])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_named(tmp_path: Path, workers: int) -> None:
    break_image(make_folders(tmp_path))
    with pytest.raises(DataError, match=r"train: the image dog/003\.png cannot be decoded: "):
        list(data(tmp_path, num_workers=workers).train_dataloader())
    skipping = data(tmp_path, num_workers=workers, on_broken="skip").train_dataloader()
    with pytest.warns(UserWarning, match=r"Skipped 1 of at most 100: .*003\.png"):
        assert sum(len(labels) for _, labels in skipping) == 23


def empty_class(folder):
    (folder / "train" / "eel").mkdir()


def empty_val_class(folder):
    (folder / "val" / "eel").mkdir()


def stray_class(folder):
    shutil.copytree(folder / "val" / "owl", folder / "val" / "eel")


def no_split(folder):
    (folder / "train").rename(folder / "training-data")


def flat(folder):
    for path in (folder / "train").rglob("*.png"):
        path.rename(folder / "train" / f"{path.parent.name}{path.name}")
    for name in CLASSES:
        (folder / "train" / name).rmdir()


def no_images(folder):
    for path in (folder / "train").rglob("*.png"):
        path.rename(path.with_suffix(".dat"))


def parquet(folder):
    no_split(folder)
    pq.write_table(pa.table({"label": [1]}), folder / "train.parquet")


def broken_tar(folder):
    shutil.rmtree(folder / "train")
    (folder / "train.tar").write_bytes(b"nonsense" * 200)


def empty_tar(folder):
    shutil.rmtree(folder / "train")
    tarfile.open(folder / "train.tar", "w").close()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (empty_class, r"The class .*train/eel holds no images: fill it or remove it"),
        (empty_val_class, r"The class .*val/eel holds no images"),
        (stray_class, r"val has the class 'eel', which the training data does not have"),
        (no_split, r"holds neither train/ nor train\.tar"),
        (flat, r"train has 0 classes; at least 2 are needed"),
        (no_images, r"The class .*train/cat holds no images|Found 0 images"),
        (parquet, r"holds Parquet files .* use ensemblenet\.data\.ParquetImages"),
        (broken_tar, r"train\.tar is not a readable tar: "),
        (empty_tar, r"train\.tar has 0 classes"),
    ],
)
def test_bad_data_is_found_before_training(tmp_path: Path, spoil: Callable[..., Any], message: str) -> None:
    spoil(make_folders(tmp_path))
    with pytest.raises(DataError, match=message):
        data(tmp_path)


def label(text):
    def write(folder):
        (folder / "classes.txt").unlink(missing_ok=True)
        (folder / "classes.txt").write_text("\n".join(CLASSES))
        with tarfile.open(folder / "train-0002.tar", "w") as tar:
            for end, content in ((".png", encoded(0, 0)), (".cls", text)):
                path = folder / f"x{end}"
                path.write_bytes(content)
                tar.add(path, path.name)

    return write


def no_label(folder):
    with tarfile.open(folder / "train-0002.tar", "w") as tar:
        path = folder / "x.png"
        path.write_bytes(encoded(0, 0))
        tar.add(path, path.name)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (label(b"3"), r"train-\*\.tar: labels must be in \[0, 3\), got 3 for the image x\.png of train-0002\.tar"),
        (label(b"cat"), r"train-0002\.tar: x\.cls must hold a number, got 'cat'"),
        (no_label, r"the sample x must have one image and one label \(\.cls\); it has x\.png"),
        (lambda folder: [path.unlink() for path in folder.glob("train-*")], r"No shards match train-\*\.tar in"),
    ],
)
def test_bad_shards_are_found_before_training(tmp_path: Path, spoil: Callable[..., Any], message: str) -> None:
    options = as_shards(tmp_path)
    spoil(tmp_path)
    with pytest.raises(DataError, match=message):
        data(tmp_path, **options)


@pytest.mark.parametrize("kind", [pa.binary(), pa.struct({"bytes": pa.large_binary(), "path": pa.string()})])
def test_each_row_of_a_parquet_shard_is_found_in_its_copy(
    tmp_path: Path, kind: pa.DataType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENSEMBLENET_CACHE", str(tmp_path / "cache"))
    rows = [str(number).encode() * 50 for number in range(200)]
    images = pa.array(rows if kind == pa.binary() else [{"bytes": row, "path": "x"} for row in rows], kind)
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"img": images, "of": range(200), "more": range(200, 400)}), path, row_group_size=37)
    shard = ParquetShard.of(path, "img", "of")
    assert shard.labels() == (list(range(200)), None)
    assert ParquetShard.of(path, "img", "more").labels() == (list(range(200, 400)), None)
    assert [shard.open_row(row).read() for row in (0, 36, 37, 63, 64, 128, 191, 192, 199)] == [
        rows[row] for row in (0, 36, 37, 63, 64, 128, 191, 192, 199)
    ]


IMAGE = {"bytes": encoded(0, 0)}


def row(image=IMAGE, label=0, name="image"):
    """A third Parquet file, of one row."""

    def write(folder):
        columns = {name: [image], "label": [label]}
        pq.write_table(pa.table(columns), folder / "train-00002-of-00003.parquet")

    return write


def unlabelled(folder):
    columns = {"image": [IMAGE, IMAGE], "label": pa.array([0, None], pa.int64())}
    pq.write_table(pa.table(columns), folder / "train-00002-of-00003.parquet")


def cut(folder):
    path = folder / "train-00001-of-00002.parquet"
    path.write_bytes(path.read_bytes()[:-20])


def spoilt_pages(folder):
    """What is wrong is seen when images are read, not by the labels."""
    path = folder / "train-00001-of-00002.parquet"
    data = bytearray(path.read_bytes())
    data[4:400] = b"x" * 396
    path.write_bytes(data)


def other_names(folder):
    path = folder / "train-00001-of-00002.parquet"
    table = pq.read_table(path)
    written = table.schema.metadata[b"huggingface"].replace(b"owl", b"elk")
    pq.write_table(table.replace_schema_metadata({"huggingface": written}), path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (row(label=3), r"train: labels must be in \[0, 3\), got 3 for the image in row 0 of train-00002-of-00003"),
        (row(label=np.uint64(2**63)), r"train-00002-of-00003\.parquet: a label: Integer value 9223372036854775808"),
        (row(label=None), r"train-00002-of-00003\.parquet must have the columns image .* label: null"),
        (row(label="cat"), r"train-00002-of-00003\.parquet must have the columns .* and label \(integers\); it has"),
        (row(image=3), r"must have the columns image \(encoded images\) .* it has image: int64, label: int64"),
        (row(name="img"), r"it has img: struct<.*input_key and target_key"),
        (row(image={"path": "a.png", "bytes": None}), r"must have the columns image"),
        (unlabelled, r"train-00002-of-00003\.parquet: 1 of 2 rows have no label"),
        (cut, r"train-00001-of-00002\.parquet is no readable Parquet file"),
        (spoilt_pages, r"train-00001-of-00002\.parquet is no readable Parquet file"),
        (other_names, r"00001-of-00002.* has 'elk'|elk"),
        (lambda folder: [path.unlink() for path in folder.glob("train-*")], r"None of the 2 Parquet files .* train-\*"),
        (lambda folder: [path.unlink() for path in folder.glob("*-*")], r"No shards match \*\.parquet in"),
    ],
)
def test_bad_parquet_shards(
    tmp_path: Path, spoil: Callable[..., Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENSEMBLENET_CACHE", str(tmp_path / "cache"))
    options = as_parquet(tmp_path, shuffle_buffer=7, on_broken="skip")
    spoil(tmp_path)
    with pytest.raises(DataError, match=message):
        list(data(tmp_path, **options).train_dataloader())
    assert not list((tmp_path / "cache").glob("*.parquet"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "tfds/x"}, r"dataset must begin with one of '', 'wds', 'torch', 'hfds', got 'tfds/x'"),
        ({"dataset": "torch/nosuch"}, r"torch/nosuch of split train .*Unknown torchvision dataset"),
        ({"augmentation": {"no_such": 1}}, r"create_transform does not take .*no_such"),
        ({"folder": "nowhere"}, r"nowhere is not a folder"),
        ({"image_size": 0}, "image_size must be at least 1, got 0"),
        ({"crop_pct": 0.0}, r"crop_pct must be above 0 and at most 1, got 0\.0"),
        ({"std": (1.0, 0.0, 1.0)}, "std must be numbers above 0"),
        ({"num_workers": -1}, "num_workers must be at least 0, got -1"),
        ({"max_broken": -1}, "max_broken must be at least 0, got -1"),
    ],
)
def test_bad_options(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        data(**{"folder": make_folders(tmp_path), **options})
