"""`fit --plan search`: successive halving against a direct account of it, what a kill leaves, and a whole run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from ensemblenet import convert, plans
from ensemblenet.cli.main import main
from ensemblenet.errors import BudgetError, TrainingError
from ensemblenet.models import MNIST1DNet
from ensemblenet.storage.restore import restore
from ensemblenet.training.fit import fit
from ensemblenet.training.module import Conversion
from ensemblenet.training.search import Candidate, candidates, search


def among():
    return [Candidate("base"), *(Candidate(name, Conversion(split_at=name)) for name in "abcdef")]


def scorer(quality, log):
    """Scores that grow with the length; `quality` says who is best."""

    def score(candidate, length):
        log.append((candidate.name, length))
        return quality[candidate.name] * (1 - 1 / (1 + length))

    return score


def test_the_better_half_goes_on_and_the_base_always(tmp_path: Path) -> None:
    log = []
    quality = dict(zip(["base", *"abcdef"], [0.5, 0.1, 0.6, 0.3, 0.2, 0.9, 0.4], strict=True))
    chosen = search(tmp_path, among(), 80, scorer(quality, log))
    assert [{name for name, length in log if length == rung} for rung in (10, 20, 40)] == [
        {"base", *"abcdef"},
        {"base", *"ebf"},
        {"base", "e"},
    ]
    assert len(log) == 7 + 4 + 2
    assert chosen.name == "e"
    assert json.loads((tmp_path / "plan.json").read_text())["chosen"] == "e"


@pytest.mark.parametrize("best", [0.5, 0.7])
def test_the_base_is_chosen_where_no_conversion_is_better(tmp_path: Path, best: float) -> None:
    quality = dict.fromkeys("abcdef", 0.4) | {"c": best, "base": 0.7}
    assert search(tmp_path, among(), 8, scorer(quality, [])).name == "base"  # also where they are equal


def test_a_killed_search_goes_on_after_what_is_finished(tmp_path: Path) -> None:
    quality = dict(zip(["base", *"abcdef"], [0.5, 0.1, 0.6, 0.3, 0.2, 0.9, 0.4], strict=True))
    log = []
    whole = scorer(quality, log)

    def dying(candidate, length):
        if len(log) == 9:
            raise KeyboardInterrupt
        return whole(candidate, length)

    with pytest.raises(KeyboardInterrupt):
        search(tmp_path, among(), 80, dying)
    assert search(tmp_path, among(), 80, whole).name == "e"
    assert len(log) == len(set(log)) == 13  # nothing ran twice


def test_the_scores_of_a_search_with_other_settings_are_not_taken(tmp_path: Path) -> None:
    search(tmp_path, among(), 8, scorer(dict.fromkeys(["base", *"abcdef"], 0.5), []))
    others = [Candidate("base"), Candidate("a", Conversion(split_at="a", budget=0.5))]
    with pytest.raises(TrainingError, match=r"plan.json is of a search with other settings of a; start a new run"):
        search(tmp_path, others, 8, scorer({}, []))


def test_candidates_keep_the_settings_and_fit_the_budget() -> None:
    base, x = MNIST1DNet(16), torch.randn(4, 40)
    found = candidates(base, x, Conversion(budget=0.9, seed=7))
    assert found[0].conversion is None
    shares = {point.split.name: point.split.macs_share for point in plans(base, x)}
    for candidate in found[1:]:
        assert (candidate.conversion.budget, candidate.conversion.seed) == (0.9, 7)
        model = convert(base, x, candidate.conversion.num_heads, 0.9, candidate.conversion.split_at)
        assert max(model.cost.share_of(model.base_cost)) <= 0.9
    used = {candidate.conversion.split_at for candidate in found[1:]}
    assert "conv1" in used  # what "auto" chooses
    assert max(shares[name] for name in used) > 0.3
    with pytest.raises(TrainingError, match=r"No conversion of the base fits a budget of 0\.001"):
        candidates(base, x, Conversion(budget=0.001))


def test_candidates_are_as_wide_as_what_auto_takes() -> None:
    base = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 64))
    x = torch.randn(4, 64)
    widths = {plan.split.name: plan.width for plan in plans(base, x, 4, 0.15)}
    assert 0 < max(width for width in widths.values() if width) < 0.1
    with pytest.raises(BudgetError, match=r"heads that keep 0\.1 of their channels do not fit"):
        convert(base, x, 4, 0.15)
    found = candidates(base, x, Conversion(budget=0.15))
    assert [candidate.name for candidate in found] == ["base", "2-heads-input"]


def test_heads_without_parameters_are_no_candidates() -> None:
    base, x = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3), nn.ReLU()), torch.randn(4, 8)
    assert plans(base, x)[-1].width == 1  # all heads would be the same
    with pytest.raises(TrainingError, match="No conversion of the base fits"):
        candidates(base, x, Conversion(min_width=1.0))


@pytest.fixture
def config(tmp_path):
    settings = {
        "name": "tiny",
        "plan": "search",
        "model": {
            "base": {"class_path": "ensemblenet.models.MNIST1DNet", "init_args": {"width": 8}},
            "heads": "looped",
            "optimization": {"lr": 0.01},
        },
        "data": {
            "class_path": "ensemblenet.data.MNIST1D",
            "init_args": {"num_train": 200, "num_val": 100, "num_test": 50, "batch_size": 20},
        },
        "trainer": {"max_epochs": 4, "accelerator": "cpu", "devices": 1, "enable_progress_bar": False},
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_a_run_trains_what_the_search_chose(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = fit(["--config", str(config), "--runs", str(tmp_path / "runs")])
    plan = json.loads((folder / "plan.json").read_text())
    stored = yaml.safe_load((folder / "config.yaml").read_text())
    chosen = next(entry for entry in plan["candidates"] if entry["name"] == plan["chosen"])
    assert stored["plan"] == "given"
    assert stored["trainer"]["max_epochs"] == 4
    assert stored["model"]["conversion"] == chosen["conversion"]
    [row] = json.loads((folder / "results.json").read_text())["rows"]
    assert row["num_heads"] == (chosen["conversion"] or {"num_heads": 1})["num_heads"]
    assert restore(folder).inputs.shape == (40,)
    assert list((tmp_path / "runs").iterdir()) == [folder]  # short runs lie within it
    assert not list((folder / "search").glob("*/results.json"))  # and read no test data
    assert f"Plan: {plan['chosen']}" in capsys.readouterr().out


def test_a_search_needs_a_length(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", str(config), "--runs", str(tmp_path), "--trainer.max_epochs", "null"]
    assert main(["fit", *arguments, "--trainer.max_steps", "5"]) == 2
    assert "--plan search shortens runs by epochs: give --trainer.max_epochs." in capsys.readouterr().err
