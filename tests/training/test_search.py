"""`fit --plan search`: what is trained, what is kept, what a kill leaves, and the user's own run of the base."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from torch import nn

from ensemblenet import BudgetError, Capacity, convert
from ensemblenet.cli.main import main
from ensemblenet.data import MNIST1D
from ensemblenet.errors import TrainingError
from ensemblenet.evaluation.scoring import score
from ensemblenet.models import MNIST1DNet
from ensemblenet.recipe import Conversion
from ensemblenet.storage.restore import restore
from ensemblenet.training.fit import fit
from ensemblenet.training.module import Classifier
from ensemblenet.training.search import candidates, chance, choose, show, take_over

pytestmark = pytest.mark.usefixtures("one_thread")


# -- what is trained


def with_blocks() -> nn.Sequential:
    """Seven like layers in a row, of which the last six may be dropped."""
    layers = [layer for _ in range(7) for layer in (nn.Linear(64, 64), nn.ReLU())]
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), *layers, nn.Linear(64, 4))


def test_the_plans_are_those_of_the_automatic_rule_and_one_network_with_few_blocks_is_the_control() -> None:
    base, x = with_blocks(), torch.randn(4, 16)
    found = candidates(base, x, Conversion(num_heads=7, split_at="3", width=0.5, seed=5))
    most = convert(base, x, num_heads="auto", seed=5)
    assert most.num_heads > 2
    assert list(found) == ["base", "2-heads", f"{most.num_heads}-heads", "reshaped"]
    for wanted, model in ((found["2-heads"], convert(base, x, seed=5)), (found[f"{most.num_heads}-heads"], most)):
        assert wanted is not None
        given = {name: getattr(wanted, name) for name in ("num_heads", "split_at", "width", "depth", "shape", "seed")}
        assert convert(base, x, **given).recipe == model.recipe
    control = found["reshaped"]
    assert control is not None
    one = convert(base, x, 1, split_at=control.split_at, depth=control.depth, shape=control.shape)
    assert one.num_heads == 1
    assert one.recipe is not None
    assert (one.recipe.split_at, one.recipe.head.depth) == ("input", 0.0)
    assert one.recipe.head.width > 1
    assert one.cost is not None
    assert one.base_cost is not None
    assert 0.9 < max(one.cost.share_of(one.base_cost)) <= 1


@pytest.mark.parametrize(("budget", "names"), [(1.0, ["base", "2-heads"]), (0.8, ["base", "2-heads", "reshaped"])])
def test_without_blocks_the_control_is_one_narrower_network_unless_it_is_the_base(
    budget: float, names: list[str]
) -> None:
    found = candidates(MNIST1DNet(16), torch.randn(4, 40), Conversion(budget=budget))
    assert list(found) == names
    if control := found.get("reshaped"):
        one = convert(MNIST1DNet(16), torch.randn(4, 40), 1, budget, control.split_at, shape=control.shape)
        assert one.recipe is not None
        assert 0.5 < one.recipe.head.width < 1


def test_candidates_keep_the_other_settings() -> None:
    settings = Conversion(4, 0.9, combine="probabilities", min_width=0.3, seed=7, shape="narrow", width=0.9)
    for wanted in list(candidates(with_blocks(), torch.randn(4, 16), settings).values())[1:]:
        assert wanted is not None
        assert (wanted.budget, wanted.combine, wanted.min_width, wanted.seed) == (0.9, "probabilities", 0.3, 7)
        assert wanted.width is None


def test_a_budget_that_no_heads_fit_ends_the_search() -> None:
    with pytest.raises(BudgetError, match=r"2 heads do not fit a budget of 0\.001"):
        candidates(MNIST1DNet(16), torch.randn(4, 40), Conversion(budget=0.001))


# -- what is kept


def outcome(accuracy: float) -> dict[str, Any]:
    plan = {"split_at": None, "width": 1.0, "depth": 1.0, "shares": {"parameters": 1.0, "macs": 0.5, "time": 0.25}}
    return {**plan, "scores": {"accuracy": accuracy, "head_accuracy": accuracy, "nll": 1.0}, "examples": 1000}


@pytest.mark.parametrize(
    ("scores", "best", "ties"),
    [
        ((0.80, 0.81, 0.82), "b", ["base", "a"]),  # two standard errors are 3.5 points
        ((0.80, 0.90, 0.89), "a", ["b"]),
        ((0.80, 0.90, 0.70), "a", []),
        ((0.80, 0.80, 0.80), "base", ["a", "b"]),
    ],
)
def test_the_best_is_kept_and_what_chance_explains_is_said(
    capsys: pytest.CaptureFixture[str], scores: tuple[float, ...], best: str, ties: list[str]
) -> None:
    among = {name: outcome(value) for name, value in zip(("base", "a", "b"), scores, strict=True)}
    assert choose(among, "accuracy") == (best, ties)
    show(among, "accuracy", best, ties)
    printed = capsys.readouterr().out
    assert f"Plan: {best}" in printed
    assert all(f"{100 * (1 - value):.2f}" in printed for value in scores)
    assert "100/50/25" in printed
    assert (f"{' and '.join(ties)} may be as good as {best}: " in printed) == bool(ties)
    assert ("is ahead by more than the choice of 1,000 validation examples explains" in printed) == (not ties)
    assert "what other seeds would do, one run does not say." in printed


def test_chance_is_twice_the_spread_of_a_difference() -> None:
    draws = np.random.default_rng(0).binomial(500, [[0.9], [0.8]], (2, 20_000)) / 500
    assert chance(0.9, 0.8, 500) == pytest.approx(2 * (draws[0] - draws[1]).std(), rel=0.03)


# -- whole runs


def write(folder: Path, **more: Any) -> list[str]:
    """The arguments of a search among the base, 2 heads and one narrower network."""
    settings = {
        "name": "tiny",
        "plan": "search",
        "model": {
            "base": {"class_path": "ensemblenet.models.MNIST1DNet", "init_args": {"width": 8}},
            "conversion": {"budget": 0.9, "combine": "probabilities"},
            "heads": "looped",
            "optimization": {"lr": 0.01},
        },
        "data": {
            "class_path": "ensemblenet.data.MNIST1D",
            "init_args": {"num_train": 200, "num_val": 100, "num_test": 50, "batch_size": 20},
        },
        "trainer": {"max_epochs": 2, "accelerator": "cpu", "devices": 1, "enable_progress_bar": False},
    } | more
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings))
    return ["--config", str(path), "--runs", str(folder / "runs")]


def base_run(folder: Path, *more: str) -> Path:
    given = ["--plan", "given", "--model.conversion", "null", "--name", "own"]
    return fit([*write(folder), *given, *more])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def row(run: Path) -> dict[str, Any]:
    [found] = json.loads((run / "results.json").read_text())["rows"]
    return found


def test_a_search_trains_all_in_full_and_becomes_the_best(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = fit([*write(tmp_path), "--model.teacher_weight", "0.5"])
    assert list((tmp_path / "runs").iterdir()) == [folder]  # the candidates' runs lie within it
    plan = json.loads((folder / "plan.json").read_text())
    data = MNIST1D(num_train=200, num_val=100, num_test=50, batch_size=20)
    runs = {name: folder / entry["run"] for name, entry in plan["candidates"].items()}
    assert list(runs) == ["base", "2-heads", "reshaped"]
    models = [yaml.safe_load((run / "config.yaml").read_text())["model"] for run in runs.values()]
    taught = [(model["teacher_weight"], model["teacher"]) for model in models]
    assert taught == [(None, None), *[(0.5, str(runs["base"]))] * 2]  # the base, once it is trained, teaches the others
    for name, entry in plan["candidates"].items():
        run = runs[name]
        assert entry["examples"] == 100
        whole = score(restore(run), data, "val")[0]
        for score_name in ("accuracy", "nll"):
            assert entry["scores"][score_name] == pytest.approx(whole[score_name], abs=1e-6)
        with next((run / "csv").rglob("metrics.csv")).open() as file:
            epochs = [float(line["val/nll"]) for line in csv.DictReader(file) if line["val/nll"]]
        assert len(epochs) == 2
        assert entry["scores"]["nll"] == pytest.approx(epochs[-1], rel=1e-4)
        assert (row(run)["num_heads"], row(run)["parameters"]) == (entry["num_heads"], whole["parameters"])
    scores = {name: entry["scores"]["accuracy"] for name, entry in plan["candidates"].items()}
    assert scores[plan["chosen"]] == max(scores.values())
    assert row(folder) == row(runs[plan["chosen"]])
    assert (folder / "checkpoints" / "last.ckpt").exists()
    stored = yaml.safe_load((folder / "config.yaml").read_text())
    assert stored["plan"] == "given"
    assert yaml.safe_load((folder / "config-1.yaml").read_text())["plan"] == "search"
    best, copy = (restore(run).network.state_dict() for run in (runs[plan["chosen"]], folder))
    assert all(torch.equal(value, copy[name]) for name, value in best.items())
    assert f"Plan: {plan['chosen']}" in capsys.readouterr().out


def test_a_killed_search_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Classifier.training_step

    def killed(self: Classifier, batch: Any, index: int) -> Any:
        if self.num_heads == 2 and self.trainer.current_epoch == 1:
            raise ConnectionError("killed")
        return step(self, batch, index)

    arguments = write(tmp_path)
    monkeypatch.setattr(Classifier, "training_step", killed)
    with pytest.raises(ConnectionError):
        fit(arguments)
    [folder] = (tmp_path / "runs").iterdir()
    [base], [heads] = (list((folder / "search").glob(f"{name}-*")) for name in ("base", "2-heads"))
    finished = contents(base)
    began: list[tuple[int, int]] = []

    def noted(self: Classifier, batch: Any, index: int) -> Any:
        if index == 0:
            began.append((self.num_heads, self.trainer.current_epoch))
        return step(self, batch, index)

    monkeypatch.setattr(Classifier, "training_step", noted)
    assert fit([*arguments, "--resume", "auto"]) == folder
    assert began == [(2, 1), (1, 0), (1, 1)]  # the rest of the heads' run, then the reshaped network
    assert contents(base) == finished
    assert list((folder / "search").glob("2-heads-*")) == [heads]
    assert json.loads((folder / "plan.json").read_text())["chosen"]


def test_the_users_run_of_the_base_is_taken_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = base_run(tmp_path, "--model.optimization.lr", "0.02", "--model.codistillation_weight", "3")
    before = contents(own)
    folder = fit([*write(tmp_path), "--base_run", str(own)])
    assert contents(own) == before
    assert not list((folder / "search").glob("base-*"))
    plan = json.loads((folder / "plan.json").read_text())
    assert (folder / plan["candidates"]["base"]["run"]).resolve() == own.resolve()
    whole = score(restore(own), MNIST1D(num_train=200, num_val=100, num_test=50, batch_size=20), "val")[0]
    assert plan["candidates"]["base"]["scores"]["accuracy"] == pytest.approx(whole["accuracy"], abs=1e-6)
    assert plan["note"] == f"The base is {own}, which was made with model.optimization.lr 0.02, not 0.01."
    assert plan["note"] in capsys.readouterr().out


@pytest.mark.parametrize("spare", [True, False])
def test_a_run_of_the_base_decides_the_split_and_the_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spare: bool
) -> None:
    measured = []

    def found(restored: Any) -> Capacity:
        measured.append(restored.folder)
        return Capacity(0.01 if spare else 1.0, 1.0)

    monkeypatch.setattr("ensemblenet.training.callbacks.capacity_of", found)
    given = ["--plan", "given", "--model.conversion", "{num_heads: 2}"]
    own = base_run(tmp_path)
    weights = []
    step = Classifier.training_step

    def noted(self: Classifier, batch: Any, index: int) -> Any:
        weights.append(self.criterion.weight)
        return step(self, batch, index)

    monkeypatch.setattr(Classifier, "training_step", noted)
    folder = fit([*write(tmp_path), *given, "--base_run", str(own)])
    network = restore(folder).network
    x, base = torch.randn(4, 40), MNIST1DNet(8)
    expected = convert(base, x, 2, capacity=Capacity(0.01 if spare else 1.0, 1.0))
    early = convert(base, x, 2)
    assert network.recipe.split_at == expected.recipe.split_at  # type: ignore[union-attr]
    assert (expected.recipe.split_at == early.recipe.split_at) == spare  # type: ignore[union-attr]
    assert set(weights) == {2.0 if spare else 1.0}
    assert measured == [own]
    fit(["--resume", str(folder), "--trainer.max_epochs", "3"])  # it keeps to what it was told
    assert measured == [own]
    assert set(weights) == {2.0 if spare else 1.0}
    with pytest.raises(TrainingError, match="num_train 200, not 160"):
        fit([*write(tmp_path), *given, "--base_run", str(own), "--data.init_args.num_train", "160"])
    weights.clear()
    fit([*write(tmp_path), *given, "--base_run", str(own), "--model.codistillation_weight", "3"])
    assert set(weights) == {3.0}


def test_a_run_that_is_taken_over_leaves_nothing_of_what_was_there(tmp_path: Path) -> None:
    own, folder = base_run(tmp_path), tmp_path / "searched"
    for run in (own, folder):
        (run / "search" / "base-1").mkdir(parents=True)
        (run / "plan.json").write_text(run.name)
    (folder / "model").mkdir()
    (folder / "model" / "recipe.json").write_text("of a copy that was killed")
    take_over(own, folder)
    assert isinstance(restore(folder).network, MNIST1DNet)
    assert (folder / "plan.json").read_text() == "searched"
    of_search = {"plan.json"}
    assert {name: kept for name, kept in contents(folder).items() if name not in of_search} == {
        name: kept for name, kept in contents(own).items() if name not in of_search
    }


@pytest.mark.parametrize(
    ("made", "asked", "said"),
    [
        ([], ["--model.base.init_args.width", "9"], "was made with model.base.init_args.width 8, not 9"),
        ([], ["--data.init_args.num_train", "160"], "was made with data.init_args.num_train 200, not 160"),
        ([], ["--trainer.max_epochs", "3"], "was made with trainer.max_epochs 2, not 3"),
        ([], ["--trainer.max_epochs", "1"], "was made with trainer.max_epochs 2, not 1"),
        ([], ["--plan", "given", "--model.conversion", "null"], "--base_run is for a conversion, and"),
        (["--model.conversion", "{num_heads: 2}"], [], "was made with model.conversion.num_heads 2, not null"),
        (["unfinished"], [], "is not finished: end it with `ensemblenet fit --resume "),
        (["removed"], [], "No such file or directory"),
    ],
)
def test_another_run_than_the_bases_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    made: list[str],
    asked: list[str],
    said: str,
) -> None:
    monkeypatch.setattr(Trainer, "fit", lambda *given, **named: None)  # no training is needed to know
    monkeypatch.setattr("ensemblenet.training.fit.finished", lambda cli: cli.folder)
    own = base_run(tmp_path, *(made if made[0:1] == ["--model.conversion"] else []))
    if made != ["unfinished"]:
        (own / "results.json").write_text("{}")
    if made == ["removed"]:
        shutil.rmtree(own)
    capsys.readouterr()
    assert main(["fit", *write(tmp_path), "--base_run", str(own), *asked]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert said in line


def test_a_search_needs_whole_runs_and_validation_examples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *write(tmp_path), "--trainer.fast_dev_run", "2"]) == 2
    assert "--plan search takes whole runs in one process" in capsys.readouterr().err
    monkeypatch.setattr(MNIST1D, "val_dataloader", lambda self: [])
    assert main(["fit", *write(tmp_path)]) == 2
    assert "--plan search chooses by validation examples, and the data has none." in capsys.readouterr().err


@pytest.mark.parametrize("change", [["--trainer.max_epochs", "3"], ["--model.optimization.lr", "0.02"]])
def test_candidates_of_one_search_are_trained_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], change: list[str]
) -> None:
    monkeypatch.setattr("ensemblenet.training.fit.searched", lambda cli, run: cli.folder)  # killed as it began
    folder = fit(write(tmp_path))
    monkeypatch.setattr("ensemblenet.training.fit.searched", lambda cli, run: pytest.fail("it went on"))
    assert main(["fit", "--resume", str(folder), *change]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert f"{folder} was made with {change[0].removeprefix('--')} " in line
