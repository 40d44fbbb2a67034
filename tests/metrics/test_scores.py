"""The table of scores: whatever a metric gives under one of its names is shown everywhere."""

from __future__ import annotations

import pytest
from rich.console import Console

from ensemblenet.metrics import scores
from ensemblenet.metrics.scores import IN_PERCENT, SCORES, TASKS, Score, in_row, meanings, row_score
from ensemblenet.reports.tables import results_table, scores_columns, with_spread


def test_every_name_in_the_tables_is_a_score() -> None:
    assert set(IN_PERCENT) <= set(SCORES)
    for task in TASKS.values():
        assert {task.main, task.best} <= set(SCORES)
        assert SCORES[task.main].unit == "%"


def test_a_share_is_shown_in_percent_wherever_it_stands() -> None:
    assert SCORES["gap"].text(0.6463) == "64.63"  # of a metric
    row = {"gap_mean": in_row("gap", 0.6463), "gap_std": in_row("gap", 0.001), "seeds": 2}
    assert row["gap_mean"] == pytest.approx(64.63)
    assert with_spread(row, "gap") == "64.63 ± 0.10"
    assert with_spread({"disagreement_mean": 0.25, "disagreement_std": 0, "seeds": 1}, "disagreement") == "25.00"
    assert row_score("disagreement").shown(in_row("disagreement", 0.25)) == 25


def test_of_classification_errors_are_shown_whatever_was_measured() -> None:
    row = {"top5_mean": 0.9, "top5_std": 0.01, "seeds": 2, "accuracy": 0.75, "method": "base", "num_heads": 1}
    assert with_spread(row, "top5") == "10.00 ± 1.00"
    *_, column = scores_columns([row | {"parameters": 5, "macs": 6.0}])
    assert (column.heading, column.cell(row)) == ("error", "25.00")
    assert SCORES["accuracy"].lower_is_better
    assert not SCORES["gap"].lower_is_better


def test_a_new_score_gets_a_column_and_a_meaning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCORES, "worst", Score("worst class", "the accuracy of the worst class", 100, 1, "%"))
    row = {"method": "base", "num_heads": 1, "parameters": 5, "macs": 6.0, "accuracy": 0.5, "worst": 0.125}
    console = Console(width=100)
    with console.capture() as captured:
        console.print(results_table([row], columns=scores_columns([row])))
    assert "worst class" in captured.get()
    assert "12.5" in captured.get()
    assert meanings(row) == (
        f"error is {SCORES['accuracy'].meaning}; worst class is the accuracy of the worst class. "
        "Higher is better for worst class. Lower is better for error."
    )
    assert meanings(["nll", "gap"]).endswith("Higher is better for GAP@20. Lower is better for NLL.")


def test_diversity_of_one_head_is_not_shown() -> None:
    row = {"method": "head 0", "num_heads": 1, "parameters": 5, "macs": 6.0, "disagreement": 0.0}
    [*_, column] = scores_columns([row])
    assert column.heading == SCORES["disagreement"].heading
    assert column.cell(row) == ""
    assert column.cell(row | {"num_heads": 2}) == "0.00"


def test_which_way_is_better_is_said_for_all_but_diversity() -> None:
    undecided = {name for name, score in scores.SCORES.items() if score.lower_is_better is None}
    assert undecided == {"disagreement", "head_kl"}
