"""A Slurm job whose time is nearly up goes on, when it is queued again, where it was; Slurm is made up here."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from tiny_runs import weights

from ensemblenet.cli.main import main

OWN_CODE = """
import os
import signal
from lightning.pytorch import Callback


class TimeIsUp(Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 4 and "SLURM_RESTART_COUNT" not in os.environ:  # in the second of three epochs
            os.kill(os.getpid(), signal.SIGUSR1)
"""
FIT = [
    *(
        "fit",
        "mnist1d/ensemblenet",
        "--num-heads",
        "2",
        "--model.heads",
        "looped",
        "--model.base.init_args.width",
        "16",
    ),
    *("--data.init_args.num_train", "120", "--data.init_args.num_val", "20", "--data.init_args.num_test", "40"),
    *("--data.init_args.batch_size", "20", "--trainer.max_epochs", "3", "--trainer.accelerator", "cpu"),
    *("--trainer.accumulate_grad_batches", "2", "--trainer.enable_progress_bar", "false"),
]
SLURM = {
    **{"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "heads", "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1"},
    **{"SLURM_NNODES": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"},
}


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The environment of a Slurm job, with an `scontrol` that notes how it was called."""
    programs, called = tmp_path / "bin", tmp_path / "called"
    programs.mkdir()
    (programs / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {called}\n')
    (programs / "scontrol").chmod(0o755)
    (tmp_path / "own.py").write_text(OWN_CODE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name, value in {**SLURM, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}.items():
        monkeypatch.setenv(name, value)
    return called


def test_a_job_whose_time_is_nearly_up_goes_on_at_its_next_step(
    slurm: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], one_thread: None
) -> None:
    other = Path("hpc_ckpt_1.ckpt")
    other.write_text("what Lightning left of another job")
    assert main([*FIT, "--runs", "whole"]) == 0
    assert main([*FIT, "--runs", "runs", "--trainer.callbacks", "own.TimeIsUp"]) == 143
    [folder] = Path("runs").iterdir()
    assert capsys.readouterr().err.endswith(f"terminated. Go on with `ensemblenet fit --resume {folder}`.\n")
    assert slurm.read_text() == "requeue 4711\n"
    assert list(Path().rglob("hpc_*")) == [other]

    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert main([*FIT, "--runs", "runs", "--trainer.callbacks", "own.TimeIsUp"]) == 0
    assert "It goes on in epoch 2, after 5 steps." in capsys.readouterr().out
    runs = [*Path("whole").iterdir(), *Path("runs").iterdir()]
    whole, again = map(weights, runs)
    assert all(torch.equal(value, again[name]) for name, value in whole.items())
    scores = [json.loads((run / "results.json").read_text())["rows"][0]["test"] for run in runs]
    assert scores[0] == scores[1]


def test_a_job_that_cannot_be_queued_again_says_so(
    slurm: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (slurm.parent / "bin" / "scontrol").write_text("#!/bin/sh\necho no such job >&2\nexit 1\n")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "4700")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "11")
    with pytest.warns(UserWarning, match="`scontrol requeue 4700_11` failed, so the job ends here: no such job"):
        assert main([*FIT, "--runs", "runs", "--trainer.callbacks", "own.TimeIsUp"]) == 143
