"""Files and folders that are there complete or not at all."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ensemblenet.storage.atomic import atomic_folder, atomic_path, remove_unfinished, write_json


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_json(path, {"rows": [1]})

    def fail() -> None:
        with atomic_path(path) as unfinished:
            unfinished.write_text("{")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert json.loads(path.read_text()) == {"rows": [1]}
    assert list(tmp_path.iterdir()) == [path]
    write_json(path, {"rows": [math.nan, {"nll": math.inf}, (1.5, None)]})
    assert json.loads(path.read_text()) == {"rows": [None, {"nll": None}, [1.5, None]]}


def test_a_folder_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "model"

    def fail() -> None:
        with atomic_folder(path) as unfinished:
            (unfinished / "part").mkdir()
            (unfinished / "part" / "recipe.json").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert not path.parent.exists()
    with atomic_folder(path) as unfinished:
        (unfinished / "recipe.json").touch()
    assert [file.name for file in path.iterdir()] == ["recipe.json"]
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(OSError, match="not empty"), atomic_folder(path):
        pass
    assert [file.name for file in path.iterdir()] == ["recipe.json"]
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("write", ["text", "torch", "safetensors"])
def test_a_full_disk_names_the_file_and_leaves_nothing(tmp_path: Path, write: str, small_files: None) -> None:
    path, tensors = tmp_path / "a", {"x": torch.zeros(10_000)}
    writers = {
        "text": lambda name: name.write_text("x" * 40_000),
        "torch": lambda name: torch.save(tensors, name),
        "safetensors": lambda name: save_file(tensors, name),
    }
    with pytest.raises(OSError, match=r"File too large|is the disk full") as caught, atomic_path(path) as unfinished:
        writers[write](unfinished)
    assert caught.value.filename == str(path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match=r"File too large|is the disk full") as caught, atomic_folder(path) as unfinished:
        writers[write](unfinished / "model")
    assert caught.value.filename == str(path)
    assert list(tmp_path.iterdir()) == []


def test_only_errors_of_writing_are_renamed(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="a bug"), atomic_path(tmp_path / "a"):
        raise RuntimeError("a bug")
    missing = tmp_path / "missing"
    with pytest.raises(FileNotFoundError) as caught, atomic_path(tmp_path / "a"):
        missing.read_text()
    assert caught.value.filename == str(missing)

    def lose_the_folder() -> None:
        with atomic_path(missing / "b") as unfinished:
            missing.rmdir()
            unfinished.touch()

    with pytest.raises(FileNotFoundError) as caught:
        lose_the_folder()
    assert caught.value.filename == str(missing / "b")


@pytest.mark.parametrize(("umask", "file", "folder"), [(0o022, 0o644, 0o755), (0o007, 0o660, 0o770)])
def test_permissions_are_those_of_the_umask(tmp_path: Path, umask: int, file: int, folder: int) -> None:
    before = os.umask(umask)
    try:
        with atomic_folder(tmp_path / "model") as unfinished:
            save_file({"x": torch.zeros(2)}, unfinished / "model.safetensors")
            (unfinished / "part").mkdir()
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert modes == {"model": folder, "part": folder, "model.safetensors": file}


def test_what_killed_writers_left_is_removed(tmp_path: Path) -> None:
    for name in ("a/.last.ckpt.4711", "a/.model-x.12/model/weights", "a/.git/config", "a/.hidden", "a/last.ckpt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    remove_unfinished(tmp_path)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [".git", ".hidden", "last.ckpt"]
