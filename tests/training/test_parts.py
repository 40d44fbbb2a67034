"""Optimizer, schedule and run folders."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from ensemblenet.storage.runs import aside, create_run_folder, unfinished_runs, write_json
from ensemblenet.training.optimization import Optimization, build_optimizer, build_schedule


def test_decay_spares_what_has_one_dimension():
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    decayed, kept = build_optimizer(network, Optimization("sgd", weight_decay=0.1)).param_groups
    assert [parameter.ndim for parameter in decayed["params"]] == [2]
    assert {parameter.ndim for parameter in kept["params"]} == {1}
    [every] = build_optimizer(network, Optimization(weight_decay=0.1, decay_all=True)).param_groups
    assert len(every["params"]) == 4


def test_the_learning_rate_rises_and_falls_to_zero():
    optimizer = build_optimizer(nn.Linear(2, 2), settings := Optimization(lr=2.0, warmup=0.1))
    schedule = build_schedule(optimizer, 100, settings)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == rates[9] == rates[10] == 2.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0)


@pytest.mark.parametrize("option", [{"lr": 0.0}, {"weight_decay": -1.0}, {"momentum": 1.0}, {"warmup": 1.5}])
def test_numbers_out_of_range(option):
    [name] = option
    with pytest.raises(ValueError, match=f"{name} must be .*, got"):
        Optimization(**option)


def test_run_folders_are_always_new(tmp_path):
    assert len({create_run_folder(tmp_path, "run") for _ in range(4)}) == 4


def test_the_unfinished_run_is_the_newest_of_its_name(tmp_path):
    for name in ("a-20260101-000000", "a-20260102-000000", "a-20260103-000000", "a-b-20260104-000000"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").touch()
    (tmp_path / "a-20260103-000000" / "results.json").touch()
    (tmp_path / "a-20260105-000000").mkdir()  # not yet begun
    found = unfinished_runs(tmp_path, "a")
    assert [folder.name for folder in found] == ["a-20260102-000000", "a-20260101-000000"]
    assert unfinished_runs(tmp_path, "c") == []


def test_runs_of_one_second_are_in_the_order_of_their_numbers(tmp_path):
    made = ["a-20260101-000000", *(f"a-20260101-000000-{number}" for number in (2, 9, 10, 11))]
    for name in made:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").touch()
    assert [folder.name for folder in unfinished_runs(tmp_path, "a")] == made[::-1]


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "results.json"
    write_json(path, {"rows": [1]})

    def fail() -> None:
        with aside(path) as unfinished:
            unfinished.write_text("{")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert json.loads(path.read_text()) == {"rows": [1]}
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"rows": [torch.nan]})
