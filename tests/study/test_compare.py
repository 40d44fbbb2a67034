"""A study, end to end but tiny: fairness, going on after a kill, failed trials, the test, the page."""

from __future__ import annotations

import csv
import html
import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from scipy import stats
from studies import NAMES, STUDY, lines

from ensemblenet.errors import TrainingError
from ensemblenet.recipe import Conversion
from ensemblenet.reports.comparison import PAGE, summary
from ensemblenet.study import compare as module
from ensemblenet.study import trials as trials_module
from ensemblenet.study.compare import paired_test, run_study
from ensemblenet.study.methods import METHODS, Setup
from ensemblenet.study.settings import Variant, tuning_points
from ensemblenet.study.trials import run_trial


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    run_study(folder, STUDY, workers=0)
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def test_every_method_has_the_same_trials_epochs_and_seeds(folder: Path) -> None:
    cells = [line["cell"] for line in lines(folder)]
    for name in NAMES:
        trials = [cell for cell in cells if (cell["name"], cell["phase"]) == (name, "tune")]
        points = [(cell["optimization"]["lr"], cell["optimization"]["weight_decay"]) for cell in trials]
        assert points == tuning_points(STUDY.tuning)
        assert [cell["seed"] for cell in trials] == [1000, 1000]
        tests = [cell for cell in cells if (cell["name"], cell["phase"]) == (name, "test")]
        assert [cell["seed"] for cell in tests] == [0, 1, 2]  # each tested once
    shared = ("base", "data", "epochs", "device")
    assert len({json.dumps([cell[key] for key in shared], sort_keys=True) for cell in cells}) == 1
    rest = ("optimizer", "momentum", "warmup", "decay_all")
    assert len({tuple(cell["optimization"][key] for key in rest) for cell in cells}) == 1


def test_tests_have_the_setting_of_the_lowest_validation_error(folder: Path, results: dict[str, Any]) -> None:
    for row in results["rows"]:
        done = [line for line in lines(folder) if line["cell"]["name"] == row["method"]]
        trials = [line for line in done if line["cell"]["phase"] == "tune"]
        best = min(trials, key=lambda line: (line["outcome"]["error"], line["outcome"]["nll"]))
        tests = [line for line in done if line["cell"]["phase"] == "test"]
        assert all(line["cell"]["optimization"] == best["cell"]["optimization"] for line in tests)
        assert row["lr"] == best["cell"]["optimization"]["lr"]
        assert row["validation_error"] == best["outcome"]["error"]
        assert row["errors"] == [line["outcome"]["error"] for line in tests]


def test_rows_keep_the_contract(results: dict[str, Any]) -> None:
    rows = results["rows"]
    assert [row["method"] for row in rows] == NAMES
    for row in rows:
        assert {"parameters", "macs", "error_mean", "error_std", "seeds"} <= set(row)
        assert row["seeds"] == 3
        assert row["error_mean"] == pytest.approx(sum(row["errors"]) / 3)
        assert row["memory_bytes"] > 4 * row["parameters"]
        assert row["cpu_seconds_mean"] > 0
    base, ours, one, no_trunk = rows
    assert (base["kind"], ours["kind"], one["kind"], no_trunk["kind"]) == ("base", "ours", "other", "ours")
    assert ours["parameters"] <= 0.95 * base["parameters"]
    assert one["parameters"] > ours["parameters"]  # its gate
    assert no_trunk["setup"] == asdict(Setup(Conversion(2, 0.95, "input"), 1.0))
    assert results["failed"] == []


def test_rows_are_tested_against_the_base(results: dict[str, Any]) -> None:
    base, *others = results["rows"]
    assert base["p"] is None
    for row in others:
        differences = [a - b for a, b in zip(row["errors"], base["errors"], strict=True)]
        expected = stats.ttest_1samp(differences, 0.0)
        assert row["difference"] == pytest.approx(sum(differences) / 3)
        assert row["p"] == pytest.approx(expected.pvalue)


def test_the_paired_test_is_students() -> None:
    values, base = {0: 1.1, 1: 1.3, 2: 1.0, 5: 9.0}, {0: 1.6, 1: 1.5, 2: 1.7, 3: 0.0}
    differences = [-0.5, -0.2, -0.7]  # of the seeds that both have
    mean = sum(differences) / 3
    error = math.sqrt(sum((d - mean) ** 2 for d in differences) / 2 / 3)
    found = paired_test(values, base)
    assert found["difference"] == pytest.approx(mean)
    assert found["p"] == pytest.approx(2 * stats.t.sf(abs(mean / error), 2))
    margin = stats.t.ppf(0.975, 2) * error
    assert found["interval"] == pytest.approx([mean - margin, mean + margin])


@pytest.mark.parametrize("values", [{0: 1.0}, {0: 1.0, 1: 2.0}])
def test_no_test_without_spread(values: dict[int, float]) -> None:
    found = paired_test(values, {seed: value + 0.5 for seed, value in values.items()})
    assert found == {"difference": -0.5, "p": None, "interval": None}
    assert paired_test({}, values)["difference"] is None


class Killed(BaseException):
    pass


def test_a_killed_study_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, results: dict[str, Any]
) -> None:
    ran = []
    monkeypatch.setattr(module, "write_comparison", lambda *_: None)  # takes seconds

    def counted(trial, stop_at=None):
        if len(ran) == stop_at:
            raise Killed
        ran.append(trial)
        return run_trial(trial)

    for stop_at in (3, 6, 12):  # in tuning, in tuning, in testing
        monkeypatch.setattr(trials_module, "run_trial", lambda trial, stop_at=stop_at: counted(trial, stop_at))
        with pytest.raises(Killed):
            run_study(tmp_path, STUDY, workers=0)
        assert len(lines(tmp_path)) == stop_at
        assert not (tmp_path / "results.json").exists()
        with (tmp_path / "cells.jsonl").open("a") as file:
            file.write('{"cell": {"name": "ba')  # the kill cut a line off
    monkeypatch.setattr(trials_module, "run_trial", counted)
    rows = run_study(tmp_path, STUDY, workers=0)
    assert len(ran) == len({trial.key for trial in ran}) == 4 * (2 + 3)  # nothing twice
    assert [row["errors"] for row in rows] == [row["errors"] for row in results["rows"]]

    ran.clear()
    run_study(tmp_path, replace(STUDY, seeds=4), workers=0)
    assert [(trial.phase, trial.seed) for trial in ran] == [("test", 3)] * 4  # one more seed, nothing else


def test_failed_trials_are_kept_and_shown_as_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = METHODS["one"].make

    def sometimes(source, setup):
        task = one(source, setup)
        if source.seed == 1:
            task.objective = lambda z, y, progress: z.sum() * math.nan
        return task

    def never(source, setup):
        task = METHODS["joint"].make(source, setup)
        task.objective = lambda z, y, progress: z.sum() * math.inf
        return task

    monkeypatch.setitem(METHODS, "one", replace(METHODS["one"], make=sometimes))
    monkeypatch.setitem(METHODS, "dml", replace(METHODS["dml"], make=never))
    study = replace(STUDY, methods=["base", "codistillation", "one", "dml"])
    rows = {row["method"]: row for row in run_study(tmp_path, study, workers=0)}
    assert set(rows) == {"base", "co-distillation, λ = 3", "ONE"}
    assert (rows["ONE"]["seeds"], rows["ONE"]["run_seeds"], rows["ONE"]["failed_seeds"]) == (2, [0, 2], [1])
    assert rows["ONE"]["difference"] == pytest.approx(
        sum(rows["ONE"]["errors"]) / 2 - (rows["base"]["errors"][0] + rows["base"]["errors"][2]) / 2
    )
    failed = json.loads((tmp_path / "results.json").read_text())["failed"]
    assert [(item["method"], item["phase"]) for item in failed] == [("DML", "tune")] * 2 + [("ONE", "test")]
    assert all("The loss became" in item["reason"] for item in failed)
    page = (tmp_path / PAGE).read_text()
    assert re.search(r'<tr class="failed">\s*<th scope="row">DML</th>\s*<td data-label="error, %">failed</td>', page)
    assert "2 (1 failed)" in page
    assert "Failed: ONE, test, seed 1" in page

    monkeypatch.undo()
    ran = []
    monkeypatch.setattr(module, "write_comparison", lambda *_: None)
    monkeypatch.setattr(trials_module, "run_trial", ran.append)
    run_study(tmp_path, study, workers=0)
    assert ran == []  # they stay failed


def test_a_base_that_fails_is_an_error_and_the_others_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(trial):
        return {"status": "failed", "reason": "Error: no luck"} if trial.method == "base" else run_trial(trial)

    monkeypatch.setattr(trials_module, "run_trial", run)
    with pytest.raises(TrainingError, match="The base finished no test run, so there is nothing to compare with: Err"):
        run_study(tmp_path, replace(STUDY, methods=["base", Variant("joint", "=joint()")]), workers=0)
    [row] = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert (row["method"], row["difference"], row["p"]) == ("=joint()", None, None)
    with (tmp_path / "results.csv").open(newline="") as file:
        [line] = csv.DictReader(file)
    assert line["method"] == "'=joint()"  # no formula


def test_the_page_is_self_contained_and_names_the_winner(folder: Path, results: dict[str, Any]) -> None:
    page = (folder / PAGE).read_text()
    assert page.count("<figure>") == 7
    assert page.count("data:image/png;base64,") == 14
    assert not re.search(r"(src|href|srcset)=\"(?!data:)|https?://|url\(", page)
    for name in NAMES:
        assert page.count(f'<th scope="row">{name}</th>') == 2
    for name in (
        "errors",
        "error_against_cost",
        "error_against_parameters",
        "heads",
        "diversity",
        "calibration",
        "effort",
    ):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert summary(results["rows"]).split(".")[0] in html.unescape(page)


def test_the_csv_has_a_line_a_method(folder: Path, results: dict[str, Any]) -> None:
    with (folder / "results.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [line["method"] for line in table] == NAMES
    for line, expected in zip(table, results["rows"], strict=True):
        assert float(line["error_mean"]) == expected["error_mean"]
