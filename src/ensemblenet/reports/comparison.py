"""What `compare` shows: the table, the result in two sentences, and the page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from ensemblenet.reports.tables import (
    Column,
    Figure,
    draw_against_cost,
    draw_heads,
    draw_measures,
    results_table,
    with_spread,
    write_page,
)

__all__ = ["PAGE", "comparison_table", "ranked", "summary", "write_comparison"]

PAGE = "index.html"

Row = Mapping[str, Any]

_MOST_REASONS = 10
_TERMINAL_COLUMNS = 6
_ERROR = {"multiclass": "test error", "multilabel": "100 − GAP@20"}


def ranked(rows: Sequence[Row]) -> list[Row]:
    """The base, and behind it the others from the lowest error to the highest.

    Example:
        >>> rows = [{"method": name, "error_mean": error} for name, error in (("base", 2.0), ("a", 3.0), ("b", 1.0))]
        >>> [row["method"] for row in ranked(rows)]
        ['base', 'b', 'a']
    """
    return [rows[0], *sorted(rows[1:], key=lambda row: row["error_mean"])]


def comparison_table(rows: Sequence[Row], title: str | None = None) -> Table:
    """The rows for a terminal of 80 characters, ranked."""
    columns = _columns(rows[0])[:_TERMINAL_COLUMNS]
    head = Column("head, %", lambda row: f"{row['head_error_mean']:.2f}" if row["num_heads"] > 1 else "")
    return results_table(ranked(rows), title, [*columns, head])


def summary(rows: Sequence[Row], task: str = "multiclass") -> str:
    """Who wins, and by how much, in two sentences."""
    base, others = rows[0], [row for row in rows[1:] if row["kind"] != "larger"]
    start = f"The base has {_ERROR[task]} {with_spread(base, 'error')} %"
    if not others:
        return f"{start}; nothing of at most its cost was compared with it."
    best, *rest = ranked([base, *others])[1:]
    wins = [row for row in others if row["difference"] is not None and row["difference"] < 0]
    sure = [row for row in wins if row["p"] is not None and row["p"] < 0.05]
    verdict = "Best" if best["error_mean"] < base["error_mean"] else "No method beats it; closest"
    next_best = f", before {rest[0]['method']} with {with_spread(rest[0], 'error')} %" if rest else ""
    return (
        f"{start}. {verdict} at no more than its cost: {best['method']} with {with_spread(best, 'error')} % "
        f"({_change(best, base)} against the base, p {_relation(best)}){next_best}. "
        f"{len(wins)} of {len(others)} methods at no more than the base's cost have a lower mean error, "
        f"{len(sure)} of them with p < 0.05."
    )


def write_comparison(path: Path, results: Mapping[str, Any], environment: Mapping[str, Any]) -> None:
    """Write the page of a study and its figures.

    Args:
        path: the page's file.
        results: what `results.json` holds.
        environment: versions and machine.
    """
    study, rows = results["study"], results["rows"]
    shown = ranked(rows)
    error = _ERROR[study["task"]] + ", %"
    lead = Figure(
        "errors",
        f"{error[0].upper()}{error[1:]}, mean and standard deviation of a seed. Orange: the base; blue: "
        "co-distillation; hollow: larger than the base.",
        lambda: draw_measures(shown, [("error", error)]),
    )
    several = [row for row in shown if row["num_heads"] > 1]
    calibration = [("nll", "NLL, nats")]
    calibration += [("ece", "ECE")] if "ece_mean" in rows[0] else []
    figures = [
        Figure(
            "error_against_cost",
            "Error against cost, with the base as a line. Methods on the same conversion share their cost; of "
            "those that cost about the same the best is named.",
            lambda: draw_against_cost(shown, error),
        ),
        *_with_heads(shown, several, error),
        Figure(
            "calibration",
            "Quality of probabilities, lower is better: negative log-likelihood, and expected calibration error in 15 "
            "bins where there is one true class.",
            lambda: draw_measures(shown, calibration),
        ),
        Figure(
            "effort",
            "What training costs: processor time of one run, and the bytes that a training step holds (weights, "
            "gradients, optimizer state, what backward needs).",
            lambda: draw_measures(
                [dict(row) | {"megabytes_mean": row["memory_bytes"] / 1e6} for row in shown],
                [("cpu_seconds", "processor time, s"), ("megabytes", "memory, MB")],
            ),
        ),
    ]
    failures = [{"method": name, "kind": "failed"} for name in _failed_methods(results)]
    title = f"{_short(study['base'])} on {_short(study['data'])}: every method, the same effort"
    write_page(
        path,
        title,
        summary(rows, study["task"]),
        [*shown, *failures],
        {"Figures": figures},
        _notes(results),
        environment,
        _columns(rows[0]),
        lead,
    )


def _with_heads(shown: Sequence[Row], several: Sequence[Row], error: str) -> list[Figure]:
    if not several:
        return []
    return [
        Figure(
            "heads",
            "Error of the whole (circle) and of a single head (square; mean over heads, for OKDDip its leader), "
            "with the base as a line.",
            lambda: draw_heads(shown, error),
        ),
        Figure(
            "diversity",
            "How much heads differ: share of pairs whose most likely classes differ, and mean KL divergence between "
            "two heads.",
            lambda: draw_measures(several, [("disagreement", "disagreement"), ("head_kl", "KL, nats")]),
        ),
    ]


def _columns(base: Row) -> list[Column]:
    def of(heading: str, cell: Callable[[Row], str]) -> Column:
        return Column(heading, lambda row: _failed(heading) if row["kind"] == "failed" else cell(row))

    return [
        Column("method", lambda row: row["method"]),
        of("error, %", lambda row: with_spread(row, "error")),
        of("vs base", lambda row: "" if row["kind"] == "base" else _change(row, base)),
        of("p", lambda row: "" if row["kind"] == "base" else _p(row)),
        of("params", lambda row: f"{row['parameters'] / base['parameters']:.2f}"),
        of("MACs", lambda row: f"{row['macs'] / base['macs']:.2f}"),
        of("one head, %", lambda row: with_spread(row, "head_error") if row["num_heads"] > 1 else ""),
        of("runs", lambda row: str(row["seeds"]) + (f" ({n} failed)" if (n := len(row["failed_seeds"])) else "")),
        of("NLL", lambda row: with_spread(row, "nll", 3)),
        of("ECE", lambda row: with_spread(row, "ece", 3)),
        of("disagreement", lambda row: with_spread(row, "disagreement", 3) if row["num_heads"] > 1 else ""),
        of("lr", lambda row: f"{row['lr']:.2g}"),
        of("weight decay", lambda row: f"{row['weight_decay']:.2g}"),
        of("parameters", lambda row: f"{row['parameters']:,}"),
        of("CPU s", lambda row: f"{row['cpu_seconds_mean']:.1f}"),
        of("MB", lambda row: f"{row['memory_bytes'] / 1e6:.1f}"),
    ]


def _failed(heading: str) -> str:
    return "failed" if heading.startswith("error") else ""


def _change(row: Row, base: Row) -> str:
    return f"{100 * (row['error_mean'] / base['error_mean'] - 1):+.0f} %".replace("-", "−")


def _relation(row: Row) -> str:
    p = _p(row)
    return p.replace("<", "< ") if p.startswith("<") else f"= {p}"


def _p(row: Row) -> str:
    if row["p"] is None:
        return "?"
    return "<0.001" if row["p"] < 0.001 else f"{row['p']:.3f}"


def _notes(results: Mapping[str, Any]) -> list[str]:
    study, rows = results["study"], results["rows"]
    tuning = study["tuning"]
    count = {"multiclass": "share of examples", "multilabel": "100 (1 − GAP@20)"}[study["task"]]
    methods = "; ".join(f"{row['method']}: {row['summary']}" for row in rows)
    notes = [
        f"Every method was trained for {study['epochs']} epochs by {study['optimizer']} with the same schedule, "
        f"batches and augmentation; the last epoch counts. Conversions have {study['num_heads']} heads, cost at most "
        f"{study['budget']:g} of the base's parameters and MACs, and part at {study['split_at']!r}, unless a method "
        "says otherwise.",
        f"Learning rate ({tuning['lr'][0]:g} to {tuning['lr'][1]:g}) and weight decay "
        f"({tuning['weight_decay'][0]:g} to {tuning['weight_decay'][1]:g}) are each method's best of the same "
        f"{tuning['trials']} pairs, by the error on validation examples after one run of "
        f"{tuning['epochs'] or study['epochs']} epochs each. All else of a method is "
        "as its paper has it.",
        f"Error: {count}, on test examples that were read once. p: two-sided paired t-test against the base over "
        f"seeds, not corrected for {len(rows) - 1} comparisons. One head: mean over single heads, for OKDDip its "
        "leader. CPU s: processor time of one training.",
        f"Methods. {methods}.",
        f"All training together took {results['cpu_minutes']:.1f} minutes of processor time.",
    ]
    failed = results["failed"]
    notes += [
        f"Failed: {cell['method']}, {cell['phase']}, seed {cell['seed']}, lr {cell['lr']:.3g}: {cell['reason']}"
        for cell in failed[:_MOST_REASONS]
    ]
    if len(failed) > _MOST_REASONS:
        notes.append(f"{len(failed) - _MOST_REASONS} more cells failed; results.json lists all.")
    return notes


def _failed_methods(results: Mapping[str, Any]) -> list[str]:
    finished = {row["method"] for row in results["rows"]}
    return list(dict.fromkeys(cell["method"] for cell in results["failed"] if cell["method"] not in finished))


def _short(spec: Mapping[str, Any]) -> str:
    return spec["class_path"].rpartition(".")[2]
