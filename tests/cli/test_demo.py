"""The demo, a preset of `compare`, end to end but short, and the page that it writes."""

from __future__ import annotations

import json
import re
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest

from ensemblenet.cli import demo as module
from ensemblenet.cli.demo import demo_study
from ensemblenet.cost import Cost
from ensemblenet.reports.comparison import PAGE
from ensemblenet.storage.runs import result_row
from ensemblenet.study.settings import Study

SIZES = {"batch_size": 100, "num_train": 200, "num_val": 20, "num_test": 100}
NAMES = ["base", "ensemblenet", "shorter, wider base", "ensemblenet, half", "ensemblenet, λ=0", "ensemblenet, λ=10"]


def short(study: Study) -> Study:
    return replace(study, data={"class_path": "ensemblenet.data.MNIST1D", "init_args": SIZES})


@pytest.fixture(scope="module")
def said_and_folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What the command printed, and where its run is."""
    arguments = ["--seeds", "1", "--epochs", "1", "--workers", "1", "--runs", str(tmp_path_factory.mktemp("demo"))]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as printed:
        patch.setattr(module, "demo_study", lambda seeds, epochs: short(demo_study(seeds, epochs)))
        folder = module.demo(arguments)
    return printed.getvalue(), folder


@pytest.fixture
def folder(said_and_folder: tuple[str, Path]) -> Path:
    return said_and_folder[1]


def test_results_hold_a_row_a_method(folder: Path) -> None:
    results = json.loads((folder / "results.json").read_text())
    rows = results["rows"]
    base, ours, reshaped, half = rows[:4]
    assert [row["method"] for row in rows] == NAMES
    assert ours["parameters"] <= 0.95 * base["parameters"]
    assert ours["macs"] <= 0.95 * base["macs"]
    assert 0.8 < max(reshaped["parameters"] / base["parameters"], reshaped["macs"] / base["macs"]) <= 0.95
    assert max(half["parameters"] / base["parameters"], half["macs"] / base["macs"]) <= 0.5
    for row in rows:
        assert row["seeds"] == 1
        assert 0 <= row["error_mean"] <= 100
        assert row["milliseconds"] > 0
        assert (row["trials"], row["validation_error"]) == (0, None)  # its settings are given
    assert [(row["lr"], row["weight_decay"]) for row in rows[:2]] == [(0.01, 0.5), (0.01, 0.5)]
    assert [row["setup"]["weight"] for row in rows[-2:]] == [0, 10]
    assert results["failed"] == []
    assert json.loads((folder / "environment.json").read_text())["cpus"]


def test_no_trial_tunes(folder: Path) -> None:
    trials = [json.loads(line)["cell"] for line in (folder / "cells.jsonl").read_text().splitlines()]
    assert {trial["phase"] for trial in trials} == {"test"}
    assert len(trials) == len(NAMES)


def test_the_page_is_self_contained_and_shows_every_figure(folder: Path) -> None:
    page = (folder / PAGE).read_text()
    assert page.count("<figure>") == 8
    assert page.count("data:image/png;base64,") == 16  # each for light and dark
    assert not re.search(r"(src|href|srcset)=\"(?!data:)|https?://|url\(", page)
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page
    for name in ("error_against_cost", "error_against_lambda", "diversity"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "Learning rate and weight decay were given, not tuned here, for all methods." in page


def test_the_command_prints_the_table_and_the_page(said_and_folder: tuple[str, Path]) -> None:
    printed, folder = said_and_folder
    assert "ensemblenet" in printed
    assert "of the base's parameters" in printed
    assert str(folder / PAGE) in printed
    # its first sentence too
    assert re.search(
        r"2 heads at 0\.\d\d of the base&#39;s parameters and 0\.\d\d of its MACs, with ", (folder / PAGE).read_text()
    )


def test_the_headline_tells_what_both_times_are() -> None:
    shared = {"error_std": 0.1, "seeds": 2, "num_heads": 2, "p": 0.01}
    base = shared | {"parameters": 100, "macs": 50.0, "milliseconds": 4.0, "cpu_seconds_mean": 10, "error_mean": 4.0}
    ours = shared | {"parameters": 90, "macs": 45.0, "milliseconds": 5.0, "cpu_seconds_mean": 12, "error_mean": 3.0}
    assert module._headline([base, ours]) == (
        "2 heads at 0.90 of the base's parameters and 0.90 of its MACs, with 1.25 of its time for a prediction and "
        "1.20 for training, both on this machine's processor: test error 3.00 ± 0.10 % instead of 4.00 ± 0.10 % "
        "(-25 %); that is more than noise (2 seeds, p = 0.010)."
    )
    assert module._headline([base, ours | {"seeds": 1, "p": None}]).endswith("nobody knows whether that is noise.")


def test_a_study_gives_what_it_compares_all_seeds_and_the_others_one() -> None:
    seeds = {name: candidate.seeds for name, candidate in demo_study(seeds=5).candidates().items()}
    assert seeds == dict.fromkeys(NAMES, 1) | dict.fromkeys(NAMES[:3], 5)


def test_a_row_has_mean_and_spread() -> None:
    row = result_row("base", Cost(5, 6.0), [1.0, 3.0], [2.0, 2.0], note="x")
    assert row["error_mean"] == 2
    assert row["error_std"] == pytest.approx(2**0.5)
    assert row["head_error_std"] == 0
    assert row["note"] == "x"


def test_a_demo_that_fails_before_its_first_trial_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "demo_study", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError) as caught:
        module.demo(["--runs", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []
    assert not hasattr(caught.value, "__notes__")  # nothing goes on with a demo
