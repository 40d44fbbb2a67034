"""A study of a trained base: the base is trained on, the others inherit its weights, on its task or on another one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from safetensors.torch import save_file
from studies import DATA, STUDY

import ensemblenet
from ensemblenet.errors import TrainingError
from ensemblenet.inputs import inputs_and_targets
from ensemblenet.models import create
from ensemblenet.recipe import Conversion
from ensemblenet.study import compare as module
from ensemblenet.study import trials as trials_module
from ensemblenet.study.compare import run_study
from ensemblenet.study.methods import METHODS, Setup, TrainingTask
from ensemblenet.study.settings import Variant
from ensemblenet.study.trials import Trial, run_trial
from ensemblenet.training.inheriting import calibration_batches
from ensemblenet.training.optimization import Optimization, build_optimizer, layer_depths

pytestmark = pytest.mark.usefixtures("one_thread")
NAME = "ensemblenet.models:MNIST1DNet"
X = torch.randn(4, 1, 40, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(5)
    file = tmp_path_factory.mktemp("weights") / "trained.safetensors"
    save_file(create(NAME, options={"width": 8}).state_dict(), file)
    return file


def spec(weights: Path) -> dict[str, Any]:
    init_args = {"name": NAME, "options": {"width": 8}, "weights": str(weights)}
    return {"class_path": "ensemblenet.models.create", "init_args": init_args}


def trial_of(weights: Path, method: str = "codistillation", seed: int = 0, **conversion: Any) -> Trial:
    wanted = Conversion(**({"num_heads": 2, "budget": 0.95, "init": "inherit"} | conversion))
    optimization = Optimization(lr=1e-12, weight_decay=0.0)  # too low for anything to move but statistics
    return Trial(method, method, Setup(wanted), spec(weights), DATA, "test", seed, optimization, epochs=1)


def prepared(trial: Trial) -> TrainingTask:
    return trials_module._prepared(trial)[0]


def test_the_base_begins_with_the_file_and_heads_with_what_convert_inherits(weights: Path) -> None:
    base = create(NAME, options={"width": 8}, weights=str(weights))
    own = prepared(trial_of(weights, "base")).network.state_dict()
    assert all(torch.equal(own[name], value) for name, value in base.state_dict().items())

    trial = trial_of(weights, seed=3)
    loader = trial.data_module().train_dataloader()
    seed_everything(3, verbose=False)
    batches = calibration_batches(loader)
    x, _ = inputs_and_targets(batches[0])
    expected = ensemblenet.convert(base, x, 2, 0.95, seed=3, init="inherit", calibration=batches).state_dict()
    made = prepared(trial).network.state_dict()
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[name], value) for name, value in expected.items())


def test_another_task_has_fresh_classifiers_and_inherits_the_rest(weights: Path) -> None:
    base = create(NAME, options={"width": 8}, weights=str(weights)).state_dict()
    first, second = (prepared(trial_of(weights, "base", seed, num_classes=7)).network.state_dict() for seed in (0, 1))
    differs = [name for name in base if not torch.equal(first[name], second[name])]
    assert differs
    for name, value in base.items():
        if name in differs:
            assert len(first[name]) == 7
        else:
            assert torch.equal(first[name], value)
    heads = prepared(trial_of(weights, num_classes=7)).network
    assert heads.train()(X).shape == (2, 4, 7)


def test_a_frozen_trunk_keeps_its_weights_and_statistics(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[tuple[dict[str, Any], Any]] = []
    train = trials_module.train

    def watched(task: TrainingTask, *given: Any) -> Any:
        before = {name: value.clone() for name, value in task.network.state_dict().items()}
        effort = train(task, *given)
        trained.append((before, task.network.state_dict()))
        return effort

    monkeypatch.setattr(trials_module, "train", watched)
    frozen = trial_of(weights, freeze="trunk", budget=2.0)
    assert run_trial(replace(frozen, optimization=Optimization(lr=0.1)))["status"] == "done"
    [(before, after)] = trained
    still = {name for name, value in after.items() if torch.equal(value, before[name])}
    trunk = {name for name in after if name.startswith("trunk.")}
    assert any("running_mean" in name for name in trunk)
    assert still == trunk


@pytest.mark.parametrize("method", ["base", "codistillation", "head_alone", "one"])
def test_learning_rates_fall_by_depth_as_in_fit(method: str, weights: Path) -> None:
    trial = replace(trial_of(weights, method), optimization=Optimization(lr=1.0, layer_decay=0.5))
    task = prepared(trial)
    depths = layer_depths(create(NAME, options={"width": 8}), X)
    optimizer = build_optimizer(task, trial.optimization, task.depths)
    rates = {id(own): group["lr"] for group in optimizer.param_groups for own in group["params"]}
    seen = set()
    for name, own in task.named_parameters():
        parts = name.split(".")
        inner = ".".join(parts[{"trunk": 2, "head": 2, "heads": 3}.get(parts[1], 1) :])
        expected = 1.0 if parts[0] == "gate" else 0.5 ** (max(depths.values()) - depths[inner])
        assert rates[id(own)] == expected
        seen.add(expected)
    assert len(seen) == len(set(depths.values())) > 2


def test_all_methods_that_can_inherit_do(weights: Path) -> None:
    study = replace(STUDY, base=spec(weights), methods=None)
    able = {one.method for one in study.candidates().values()}
    assert able == METHODS.keys() - {"deep_ensemble_of_bases"}
    assert {one.setup.conversion.init for one in study.candidates().values()} == {"inherit"}
    frozen = {one.method for one in replace(study, freeze="trunk").candidates().values()}
    assert frozen == {"base", "joint", "independent", "codistillation", "teacher", "one", "dml", "okddip", "kdcl"}
    base = create(NAME, options={"width": 8}, weights=str(weights))
    values = torch.cat([own.flatten() for own in base.parameters()])
    for method in able - {"base"}:  # none of the layers before the first repaired one is drawn anew
        network = prepared(trial_of(weights, method)).network
        assert any(torch.isin(own, values).all() for own in network.parameters() if own.ndim > 1), method


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["base", "deep_ensemble_of_bases"]}, "deep_ensemble_of_bases cannot begin with trained weights"),
        (
            {"methods": ["base", "narrow"], "freeze": "trunk"},
            "narrow cannot begin with a frozen trunk: it has",
        ),
        ({"freeze": "trunk", "init": "fresh"}, "is for a trunk that has learned"),
        ({"num_classes": 0}, "num_classes must be an integer of at least 1"),
        ({"layer_decay": 0.0}, r"layer_decay must be in \(0, 1\]"),
        ({"num_classes": 4}, "The data has 10 classes and the network 4 outputs"),
        ({"importance": "scale", "init": "fresh"}, "importance says what heads inherit"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    changes: dict[str, Any], message: str, weights: Path, tmp_path: Path
) -> None:
    study = replace(STUDY, base=spec(weights), **changes)
    with pytest.raises((TrainingError, ensemblenet.ConversionError), match=message):
        run_study(tmp_path, study, workers=0)
    assert not (tmp_path / "results.json").exists()


def test_a_study_says_with_which_weights_it_began(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages: list[dict[str, Any]] = []
    monkeypatch.setattr(module, "write_comparison", lambda _, results, *rest: pages.append(results))
    fresh = Variant("codistillation", name="fresh heads", init="fresh")
    study = replace(STUDY, base=spec(weights), methods=["base", "codistillation", fresh], seeds=1)
    rows = run_study(tmp_path, study, workers=0)
    assert [row["setup"]["conversion"]["init"] for row in rows] == ["inherit", "inherit", "fresh"]
    assert pages[0]["study"]["init"] == "inherit"
    assert json.loads((tmp_path / "results.json").read_text())["study"]["init"] == "inherit"
    before = (tmp_path / "cells.jsonl").read_text()
    run_study(tmp_path, study, workers=0)
    assert (tmp_path / "cells.jsonl").read_text() == before  # nothing twice
