"""Two processes train as one does on the same global batch; one that dies ends the run; so do two with FSDP2."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from functools import partial

import pytest
import torch
import yaml
from commands import own_environment, run_apart
from made_images import make_folders
from tiny_runs import weights

import ensemblenet
from ensemblenet.cli.main import main
from ensemblenet.models import CifarResNet
from ensemblenet.storage.restore import restore

OWN_CODE = """
import os
import signal
import time
from datetime import timedelta
import torch
from lightning.pytorch import Callback
from torch import nn


class Small(nn.Module):
    def __init__(self, num_classes=3):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.GroupNorm(2, 8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 16, 3, 2), nn.ReLU())
        self.fc = nn.Linear(16, num_classes)

    def forward(self, x):
        return self.fc(self.body(self.stem(x)).mean((2, 3)))


class Killed(Callback):
    rank = 1

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_rank == self.rank and trainer.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)


class FirstKilled(Killed):
    rank = 0


class Busy(Killed):
    # as a GPU's: what the first process waits for says nothing
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        super().on_train_batch_start(trainer, module, batch, batch_idx)
        if trainer.global_step == 3:
            time.sleep(60)


class Stops(Callback):
    def on_train_start(self, trainer, module):
        # shorter than it may take until both have begun
        torch.distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=2))

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_rank == 1 and trainer.global_step == 3:
            os.kill(os.getpid(), signal.SIGSTOP)


class Fails(Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_rank == 0 and trainer.global_step == 3:
            raise ValueError("the first process fails")
"""

MODEL_PARALLEL = json.dumps({"class_path": "lightning.pytorch.strategies.ModelParallelStrategy"})
TWO = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]


def make(folder, batch_size, trainer=()):
    """A run of 2 epochs of 5 steps on 21 images; 14 images to validate and test on."""
    if not (folder / "images").exists():
        (folder / "own.py").write_text(OWN_CODE)
        make_folders(folder / "images", train=7, val=5)
        (folder / "images" / "val" / "cat" / "104.png").unlink()
    settings = {
        "name": "tiny",
        "model": {
            "base": {"class_path": "own.Small"},
            "conversion": {"num_heads": 2, "budget": 1.0},
            "heads": "looped",
            "optimization": {"optimizer": "sgd", "lr": 0.1},
        },
        "data": {
            "class_path": "ensemblenet.data.ImageData",
            "init_args": {
                "folder": str(folder / "images"),
                "image_size": 16,
                "batch_size": batch_size,
                "eval_batch_size": 3,
                "num_workers": 0,
            },
        },
        "trainer": {
            "max_epochs": 2,
            "accelerator": "cpu",
            "devices": 1,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            **dict(trainer),
        },
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return ["--config", str(path), "--runs", str(folder / "runs")]


def start(folder, arguments, launch=("-m", "ensemblenet")):
    free = socket.socket()
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
    free.close()
    done = subprocess.run(
        [sys.executable, *(part.format(port=port) for part in launch), "fit", *arguments],
        env=own_environment(folder),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
    )
    return done


def logged(folder):
    """What the run logged, by column."""
    [path] = folder.glob("csv/version_*/metrics.csv")
    header, *lines = (line.split(",") for line in path.read_text().splitlines())
    return {
        name: [float(line[place]) for line in lines if line[place]]
        for place, name in enumerate(header)
        if name.startswith(("train/", "val/", "test/"))
    }


def taught(folder):
    """Images that repeat, and a teacher whose logits are stored: each process works out its share."""
    torch.manual_seed(0)
    teacher = ensemblenet.convert(CifarResNet(depth=8, num_classes=3), torch.randn(4, 3, 16, 16), budget=2.0)
    ensemblenet.save(teacher, folder / "teacher")
    return ["--teacher", str(folder / "teacher"), "--data.init_args.augmentation", "{no_aug: true}"]


@pytest.mark.parametrize(
    ("launch", "options"),
    [
        (("-m", "ensemblenet"), lambda folder: []),
        (("-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port={port}", "-m", "ensemblenet"), taught),
    ],
    ids=["lightning", "torchrun and a teacher"],
)
def test_two_processes_train_as_one_does(tmp_path, monkeypatch, launch, options):
    more = options(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    alone = run_apart(tmp_path / "printed", main, ["fit", *make(tmp_path, batch_size=4), *more])
    assert alone.code == 0, alone.stderr
    assert ("It ran once for each of 21 training examples" in alone.stdout) == bool(more)
    [one] = (tmp_path / "runs").iterdir()

    done = start(tmp_path, [*make(tmp_path, batch_size=2), *TWO, "--name", "two", *more], launch)
    assert done.returncode == 0, done.stderr
    [two] = set((tmp_path / "runs").iterdir()) - {one}  # one folder for both processes

    assert done.stdout.count("Results and logs") == 1
    for name, tensor in weights(one).items():
        torch.testing.assert_close(tensor, weights(two)[name], rtol=1e-4, atol=1e-5)
    columns = logged(one), logged(two)
    assert columns[0].keys() == columns[1].keys()
    assert len(columns[0]["train/loss"]) == 10
    for name, values in columns[0].items():
        assert values == pytest.approx(columns[1][name], rel=1e-3, abs=1e-4), name
    rows = [json.loads((run / "results.json").read_text())["rows"][0] for run in (one, two)]
    assert rows[0]["test"]["accuracy"] == rows[1]["test"]["accuracy"]
    hits = 14 * rows[1]["test"]["accuracy"]  # of 14 images, none twice
    assert hits == pytest.approx(round(hits), abs=1e-4)


@pytest.mark.parametrize(
    ("callback", "which"),
    [
        ("Killed", "number 1 was killed by SIGKILL."),
        ("Busy", "number 1 was killed by SIGKILL."),
        ("FirstKilled", "the first one."),
        ("Fails", None),
    ],
)
def test_a_process_that_dies_ends_the_run(tmp_path, callback, which):
    # a run that hangs meets the time limit of `start`
    more = ["--checkpoint_steps", "1", "--trainer.callbacks", f"own.{callback}"]
    done = start(tmp_path, [*make(tmp_path, batch_size=2), *TWO, *more])
    assert done.returncode == {"FirstKilled": -signal.SIGKILL, "Fails": 1}.get(callback, 2), done.stderr
    [folder] = (tmp_path / "runs").iterdir()
    if which is None:
        assert "the first process fails" in done.stderr
    else:
        said = [line for line in done.stderr.splitlines() if line.startswith("ensemblenet fit: ")]
        assert said == [
            f"ensemblenet fit: Another process of the run has ended: {which} "
            f"Go on with `ensemblenet fit --resume {folder}`."
        ]
        assert "Traceback" not in done.stderr
    assert not (folder / "results.json").exists()


LATE = """
import os, sys, time
from pathlib import Path
from ensemblenet.training.processes import ending_together
with ending_together(None, lambda: None):
    Path(sys.argv[1]).touch()
    time.sleep(0.5)
    raise RuntimeError("Connection reset by peer")
"""
FIRST = """
import subprocess, sys, time
from pathlib import Path
subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2]])
while not Path(sys.argv[2]).exists():
    time.sleep(0.05)
time.sleep(1.5)
"""


def test_a_process_whose_death_shows_late_is_named(tmp_path):
    # a dying process closes its connections before the system ends it, and then those who waited for it look
    environment = {**own_environment(tmp_path), "LOCAL_RANK": "1"}
    told = subprocess.run(
        [sys.executable, "-c", FIRST, LATE, tmp_path / "begun"], env=environment, capture_output=True, text=True
    )
    assert "TrainingError: Another process of the run has ended: the first one." in told.stderr


def test_a_process_that_stands_still_ends_the_run_after_the_time_limit(tmp_path):
    done = start(tmp_path, [*make(tmp_path, batch_size=2), *TWO, "--trainer.callbacks", "own.Stops"])
    assert done.returncode == 2, done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("ensemblenet fit: Another process of the run has ended, or does not answer: ")
    assert "Timed out" in line


def test_sharded_processes_train_as_one_does_also_where_one_was_killed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    alone = run_apart(tmp_path / "printed", main, ["fit", *make(tmp_path, batch_size=4)])
    assert alone.code == 0, alone.stderr
    [one] = (tmp_path / "runs").iterdir()

    sharded = ["--trainer.devices", "2", "--trainer.strategy", "fsdp2", "--checkpoint_steps", "1"]
    killed = [*sharded, "--name", "two", "--trainer.callbacks", "own.Killed"]
    assert start(tmp_path, [*make(tmp_path, batch_size=2), *killed]).returncode == 2
    [two] = set((tmp_path / "runs").iterdir()) - {one}
    done = start(tmp_path, ["--resume", str(two), "--trust", "--trainer.callbacks", "null"])
    assert done.returncode == 0, done.stderr
    assert "It goes on in epoch 1, after 3 steps." in done.stdout
    assert "FSDP2-wrapped" not in done.stderr

    checkpoints = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (one, two)]
    same = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)
    for name, tensor in checkpoints[0]["state_dict"].items():
        same(checkpoints[1]["state_dict"][name], tensor)
        same(restore(two, trust=True).network.state_dict()[name.removeprefix("network.")], tensor)
    states = [checkpoint["optimizer_states"][0]["state"] for checkpoint in checkpoints]  # another strategy may go on
    for number, state in states[0].items():
        same(states[1][number]["momentum_buffer"], state["momentum_buffer"])
    rows = [json.loads((run / "results.json").read_text())["rows"][0] for run in (one, two)]
    assert rows[0]["test"] == pytest.approx(rows[1]["test"], rel=1e-3, abs=1e-4)
    assert rows[0]["parameters"] == rows[1]["parameters"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--trainer.strategy", "fsdp2", "--ema", "0.9"],
            "ema works on whole networks, not with trainer.strategy fsdp",
        ),
        (["--trainer.strategy", "fsdp2", "--trainer.sync_batchnorm", "true"], "sync_batchnorm works on whole networks"),
        (["--trainer.strategy", "fsdp"], "trainer.strategy fsdp: fit shards by FSDP2; use --trainer.strategy fsdp2."),
        (
            ["--trainer.strategy", MODEL_PARALLEL],
            "trainer.strategy ModelParallelStrategy: fit shards by FSDP2; use --tr",
        ),
    ],
)
def test_other_ways_to_shard_are_refused(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["fit", *make(tmp_path, batch_size=2), *options]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not list((tmp_path / "runs").glob("*"))
