"""What is known of the data, from a file that anyone may have written: checked where it is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ensemblenet import LoadError, convert, save
from ensemblenet.cli import main
from ensemblenet.data.files import file_reader
from ensemblenet.errors import DataError
from ensemblenet.models import MNIST1DNet
from ensemblenet.storage.descriptions import read_description, write_description
from ensemblenet.storage.restore import restore

WHOLE: dict[str, Any] = {
    "classes": list("0123456789"),
    "data": "MNIST1D",
    "task": "multiclass",
    "input_shape": [40],
    "preprocessing": {"mean": [0.5], "std": [0.5], "crop_pct": 0.9, "interpolation": "bicubic", "seconds": None},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(convert(MNIST1DNet(8), torch.randn(2, 40)).eval(), tmp_path_factory.mktemp("models") / "saved", WHOLE)


def test_what_is_whole_is_read(saved: Path) -> None:
    assert read_description(saved) == WHOLE
    assert restore(saved).classes == WHOLE["classes"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": "0123456789"}, "classes must be a list of names, got '0123456789'"),
        ({"classes": [["a"]] * 10}, "classes must be a list of names"),
        ({"classes": dict.fromkeys("0123456789", 1)}, "classes must be a list of names"),
        ({"classes": list("0123456789a")}, "names 11 classes, but the model has 10 outputs"),
        ({"classes": []}, "names 0 classes, but the model has 10 outputs"),
        ({"data": 5}, "data must be a name, got 5"),
        ({"task": ["multiclass"]}, r"task must be one of .*, got \['multiclass'\]"),
        ({"input_shape": [40, -1]}, "input_shape must be a list of sizes"),
        ({"input_shape": [10**6, 10**6]}, "input_shape must be a list of sizes, together at most 16,777,216"),
        ({"input_dtype": "load"}, "input_dtype must be a dtype's name"),
        ({"preprocessing": 7}, "preprocessing must be an object, got 7"),
        ({"preprocessing": {"mean": "0.5"}}, "preprocessing.mean must be a list of numbers"),
        ({"preprocessing": {"mean": [float("nan")]}}, "preprocessing.mean must be a list of numbers"),
        ({"preprocessing": {"std": [0]}}, "preprocessing.std must be a list of positive numbers"),
        ({"preprocessing": {"crop_pct": "x"}}, "preprocessing.crop_pct must be a positive number"),
        ({"preprocessing": {"num_clips": 2**40}}, "preprocessing.num_clips must be a positive integer"),
        ({"preprocessing": {"interpolation": 3}}, "preprocessing.interpolation must be a name"),
    ],
)
def test_what_is_damaged_is_named(
    saved: Path, changes: dict, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """By every command, in one line; `export` is one of them."""
    whole = (saved / "data.json").read_text()
    try:
        (saved / "data.json").write_text(json.dumps(WHOLE | changes))
        with pytest.raises(LoadError, match=message):
            restore(saved)
        assert main(["export", str(saved), "--output", str(tmp_path / "m.onnx")]) == 2
    finally:
        (saved / "data.json").write_text(whole)
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "m.onnx").exists()


def test_what_is_no_plain_data_is_not_written(tmp_path: Path) -> None:
    for entry in (float("nan"), {1, 2}, torch.zeros(2)):
        with pytest.raises(LoadError, match="The description must be plain data that JSON can hold"):
            write_description(tmp_path, {"entry": entry})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("data", "preprocessing"),
    [
        ("ImageData", {}),
        ("ImageData", {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "unheard of"}),
        ("Kinetics", {"mean": [0.5] * 3, "std": [0.5] * 3}),
        ("ParquetImages", {"mean": [0.5] * 3}),
    ],
)
def test_preprocessing_that_says_too_little(data: str, preprocessing: dict) -> None:
    shape = (3, 4, 32, 32) if data == "Kinetics" else (3, 32, 32)
    with pytest.raises(DataError, match=f"What is stored of the {data} .* does not say how files are read: ") as caught:
        file_reader(shape, {"data": data, "preprocessing": preprocessing})
    assert "\n" not in str(caught.value)
