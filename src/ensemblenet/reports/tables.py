"""Tables in the terminal: their columns and how numbers are written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich import box
from rich.table import Table

from ensemblenet.metrics.scores import IN_PERCENT, SCORES, row_score

__all__ = [
    "COST_NOTE",
    "SURE",
    "Column",
    "p_text",
    "results_columns",
    "results_table",
    "scores_columns",
    "short_number",
    "time_columns",
    "with_spread",
]

_MACS_NOTE = "MACs are multiply-adds for one example: half of what torch.utils.flop_counter counts."
_TIME_NOTE = "Time is an estimate for an accelerator."
COST_NOTE = f"{_MACS_NOTE} Activations (act.) are the elements that operators write for it. {_TIME_NOTE}"

_ON_PAGES = ("act.", "time")  # beside many scores a terminal has no room for them
SURE = 0.05  # a p below it is more than noise

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Args:
        heading: the text above it.
        cell: gives the text of a row.

    Example:
        >>> Column("K", lambda row: str(row["num_heads"])).cell({"num_heads": 4})
        '4'
    """

    heading: str
    cell: Callable[[Row], str]


def results_table(
    rows: Sequence[Row],
    title: str | None = None,
    columns: Sequence[Column] = (),
    left_out: Sequence[str] = _ON_PAGES,
) -> Table:
    """Rows as a table for the terminal, which has no room for all columns: the page shows them.

    Args:
        rows: one a line.
        title: the line above the table.
        columns: the columns; if empty, [`results_columns`][ensemblenet.reports.tables.results_columns].
        left_out: the headings of those that are not shown.

    Example:
        >>> results_table([{"method": "base"}], columns=[Column("method", lambda row: row["method"])]).row_count
        1
    """
    columns = [column for column in columns or results_columns(rows) if column.heading not in left_out]
    timed = any(column.heading == "time" for column in columns)
    table = Table(
        title=title,
        caption=f"{_MACS_NOTE} {_TIME_NOTE}" if timed else _MACS_NOTE,
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    for k, column in enumerate(columns):
        table.add_column(column.heading, justify="right" if k else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(column.cell(row) for column in columns))
    return table


def results_columns(rows: Sequence[Row]) -> list[Column]:
    """For rows of a `results.json`: size, errors or the like, and the time of a prediction where it was measured.

    Example:
        >>> [column.heading for column in results_columns([{"error_mean": 1.5}])]
        ['method', 'K', 'params', 'MACs', 'error, %', 'runs']
    """
    timed = any(row.get("milliseconds") is not None for row in rows)
    return [
        Column("method", lambda row: row["method"]),
        Column("K", lambda row: str(row["num_heads"])),
        Column("params", lambda row: f"{row['parameters']:,}"),
        Column("MACs", lambda row: f"{row['macs']:,.0f}"),
        *time_columns(rows),
        *(
            Column(SCORES[name].label, partial(with_spread, name=name))
            for name in IN_PERCENT
            if any(f"{name}_mean" in row for row in rows)
        ),
        Column("runs", lambda row: str(row["seeds"])),
        *([Column("ms", lambda row: f"{row['milliseconds']:.2f}")] if timed else []),
    ]


def scores_columns(rows: Sequence[Row]) -> list[Column]:
    """For rows of [`ensemblenet.evaluation.scoring.score`][]: cost, and the scores that any of them has.

    Example:
        >>> [column.heading for column in scores_columns([{"accuracy": 0.9, "nll": 0.3}])]
        ['', 'params', 'MACs', 'error', 'NLL']
    """

    def text(row: Row, name: str) -> str:
        alone = SCORES[name].of_several and row["num_heads"] == 1
        return "" if alone or name not in row else SCORES[name].text(row[name])

    return [
        Column("", lambda row: row["method"]),
        Column("params", lambda row: short_number(row["parameters"])),
        Column("MACs", lambda row: short_number(row["macs"])),
        *time_columns(rows),
        *(
            Column(score.heading, partial(text, name=name))
            for name, score in SCORES.items()
            if any(name in row for row in rows)
        ),
    ]


def time_columns(rows: Sequence[Row]) -> list[Column]:
    """Activations and estimated time against the first row's; results of older versions have none.

    Example:
        >>> rows = [{"activations": 10.0, "time": 20.0}, {"activations": 15.0, "time": 25.0}]
        >>> [(column.heading, column.cell(rows[1])) for column in time_columns(rows)]
        [('act.', '1.50'), ('time', '1.25')]
    """
    whole = rows[0]
    return [
        Column(heading, lambda row, name=name: f"{row[name] / whole[name]:.2f}")
        for heading, name in (("act.", "activations"), ("time", "time"))
        if whole.get(name) and all(name in row for row in rows)
    ]


def with_spread(row: Row, name: str) -> str:
    """Mean and standard deviation of a score in a row of `results.json`; empty where the row lacks it.

    Example:
        >>> with_spread({"error_mean": 1.234, "error_std": 0.04, "seeds": 3}, "error")
        '1.23 ± 0.04'
    """
    if row.get(f"{name}_mean") is None:
        return ""
    score = row_score(name)
    mean = score.text(row[f"{name}_mean"])
    return f"{mean} ± {abs(score.scale) * row[f'{name}_std']:.{score.digits}f}" if row["seeds"] > 1 else mean


def short_number(number: float) -> str:
    """A count in four digits.

    Example:
        >>> short_number(217_120), short_number(5_075_734), short_number(97)
        ('217.1k', '5.076M', '97')
    """
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.4g}{name}"
    return f"{number:.0f}"


def p_text(p: float, name: str = "") -> str:
    """A test's p in three digits, in a sentence behind its name.

    Example:
        >>> p_text(0.0466), p_text(1e-7), p_text(0.0466, "p "), p_text(1e-7, "p ")
        ('0.047', '<0.001', 'p = 0.047', 'p < 0.001')
    """
    relation, number = ("<", "0.001") if p < 0.001 else ("=", f"{p:.3f}")
    return f"{name}{relation} {number}" if name else f"{relation.strip('=')}{number}"
