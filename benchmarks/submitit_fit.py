"""Runs of `fit` as jobs of submitit, by its executor without Slurm: one is told that its time is up, and goes on.

python benchmarks/submitit_fit.py --folder FOLDER
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import submitit
import torch
from submitit.helpers import DelayedSubmission

from ensemblenet.cli import main as ensemblenet

FIT = [
    *("fit", "mnist1d/ensemblenet", "--data.init_args.num_train", "2000", "--data.init_args.num_val", "500"),
    *("--data.init_args.num_test", "500", "--trainer.max_epochs", "12", "--trainer.accelerator", "cpu"),
    *(
        "--model.heads",
        "looped",
        "--trainer.enable_progress_bar",
        "false",
        "--resume",
        "auto",
        "--checkpoint_steps",
        "10",
    ),
]


class Command:
    """A command of ensemblenet that is queued again when the time of its job is up."""

    def __call__(self, arguments: list[str]) -> int:
        """Run it on one thread."""
        torch.set_num_threads(1)
        return ensemblenet(arguments)

    def checkpoint(self, arguments: list[str]) -> DelayedSubmission:
        """What submitit queues instead: the same, as `--resume auto` finds the unfinished run."""
        return DelayedSubmission(self, arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    folder = parser.parse_args().folder
    executor = submitit.AutoExecutor(folder=folder / "jobs", cluster="local")
    executor.update_parameters(timeout_min=10)
    runs = folder / "runs"

    def submitted(name: str) -> Any:
        return executor.submit(Command(), [*FIT, "--runs", str(runs), "--name", name])

    assert submitted("whole").result() == 0
    job = submitted("interrupted")
    while not list(runs.glob("interrupted-*/checkpoints/last.ckpt")):
        time.sleep(0.1)
    [task] = Path(f"/proc/{job.job_id}/task/{job.job_id}/children").read_text().split()
    os.kill(int(task), signal.SIGUSR2)  # as Slurm does for submitit when time is nearly up
    assert job.result() == 0
    [whole], [interrupted] = runs.glob("whole-*"), runs.glob("interrupted-*")
    states = [
        torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for run in (whole, interrupted)
    ]
    scores = [json.loads((run / "results.json").read_text())["rows"][0]["test"] for run in (whole, interrupted)]
    said = [line for line in job.stdout().splitlines() if line.startswith("It goes on")]
    same = scores[0] == scores[1] and all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    print(json.dumps({"it_said": said, "same_weights_and_scores": same}))


if __name__ == "__main__":
    main()
