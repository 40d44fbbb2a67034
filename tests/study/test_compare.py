"""`compare`, end to end but tiny: fairness, going on after a kill, failed cells, the test, the page."""

from __future__ import annotations

import csv
import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml
from scipy import stats

from ensemblenet.cli import main as cli
from ensemblenet.data import MNIST1D
from ensemblenet.errors import TrainingError
from ensemblenet.reports.comparison import PAGE, summary
from ensemblenet.study import compare as module
from ensemblenet.study import trials as cells_module
from ensemblenet.study.compare import Ledger, Study, Tuning, Variant, paired_test, run_study, tuning_points
from ensemblenet.study.methods import METHODS, Contender, Setup
from ensemblenet.study.trials import Cell, Workers, run_cell, train, training_memory
from ensemblenet.training.optimization import Optimization

BASE = {"class_path": "ensemblenet.models.MNIST1DNet", "init_args": {"width": 8}}
DATA = {
    "class_path": "ensemblenet.data.MNIST1D",
    "init_args": {"batch_size": 20, "num_train": 60, "num_val": 40, "num_test": 50},
}
STUDY = Study(
    BASE,
    DATA,
    methods=["base", "codistillation", "one", Variant("codistillation", name="no trunk", split_at="input", weight=1.0)],
    num_heads=2,
    weight=3.0,
    epochs=1,
    seeds=3,
    tuning=Tuning(trials=2),
)
NAMES = ["base", "co-distillation, λ = 3", "ONE", "no trunk"]
CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "compare").glob("*.yaml"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    run_study(folder, STUDY, workers=0)
    return folder


@pytest.fixture(scope="module")
def results(folder):
    return json.loads((folder / "results.json").read_text())


def lines(folder):
    return [json.loads(line) for line in (folder / "cells.jsonl").read_text().splitlines()]


# -- the same effort


def test_every_method_has_the_same_trials_epochs_and_seeds(folder):
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


def test_trials_may_be_shorter_than_tests():
    study = replace(STUDY, epochs=9, tuning=Tuning(trials=1, epochs=2))
    settings = {"base": [Optimization()]}
    assert [cell.epochs for cell in study.cells("tune", settings)] == [2]
    assert [cell.epochs for cell in study.cells("test", settings)] == [9, 9, 9]
    with pytest.raises(TrainingError, match=r"tuning\.epochs must be at least 1, got 0"):
        Tuning(epochs=0)


def test_tests_have_the_setting_of_the_lowest_validation_error(folder, results):
    for row in results["rows"]:
        done = [line for line in lines(folder) if line["cell"]["name"] == row["method"]]
        trials = [line for line in done if line["cell"]["phase"] == "tune"]
        best = min(trials, key=lambda line: (line["outcome"]["error"], line["outcome"]["nll"]))
        tests = [line for line in done if line["cell"]["phase"] == "test"]
        assert all(line["cell"]["optimization"] == best["cell"]["optimization"] for line in tests)
        assert row["lr"] == best["cell"]["optimization"]["lr"]
        assert row["validation_error"] == best["outcome"]["error"]
        assert row["errors"] == [line["outcome"]["error"] for line in tests]


def cell(phase="tune", **changes) -> Cell:
    setup = Setup(num_heads=2, weight=3.0)
    made = Cell("ours", "codistillation", setup, BASE, DATA, phase, 0, Optimization(), epochs=1)
    return replace(made, **changes)


def test_tuning_never_reads_test_data_and_testing_no_validation_data(monkeypatch):
    monkeypatch.setattr(MNIST1D, "test_dataloader", lambda self: 1 / 0)
    assert run_cell(cell("tune"))["status"] == "done"
    assert run_cell(cell("test")) == {"status": "failed", "reason": "ZeroDivisionError: division by zero"}
    monkeypatch.undo()
    monkeypatch.setattr(MNIST1D, "val_dataloader", lambda self: 1 / 0)
    assert run_cell(cell("test"))["status"] == "done"


def test_a_cell_depends_on_its_settings_alone():
    def outcome(**changes):
        found = run_cell(cell("test", **changes))
        return {key: value for key, value in found.items() if not key.endswith("seconds")}

    first = outcome()
    torch.manual_seed(1)  # what ran before does not matter
    assert outcome() == first
    assert outcome(seed=1) != first


def test_bfloat16_trains_as_float32_does_to_its_precision():
    losses = {}
    for precision in ("32", "bf16"):
        chosen = cell(optimization=Optimization(lr=0.02), precision=precision)
        data = chosen.data_module()
        x, y = next(iter(data.train_dataloader()))
        contender = chosen.contender(x)
        before = contender.loss(x, y, 0.0).item()
        train(contender, data, chosen.optimization, 50, 0, precision)
        losses[precision] = contender.loss(x, y, 1.0).item()
        assert losses[precision] < before / 2  # autocast that keeps the weights it has cast would not get there
    assert losses["bf16"] == pytest.approx(losses["32"], rel=0.5)  # of one batch after a long way
    assert losses["bf16"] != losses["32"]


def test_tuning_points_cover_the_ranges_and_more_trials_keep_the_first():
    tuning = Tuning(16, (1e-3, 1e-1), (0.01, 1.0))
    points = tuning_points(tuning)
    assert tuning_points(replace(tuning, trials=5)) == points[:5]
    for values, (low, high) in zip(zip(*points, strict=True), (tuning.lr, tuning.weight_decay), strict=True):
        assert low <= min(values)
        assert max(values) <= high
        quarters = [int(4 * math.log(value / low) / math.log(high / low)) for value in values]
        assert all(quarters.count(quarter) >= 3 for quarter in range(4))


# -- rows


def test_rows_keep_the_contract(results):
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
    assert no_trunk["setup"] == asdict(Setup(2, 0.95, "input", 1.0))
    assert results["failed"] == []


def test_rows_are_tested_against_the_base(results):
    base, *others = results["rows"]
    assert base["p"] is None
    for row in others:
        differences = [a - b for a, b in zip(row["errors"], base["errors"], strict=True)]
        expected = stats.ttest_1samp(differences, 0.0)
        assert row["difference"] == pytest.approx(sum(differences) / 3)
        assert row["p"] == pytest.approx(expected.pvalue)


def test_the_paired_test_is_students():
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
def test_no_test_without_spread(values):
    found = paired_test(values, {seed: value + 0.5 for seed, value in values.items()})
    assert found == {"difference": -0.5, "p": None, "interval": None}
    assert paired_test({}, values)["difference"] is None


# -- going on


class Killed(BaseException):
    pass


def test_a_killed_study_goes_on_where_it_stopped(tmp_path, monkeypatch, results):
    ran = []
    monkeypatch.setattr(module, "write_comparison", lambda *_: None)  # takes seconds

    def counted(cell, stop_at=None):
        if len(ran) == stop_at:
            raise Killed
        ran.append(cell)
        return run_cell(cell)

    for stop_at in (3, 6, 12):  # in tuning, in tuning, in testing
        monkeypatch.setattr(cells_module, "run_cell", lambda cell, stop_at=stop_at: counted(cell, stop_at))
        with pytest.raises(Killed):
            run_study(tmp_path, STUDY, workers=0)
        assert len(lines(tmp_path)) == stop_at
        assert not (tmp_path / "results.json").exists()
        with (tmp_path / "cells.jsonl").open("a") as file:
            file.write('{"cell": {"name": "ba')  # the kill cut a line off
    monkeypatch.setattr(cells_module, "run_cell", counted)
    rows = run_study(tmp_path, STUDY, workers=0)
    assert len(ran) == len({cell.key for cell in ran}) == 4 * (2 + 3)  # nothing twice
    assert [row["errors"] for row in rows] == [row["errors"] for row in results["rows"]]

    ran.clear()
    run_study(tmp_path, replace(STUDY, seeds=4), workers=0)
    assert [(cell.phase, cell.seed) for cell in ran] == [("test", 3)] * 4  # one more seed, nothing else


def test_a_ledger_reads_what_it_wrote(tmp_path):
    path = tmp_path / "cells.jsonl"
    ledger = Ledger(path)
    assert cell() not in ledger
    ledger.add(cell(), {"status": "done", "error": 1.5})
    again = Ledger(path)
    assert again[cell()] == {"status": "done", "error": 1.5}
    assert cell(seed=1) not in again


def test_a_damaged_ledger_is_named(tmp_path):
    path = tmp_path / "cells.jsonl"
    path.write_text('{"cell": {}, "outcome": {}}\n{"cell"\n')
    with pytest.raises(TrainingError, match=re.escape("cells.jsonl, line 2 is no finished cell; remove that line.")):
        Ledger(path)


# -- failures


def test_failed_cells_are_kept_and_shown_as_failed(tmp_path, monkeypatch):
    one = METHODS["one"].make

    def sometimes(source, setup):
        contender = one(source, setup)
        if source.seed == 1:
            contender.objective = lambda z, y, progress: z.sum() * math.nan
        return contender

    def never(source, setup):
        contender = METHODS["joint"].make(source, setup)
        contender.objective = lambda z, y, progress: z.sum() * math.inf
        return contender

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
    assert re.search(r'<tr class="failed"><td>DML</td><td>failed</td>', page)
    assert "2 (1 failed)" in page
    assert "Failed: ONE, test, seed 1" in page

    monkeypatch.undo()
    ran = []
    monkeypatch.setattr(module, "write_comparison", lambda *_: None)
    monkeypatch.setattr(cells_module, "run_cell", ran.append)
    run_study(tmp_path, study, workers=0)
    assert ran == []  # they stay failed


def test_a_base_that_fails_is_an_error_and_the_others_are_kept(tmp_path, monkeypatch):
    def run(cell):
        return {"status": "failed", "reason": "Error: no luck"} if cell.method == "base" else run_cell(cell)

    monkeypatch.setattr(cells_module, "run_cell", run)
    with pytest.raises(TrainingError, match="The base finished no test run, so there is nothing to compare with: Err"):
        run_study(tmp_path, replace(STUDY, methods=["base", "joint"]), workers=0)
    [row] = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert (row["method"], row["difference"], row["p"]) == ("joint, λ = 0", None, None)


def test_outputs_that_are_not_finite_fail(monkeypatch):
    monkeypatch.setattr(Contender, "forward", lambda self, x: (self.network(x, per_head=True) * math.nan,) * 2)
    assert run_cell(cell())["status"] == "failed"
    diverged = {"error": 90.0, "head_errors": [90.0], "nll": math.inf}
    monkeypatch.undo()
    monkeypatch.setattr(cells_module.Measures, "compute", lambda self: diverged)
    assert run_cell(cell())["reason"] == "TrainingError: The trained network's outputs are not finite."


def test_workers_give_outcomes_and_a_dying_one_is_told(tmp_path, monkeypatch):
    (tmp_path / "dying.py").write_text(
        "import os, torch\nclass Dying(torch.nn.Linear):\n    def __init__(self):\n        os._exit(1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    dying = cell(base={"class_path": "dying.Dying"}, method="base")
    with Workers(1) as workers:
        [(done, outcome)] = workers.run([cell("test")])
        assert done == cell("test")
        assert outcome["head_errors"] == run_cell(done)["head_errors"]
        with pytest.raises(TrainingError, match="A worker process died, perhaps for want of memory"):
            list(workers.run([dying]))


# -- what people see


def test_the_page_is_self_contained_and_names_the_winner(folder, results):
    page = (folder / PAGE).read_text()
    assert page.count("<figure>") == 6
    assert page.count("data:image/png;base64,") == 12
    assert not re.search(r"(src|href|srcset)=\"(?!data:)|https?://|url\(", page)
    for name in NAMES:
        assert f"<td>{name}</td>" in page
    for name in ("errors", "error_against_cost", "heads", "diversity", "calibration", "effort"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert summary(results["rows"]).split(".")[0] in page


def row(method, error, kind="other", p=0.01, **more):
    values = {"method": method, "kind": kind, "error_mean": error, "error_std": 0.1, "seeds": 3, "p": p}
    return values | {"difference": error - 2.0} | more


def test_the_summary_says_who_wins_and_by_how_much():
    base = row("base", 2.0, "base")
    rows = [base, row("a", 1.5), row("b", 1.0, p=0.2), row("c", 3.0), row("large", 0.5, "larger")]
    assert summary(rows) == (
        "The base has test error 2.00 ± 0.10 %. Best at no more than its cost: b with 1.00 ± 0.10 % (−50 % against "
        "the base, p = 0.200), before a with 1.50 ± 0.10 %. 2 of 3 methods at no more than the base's cost have a "
        "lower mean error, 1 of them with p < 0.05."
    )
    assert "No method beats it; closest at no more than its cost: c with 3.00 ± 0.10 % (+50 %" in summary(
        [base, rows[3]]
    )
    assert "nothing of at most its cost" in summary([base])


def test_the_csv_has_a_line_a_method(folder, results):
    with (folder / "results.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [line["method"] for line in table] == NAMES
    for line, expected in zip(table, results["rows"], strict=True):
        assert float(line["error_mean"]) == expected["error_mean"]


def test_memory_grows_with_the_batch_by_what_backward_needs():
    network = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    contender = Contender(network, lambda z, y, progress: z.sum())

    def of(batch):
        return training_memory(contender, torch.zeros(batch, 4), torch.zeros(batch), Optimization())

    parameters, tensors = 4 * 8 + 8 + 8 * 3 + 3, 4
    state = 4 * 4 * parameters + 4 * tensors  # weights, gradients, two moments; a count of steps each
    assert of(10) == state + 10 * 4 * (4 + 8)  # the two linear layers' inputs; ReLU keeps its output, which is one
    assert of(20) == state + 20 * 4 * (4 + 8)


# -- the command


@pytest.fixture
def config(tmp_path):
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


def test_the_command_runs_and_goes_on_with_other_settings(tmp_path, config, capsys, monkeypatch):
    runs = tmp_path / "runs"
    assert cli.main(["compare", "--config", str(config), "--runs", str(runs), "--workers", "0"]) == 0
    [folder] = runs.iterdir()
    printed = capsys.readouterr().out
    assert folder.name.startswith("tiny-")
    assert "The base has test error" in printed
    assert "--resume" in printed
    assert len(lines(folder)) == 2 * (1 + 2)
    assert json.loads((folder / "environment.json").read_text())["cpus"]

    before = (folder / "cells.jsonl").read_text()
    assert cli.main(["compare", "--resume", str(folder), "--seeds", "3", "--workers", "0"]) == 0
    assert (folder / "cells.jsonl").read_text().startswith(before)
    assert len(lines(folder)) == 2 * (1 + 3)
    assert json.loads((folder / "results.json").read_text())["rows"][1]["seeds"] == 3
    assert list(runs.iterdir()) == [folder]
    assert yaml.safe_load((folder / "config.yaml").read_text())["seeds"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "missing.yaml"], "missing.yaml"),
        (["--resume", "missing"], "missing is no folder of a study: it has no config.yaml"),
        (["--methods", "[codistillation]"], "methods must begin with base"),
        (["--methods", "[base, nothing]"], "methods must be among base, narrow,"),
        (["--methods", "[base, joint, joint]"], "methods has 'joint, λ = 0' twice"),
        (["--tuning.trials", "0"], "tuning.trials must be at least 1, got 0"),
        (["--tuning.lr", "[0.1, 0.01]"], "tuning.lr must be two numbers above 0, the smaller first"),
        (["--split_at", "conv9"], "conv9"),
        (["--budget", "0.001"], "do not fit a budget"),
        (["--base.class_path", "ensemblenet.models.Nothing"], "Nothing"),
        (["--data.init_args.batch_size", "100"], "MNIST1D needs 1 <= batch_size <= num_train"),
        (["--workers", "-1"], "--workers must be at least 0, got -1"),
        (["--seeds", "0"], "seeds must be at least 1, got 0"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(arguments, message, config, tmp_path, capsys):
    given = ["--config", str(config)] if arguments[0] != "--resume" else []
    assert cli.main(["compare", *given, "--runs", str(tmp_path / "runs"), "--workers", "0", *arguments]) == 2
    captured = capsys.readouterr().err
    assert captured.startswith("ensemblenet compare: ")
    assert captured.count("\n") == 1
    assert message in captured


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_a_shipped_config_makes_a_study(path):
    study = module.read_study(["--config", str(path)])[0]
    assert next(iter(study.entrants())) == "base"
    assert any(METHODS[method].several for method, _ in study.entrants().values())
    assert study.seeds >= 3
