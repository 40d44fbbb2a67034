"""One trial: what it depends on, what it reads, what it measures, and workers that run several."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from made_images import make_folders
from studies import trial
from torch import nn

from ensemblenet.cost import Budget
from ensemblenet.data import MNIST1D
from ensemblenet.errors import TrainingError
from ensemblenet.recipe import Conversion
from ensemblenet.study import trials as trials_module
from ensemblenet.study.methods import METHODS, Setup, Source, TrainingTask
from ensemblenet.study.trials import Trial, Workers, run_trial, train, training_memory, trial_key
from ensemblenet.training.optimization import Optimization


def test_tuning_never_reads_test_data_and_testing_no_validation_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MNIST1D, "test_dataloader", lambda self: 1 / 0)
    assert run_trial(trial("tune"))["status"] == "done"
    assert run_trial(trial("test")) == {"status": "failed", "reason": "ZeroDivisionError: division by zero"}
    monkeypatch.undo()
    monkeypatch.setattr(MNIST1D, "val_dataloader", lambda self: 1 / 0)
    assert run_trial(trial("test"))["status"] == "done"


def test_a_trial_depends_on_its_settings_alone() -> None:
    def outcome(**changes):
        found = run_trial(trial("test", **changes))
        return {key: value for key, value in found.items() if not key.endswith("seconds")}

    first = outcome()
    torch.manual_seed(1)  # what ran before does not matter
    assert outcome() == first
    assert outcome(seed=1) != first


def test_bfloat16_trains_as_float32_does_to_its_precision() -> None:
    losses = {}
    for precision in ("32", "bf16"):
        chosen = trial(optimization=Optimization(lr=0.02), precision=precision)
        data = chosen.data_module()
        x, y = next(iter(data.train_dataloader()))
        task = chosen.task(x)
        before = task.loss(x, y, 0.0).item()
        train(task, data, chosen.optimization, 50, 0, precision)
        losses[precision] = task.loss(x, y, 1.0).item()
        assert losses[precision] < before / 2  # autocast that keeps the weights it has cast would not get there
    assert losses["bf16"] == pytest.approx(losses["32"], rel=0.5)  # of one batch after a long way
    assert losses["bf16"] != losses["32"]


def test_outputs_that_are_not_finite_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingTask, "forward", lambda self, x: (self.network(x, per_head=True) * math.nan,) * 2)
    assert run_trial(trial())["status"] == "failed"
    diverged = {"error": 90.0, "head_errors": [90.0], "nll": math.inf}
    monkeypatch.undo()
    monkeypatch.setattr(trials_module.Measures, "compute", lambda self: diverged)
    assert run_trial(trial())["reason"] == "TrainingError: The trained network's outputs are not finite."


def test_workers_give_outcomes_and_a_dying_one_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dying.py").write_text(
        "import os, torch\nclass Dying(torch.nn.Linear):\n    def __init__(self):\n        os._exit(1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    dying = trial(base={"class_path": "dying.Dying"}, method="base")
    with Workers(1) as workers:
        [(done, outcome)] = workers.run([trial("test")])
        assert done == trial("test")
        assert outcome["head_errors"] == run_trial(done)["head_errors"]
        with pytest.raises(TrainingError, match="A worker process died, perhaps for want of memory"):
            list(workers.run([dying]))


def test_memory_grows_with_the_batch_by_what_backward_needs() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    task = TrainingTask(network, lambda z, y, progress: z.sum())

    def of(batch):
        return training_memory(task, torch.zeros(batch, 4), torch.zeros(batch), Optimization())

    parameters, tensors = 4 * 8 + 8 + 8 * 3 + 3, 4
    state = 4 * 4 * parameters + 4 * tensors  # weights, gradients, two moments; a count of steps each
    assert of(10) == state + 10 * 4 * (4 + 8)  # the two linear layers' inputs; ReLU keeps its output, which is one
    assert of(20) == state + 20 * 4 * (4 + 8)


def data_of(name: str, folder: Path) -> dict[str, Any]:
    arguments: dict[str, Any] = {"batch_size": 4, "num_train": 20, "num_val": 10, "num_test": 10}
    if name == "ImageData":
        make_folders(folder)
        arguments = {"folder": str(folder), "image_size": 8, "batch_size": 4, "num_workers": 0, "seed": None}
    return {"class_path": f"ensemblenet.data.{name}", "init_args": arguments}


@pytest.mark.parametrize("name", ["MNIST1D", "ImageData"])
def test_each_seed_trains_on_batches_of_its_own(tmp_path: Path, name: str) -> None:
    first = Trial("base", "base", Setup(), {}, data_of(name, tmp_path), "test", 0, Optimization(), epochs=1)
    found: dict[int, list[torch.Tensor]] = {}
    examples: dict[int, torch.Tensor] = {}
    for seed in (1, 2, 1):
        data = replace(first, seed=seed).data_module()
        example = next(iter(data.train_dataloader()))[0]
        assert torch.equal(example, examples.setdefault(seed, example))  # what was trained before does not matter
        base = nn.Sequential(nn.Flatten(), nn.Linear(example[0].numel(), 10))
        task = METHODS["base"].build(Source(lambda base=base: base, example, seed), Setup())
        seen: list[torch.Tensor] = []
        task.loss = lambda x, y, progress, seen=seen, loss=task.loss: seen.append(x) or loss(x, y, progress)
        train(task, data, Optimization(), 1, seed)
        assert seed not in found or all(map(torch.equal, seen, found[seed]))
        found[seed] = seen
    assert len(found[1]) > 1
    assert not all(map(torch.equal, found[1], found[2]))


def test_a_trial_whose_budget_knew_no_activations_is_found_again() -> None:
    old = {"setup": {"conversion": {"budget": {"parameters": 0.9, "macs": 1.0}}}}
    new = {"setup": asdict(Setup(Conversion(num_heads=4, budget=Budget(0.9, 1.0))))}
    assert trial_key(old) == trial_key(new)
    assert trial_key(new) != trial_key({"setup": asdict(Setup(Conversion(num_heads=4, budget=Budget(0.9, time=1.2))))})
