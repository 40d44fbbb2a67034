"""Trials that the trained base teaches: which base it is, that it is trained once, and again where it was lost."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from studies import STUDY, lines, trial

from ensemblenet.errors import TrainingError
from ensemblenet.study import compare as module
from ensemblenet.study import trials as trials_module
from ensemblenet.study.compare import run_study
from ensemblenet.study.from_fit import study_settings
from ensemblenet.study.settings import Variant
from ensemblenet.study.task import Setup
from ensemblenet.study.trials import Trial, run_trial, trial_key

TAUGHT = replace(STUDY, methods=["base", Variant("teacher", name="taught", temperature=2.0)], seeds=2)


def test_the_base_of_the_same_seed_teaches_and_is_trained_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    trained: list[int] = []
    train = trials_module.train
    monkeypatch.setattr(trials_module, "train", lambda *given: trained.append(1) or train(*given))
    monkeypatch.setattr(module, "write_comparison", lambda *_: None)
    watched: list[tuple[Any, ...]] = []
    rows = run_study(tmp_path, TAUGHT, workers=0, watch=lambda *given: watched.append(given[:3]))

    entries = lines(tmp_path)
    assert len(trained) == len(entries) == 2 * (2 + 2)
    assert max(done for phase, done, _ in watched if phase == "tune") == 4
    assert {total for _, _, total in watched} == {4}
    cells = [entry["cell"] for entry in entries]
    bases = {
        trial_key(cell): entry["outcome"] for cell, entry in zip(cells, entries, strict=True) if cell["name"] == "base"
    }
    for cell in cells:
        if cell["name"] == "taught":
            assert cell["setup"]["temperature"] == 2.0
            assert trial_key(cell["teacher"]) in bases  # one that the study trained
            assert (cell["teacher"]["seed"], cell["teacher"]["phase"]) == (cell["seed"], cell["phase"])
            rivals = [outcome for key, outcome in bases.items() if f'"phase": "{cell["phase"]}"' in key]
            if cell["phase"] == "tune":  # the best of those tuned
                chosen = bases[trial_key(cell["teacher"])]
                assert chosen == min(rivals, key=lambda outcome: (outcome["error"], outcome["nll"]))
        else:
            assert cell["teacher"] is None
    base, taught = rows
    assert taught["training_only_parameters"] == base["parameters"]
    assert taught["parameters"] <= 0.95 * base["parameters"]
    assert len(list((tmp_path / "teachers").iterdir())) == 2 + 2

    # without the kept bases the trials of another seed count train them again, to the same
    shutil.rmtree(tmp_path / "teachers")
    kept = [entry for entry in (tmp_path / "cells.jsonl").read_text().splitlines() if '"name": "taught"' not in entry]
    (tmp_path / "cells.jsonl").write_text("\n".join(kept) + "\n")
    again = run_study(tmp_path, TAUGHT, workers=0)
    assert [row["errors"] for row in again] == [row["errors"] for row in rows]
    assert [row["nll_mean"] for row in again] == [row["nll_mean"] for row in rows]


def test_a_trial_reads_the_base_that_was_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    base = trial(name="base", method="base", setup=Setup())
    taught = trial(method="teacher", teacher=base)
    first = run_trial(taught)
    assert run_trial(base, tmp_path)["status"] == "done"
    [file] = tmp_path.iterdir()

    trained: list[str] = []
    train = trials_module.train
    monkeypatch.setattr(
        trials_module, "train", lambda task, *given: trained.append(type(task).__name__) or train(task, *given)
    )
    for damage in (b"", b"0000"):
        file.write_bytes(file.read_bytes()[: -len(damage) or None] + damage)
        again = run_trial(taught, tmp_path)
        assert {**again, "seconds": 0, "cpu_seconds": 0} == {**first, "seconds": 0, "cpu_seconds": 0}
    assert trained == ["Taught", "TrainingTask", "Taught"]  # a damaged base is trained again


def test_a_base_that_fails_teaches_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(trial: Trial, weights: Path) -> dict[str, Any]:
        assert trial.method != "teacher"
        return {"status": "failed", "reason": "Error: no luck"} if trial.method == "base" else run_trial(trial)

    monkeypatch.setattr(trials_module, "run_trial", run)
    with pytest.raises(TrainingError, match="The base finished no test run"):
        run_study(tmp_path, TAUGHT, workers=0)


def test_the_key_of_a_trial_holds_its_teacher() -> None:
    teacher = trial(name="base", method="base")
    keys = {trial(teacher=one).key for one in (None, teacher, replace(teacher, seed=1))}
    assert len(keys) == 3
    stored = asdict(trial(teacher=teacher))
    assert trial_key(stored) in keys
    del stored["teacher"]["halved"], stored["teacher"]["setup"]["temperature"]  # as before there were any
    assert trial_key(stored) in keys
    without = asdict(trial())
    del without["teacher"], without["setup"]["teacher_weight"]
    assert trial_key(without) in keys


@pytest.mark.parametrize("options", [{"teacher_weight": 0.0}, {"temperature": -1.0}, {"teacher_weight": torch.inf}])
def test_a_weight_or_a_temperature_out_of_range_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(TrainingError, match="must be a finite number above 0, got"):
        replace(TAUGHT, **options).candidates()  # pyright: ignore[reportArgumentType]


def test_a_file_of_fit_with_a_teacher_is_compared_with_one() -> None:
    model = {"base": {"class_path": "a.Net"}, "teacher": "runs/base", "teacher_temperature": 2.0}
    settings, left_out = study_settings({"model": model, "data": {"class_path": "a.Data"}})
    assert settings["methods"] == ["base", "codistillation", "teacher"]
    assert (settings["teacher_weight"], settings["temperature"]) == (1.0, 2.0)
    assert left_out == ["model.teacher"]  # the study trains its own
