"""Class folders, tars and shards as people have them: nested, hidden, linked, and in all spellings of a name."""

from __future__ import annotations

import io
import tarfile
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_images import encoded, make_folders, make_shards

from ensemblenet.data import ImageData
from ensemblenet.data.files import find_files
from ensemblenet.data.image_sets import open_images
from ensemblenet.data.parquet_images import read_parquet_images
from ensemblenet.data.tars import files_of_tar
from ensemblenet.errors import DataError


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(0, 0))


def found(folder: Path, split: str = "train", dataset: str = "", **options: Any) -> dict[str, list[str]]:
    """The names of the images of each class."""
    images = open_images(folder, dataset, split, None, True, options)
    assert images.classes is not None
    by_class: dict[str, list[str]] = {name: [] for name in images.classes}
    for place, label in enumerate(images.labels):
        by_class[images.classes[label]].append(images.name(place))
        images.image(place)
    return by_class


def in_folders(folder: Path, *names: str) -> Path:
    touch(folder / "train", *names)
    return folder


def in_tar(folder: Path, *names: str, prefix: str = "") -> Path:
    with tarfile.open(folder / "train.tar", "w") as tar:
        for name in names:
            data = encoded(0, 0)
            member = tarfile.TarInfo(f"{prefix}{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return folder


def in_deep_tar(folder: Path, *names: str) -> Path:
    return in_tar(folder, *names, prefix="./data/train/")


@pytest.mark.parametrize("make", [in_folders, in_tar, in_deep_tar])
def test_a_class_is_the_first_folder_and_images_lie_at_any_depth(tmp_path: Path, make: Callable[..., Path]) -> None:
    nested = ("cat/a/1.png", "cat/b/2.png", "cat/3.png", "dog/a/1.png", "dog/x/y/z/4.PNG")
    hidden = (
        ".ipynb_checkpoints/1.png",
        "cat/.ipynb_checkpoints/1-checkpoint.png",
        "cat/._1.png",
        "__MACOSX/cat/1.png",
    )
    assert found(make(tmp_path, *nested, *hidden)) == {
        "cat": ["cat/3.png", "cat/a/1.png", "cat/b/2.png"],
        "dog": ["dog/a/1.png", "dog/x/y/z/4.PNG"],
    }


@pytest.mark.parametrize("make", [in_folders, in_tar])
def test_one_name_in_two_spellings_is_one_class(tmp_path: Path, make: Callable[..., Path]) -> None:
    composed, apart = (unicodedata.normalize(form, "\u00e9clair") for form in ("NFC", "NFD"))
    assert composed != apart
    by_class = found(make(tmp_path, f"{composed}/1.png", f"{apart}/2.png", "5\u00b2/1.png"))
    assert {name: len(files) for name, files in by_class.items()} == {"5\u00b2": 1, composed: 2}
    touch(tmp_path / "val", f"{apart}/1.png", "5\u00b2/1.png")
    data = ImageData(tmp_path, image_size=16, batch_size=1, num_workers=0)
    data.expect_classes(["5\u00b2", apart])  # as a network trained on another system says
    data.setup("fit")
    assert data.classes == ["5\u00b2", composed]


@pytest.mark.parametrize("make", [in_folders, in_tar])
def test_folders_of_file_systems_and_servers_are_no_classes(tmp_path: Path, make: Callable[..., Path]) -> None:
    own = ["@eaDir/a.jpg", "dog/@eaDir/a.jpg", "$RECYCLE.BIN/a.jpg", "lost+found/a.jpg", "__MACOSX/a.jpg", ".b/a.jpg"]
    names = found(make(tmp_path, "cat/0.png", "dog/0.png", *own))
    assert names == {"cat": ["cat/0.png"], "dog": ["dog/0.png"]}


@pytest.mark.parametrize("make", [in_folders, in_tar])
def test_a_class_whose_name_is_no_utf_8_is_refused(tmp_path: Path, make: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match=r"^The class 'do\\udcffg' has a name that is not UTF-8"):
        found(make(tmp_path, "cat/0.png", "do\udcffg/0.png"))


def test_numbers_of_any_length_have_an_order(tmp_path: Path) -> None:
    long = "1" * 5000
    assert list(found(in_tar(tmp_path, f"{long}/0.png", f"2{long}/0.png", "9/0.png"))) == ["9", long, f"2{long}"]


@pytest.mark.parametrize("given", [{"cat": "x"}, {"cat": 0.5}, {"cat": None}, {"cat": True}, ["cat"], 3], ids=str)
def test_a_class_map_that_is_none_is_refused(tmp_path: Path, given: Any) -> None:
    with pytest.raises(DataError, match="class_map must be numbers by the names of classes"):
        found(in_folders(tmp_path, "cat/0.png", "dog/0.png"), class_map=given)


def test_images_outside_of_class_folders_are_left_out(tmp_path: Path) -> None:
    assert found(in_folders(tmp_path, "cat/1.png", "dog/1.png", "overview.png")).keys() == {"cat", "dog"}


def links(train: Path) -> None:
    """Loops: to the split, to what it lies in, and two links in each folder to the folder itself."""
    (train / "all").symlink_to(train)
    (train / "cat" / "up").symlink_to(train)
    (train / "dog" / "top").symlink_to(train.parent)
    for name in ("one", "two"):
        (train / "cat" / name).symlink_to(train / "cat")


def test_a_loop_of_links_counts_each_image_once(tmp_path: Path) -> None:
    links(in_folders(tmp_path, "cat/1.png", "dog/1.png") / "train")
    assert found(tmp_path) == {"cat": ["cat/1.png"], "dog": ["dog/1.png"]}
    assert len(find_files([str(tmp_path)], [".png"])) == 2


def test_a_ladder_of_links_ends(tmp_path: Path) -> None:
    """Without a loop, and yet 2^40 ways lead to the last folder."""
    for depth in range(40):
        (tmp_path / f"d{depth}").mkdir()
        for name in ("a", "b"):
            (tmp_path / f"d{depth}" / name).symlink_to(tmp_path / f"d{depth + 1}")
    touch(tmp_path, "d40/1.png")
    begun = time.process_time()
    assert find_files([str(tmp_path / "d0")], [".png"]) == [tmp_path / "d0" / Path(*"a" * 40) / "1.png"]
    assert time.process_time() - begun < 5


def test_linked_classes_and_images_are_read(tmp_path: Path) -> None:
    touch(tmp_path / "disk", "cats/1.png", "dogs/1.png")
    (tmp_path / "train" / "dog").mkdir(parents=True)
    (tmp_path / "train" / "cat").symlink_to(tmp_path / "disk" / "cats")
    (tmp_path / "train" / "dog" / "2.png").symlink_to(tmp_path / "disk" / "dogs" / "1.png")
    assert found(tmp_path) == {"cat": ["cat/1.png"], "dog": ["dog/2.png"]}
    (tmp_path / "train" / "dog" / "3.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(DataError, match=r"dog/3\.png cannot be decoded: .*No such file"):
        found(tmp_path)


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "images").mkdir()
    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(DataError, match=r"images cannot be read: Permission denied"):
        find_files([str(tmp_path / "images")], [".png"])


def test_class_maps_number_classes_and_other_arguments_are_refused(tmp_path: Path) -> None:
    in_folders(tmp_path, "cat/1.png", "dog/1.png", "owl/1.png")
    (tmp_path / "train" / "map.txt").write_text("owl\ncat\n")
    for class_map in ("map.txt", str(tmp_path / "train" / "map.txt"), {"owl": 0, "cat": 1}):
        assert found(tmp_path, class_map=class_map) == {"owl": ["owl/1.png"], "cat": ["cat/1.png"]}
    for options, message in (({"class_map": "no.txt"}, "class_map=no.txt is neither a file"), ({"x": 1}, "got x")):
        with pytest.raises(DataError, match=message):
            found(tmp_path, **options)


# -- tars


def add(tar: tarfile.TarFile, name: str, data: bytes = b"", **fields: Any) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for field, value in fields.items():
        setattr(member, field, value)
    tar.addfile(member, io.BytesIO(data))


def test_a_tar_of_tars_and_links_within_a_tar(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for name in ("cat", "dog"):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as within:
                add(within, "1.png", encoded(0, 1))
            add(tar, f"{name}.tar", inner.getvalue())
    assert found(tmp_path) == {"cat": ["cat/1.png"], "dog": ["dog/1.png"]}
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        add(tar, "cat/1.png", encoded(0, 1))
        add(tar, "dog/1.png", type=tarfile.LNKTYPE, linkname="cat/1.png")
        add(tar, "dog/2.png", type=tarfile.SYMTYPE, linkname="../cat/1.png")
        add(tar, "dog/3.png", type=tarfile.SYMTYPE, linkname="/etc/passwd")
    assert found(tmp_path) == {"cat": ["cat/1.png"], "dog": ["dog/1.png", "dog/2.png"]}


def claim(size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    member = tarfile.TarInfo("cat/1.png")
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.GNUTYPE_SPARSE])
@pytest.mark.parametrize("size", [10**12, 2**62])
def test_a_header_that_claims_too_much(tmp_path: Path, kind: bytes, size: int) -> None:
    (tmp_path / "train.tar").write_bytes(claim(size, kind) + b"x" * 5120)
    begun = time.process_time()
    with pytest.raises(DataError, match=r"train\.tar "):
        found(tmp_path)
    assert time.process_time() - begun < 5


def test_damaged_tars_raise_nothing_but_data_errors(tmp_path: Path) -> None:
    whole = (in_tar(tmp_path, "cat/1.png", "dog/1.png") / "train.tar").read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(150):
        data = bytearray(whole[: rng.integers(1, len(whole) + 1)])
        for place in rng.integers(0, min(len(data), 1600), 4):
            data[place] = rng.integers(256)
        (tmp_path / "x.tar").write_bytes(data)
        try:
            files = files_of_tar(tmp_path / "x.tar", [".png"])
        except DataError:
            continue
        assert all(file.size <= len(whole) for file in files)


# -- shards


def test_shards_take_every_format(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        for number, (suffix, kind) in enumerate({"webp": "WEBP", "bmp": "BMP", "tif": "TIFF", "JPG": "JPEG"}.items()):
            add(tar, f"{number}.{suffix}", encoded(0, number, kind))
            add(tar, f"{number}.cls", f" {number % 2}\n".encode())
            add(tar, f"._{number}.{suffix}", b"of another system")
    names = [f"{number} of train-0.tar" for number in ("0.webp", "1.bmp", "2.tif", "3.JPG")]
    assert found(tmp_path, "train-*.tar", "wds/") == {"0": names[::2], "1": names[1::2]}


@pytest.mark.parametrize(
    ("text", "classes"),
    [
        ("\ufeffice cream\r\nhot\u2028dog\r\nowl\x85s\r\n\r\n", ["ice cream", "hot\u2028dog", "owl\x85s"]),
        ("a\x0bb\nc\x1cd\ne\x0cf", ["a\x0bb", "c\x1cd", "e\x0cf"]),
    ],
)
def test_names_of_classes_are_lines(tmp_path: Path, text: str, classes: list[str]) -> None:
    make_shards(tmp_path, train=2, val=1)
    (tmp_path / "classes.txt").write_bytes(text.encode())
    assert list(found(tmp_path, "train-*.tar", "wds/")) == classes


@pytest.mark.parametrize(
    ("text", "message"),
    [(b"a\n\nb\n", r"classes\.txt, line 2 is empty"), ("caf\u00e9\nb\nc".encode("latin-1"), r"is no text in UTF-8")],
)
def test_names_that_would_be_shifted_or_garbled(tmp_path: Path, text: bytes, message: str) -> None:
    make_shards(tmp_path, train=2, val=1)
    (tmp_path / "classes.txt").write_bytes(text)
    with pytest.raises(DataError, match=message):
        found(tmp_path, "train-*.tar", "wds/")


@pytest.mark.parametrize("label", [str(2**40), str(2**70), "1e3", "\u00b2", "9" * 50, "1" * 10**6])
def test_strange_labels_of_shards(tmp_path: Path, label: str) -> None:
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        add(tar, "0.png", encoded(0, 0))
        add(tar, "0.cls", label.encode())
    with pytest.raises(
        DataError, match=r"has the label 1,099,511,627,776; labels must be below|0\.cls must hold a number"
    ):
        found(tmp_path, "train-*.tar", "wds/")


@pytest.mark.parametrize("label", [2**40, 2**63 + 1])
def test_strange_labels_of_parquet_files(tmp_path: Path, label: int) -> None:
    table = pa.table({"image": [{"bytes": encoded(0, 0), "path": ""}], "label": pa.array([label], pa.uint64())})
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"x\.parquet"):
        read_parquet_images(tmp_path / "x.parquet")


def test_torchvision_sets_are_read_by_the_same_reader(tmp_path: Path) -> None:
    from PIL import Image

    levels = np.full((16, 16), 1000, np.uint16)
    Image.fromarray(levels).save(make_folders(tmp_path) / "train" / "cat" / "000.png")
    images = open_images(tmp_path / "train", "torch/folder", ".", None, True, {})
    assert np.asarray(images.image(0)).max() == 1000 // 256
