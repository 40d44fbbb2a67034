"""The demo, end to end but short, and the page that it writes."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch

from ensemblenet.cli import demo as module
from ensemblenet.cli.demo import PAGE, Job, Method, demo_methods, evaluate, run_demo, train
from ensemblenet.cost import Cost
from ensemblenet.storage.runs import result_row
from ensemblenet.training.optimization import Optimization


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    short = [Method(method.name, replace(method.job, epochs=1), seeds=1) for method in demo_methods()]
    run_demo(folder, short, workers=1, sizes=(200, 20, 100))
    return folder


def test_results_hold_a_row_a_method(folder):
    rows = json.loads((folder / "results.json").read_text())["rows"]
    base, ours = rows[:2]
    assert (base["method"], ours["method"]) == ("base", "ensemblenet")
    assert len({row["method"] for row in rows}) == len(rows)
    assert ours["parameters"] <= 0.95 * base["parameters"]
    assert ours["macs"] <= 0.95 * base["macs"]
    for row in rows:
        assert row["seeds"] == 1
        assert 0 <= row["error_mean"] <= 100
        assert row["milliseconds"] > 0
    assert json.loads((folder / "environment.json").read_text())["cpus"]


def test_the_page_is_self_contained_and_shows_every_figure(folder):
    page = (folder / PAGE).read_text()
    assert page.count("<figure>") == 3
    assert page.count("data:image/png;base64,") == 6  # each for light and dark
    assert not re.search(r"(src|href|srcset)=\"(?!data:)|https?://|url\(", page)
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page
    for name in ("error_against_cost", "error_against_lambda", "agreement_of_heads"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_prints_the_table_and_the_page(tmp_path, monkeypatch, capsys):
    methods = demo_methods

    def two_methods(seeds, epochs):
        return methods(seeds, epochs)[:2] + methods(seeds, epochs)[4:5]

    monkeypatch.setattr(module, "demo_methods", two_methods)
    monkeypatch.setattr(module, "run_jobs", lambda jobs, *_: [module.run_job(job, (100, 10, 50)) for job in jobs])
    folder = module.demo(["--seeds", "1", "--epochs", "1", "--runs", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "ensemblenet" in printed
    assert "of the base's parameters" in printed
    assert str(folder / PAGE) in printed


def test_training_is_deterministic():
    x, y = torch.randn(100, 40), torch.randint(10, (100,))
    job = Job(num_heads=2, base_width=8)
    results = []
    for _ in range(2):
        network = job.network()
        train(network, (x, y), Optimization(), weight=2.0, epochs=1, seed=0)
        results.append(evaluate(network, (x, y)))
    assert results[0] == results[1]
    assert len(results[0]["head_errors"]) == 2
    assert results[0]["pairs"][0][0] == 100


def test_a_row_has_mean_and_spread():
    row = result_row("base", Cost(5, 6.0), [1.0, 3.0], [2.0, 2.0], note="x")
    assert row["error_mean"] == 2
    assert row["error_std"] == pytest.approx(2**0.5)
    assert row["head_error_std"] == 0
    assert row["note"] == "x"
