"""What a study's page says."""

from __future__ import annotations

from ensemblenet.reports.comparison import comparison_table, summary


def row(method, error, kind="other", p=0.01, **more):
    values = {"method": method, "kind": kind, "error_mean": error, "error_std": 0.1, "seeds": 3, "p": p}
    return values | {"difference": error - 2.0} | more


def test_the_summary_says_who_wins_and_by_how_much() -> None:
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


def test_of_tagging_gap_is_shown_and_higher_is_better() -> None:
    cost = {"parameters": 5, "macs": 6.0, "num_heads": 2, "head_error_mean": 40.0}
    base, good, bad = (
        row(name, error, kind) | cost | {"difference": error - 36}
        for name, error, kind in (("base", 36.0, "base"), ("good", 35.0, "ours"), ("bad", 38.0, "other"))
    )
    assert summary([base, bad, good], "multilabel") == (
        "The base has GAP@20 64.00 ± 0.10 %. Best at no more than its cost: good with 65.00 ± 0.10 % (+1.00 points "
        "against the base, p = 0.010), before bad with 62.00 ± 0.10 %. 1 of 2 methods at no more than the base's cost "
        "have a higher mean GAP@20, 1 of them with p < 0.05."
    )
    table = comparison_table([base, bad, good], task="multilabel")
    cells = [list(column.cells) for column in table.columns]
    assert [column.header for column in table.columns][1] == "GAP@20, %"
    assert cells[0] == ["base", "good", "bad"]
    assert cells[1] == ["64.00 ± 0.10", "65.00 ± 0.10", "62.00 ± 0.10"]
    assert cells[2] == ["", "+1.00", "−2.00"]
    assert cells[-1] == ["60.00"] * 3
