"""Files and folders that are there complete or not at all."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from ensemblenet.storage.atomic import atomic_folder, atomic_path, write_json


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
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"rows": [math.nan]})


def test_a_folder_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "model"

    def fail() -> None:
        with atomic_folder(path) as unfinished:
            (unfinished / "part").mkdir()
            (unfinished / "part" / "recipe.json").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(path.parent.iterdir()) == []
    with atomic_folder(path) as unfinished:
        (unfinished / "recipe.json").touch()
    assert [file.name for file in path.iterdir()] == ["recipe.json"]
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(OSError, match="not empty"), atomic_folder(path):
        pass
    assert [file.name for file in path.iterdir()] == ["recipe.json"]
    assert list(path.parent.iterdir()) == [path]
