"""The order of classes and of examples hangs on names alone, and labels keep the meaning that they had in training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_images import CLASSES, encoded, make_folders, make_shards, make_tars
from timm.utils.misc import natural_key as natural_key_of_timm

from ensemblenet.data import ImageData, Kinetics, ParquetImages, image_sets
from ensemblenet.data.classes import in_order
from ensemblenet.data.loading import ExampleLoader
from ensemblenet.errors import DataError

SMALL = {"image_size": 16, "batch_size": 2, "num_workers": 0, "augmentation": {"no_aug": True}}
TIES = [
    "cat",
    "Cat",
    "CAT",
    "a1",
    "A1",
    "a01",
    "1",
    "01",
    "001",
    "é",
    "É",
    "日本10",
    "日本２",
    "日本2",
    "Straße",
    "٣",
    "3",
]


@pytest.mark.parametrize(
    ("names", "order"),
    [
        ({"cat", "Cat"}, ["Cat", "cat"]),
        ({"1", "01", "001"}, ["001", "01", "1"]),
        ({"a1", "A1", "a01"}, ["A1", "a01", "a1"]),
        ({"b10", "B9", "a", "10²", "10"}, ["10", "10²", "a", "B9", "b10"]),
        ({"日本10", "日本2", "É", "é", "e"}, ["e", "É", "é", "日本2", "日本10"]),
    ],
)
def test_names_have_one_order(names: set[str], order: list[str]) -> None:
    assert in_order(names) == in_order(sorted(names)) == in_order(sorted(names, reverse=True)) == order


def test_names_without_ties_are_in_timms_order() -> None:
    names = ["n01440764", "n2", "Owl", "owl hawk", "zebra-12", "Zebra-3", "_x", "10", "9", "ärger", "日本10", "日本2"]
    assert in_order(names) == sorted(names, key=natural_key_of_timm)


# -- every reader, in several processes

READ = """
import json, os, random, sys
from pathlib import Path
import torch
from ensemblenet.data import ImageData, Kinetics, ParquetImages

chance = random.Random(os.environ["PYTHONHASHSEED"])
walk = os.walk

def shuffled(*arguments, **options):  # no file system promises an order
    for parent, folders, names in walk(*arguments, **options):
        chance.shuffle(names)
        yield parent, folders, names

os.walk = shuffled
folder = Path(sys.argv[1])
small = dict(image_size=16, batch_size=2, num_workers=0)
shards = dict(dataset="wds/", train="*.tar", val="*.tar")
found = {}
for form, options in {"folders": {}, "tars": {}, "shards": shards}.items():
    data = ImageData(folder / form, **small, **options)
    data.setup("fit")
    labels = [label for _, labels in data.val_dataloader() for label in labels.tolist()]
    found[form] = data.classes, [(data.example_name("val", place), label) for place, label in enumerate(labels)]
for split in ("names.csv", "numbers.csv", "names", "numbers.txt"):
    data = Kinetics(folder / "videos", train=split, val=split)
    data.setup("fit")
    examples = data.val_dataloader()._loader.dataset.examples  # the files are empty
    found[split] = data.classes, [(str(path), label) for path, label in zip(examples.paths, examples.labels)]
data = ParquetImages(folder / "parquet", batch_size=2, num_val=2)
data.setup("fit")
found["parquet"] = data.classes, data.examples("train").targets.tolist()
print(json.dumps(found))
"""


def make_all(folder: Path) -> None:
    """The same classes as class folders, tars, shards, videos and Parquet."""
    image = encoded(0, 0)
    for name in TIES:
        for split in ("train", "val"):
            (folder / "folders" / split / name).mkdir(parents=True)
            for file in ("1.png", "01.png", "A.png", "a.png"):
                (folder / "folders" / split / name / file).write_bytes(image)
    (folder / "tars").mkdir()
    for split in ("train", "val"):
        with tarfile.open(folder / "tars" / f"{split}.tar", "w") as tar:
            tar.add(folder / "folders" / split, split)
    make_shards(folder / "tars", train=1, val=1)
    (folder / "shards").mkdir()
    for shard in (folder / "tars").glob("*-*.tar"):
        shard.rename(folder / "shards" / shard.name)
    (folder / "shards" / "classes.txt").write_text("Cat\ncat\nice cream\n", encoding="utf-8")
    numbers = [name for name in TIES if name.isdecimal()]
    for label in TIES:
        (folder / "videos" / "names" / label).mkdir(parents=True)
        (folder / "videos" / "names" / label / f"of {label}.mp4").touch()
    for split, labels in (("names", TIES), ("numbers", numbers)):
        rows = "".join(f"{label},of {label},,\n" for label in labels)
        (folder / "videos" / f"{split}.csv").write_text(f"label,youtube_id,time_start,time_end\n{rows}", "utf-8")
    lines = "".join(f"names/{label}/of {label}.mp4,{label}\n" for label in numbers)
    (folder / "videos" / "numbers.txt").write_text(lines, "utf-8")
    (folder / "parquet").mkdir()
    for split in ("train", "test"):
        write_parquet(folder / "parquet" / f"{split}.parquet", ["Cat", "cat", "01"])


def write_parquet(path: Path, classes: list[str] | None, labels: tuple[int, ...] = (0, 1, 2) * 4) -> None:
    table = pa.table({"image": [{"bytes": encoded(label, 0), "path": ""} for label in labels], "label": labels})
    pq.write_table(table.replace_schema_metadata({"classes": ",".join(classes)} if classes else None), path)


def test_every_process_gives_the_same_labels(tmp_path: Path) -> None:
    make_all(tmp_path)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", READ, str(tmp_path)],
            env=os.environ | {"PYTHONHASHSEED": str(seed), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in range(2)
    ]
    outputs = [json.loads(process.communicate(timeout=600)[0]) for process in processes]
    first = outputs[0]
    for form in first:
        for other in outputs[1:]:
            assert other[form] == first[form], form
    assert first["folders"][0] == first["tars"][0] == in_order(TIES)
    for form in ("folders", "tars"):
        classes, examples = first[form]
        assert [Path(name).parent.name for name, _ in examples] == [classes[label] for _, label in examples]
    assert first["shards"][0] == ["Cat", "cat", "ice cream"]
    assert first["names"][0] == first["names.csv"][0] == sorted(TIES)
    assert first["numbers.csv"][0] == first["numbers.txt"][0] == ["001", "01", "1", "3", "٣"]
    for split in ("names", "names.csv", "numbers.csv", "numbers.txt"):
        classes, examples = first[split]
        assert [Path(path).stem for path, _ in examples] == [f"of {classes[label]}" for _, label in examples]
    assert first["parquet"] == [["Cat", "cat", "01"], [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]]


# -- data for a network that was trained on some classes


def labels_of(loader: ExampleLoader) -> list[int]:
    return [label for _, labels in loader for label in labels.tolist()]


def expecting(classes: list[str], data: Any, stage: str = "test") -> Any:
    data.expect_classes(classes)
    data.setup(stage)
    return data


@pytest.mark.parametrize("make", [make_folders, make_tars])
@pytest.mark.parametrize("stage", ["fit", "test"])
def test_class_folders_take_the_labels_of_the_network(tmp_path: Path, make: Callable[[Path], Path], stage: str) -> None:
    data = expecting(["owl", "cat", "dog"], ImageData(make(tmp_path), **SMALL), stage)
    assert data.description()["classes"] == ["owl", "cat", "dog"]
    for place, label in enumerate(labels_of(data.val_dataloader())):
        assert f"{data.classes[label]}/" in data.example_name("val", place)


def test_a_split_without_training_data_that_lacks_a_class(tmp_path: Path) -> None:
    (make_folders(tmp_path) / "train").rename(tmp_path / "elsewhere")
    (tmp_path / "val" / "cat").rename(tmp_path / "gone")
    data = expecting(list(CLASSES), ImageData(tmp_path, **SMALL))
    assert labels_of(data.test_dataloader()) == [1] * 5 + [2] * 5
    assert data.classes == list(CLASSES)


def renamed(folder: Path) -> None:
    for split in ("train", "val"):
        (folder / split / "dog").rename(folder / split / "emu")


def added(folder: Path) -> None:
    make = folder / "train" / "cow"
    make.mkdir()
    (make / "0.png").write_bytes(encoded(0, 0))


def removed(folder: Path) -> None:
    (folder / "train" / "dog").rename(folder / "dog")


def strange(folder: Path) -> None:
    (folder / "train").rename(folder / "elsewhere")
    (folder / "val" / "dog").rename(folder / "val" / "emu")


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (renamed, r"train does not have .*: class 1 is 'emu' and was 'dog'\. Give the data that was trained on, or"),
        (added, r"train does not have .*: 1 class more: 'cow'\."),
        (removed, r"train does not have .*: 1 class fewer: 'dog'\."),
        (strange, r"val has the class 'emu', which the training data does not have: remove it, or train on it"),
    ],
)
def test_folders_with_other_classes_are_refused(
    tmp_path: Path, change: Callable[[Path], None], message: str, stage: str
) -> None:
    change(make_folders(tmp_path))
    if (change, stage) == (strange, "fit"):
        message = r"holds neither train/ nor train\.tar"
    with pytest.raises(DataError, match=message):
        expecting(list(CLASSES), ImageData(tmp_path, **SMALL), stage)


def shards(folder: Path) -> dict[str, Any]:
    make_shards(folder)
    return {"dataset": "wds/", "train": "train-*.tar", "val": "val-*.tar"}


def test_shards_whose_classes_have_another_order_are_refused(tmp_path: Path) -> None:
    options = shards(tmp_path)
    assert expecting(list(CLASSES), ImageData(tmp_path, **SMALL, **options)).classes == list(CLASSES)
    (tmp_path / "classes.txt").write_text("cat\nowl\ndog\n")
    with pytest.raises(DataError, match=r"does not have .*: class 1 is 'owl' and was 'dog'"):
        expecting(list(CLASSES), ImageData(tmp_path, **SMALL, **options))


def test_of_numbers_alone_only_the_highest_is_compared(tmp_path: Path) -> None:
    options = shards(tmp_path)
    (tmp_path / "classes.txt").unlink()
    assert expecting(list(CLASSES), ImageData(tmp_path, **SMALL, **options)).classes == list(CLASSES)
    for shard in tmp_path.glob("train-*.tar"):
        shard.unlink()
    assert expecting(list("abcd"), ImageData(tmp_path, **SMALL, **options)).classes == list("abcd")
    with pytest.raises(DataError, match="has the label 2; the training data has 2 classes"):
        expecting(["cat", "dog"], ImageData(tmp_path, **SMALL, **options))


def test_a_class_map_of_another_order_is_refused(tmp_path: Path) -> None:
    make_folders(tmp_path)
    (tmp_path / "map.txt").write_text("owl\ndog\ncat\n")
    mapped = ImageData(tmp_path, **SMALL, reader={"class_map": str(tmp_path / "map.txt")})
    assert labels_of(expecting(["owl", "dog", "cat"], mapped).val_dataloader())[0] == 2
    with pytest.raises(DataError, match=r"does not have .*: class 0 is 'owl' and was 'cat'"):
        expecting(list(CLASSES), ImageData(tmp_path, **SMALL, reader={"class_map": str(tmp_path / "map.txt")}))


class ImageNet(list[Any]):
    """What torchvision's set of this name has."""

    targets = (0, 1)
    classes = (("tench", "Tinca tinca"), ("goldfish",))


def test_a_class_of_several_names_is_one_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_sets, "_timm_dataset", lambda *_, **__: ImageNet([0, 1]))
    images = image_sets.open_images(tmp_path, "torch/imagenet", "val", None, False, {})
    assert images.classes == json.loads(json.dumps(images.classes)) == ["tench, Tinca tinca", "goldfish"]


def videos(folder: Path, *classes: str, split: str = "train") -> None:
    for name in classes:
        (folder / split / name).mkdir(parents=True, exist_ok=True)
        (folder / split / name / f"{name}.mp4").touch()


def test_videos_take_the_labels_of_the_network(tmp_path: Path) -> None:
    options: dict[str, Any] = {"train": "train", "val": "val", "num_workers": 0}

    def labels(stage: str) -> list[int]:
        data = expecting(["c", "a", "b"], Kinetics(tmp_path, **options), stage)
        return data.val_dataloader()._loader.dataset.examples.labels  # the files are empty

    videos(tmp_path, "b", "c", split="val")
    assert labels("validate") == [2, 0]
    videos(tmp_path, "a", "b", "c")
    assert labels("validate") == labels("fit") == [2, 0]
    videos(tmp_path, "d")
    for stage in ("fit", "test"):
        with pytest.raises(DataError, match=r"train does not have .*: 1 class more: 'd'"):
            labels(stage)


def parquet(folder: Path, train: list[str] | None, test: list[str] | None) -> ParquetImages:
    write_parquet(folder / "train.parquet", train)
    write_parquet(folder / "test.parquet", test, (0, 1))
    return ParquetImages(folder, batch_size=2, num_val=2)


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (["cat", "owl", "dog"], None, r"train\.parquet does not have .*: class 1 is 'owl' and was 'dog'"),
        (
            ["cat", "dog", "owl"],
            ["dog", "cat", "owl"],
            r"test\.parquet does not have .*: class 0 is 'dog' and was 'cat'",
        ),
        (["cat", "dog", "owl"], ["cat", "dog"], r"test\.parquet does not have .*: 1 class fewer: 'owl'"),
    ],
)
def test_parquet_files_that_name_other_classes_are_refused(
    tmp_path: Path, train: list[str] | None, test: list[str] | None, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        expecting(list(CLASSES), parquet(tmp_path, train, test))


def test_parquet_files_need_not_name_classes(tmp_path: Path) -> None:
    assert expecting(list(CLASSES), parquet(tmp_path, None, None)).classes == list(CLASSES)
    with pytest.raises(DataError, match=r"labels must be in \[0, 2\), as its metadata or the training data names 2"):
        expecting(["cat", "dog"], parquet(tmp_path, None, None))
