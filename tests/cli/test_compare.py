"""The command `compare`: what it prints, going on with other settings, and a user's mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from studies import BASE, DATA, lines

from ensemblenet.cli import main
from ensemblenet.cli.compare import read_study
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
    assert "The base has test error" in printed
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
        (["--methods", "[base, joint, joint]"], "methods has 'joint, λ = 0' twice"),
        (["--tuning.trials", "0"], "tuning.trials must be at least 1, got 0"),
        (["--tuning.lr", "[0.1, 0.01]"], "tuning.lr must be two numbers above 0, the smaller first"),
        (["--split_at", "conv9"], "conv9"),
        (["--budget", "0.001"], "do not fit a budget"),
        (["--base.class_path", "ensemblenet.models.Nothing"], "base: ensemblenet.models.Nothing cannot be made: "),
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
