"""`fit` from a configuration: run folders, exact resume after a kill, non-finite losses, bad input."""

from __future__ import annotations

import json
import signal
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from commands import run_apart

import ensemblenet
from ensemblenet.cli.main import main
from ensemblenet.errors import TrainingError
from ensemblenet.models import MNIST1DNet
from ensemblenet.storage.runs import environment
from ensemblenet.training import loggers
from ensemblenet.training.fit import fit

CUSTOM_CODE = """
import os
import signal
from pathlib import Path

import torch
from lightning.pytorch import Callback
from torch import nn


class KilledOnce(Callback):
    # in the second epoch of 5 batches; not again when the run goes on

    def on_train_batch_start(self, trainer, module, *rest):
        done = Path(__file__).with_name("was_killed")
        if trainer.global_step == 8 and not done.exists():
            done.touch()
            os.kill(os.getpid(), signal.SIGKILL)


class Dropping(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(40, width), nn.Dropout(0.5), nn.ReLU(), nn.Linear(width, 10))

    def forward(self, x):
        return self.layers(x)


class Breaking(Dropping):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x):
        self.calls += self.training
        return super().forward(x) / (self.calls < 8)
"""


@pytest.fixture
def config(tmp_path, monkeypatch, one_thread) -> Path:
    """A configuration of a tiny run, in a folder that also holds the user's own module."""
    (tmp_path / "mine.py").write_text(CUSTOM_CODE)
    monkeypatch.syspath_prepend(tmp_path)
    settings = {
        "name": "tiny",
        "seed_everything": 3,
        "model": {
            "base": {"class_path": "ensemblenet.models.MNIST1DNet", "init_args": {"width": 8}},
            "conversion": {"num_heads": 2, "budget": 1.0},
            "heads": "fused",  # which of them is faster is nothing to rely on
        },
        "data": {
            "class_path": "ensemblenet.data.MNIST1D",
            "init_args": {"num_train": 100, "num_val": 20, "num_test": 50, "batch_size": 20},
        },
        "trainer": {"max_epochs": 2, "accelerator": "cpu", "log_every_n_steps": 1},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def options(config: Path, runs: str = "runs", **more: str) -> list[str]:
    named = [part for name, value in more.items() for part in (f"--{name.replace('__', '.')}", value)]
    return ["--config", str(config), "--runs", str(config.parent / runs), *named]


def checkpoint(folder: Path) -> dict:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def test_a_run_leaves_config_environment_logs_results_and_model(config):
    folder = fit(options(config))

    [row] = json.loads((folder / "results.json").read_text())["rows"]
    base = MNIST1DNet(width=8)
    assert row["method"] == "ensemblenet"
    assert row["num_heads"] == 2
    assert row["parameters"] <= sum(parameter.numel() for parameter in base.parameters())
    assert 0 <= row["error_mean"] <= 100
    assert row["seeds"] == 1
    assert json.loads((folder / "environment.json").read_text())["packages"]["torch"] == version("torch")
    assert yaml.safe_load((folder / "config.yaml").read_text())["seed_everything"] == 3
    assert list((folder / "tensorboard").glob("events*"))
    header = (folder / "csv" / "version_0" / "metrics.csv").read_text().splitlines()[0]
    for column in ("train/loss", "train/divergence", "val/divergence", "val/accuracy", "val/head_accuracy_1"):
        assert column in header

    trained = checkpoint(folder)["state_dict"]
    loaded = ensemblenet.load(folder / "model")
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, trained[f"network.{name}"])


def test_the_base_alone_goes_the_same_way(config):
    folder = fit([*options(config), "--model.conversion", "null", "--trainer.max_epochs", "1"])

    [row] = json.loads((folder / "results.json").read_text())["rows"]
    assert row["method"] == "base"
    assert row["head_error_mean"] == row["error_mean"]
    assert row["parameters"] == sum(parameter.numel() for parameter in MNIST1DNet(width=8).parameters())


def test_runs_never_overwrite_one_another(config):
    folders = {fit(options(config, trainer__max_epochs="1")) for _ in range(2)}
    assert len(folders) == 2


def test_a_killed_run_resumes_to_the_same_weights(config):
    custom = [*options(config, model__base="mine.Dropping", trainer__max_epochs="5")]
    whole = fit(custom)

    killed_options = [*options(config, runs="killed", model__base="mine.Dropping", trainer__max_epochs="5")]
    arguments = ["fit", *killed_options, "--trainer.callbacks", "mine.KilledOnce"]
    killed = run_apart(config.parent / "printed", main, arguments)
    assert killed.code == -signal.SIGKILL, killed.stderr
    [folder] = (config.parent / "killed").iterdir()
    assert not (folder / "results.json").exists()
    assert checkpoint(folder)["global_step"] == 5  # the end of the first epoch

    assert fit(["--resume", str(folder), "--trust"]) == folder

    assert checkpoint(folder)["global_step"] == checkpoint(whole)["global_step"]
    for name, tensor in checkpoint(whole)["state_dict"].items():
        assert torch.equal(tensor, checkpoint(folder)["state_dict"][name]), name
    rows = [json.loads((run / "results.json").read_text())["rows"] for run in (whole, folder)]
    assert rows[0] == rows[1]


def test_auto_resumes_the_newest_unfinished_run_or_starts_one(config):
    first = fit(options(config, resume="auto", trainer__max_epochs="1"))
    (first / "results.json").unlink()
    assert fit(options(config, resume="auto", trainer__max_epochs="2")) == first
    assert checkpoint(first)["epoch"] == 1
    assert fit(options(config, resume="auto", trainer__max_epochs="1")) != first


def test_a_loss_that_becomes_non_finite_stops_the_run_and_keeps_the_last_good_checkpoint(config):
    # 5 batches an epoch: the eighth call is batch 2 of epoch 1.
    with pytest.raises(
        TrainingError,
        match=r"The loss became (nan|inf) at step 7 \(epoch 1, batch 2\) with .*rate 0\.0.* good checkpoint is kept",
    ):
        fit([*options(config, model__base="mine.Breaking"), "--model.conversion", "null"])

    [folder] = (config.parent / "runs").iterdir()
    saved = checkpoint(folder)
    assert saved["epoch"] == 0
    assert all(tensor.isfinite().all() for tensor in saved["state_dict"].values())
    assert not (folder / "results.json").exists()


def test_a_loss_that_is_not_finite_at_the_first_step_promises_no_checkpoint(config, monkeypatch):
    monkeypatch.setattr("ensemblenet.losses.CoDistillationLoss.forward", lambda self, z, *_: z.sum() * float("nan"))
    with pytest.raises(TrainingError, match=r"The loss became nan at step 0 .*There is no checkpoint yet\. Lower"):
        fit(options(config))


def test_weights_that_become_non_finite_do_not_reach_the_checkpoint(config, monkeypatch):
    from ensemblenet.training.module import Classifier

    def break_weights(self, *arguments):
        if self.current_epoch == 1:
            next(self.network.parameters()).data.fill_(float("inf"))

    monkeypatch.setattr(Classifier, "on_train_batch_end", break_weights)
    monkeypatch.setattr(Classifier, "training_step", lambda self, batch, i: self.network(batch[0]).square().mean())
    with pytest.raises(TrainingError, match=r"The weights .* became non-finite at step 10 \(epoch 1\)"):
        fit(options(config))
    [folder] = (config.parent / "runs").iterdir()
    assert checkpoint(folder)["epoch"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume", "nowhere"], "nowhere has no config.yaml, so nothing there can go on"),
        (["--no-such-option", "1"], "no-such-option"),
        (["--model.optimization.lr", "-1"], "lr must be above 0, got -1"),
        (["--data.init_args.batch_size", "0"], "1 <= batch_size <= num_train"),
        (["--model.base", "no.such.Network"], "no.such.Network"),
    ],
)
def test_bad_arguments(config, arguments, message):
    with pytest.raises(ensemblenet.EnsembleNetError) as caught:
        fit([*options(config), *arguments])
    assert message in str(caught.value)


def test_a_finished_run_is_not_resumed(config):
    folder = fit(options(config, trainer__max_epochs="1"))
    with pytest.raises(TrainingError, match=r"is finished: it has results.json"):
        fit(["--resume", str(folder)])


def test_what_a_run_says(config, capfd):
    folder = fit(options(config, trainer__max_epochs="1"))
    printed, errors = capfd.readouterr()
    lines = printed.splitlines()
    assert f"Run folder: {folder}" in lines
    assert any(line.startswith("The heads run ") for line in lines)
    for noise in ("GPU available", "litlogger", "Seed set", "deprecated"):
        assert noise not in printed + errors


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data", "nowhere"], "Option 'folder' is not accepted"),
        (["--data=nowhere"], "data: ensemblenet.data.MNIST1D cannot be made: Option 'folder' is not accepted"),
        (["--resume"], "--resume: expected one argument"),
        (
            ["--model.conversion.num_hedas", "3"],
            "no setting model.conversion.num_hedas. Did you mean model.conversion.num_heads?",
        ),
        (["--model.conversion.num_heads", "x"], 'num_heads must be an integer of at least 1, or "auto", got'),
        (["--trainer.devices", "0"], "devices='0'"),
    ],
)
def test_a_wrong_option_is_one_short_line(config, capsys, more, message):
    assert main(["fit", *options(config), *more]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line
    assert "Union" not in line


def test_fit_without_a_file(capsys):
    assert main(["fit"]) == 2
    assert "A configuration is needed: a YAML file, or a name in" in capsys.readouterr().err


def test_the_environment_names_no_folders(monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["/opt/bin/ensemblenet", "fit", "--data=/home/me/photos", "--runs", "/home/me/runs"]
    )
    assert environment()["command"] == "ensemblenet fit --data=photos --runs runs"


def test_a_resumed_run_goes_on_in_mlflow(tmp_path, monkeypatch):
    asked = []

    def logger(name, **options):
        asked.append(options)
        return SimpleNamespace(run_id="17")

    monkeypatch.setattr(loggers, "MLFlowLogger", logger)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for _ in range(2):
        loggers._mlflow(tmp_path)
    assert [options["run_id"] for options in asked] == [None, "17"]
    assert asked[0]["tracking_uri"] == f"sqlite:///{tmp_path / 'mlflow.db'}"
