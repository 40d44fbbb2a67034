"""A trial in two processes: the figures of one with batches twice as large, and what is said where one fails."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from commands import killed_trial
from studies import DATA, trial
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from ensemblenet.study import together
from ensemblenet.study.together import in_processes
from ensemblenet.study.trials import Outcome, run_trial


def sized(batch_size: int) -> dict[str, Any]:
    return DATA | {"init_args": DATA["init_args"] | {"batch_size": batch_size}}


def test_two_processes_train_as_one_with_batches_twice_as_large(tmp_path: Path, one_thread: None) -> None:
    base = trial("test", name="base", method="base")
    taught = trial("test", method="teacher", epochs=3)
    weights = [tmp_path / name for name in ("one", "two")]
    outcomes = []
    for devices, folder in zip((1, 2), weights, strict=True):
        folder.mkdir()
        own = {"base": {"class_path": "networks.Plain"}, "data": sized(40 // devices), "devices": devices}
        outcomes.append(run_trial(replace(taught, teacher=replace(base, **own), **own), folder))
    one, two = outcomes
    assert one["status"] == two["status"] == "done", two
    for name in ("error", "nll", "head_nll", "divergence"):
        assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name
    assert [len(list(folder.iterdir())) for folder in weights] == [1, 1]  # the first process alone kept the teacher


def test_a_process_that_is_killed_is_no_outcome() -> None:
    with pytest.raises(ChildProcessError, match="One of the 2 processes of a trial died, perhaps for want of memory"):
        in_processes(killed_trial, 2, "cpu")


OWN = {"status": "failed", "reason": "TrainingError: the loss is not finite"}
LOST = {"status": "failed", "reason": "RuntimeError: Connection closed by peer"}


@pytest.mark.parametrize(
    ("told", "error", "expected"),
    [
        ([LOST, OWN], ProcessExitedException("", 0, 1, 1), OWN["reason"]),
        ([LOST], ProcessExitedException("", 0, 1, 1), "One of the 2 processes"),
        ([OWN], ProcessExitedException("", 0, 1, -9, "SIGKILL"), "One of the 2 processes"),
        ([LOST], ProcessRaisedException("-- Process 1:\nTraceback\nOSError: no space\n", 1, 1), "OSError: no space"),
    ],
)
def test_a_fault_of_a_trials_own_is_told_from_a_lost_process(
    monkeypatch: pytest.MonkeyPatch, told: list[Outcome], error: Exception, expected: str
) -> None:
    def start(process: Any, arguments: tuple[Any, ...], number: int) -> None:
        for rank, outcome in enumerate(told):
            Path(arguments[-1], f"{rank}.json").write_text(json.dumps(outcome))
        raise error

    monkeypatch.setattr(together, "start_processes", start)
    run = partial(in_processes, killed_trial, 2, "cpu")
    if expected == OWN["reason"]:
        assert run() == OWN
    else:
        with pytest.raises(OSError, match=expected):
            run()
