"""The command `compare`: what it prints, going on with other settings, and a user's mistakes."""

from __future__ import annotations

import html
import json
from pathlib import Path

import pytest
import yaml
from safetensors.torch import save_file
from studies import BASE, DATA, lines

from ensemblenet.cli import main
from ensemblenet.cli.compare import read_study
from ensemblenet.cost import Budget
from ensemblenet.models import create
from ensemblenet.study.methods import METHODS

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "compare").glob("*.yaml"))


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    settings = {
        "name": "tiny",
        "base": BASE,
        "data": DATA,
        "methods": ["base", {"method": "codistillation", "name": "ours"}],
        "num_heads": 2,
        "epochs": 1,
        "seeds": 2,
        "tuning": {"trials": 1, "lr": [0.01, 0.02]},
    }
    path.write_text(yaml.safe_dump(settings))
    return path


def test_the_command_runs_and_goes_on_with_other_settings(
    tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = tmp_path / "runs"
    assert main(["compare", "--config", str(config), "--runs", str(runs), "--workers", "0"]) == 0
    [folder] = runs.iterdir()
    printed = capsys.readouterr().out
    assert folder.name.startswith("tiny-")
    assert "at no more than the base's cost" in printed
    assert "--resume" in printed
    assert len(lines(folder)) == 2 * (1 + 2)
    assert json.loads((folder / "environment.json").read_text())["cpus"]

    before = (folder / "cells.jsonl").read_text()
    assert main(["compare", "--resume", str(folder), "--seeds", "3", "--workers", "0"]) == 0
    assert (folder / "cells.jsonl").read_text().startswith(before)
    assert len(lines(folder)) == 2 * (1 + 3)
    assert json.loads((folder / "results.json").read_text())["rows"][1]["seeds"] == 3
    assert list(runs.iterdir()) == [folder]
    assert yaml.safe_load((folder / "config.yaml").read_text())["seeds"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "missing.yaml"], "missing.yaml"),
        (
            ["--resume", "missing"],
            "missing has no config.yaml, so nothing there can go on: give --resume a folder under runs/.",
        ),
        (["--methods", "[codistillation]"], "methods must begin with base"),
        (["--methods", "[base, nothing]"], "methods must be among base, narrow,"),
        (["--methods", "nothing"], "deep_ensemble_of_bases; got 'nothing'."),
        (["--methods=base,codistilation"], "got 'codistilation'. Did you mean codistillation?"),
        (["--methods", "[base, joint, joint]"], "methods has 'joint, λ = 0' twice"),
        (["--tuning.trials", "0"], "tuning.trials must be at least 1, got 0"),
        (["--tuning.lr", "[0.1, 0.01]"], "tuning.lr must be two numbers above 0, the smaller first"),
        (["--split_at", "conv9"], "conv9"),
        (["--budget", "0.001"], "do not fit a budget"),
        (["--base.class_path", "ensemblenet.models.Nothing"], "base.class_path: ensemblenet.models has no Nothing."),
        (["--data.init_args.batch_size", "100"], "MNIST1D needs 1 <= batch_size <= num_train"),
        (["--workers", "-1"], "--workers must be at least 0, got -1"),
        (["--seeds", "0"], "seeds must be at least 1, got 0"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--config", str(config)] if arguments[0] != "--resume" else []
    assert main(["compare", *given, "--runs", str(tmp_path / "runs"), "--workers", "0", *arguments]) == 2
    captured = capsys.readouterr().err
    assert captured.startswith("ensemblenet compare: ")
    assert captured.count("\n") == 1
    assert message in captured


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_a_shipped_config_makes_a_study(path: Path) -> None:
    study = read_study(["--config", str(path)])[0]
    assert next(iter(study.candidates())) == "base"
    assert any(METHODS[one.method].several for one in study.candidates().values())
    assert study.seeds >= 3


def test_a_configuration_of_fit_is_compared_with_its_base(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], one_thread: None
) -> None:
    settings = {
        "name": "mine",
        "model": {
            "base": BASE,
            "conversion": {"num_heads": 3, "budget": 0.9},
            "codistillation_weight": 1.5,
            "label_smoothing": 0.1,
            "optimization": {"lr": 0.03, "weight_decay": 0.3, "warmup": 0.2},
        },
        "data": DATA,
        "trainer": {"max_epochs": 7, "precision": "bf16-mixed", "gradient_clip_val": 1.0},
    }
    path = tmp_path / "fit.yaml"
    path.write_text(yaml.safe_dump(settings))
    study, plain = read_study([str(path), "--budget", "macs=0.8", "--tuning.trials", "1", "--min-width", "0.2"])
    assert [(name, one.setup.weight) for name, one in study.candidates().items()] == [
        ("base", 1.5),
        ("co-distillation, λ = 1.5", 1.5),
    ]
    assert (study.num_heads, study.budget, study.min_width, study.epochs) == (3, Budget(macs=0.8), 0.2, 7)
    assert (study.precision, plain["name"]) == ("bf16", "compare-mine")
    assert study.tuning.trials == 1
    assert (*study.tuning.lr, *study.tuning.weight_decay) == pytest.approx((0.01, 0.09, 0.1, 0.9))
    printed = capsys.readouterr().out
    assert "no model.label_smoothing, trainer.gradient_clip_val" in printed
    assert study.warmup == 0.2

    more = [
        "--methods",
        "[base, joint]",
        "--epochs",
        "1",
        "--seeds",
        "1",
        "--workers",
        "0",
        "--runs",
        str(tmp_path / "runs"),
    ]
    assert main(["compare", "--config", str(path), "--tuning.trials=1", *more]) == 0
    [folder] = (tmp_path / "runs").iterdir()
    rows = json.loads((folder / "results.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["base", "joint, λ = 0"]
    assert read_study(["--resume", str(folder)])[0].epochs == 1


FINETUNE = sorted((Path(__file__).parents[2] / "configs" / "finetune").glob("*.yaml"))


@pytest.mark.parametrize("path", FINETUNE, ids=[path.stem for path in FINETUNE])
def test_a_configuration_for_a_trained_base_is_done_as_it_says(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.pth").touch()
    options = ["--data", str(tmp_path), "--weights", str(tmp_path / "a.pth"), "--num-classes", "7"]
    study, _ = read_study([str(path), *options])
    wanted = yaml.safe_load(path.read_text())["model"]["optimization"]
    one = study.candidates()["co-distillation, λ = 2"].setup.conversion
    assert (one.init, one.num_classes, study.base["init_args"]["weights"]) == ("inherit", 7, str(tmp_path / "a.pth"))
    points = study.optimization(1.0, 0.5)
    assert (points.warmup, points.layer_decay) == (wanted["warmup"], wanted["layer_decay"])
    assert "A study has no" not in capsys.readouterr().out
    frozen = read_study([str(path), *options, "--freeze", "trunk"])[0].candidates()
    assert [candidate.setup.conversion.freeze for candidate in frozen.values()] == ["trunk", "trunk"]


def test_one_command_says_whether_a_trained_base_gained(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "base.safetensors"
    name = "ensemblenet.models:MNIST1DNet"
    save_file(create(name, options={"width": 8}).state_dict(), weights)
    settings = yaml.safe_load(config.read_text()) | {
        "base": {"class_path": "ensemblenet.models.create", "init_args": {"name": name, "options": {"width": 8}}}
    }
    config.write_text(yaml.safe_dump(settings))
    given = ["compare", str(config), "--workers", "0", "--seeds", "1", "--runs", str(tmp_path / "runs")]
    assert main([*given, "--weights", str(weights)]) == 0
    said = f"The base begins with the weights {weights} and is trained on; the others inherit them."
    assert said in capsys.readouterr().out
    [folder] = (tmp_path / "runs").iterdir()
    assert said in html.unescape((folder / "index.html").read_text())
    stored = [line["cell"] for line in lines(folder)]
    assert {cell["base"]["init_args"]["weights"] for cell in stored} == {str(weights)}
    assert {cell["setup"]["conversion"]["init"] for cell in stored} == {"inherit"}

    assert main([*given, "--weights", str(tmp_path / "none.pth")]) == 2
    assert "none.pth: No such file or directory" in capsys.readouterr().err
    assert main([*given, "--freeze", "trunk"]) == 2  # of what is not trained
    assert "is for a trunk that has learned: use --init inherit" in capsys.readouterr().err


def test_the_folder_of_the_data_and_misspelt_settings(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(config), "--data", str(config.parent)]) == 2  # MNIST-1D has none
    assert "'folder' is not accepted" in capsys.readouterr().err
    assert main(["compare", str(config), "--tuning.trails", "3"]) == 2
    assert "Did you mean tuning.trials?" in capsys.readouterr().err
    assert main(["compare", str(config), "--budget", "95"]) == 2
    assert "did you mean 0.95?" in capsys.readouterr().err
