"""The command `fit`: its help, its short names, and what it says of names that it does not know."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from studies import BASE, DATA
from torch import Tensor, nn

from ensemblenet.cli import main


@pytest.fixture
def config(tmp_path: Path, one_thread: None) -> Path:
    path = tmp_path / "tiny.yaml"
    settings = {
        "name": "tiny",
        "runs": str(tmp_path / "runs"),
        "model": {"base": BASE, "heads": "looped"},
        "data": DATA,
        "trainer": {"max_epochs": 1, "enable_progress_bar": False},
    }
    path.write_text(yaml.safe_dump(settings))
    return path


def test_a_file_needs_no_option_and_short_names_are_those_of_other_commands(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ["--num-heads", "3", "--budget", "macs=0.9,time=9", "--weight=1.5", "--epochs", "0", "--device", "cpu"]
    short += ["--split_at", "input", "--min-width", "0.1", "--seed", "7", "--model.label-smoothing", "0.1"]
    short += ["--shape", "narrow", "--lr", "0.02", "--batch-size", "9", "--warmup=0.2", "--precision", "bf16-mixed"]
    assert main(["fit", str(config), *short]) == 0
    [run] = (tmp_path / "runs").iterdir()
    stored = yaml.safe_load((run / "config.yaml").read_text())
    conversion = stored["model"]["conversion"]
    assert [conversion[name] for name in ("num_heads", "split_at", "min_width")] == [3, "input", 0.1]
    assert conversion["budget"] == {"parameters": 1.0, "macs": 0.9, "activations": None, "time": 9.0, "measured": False}
    assert (stored["model"]["codistillation_weight"], stored["model"]["label_smoothing"]) == (1.5, 0.1)
    assert (stored["seed_everything"], stored["trainer"]["max_epochs"]) == (7, 0)
    assert [stored["trainer"][name] for name in ("accelerator", "precision")] == ["cpu", "bf16-mixed"]
    assert [stored["model"]["optimization"][name] for name in ("lr", "warmup")] == [0.02, 0.2]
    assert (conversion["shape"], stored["data"]["init_args"]["batch_size"]) == ("narrow", 9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.optimization.lrr", "1"], "no setting model.optimization.lrr. Did you mean model.optimization.lr?"),
        (["--model.conversion.num_head", "2"], "model.conversion.num_head. Did you mean model.conversion.num_heads?"),
        (["--model.base.widht", "2"], "MNIST1DNet takes no widht. Did you mean width?"),
        (["--data.init_args.batchsize", "2"], "MNIST1D takes no batchsize. Did you mean batch_size?"),
        (["--data", "ensemblenet.data.MNIST2D"], "ensemblenet.data has no MNIST2D. Did you mean MNIST1D?"),
        (["--model.base", "MNIST1DNett"], "there is no class 'MNIST1DNett'. Did you mean MNIST1DNet?"),
        (["--trainer.callbacks+=EarlyStoping"], "there is no class 'EarlyStoping'. Did you mean EarlyStopping?"),
        (["--budget", "95"], "--budget: budget is a share of the base's cost, got 95: did you mean 0.95?"),
        (["--model.conversion.budget", "95"], "did you mean 0.95?"),
        (["--num-heads"], "--num-heads needs a value."),
        (["--epoch", "3"], "There is no setting epoch. Did you mean epochs?"),
        (["--batchsize", "3"], "There is no setting batchsize. Did you mean batch_size?"),
        (["--lr", "nan"], "model.optimization.lr must be a number; got nan."),
        (["--plan", "serch"], "plan must be one of 'given', 'search'; got serch."),
    ],
)
def test_a_misspelt_name_is_one_line_with_what_was_meant(
    arguments: list[str], message: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", str(config), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ({"trainer": {"max_epoch": 1}}, "trainer.max_epochs"),
        ({"model": {"optimisation": {"lr": 0.1}}}, "model.optimization"),
        ({"modle": {"task": "multilabel"}}, "model"),
    ],
)
def test_so_is_a_misspelt_key_of_a_file(
    wrong: dict[str, object], right: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | wrong))
    assert main(["fit", str(config)]) == 2
    assert f"Did you mean {right}" in capsys.readouterr().err


def test_the_help_has_the_settings_that_matter_and_all_the_rest_on_demand(capsys: pytest.CaptureFixture[str]) -> None:
    for more in ([], ["all"]):
        with pytest.raises(SystemExit) as exit_:
            main(["fit", "--help", *more])
        assert exit_.value.code == 0
    short, named, whole = capsys.readouterr().out.split("usage: ")[1:]
    assert short.count("\n  -") == 20
    assert short.count("\n") < 45  # a screenful or so, of over a thousand lines
    for option in ("--num-heads", "--budget", "--data FOLDER", "--weight", "--help all"):
        assert option in short
    for option in ("--min-width", "--engine", "--trust"):
        assert option not in short
        assert option in named
    assert "--trainer.limit_test_batches" not in short
    assert "--trainer.limit_test_batches" in whole


@pytest.mark.parametrize(
    ("limit", "mark"), [("2", "2 batches of the test data"), ("0.5", "0.5 of the test data"), ("1.0", None)]
)
def test_a_test_of_some_batches_is_marked(
    config: Path, tmp_path: Path, limit: str, mark: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    limited = ["--trainer.limit_test_batches", limit, "--data.init_args.num_test", "3000", "--epochs", "0"]
    assert main(["fit", str(config), *limited]) == 0
    [run] = (tmp_path / "runs").iterdir()
    [row] = json.loads((run / "results.json").read_text())["rows"]
    assert row.get("tested_on") == mark
    assert f"tested on {mark or 'the test data'}" in " ".join(capsys.readouterr().out.split())


def test_what_the_conversion_is_and_costs_is_said(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", str(config), "--num-heads", "2", "--split-at", "input"]) == 0
    assert "Split at 'input': 2 heads of width 0." in (said := capsys.readouterr().out)
    assert " and depth " in said
    assert "of the base's parameters" in said


class Soft(nn.Module):
    """A base that ends in a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(40, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).softmax(-1)


class Tags(Soft):
    """A base that ends in a sigmoid."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).sigmoid()


class OneNumber(Soft):
    """A base of regression."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)[:, 0]


@pytest.mark.parametrize("heads", [[], ["--num-heads", "2"]])
@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("Soft", "leave the softmax out of the base"),
        ("Tags", "leave the sigmoid out of the base"),
        ("OneNumber", "one number an example, (N,)"),
    ],
)
def test_outputs_that_are_no_logits_are_refused_with_what_to_do(
    base: str, message: str, heads: list[str], config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = yaml.safe_load(config.read_text())
    settings["model"]["base"] = {"class_path": f"{__name__}.{base}"}
    config.write_text(yaml.safe_dump(settings))
    assert main(["fit", str(config), *heads]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_resume_auto_finds_a_run_whose_name_has_a_folder(config: Path, tmp_path: Path) -> None:
    named = ["--name", "group/tiny", "--resume", "auto"]
    assert main(["fit", str(config), *named, "--epochs", "1"]) == 0
    [run] = (tmp_path / "runs" / "group").iterdir()
    (run / "results.json").unlink()  # as if it was killed
    assert main(["fit", str(config), *named, "--epochs", "1"]) == 0
    assert [run] == list((tmp_path / "runs" / "group").iterdir())
