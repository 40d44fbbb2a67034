"""What a study's page says."""

from __future__ import annotations

from ensemblenet.reports.comparison import summary


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
