"""`validate` and `test` score the whole network, its heads and its first heads, as a direct computation does."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule
from sklearn.metrics import accuracy_score, log_loss, top_k_accuracy_score
from torch.utils.data import DataLoader, TensorDataset

import ensemblenet
from ensemblenet.cli.main import main
from ensemblenet.cli.test import test as run_test
from ensemblenet.cli.validate import validate
from ensemblenet.errors import EnsembleNetError, LoadError
from ensemblenet.evaluation.scoring import chosen_data, score
from ensemblenet.inputs import Inputs
from ensemblenet.metrics.tagging import TaggingMetrics
from ensemblenet.models import MNIST1DNet
from ensemblenet.storage.restore import Restored, data_module, restore
from ensemblenet.storage.specs import changed_data
from ensemblenet.training.fit import fit

DATA = {"num_train": 60, "num_val": 40, "num_test": 50, "batch_size": 20}
SPEC = {"class_path": "ensemblenet.data.MNIST1D", "init_args": DATA}


def train(folder, conversion):
    base = {"class_path": "ensemblenet.models.MNIST1DNet", "init_args": {"width": 8}}
    settings = {
        "name": "tiny",
        "model": {"base": base, "conversion": conversion, "heads": "looped"},
        "data": SPEC,
        "trainer": {"max_epochs": 2, "accelerator": "cpu", "devices": 1},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings))
    return fit(["--config", str(folder / "tiny.yaml"), "--runs", str(folder / "runs")])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train(tmp_path_factory.mktemp("evaluate"), {"num_heads": 3})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model = ensemblenet.convert(MNIST1DNet(8), torch.randn(2, 40), num_heads=2, seed=1).eval()
    return ensemblenet.save(model, tmp_path_factory.mktemp("saved") / "model")


def reference(network, x, y):
    with torch.inference_mode():
        z = network(x).double()
    p, y, classes = z.softmax(1).numpy(), y.numpy(), range(z.shape[1])
    return {
        "accuracy": accuracy_score(y, p.argmax(1)),
        "top5": top_k_accuracy_score(y, p, k=5, labels=classes),
        "nll": log_loss(y, p, labels=classes),
        "brier": np.mean([sum((row[c] - (c == label)) ** 2 for c in classes) for row, label in zip(p, y, strict=True)]),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
    }


@pytest.mark.parametrize(("command", "split"), [(validate, "val"), (run_test, "test")])
def test_rows_are_those_of_the_networks_that_stand_in_them(run: Path, command: Callable[..., Any], split: str) -> None:
    rows = {row["method"]: row for row in command([str(run)])}
    restored = restore(run)
    data = data_module(restored)
    data.setup()
    model = restored.network
    networks = {
        "ensemble": model,
        "head 0": model.head(0),
        "head 1": model.head(1),
        "head 2": model.head(2),
        "first 2": model.first(2),
    }
    assert list(rows) == list(networks)
    for name, network in networks.items():
        expected = reference(network, *getattr(data, split))
        assert {key: rows[name][key] for key in expected} == pytest.approx(expected, rel=1e-5), name
    assert rows["first 2"]["macs"] == model.first(2).cost.macs
    assert rows["head 1"]["macs"] == ensemblenet.measure_cost(model.head(1), torch.zeros(1, 40)).macs
    votes = [model.head(k)(getattr(data, split)[0]).argmax(1) for k in range(3)]
    differ = [(votes[i] != votes[j]).float().mean().item() for i, j in ((0, 1), (0, 2), (1, 2))]
    assert rows["ensemble"]["disagreement"] == pytest.approx(np.mean(differ), abs=1e-6)
    if split == "test":
        [trained] = json.loads((run / "results.json").read_text())["rows"]
        assert trained["error_mean"] == pytest.approx(100 * (1 - rows["ensemble"]["accuracy"]), abs=1e-4)
        assert trained["test"]["first_accuracy_2"] == pytest.approx(rows["first 2"]["accuracy"], abs=1e-6)
        assert trained["test"]["head_top5_1"] == pytest.approx(rows["head 1"]["top5"], abs=1e-6)


def test_a_base_is_one_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [row] = run_test([str(train(tmp_path, None))])
    assert (row["method"], row["num_heads"], row["disagreement"]) == ("base", 1, 0)
    assert "tiny" in capsys.readouterr().out


def test_the_table_and_the_file(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "scores.json"
    rows = run_test([str(run), "--output", str(path), "--data.num_test", "30", "--data.init_args.num_val=20"])
    written = json.loads(path.read_text())
    assert written["rows"] == rows
    assert written["split"] == "test"
    assert 30 * rows[0]["accuracy"] == pytest.approx(round(30 * rows[0]["accuracy"]))
    printed = capsys.readouterr().out
    [line] = [line for line in printed.splitlines() if line.startswith(" ensemble")]
    assert f"{100 - 100 * rows[0]['accuracy']:.2f}" in line  # errors are shown
    assert " error " in printed
    assert f"{rows[0]['brier']:.4f}" in line
    assert main(["test", str(run), "--output", str(path)]) == 2
    assert "exists; --output needs a new file" in capsys.readouterr().err


def test_a_saved_directory_takes_data_from_a_file_or_from_options(saved: Path, tmp_path: Path) -> None:
    for content in (SPEC, {"data": SPEC, "model": {}}):
        (tmp_path / "data.yaml").write_text(yaml.safe_dump(content))
        from_file = run_test([str(saved), "--config", str(tmp_path / "data.yaml")])
        options = [f"--data.{key}={value}" for key, value in DATA.items()]
        assert run_test([str(saved), "--data.class_path", SPEC["class_path"], *options]) == from_file


def test_options_go_before_the_file_and_the_file_before_the_run(run: Path, tmp_path: Path) -> None:
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({"init_args": {"num_test": 30, "num_val": 30}}))
    data = chosen_data(restore(run), tmp_path / "data.yaml", ["--data.num_test", "20"])
    assert data.sizes == (60, 30, 20)  # pyright: ignore


def test_a_folder_has_a_short_option(saved: Path) -> None:
    for folder in (["--data", "elsewhere"], ["--data=elsewhere"], ["--data.init_args.folder=elsewhere"]):
        options = ["--data.num_val=7", *folder]
        data = chosen_data(restore(saved), None, options, class_path="ensemblenet.data.ParquetImages")
        assert (str(data.folder), data.num_val) == ("elsewhere", 7)  # pyright: ignore


def test_features_keep_their_order() -> None:
    features = {"rgb": 16, "audio": 8}  # in which they stand side by side
    spec = {"class_path": "ensemblenet.data.YouTube8M", "init_args": {"folder": "x", "features": features}}
    assert list(changed_data(spec, ["--data.batch_size=8"])["init_args"]["features"]) == ["rgb", "audio"]


def test_another_class_leaves_the_arguments_of_the_runs_own_behind(run: Path) -> None:
    data = chosen_data(restore(run), None, ["--data.num_test=20"], class_path="MNIST1D")
    assert data.sizes == (4000, 2000, 20)  # pyright: ignore


CLASS = "--data.class_path=ensemblenet.data.MNIST1D"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "does not know its data: give --data.class_path"),
        ([CLASS, "--data.num_test"], "expected one argument"),
        ([CLASS, "--data.num_test", "three"], 'data: ensemblenet.data.MNIST1D cannot be made: Parser key "num_test":'),
        (
            [CLASS, "--data.num_tst", "3"],
            "MNIST1D cannot be made: Option 'num_tst' is not accepted. Did you mean num_test?",
        ),
        ([CLASS, "--data.folder=x"], "folder"),
        (["--data.class_path=ensemblenet.data.NoSuch"], "NoSuch"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_what_the_command_line_gets_wrong(
    saved: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["test", str(saved), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_options_of_the_data_may_stand_before_the_model(saved: Path, tmp_path: Path) -> None:
    scores = tmp_path / "scores.json"
    before = ["--data.num-test", "3", "--data.num_train=20", "--data.batch_size", "10", CLASS, "--data.num_val", "1"]
    row = run_test([*before, str(saved), "--device", "cpu", "--output", str(scores)])[0]
    hits = 3 * row["accuracy"]  # of three examples
    assert hits == pytest.approx(round(hits), abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dta.num_test", "3"], "unrecognized arguments: --dta.num_test 3"),
        (["--ouput", "x.json"], "Did you mean --output?"),
    ],
)
def test_an_unknown_option_is_one_line(
    saved: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["test", str(saved), *arguments])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_device_that_is_not_there(saved: Path) -> None:
    restored = restore(saved)
    with pytest.raises(LoadError, match="There is no device 'cuda:99'"):
        score(restored, chosen_data(restored, None, [], "ensemblenet.data.MNIST1D"), "test", "cuda:99")


@pytest.mark.parametrize(("content", "message"), [("{", "is not YAML"), ("- 1", "must hold class_path and init_args")])
def test_a_file_that_names_no_data(saved: Path, tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "data.yaml").write_text(content)
    with pytest.raises(LoadError, match=message):
        run_test([str(saved), "--config", str(tmp_path / "data.yaml")])


class Examples(LightningDataModule):
    """Batches of tensors as test data."""

    def __init__(self, x, y, classes=None):
        super().__init__()
        self.examples, self.classes = TensorDataset(x, y), classes

    def test_dataloader(self) -> None:
        return DataLoader(self.examples, batch_size=16)

    def description(self):
        return {"classes": self.classes}


X, Y = torch.randn(20, 40), torch.arange(20) % 10


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Examples(X, Y + 1), "has the label 10; .* has 10 classes"),
        (Examples(X, Y, list("0123456798")), "The data does not .*: class 8 is '9' and was '8'. Give the data that"),
        (Examples(X, Y, list("01234567789")), "The data does not .*: class 8 is '7' and was '8'"),
        (Examples(X, Y, list("0123456789a")), "The data does not .*: 1 class more: 'a'"),
        (Examples(X, Y, list("012345678")), "The data does not .*: 1 class fewer: '9'"),
        (Examples(X, Y, list("9876543210a")), "The data does not .*: 1 class more: 'a'"),
        (Examples(X, Y, list("0123")), "The data does not .*: 6 classes fewer: '4', ..."),
    ],
)
def test_data_that_does_not_fit(run: Path, data: Examples, message: str) -> None:
    with pytest.raises(EnsembleNetError, match=message):
        score(restore(run), data, "test")


def test_data_of_another_number_of_classes_than_the_network_has_outputs(run: Path) -> None:
    restored = replace(restore(run), description={})
    with pytest.raises(LoadError, match=r"The data has 3 classes, .* has 10"):
        score(restored, Examples(X, Y, list("abc")), "test")


def test_inputs_of_a_shape_that_the_network_cannot_take(tmp_path: Path) -> None:
    restored = Restored(torch.nn.Linear(40, 10).eval(), "multiclass", Inputs.of(torch.zeros(1, 40)), {}, None, tmp_path)
    with pytest.raises(LoadError, match=r"inputs of shape \(10,\), .* was trained on \(40,\)"):
        score(restored, Examples(X[:, :10], Y), "test")


def test_views_of_an_example_are_one_example(tmp_path: Path) -> None:
    network = torch.nn.Sequential(torch.nn.Linear(40, 10)).eval()
    restored = Restored(network, "multiclass", Inputs.of(torch.zeros(1, 40)), {}, None, tmp_path)
    views = torch.randn(20, 3, 40)
    [row] = score(restored, Examples(views, Y), "test")
    with torch.inference_mode():
        p = network(views).softmax(-1).mean(1)
    assert row["nll"] == pytest.approx(log_loss(Y, p.numpy(), labels=range(10)), rel=1e-5)


def test_taggers_have_the_metrics_of_tagging(tmp_path: Path) -> None:
    model = ensemblenet.convert(
        ensemblenet.models.MLPTagger(12, 30, [64]), torch.randn(2, 12), task="multilabel"
    ).eval()
    restored = Restored(model, "multilabel", Inputs.of(torch.zeros(1, 12)), {}, None, tmp_path)
    x, y = torch.randn(40, 12), (torch.rand(40, 30) < 0.1).to(torch.int8)
    rows = score(restored, Examples(x, y), "test")
    assert [row["method"] for row in rows] == ["ensemble", "head 0", "head 1"]
    with torch.inference_mode():
        z = model(x, per_head=True)
    for row, some in zip(rows, (z, z[:1], z[1:]), strict=True):
        metrics = TaggingMetrics(30, len(some))
        metrics.update(some, y)
        expected = {key: value.item() for key, value in metrics.compute().items() if not key.startswith("head")}
        assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-5)
    with pytest.raises(LoadError, match="The data has 29 classes"):
        score(restored, Examples(x, y[:, 1:]), "test")
