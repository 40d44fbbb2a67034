"""A run keeps its classes when training begins; other ones are refused in one line, and labels keep their names."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from made_images import CLASSES, encoded, make_folders, make_shards

from ensemblenet.cli.main import main
from ensemblenet.training.fit import fit

BASE = {"depth": 8, "width": 4, "num_classes": 3}
OWN_CODE = """
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset

class Own(LightningDataModule):
    def __init__(self, names: list[str]):
        super().__init__()
        self.names = names

    def description(self):
        return {"classes": self.names}

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.zeros(6, 3, 16, 16), torch.arange(6) % 3), 6)

    val_dataloader = test_dataloader = train_dataloader
"""


@pytest.fixture(scope="module", autouse=True)
def own_code(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("code")
    (folder / "small_network.py").write_text(OWN_CODE)
    sys.path.insert(0, str(folder))


def arguments(folder: Path) -> list[str]:
    settings = {
        "name": "tiny",
        "model": {"base": {"class_path": "ensemblenet.models.CifarResNet", "init_args": BASE}, "conversion": None},
        "data": {
            "class_path": "ensemblenet.data.ImageData",
            "init_args": {"folder": "images", "image_size": 16, "batch_size": 6, "num_workers": 0},
        },
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings))
    return ["--config", str(folder / "tiny.yaml"), "--runs", str(folder / "runs"), "--data", str(folder / "images")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    make_folders(folder / "images")
    fit(arguments(folder))
    return folder


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    """Of the images and the run, for a test to spoil."""
    for part in ("images", "runs"):
        shutil.copytree(trained / part, tmp_path / part)
    return tmp_path


def run_of(folder: Path) -> Path:
    [run] = (folder / "runs").iterdir()
    return run


def resume(folder: Path) -> list[str]:
    (run_of(folder) / "results.json").unlink(missing_ok=True)
    return ["fit", "--resume", str(run_of(folder)), "--data", str(folder / "images"), "--trainer.max_epochs", "2"]


def on(command: str, *more: str) -> Callable[[Path], list[str]]:
    def written(folder: Path) -> list[str]:
        options = [option.format(folder=folder) for option in more]
        return [command, str(run_of(folder)), "--data.folder", str(folder / "images"), *options]

    return written


COMMANDS = {
    "resume": resume,
    "test": on("test"),
    "validate": on("validate"),
    "predict": on("predict", "--output", "{folder}/out.csv"),
    "report": on("report", "--output", "{folder}/out.html"),
}


def renamed(images: Path) -> None:
    for split in ("train", "val"):
        (images / split / "dog").rename(images / split / "emu")


def added(images: Path) -> None:
    for split in ("train", "val"):
        (images / split / "Cat").mkdir()
        (images / split / "Cat" / "0.png").write_bytes(encoded(0, 0))


def without_training_data(images: Path) -> None:
    (images / "val" / "dog").rename(images / "val" / "emu")
    shutil.rmtree(images / "train")


def one_line(written: str) -> str:
    [line] = [line for line in written.splitlines() if not line.startswith("Warning: ")]
    return line


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            renamed,
            "train does not have the classes of the training data: class 1 is 'emu' and was 'dog'. Give the data",
        ),
        (added, "train does not have the classes of the training data: 1 class more: 'Cat'. Give the data that was"),
        (without_training_data, "val has the class 'emu', which the training data does not have: remove it, or train"),
    ],
)
def test_other_classes_are_refused_in_one_line(
    copy: Path, capsys: pytest.CaptureFixture[str], command: str, change: Callable[[Path], None], message: str
) -> None:
    change(copy / "images")
    if (change, command) == (without_training_data, "resume"):
        message = "holds neither train/ nor train.tar"
    capsys.readouterr()
    assert main(COMMANDS[command](copy)) == 2
    assert message in one_line(capsys.readouterr().err)
    assert not list(copy.glob("out*"))


def test_data_modules_of_the_users_own_are_compared_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments(tmp_path)
    settings = yaml.safe_load((tmp_path / "tiny.yaml").read_text())
    settings["data"] = {"class_path": "small_network.Own", "init_args": {"names": ["a", "b", "c"]}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(settings))
    fit(["--config", str(tmp_path / "tiny.yaml"), "--runs", str(tmp_path / "runs")])
    for names, message in (("[a, c, b]", "class 1 is 'c' and was 'b'"), ("[a, b, c, d]", "1 class more: 'd'")):
        capsys.readouterr()
        assert main(["test", "--trust", str(run_of(tmp_path)), "--data.names", names]) == 2
        assert message in one_line(capsys.readouterr().err)


def test_the_classes_are_kept_when_training_begins(tmp_path: Path) -> None:
    make_folders(tmp_path / "images")
    with pytest.raises(ZeroDivisionError):
        fit([*arguments(tmp_path), "--trainer.callbacks", f"{__name__}.Failing"])
    assert json.loads((run_of(tmp_path) / "data.json").read_text())["classes"] == list(CLASSES)
    renamed(tmp_path / "images")
    assert main(["fit", *arguments(tmp_path), "--resume", "auto"]) == 2
    assert not (run_of(tmp_path) / "results.json").exists()


class Failing(Callback):
    """Ends a run behind its first step."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        raise ZeroDivisionError


def test_a_resumed_run_keeps_its_labels(copy: Path) -> None:
    kept = run_of(copy) / "data.json"
    described = json.loads(kept.read_text())
    kept.write_text(json.dumps(described | {"classes": ["owl", "cat", "dog"]}))  # as an earlier version may have had it
    assert main(resume(copy)) == 0
    assert json.loads((run_of(copy) / "model" / "data.json").read_text())["classes"] == ["owl", "cat", "dog"]


def test_a_run_that_kept_no_classes_is_resumed(copy: Path) -> None:
    (run_of(copy) / "data.json").unlink()
    assert main(resume(copy)) == 0
    assert json.loads((run_of(copy) / "data.json").read_text())["classes"] == list(CLASSES)


def test_damaged_classes_are_refused(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_of(copy) / "data.json").write_text('{"classes": 5}')
    assert main(resume(copy)) == 2
    assert "data.json: classes must be a list of names, got 5." in one_line(capsys.readouterr().err)


def predicted(folder: Path, *options: str) -> dict[str, tuple[str, float]]:
    """For each image of the validation split its label, and the probability of cats."""
    out = folder / f"predictions-{len(list(folder.iterdir()))}.csv"
    assert main(["predict", str(run_of(folder)), "--split", "val", "--output", str(out), *options]) == 0
    with out.open(newline="") as file:
        return {row["id"]: (row["label"], float(row["p_cat"])) for row in csv.DictReader(file)}


def test_without_the_training_data_labels_come_from_the_stored_classes(copy: Path) -> None:
    whole = predicted(copy, "--data.folder", str(copy / "images"))
    shutil.rmtree(copy / "images" / "train")
    shutil.rmtree(copy / "images" / "val" / "cat")
    lacking = predicted(copy, "--data.folder", str(copy / "images"))
    assert lacking == {name: found for name, found in whole.items() if found[0] != "cat"}
    assert all(name.startswith(label) for name, (label, _) in lacking.items())


def test_shards_of_permuted_classes_are_refused(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(copy / "images")
    (copy / "images").mkdir()
    make_shards(copy / "images")
    splits = ["--data.dataset", "wds/", "--data.train", "train-*.tar", "--data.val", "val-*.tar"]
    assert len(predicted(copy, "--data.folder", str(copy / "images"), *splits)) == 15
    (copy / "images" / "classes.txt").write_text("cat\nowl\ndog\n")
    for command in ("test", "validate", "predict", "report"):
        capsys.readouterr()
        assert main([*COMMANDS[command](copy), *splits]) == 2
        assert "class 1 is 'owl' and was 'dog'" in one_line(capsys.readouterr().err)
