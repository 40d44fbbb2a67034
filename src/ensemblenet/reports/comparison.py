"""The results of a study: a table, two sentences, and a page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table as TerminalTable

from ensemblenet.cost import Budget
from ensemblenet.functional import Task
from ensemblenet.metrics.scores import SCORES, TASKS, meanings, row_as_shown
from ensemblenet.reports.comparison_figures import (
    against_cost_height,
    draw_against_cost,
    draw_heads,
    draw_measures,
    draw_weights,
)
from ensemblenet.reports.figures import Figure, draw_pairs
from ensemblenet.reports.names import data_name, network_name
from ensemblenet.reports.page import Table, write_page
from ensemblenet.reports.tables import (
    COST_NOTE,
    SURE,
    Column,
    p_text,
    results_table,
    time_columns,
    with_spread,
)

__all__ = ["PAGE", "begins_with", "comparison_table", "noise", "ranked", "summary", "tested_on", "write_comparison"]

PAGE = "index.html"

Row = Mapping[str, Any]

_MOST_REASONS = 10
_TERMINAL_COLUMNS = 6


def ranked(rows: Sequence[Row]) -> list[Row]:
    """The base, and behind it the others from the best to the worst.

    Example:
        >>> rows = [{"method": name, "error_mean": error} for name, error in (("base", 2.0), ("a", 3.0), ("b", 1.0))]
        >>> [row["method"] for row in ranked(rows)]
        ['base', 'b', 'a']
    """
    return [rows[0], *sorted(rows[1:], key=lambda row: row["error_mean"])]


def comparison_table(rows: Sequence[Row], title: str | None = None, task: Task = "multiclass") -> TerminalTable:
    """The rows for a terminal of 80 characters, ranked."""
    shown = _as_shown(rows, task)
    columns = [*_columns(shown, task)[:_TERMINAL_COLUMNS], *time_columns(shown)[1:]]
    head = Column("head", lambda row: f"{row['head_error_mean']:.2f}" if row["num_heads"] > 1 else "")
    return results_table(shown, title, [*columns, head], left_out=())


def _as_shown(rows: Sequence[Row], task: Task) -> list[Row]:
    """The rows ranked, with the score that speaks for the task as `error`: for tagging GAP@20, else the error."""
    return [row_as_shown(row, task) for row in ranked(rows)]


def summary(rows: Sequence[Row], task: Task = "multiclass") -> str:
    """Who wins, by how much, and whether that is noise.

    Args:
        rows: the rows of a study's `results.json`, the base first.
        task: names the score.

    Example:
        >>> summary([{"method": "base", "kind": "base", "error_mean": 2.0, "seeds": 1}])
        'The base has test error 2.00 %; nothing of at most its cost was compared with it.'
    """
    base, *others = _as_shown([rows[0], *(row for row in rows[1:] if row["kind"] != "larger")], task)
    title, score = TASKS[task].title, with_spread(base, "error")
    if not others:
        return f"The base has {title} {score} %; nothing of at most its cost was compared with it."
    best, *rest = others
    found = f"{best['method']} with {title} {with_spread(best, 'error')} % instead of {score} %"
    verdict = f"Best at no more than the base's cost is {found} ({_more_or_less(best, base, task)})"
    if (best["error_mean"] < base["error_mean"]) != _lower(task):
        verdict = f"Nothing at no more than the base's cost beats it. Closest is {found}"
    text = f"{verdict}; {noise(best, base)}."
    if not rest:
        return text
    wins = [row for row in others if row["difference"] is not None and row["difference"] < 0]
    sure = [row for row in wins if row["p"] is not None and row["p"] < SURE]
    are = "is" if len(wins) == 1 else "are"
    return (
        f"{text} Next is {rest[0]['method']} with {with_spread(rest[0], 'error')} %. Of {len(others)} methods at that "
        f"cost {len(wins)} {are} better on average than the base, {len(sure)} by more than noise."
    )


def _more_or_less(row: Row, base: Row, task: Task) -> str:
    change = _change(row, base, task)
    word = ("less" if _lower(task) else "fewer") if change.startswith("−") else "more"
    return f"{change[1:]}{'' if _lower(task) else ' points'} {word}"


def noise(row: Row, base: Row) -> str:
    """Whether a method's difference from the base is noise, in words.

    Example:
        >>> noise({"seeds": 5, "p": 0.01}, {"seeds": 5}), noise({"seeds": 1, "p": None}, {"seeds": 5})
        ('that is more than noise (5 seeds, p = 0.010)', 'one seed, so nobody knows whether that is noise')
    """
    seeds = min(row["seeds"], base["seeds"])
    if row["p"] is None:
        return "one seed, so nobody knows whether that is noise" if seeds < 2 else "whether that is noise is not known"
    says = "that is more than noise" if row["p"] < SURE else "that may be noise"
    return f"{says} ({seeds} seeds, {p_text(row['p'], 'p ')})"


def write_comparison(
    path: Path, results: Mapping[str, Any], environment: Mapping[str, Any], headline: str | None = None
) -> None:
    """Write the page of a study and its figures.

    Args:
        path: the page's file.
        results: the content of `results.json`.
        environment: versions and machine.
        headline: the first sentences of the page; None takes [`summary`][ensemblenet.reports.comparison.summary].
    """
    study, rows = results["study"], results["rows"]
    task: Task = study["task"]
    shown = _as_shown(rows, task)
    finished = {row["method"] for row in rows}
    unfinished = dict.fromkeys(trial["method"] for trial in results["failed"] if trial["method"] not in finished)
    failures = [{"method": name, "kind": "failed"} for name in unfinished]
    base, data = network_name(study["base"]), _data(study["data"])
    effort = ", the same effort for each" if all(row["trials"] for row in rows) else ""
    number = f"{len(rows)} methods compared" if len(rows) > 1 else "one method"
    halved = f", {tested_on(results)}" if results.get("halves") else ""
    error = f"{TASKS[task].title}, %"
    write_page(
        path,
        f"{base[0].upper()}{base[1:]} on {data}: {number}{effort}{halved}",
        " ".join(filter(None, [headline or summary(rows, task), _halves(results)])),
        _lead(shown, error, _lower(task)),
        {
            "Results": [Table([*shown, *failures], _columns(shown, task), COST_NOTE)],
            "Figures": _figures(shown, error, _lower(task)),
            "What training takes": [Table(shown, _training_columns(shown))],
        },
        _notes(results),
        environment,
    )


def tested_on(results: Mapping[str, Any]) -> str:
    """On which examples a study tested, in words.

    Example:
        >>> tested_on({"halves": [60, 61]})
        'tested on half of the validation data'
    """
    return "tested on half of the validation data" if results.get("halves") else "tested on the test data"


def begins_with(study: Mapping[str, Any]) -> str | None:
    """With which weights the methods of a study begin, in words; None where all are drawn anew.

    Example:
        >>> study = {"base": {"init_args": {"weights": "a.pth"}}, "init": "inherit", "freeze": "trunk"}
        >>> begins_with(study)
        'The base begins with the weights a.pth and is trained on; the others inherit them, with a frozen trunk.'
    """
    weights, init = (study["base"].get("init_args") or {}).get("weights"), study.get("init") or "fresh"
    if weights is None and init == "fresh":
        return None
    classes = f", with fresh classifiers of {number} classes" if (number := study.get("num_classes")) else ""
    frozen = ", with a frozen trunk" if study.get("freeze") else ""
    others = f"inherit them{frozen}" if init == "inherit" else "begin with fresh ones, unless their name says otherwise"
    named = "its weights" if weights is None else f"the weights {weights}"
    return f"The base begins with {named} and is trained on{classes}; the others {others}."


def _halves(results: Mapping[str, Any]) -> str | None:
    """What a study did for want of a test split."""
    if not (halves := results.get("halves")):
        return None
    return (
        "The data has no test split: methods were tuned on one half of the validation data "
        f"({halves[0]:,} examples) and tested on the other ({halves[1]:,})."
    )


def _lead(rows: Sequence[Row], error: str, lower_is_better: bool) -> list[Figure]:
    """What is to be seen first: who is how good, and at what cost."""
    costs = {"macs": "MACs"} | ({"time": "estimated time"} if all(row.get("time") for row in rows) else {})
    return [
        Figure(
            "errors",
            f"{error[0].upper()}{error[1:]}, mean and standard deviation of a seed. Orange: the base; blue: "
            "co-distillation; hollow: larger than the base.",
            lambda: draw_measures(rows, [("error", error)], against_cost_height(rows, len(costs))),
        ),
        Figure(
            "error_against_cost",
            "The same against what a prediction costs. Dashed: the base's; shaded: better at no more than its cost.",
            lambda: draw_against_cost(rows, costs, error, lower_is_better),
        ),
    ]


def _figures(rows: Sequence[Row], error: str, lower_is_better: bool) -> list[Figure]:
    """The figures below the table.

    Args:
        rows: as they are shown.
        error: the name of the score.
        lower_is_better: of that score.
    """
    name = error.removeprefix("test ").removesuffix(", %")
    title = f"{name[0].upper()}{name[1:]}"
    several = [row for row in rows if row["num_heads"] > 1]
    calibration = [(name, SCORES[name].label) for name in ("nll", "ece") if f"{name}_mean" in rows[0]]
    figures = [
        Figure(
            "error_against_parameters",
            f"{title} against the number of parameters. Methods on the same conversion have the same.",
            lambda: draw_against_cost(rows, {"parameters": "parameters"}, error, lower_is_better),
        ),
    ]
    if len(swept := _swept(rows)) > 2:
        seeds = ", ".join(f"{row['seeds']} at λ = {row['setup']['weight']:g}" for row in swept)
        figures.append(
            Figure(
                "error_against_lambda",
                f"{title} of the ensemble and of its single heads against the co-distillation weight, with the base as "
                f"a line; seeds: {seeds}.",
                lambda: draw_weights(swept, rows[0], error),
            )
        )
    if several:
        figures += [
            Figure(
                "heads",
                f"{title} of the whole (circle) and of a single head (square; mean over heads, for OKDDip its leader), "
                "with the base as a line.",
                lambda: draw_heads(rows, error),
            ),
            Figure(
                "diversity",
                "How much heads differ: share of pairs whose most likely classes differ, and mean KL divergence "
                "between two heads.",
                lambda: draw_measures(several, [(name, SCORES[name].label) for name in ("disagreement", "head_kl")]),
            ),
        ]
    if paired := next((row for row in rows if row["kind"] == "ours" and len(row.get("pairs", ())) > 2), None):
        figures.append(
            Figure(
                "agreement_of_heads",
                f"{paired['method']}: how often two heads have the same most likely class. Heads that always have "
                "would gain nothing from being several.",
                lambda: draw_pairs(paired["pairs"]),
            )
        )
    return [
        *figures,
        Figure(
            "calibration",
            "Quality of probabilities, lower is better: negative log-likelihood, and expected calibration error in 15 "
            "bins where there is one true class.",
            lambda: draw_measures(rows, calibration),
        ),
        Figure(
            "effort",
            "What training costs: processor time of one run, and the bytes that a training step holds (weights, "
            "gradients, optimizer state, what backward needs).",
            lambda: draw_measures(
                [dict(row) | {"megabytes_mean": row["memory_bytes"] / 1e6} for row in rows],
                [("cpu_seconds", "processor time, s"), ("megabytes", "memory, MB")],
            ),
        ),
    ]


def _swept(rows: Sequence[Row]) -> list[Row]:
    """This project's method on one conversion, that of most lambdas, by rising lambda."""
    by_plan: dict[str, dict[float, Row]] = {}
    for row in rows:
        if row["kind"] == "ours":
            plan = str({key: value for key, value in row["setup"].items() if key != "weight"})
            by_plan.setdefault(plan, {})[row["setup"]["weight"]] = row
    most = max(by_plan.values(), key=len, default={})
    return [most[weight] for weight in sorted(most)]


def _columns(rows: Sequence[Row], task: Task) -> list[Column]:
    base, main = rows[0], SCORES[TASKS[task].main].label

    def of(heading: str, cell: Callable[[Row], str]) -> Column:
        if_failed = "failed" if heading == main else ""
        return Column(heading, lambda row: if_failed if row["kind"] == "failed" else cell(row))

    def score(name: str) -> Column:
        alone = SCORES[name].of_several
        return of(SCORES[name].label, lambda row: "" if alone and row["num_heads"] == 1 else with_spread(row, name))

    measured = [name for name in SCORES if name not in ("error", "head_error")]
    return [
        Column("method", lambda row: row["method"]),
        of(main, lambda row: with_spread(row, "error")),
        of("vs base", lambda row: "" if row["kind"] == "base" else _change(row, base, task)),
        of("p", lambda row: "" if row["kind"] == "base" else _p(row, base)),
        of("params", lambda row: f"{row['parameters'] / base['parameters']:.2f}"),
        of("MACs", lambda row: f"{row['macs'] / base['macs']:.2f}"),
        *(of(column.heading, column.cell) for column in time_columns(rows)),
        of("one head, %", lambda row: with_spread(row, "head_error") if row["num_heads"] > 1 else ""),
        of("runs", lambda row: str(row["seeds"]) + (f" ({n} failed)" if (n := len(row["failed_seeds"])) else "")),
        *(score(name) for name in measured if any(f"{name}_mean" in row for row in rows)),
    ]


def _training_columns(rows: Sequence[Row]) -> list[Column]:
    """What a method's training was given, and what it took."""
    timed = any("milliseconds" in row for row in rows)
    return [
        Column("method", lambda row: row["method"]),
        Column("learning rate", lambda row: f"{row['lr']:.2g}"),
        Column("weight decay", lambda row: f"{row['weight_decay']:.2g}"),
        Column("parameters", lambda row: f"{row['parameters']:,}"),
        *([Column("ms", lambda row: f"{row['milliseconds']:.2f}")] if timed else []),
        Column("CPU s", lambda row: f"{row['cpu_seconds_mean']:.1f}"),
        Column("MB", lambda row: f"{row['memory_bytes'] / 1e6:.1f}"),
    ]


def _lower(task: Task) -> bool:
    return bool(SCORES[TASKS[task].main].lower_is_better)


def _change(row: Row, base: Row, task: Task) -> str:
    """Of errors the share of the base's, of what is better high the difference in points."""
    if _lower(task):
        return f"{100 * (row['error_mean'] / base['error_mean'] - 1):+.0f} %".replace("-", "−")
    return f"{row['error_mean'] - base['error_mean']:+.2f}".replace("-", "−")


def _p(row: Row, base: Row) -> str:
    if row["p"] is None:
        return "1 seed" if min(row["seeds"], base["seeds"]) < 2 else "unknown"
    return p_text(row["p"])


def _notes(results: Mapping[str, Any]) -> list[str]:
    study, rows, failed = results["study"], results["rows"], results["failed"]
    tuning, main = study["tuning"], SCORES[TASKS[study["task"]].main]
    fixed = [row for row in rows if not row["trials"]]
    scores = [name for name in SCORES if f"{name}_mean" in rows[0] and name not in ("error", "head_error")]
    methods = "; ".join(f"{row['method']}: {row['summary']}" for row in rows)
    notes = [
        f"Every method was trained for {study['epochs']} epochs by {study['optimizer']} with the same schedule, "
        f"batches and augmentation; the last epoch counts. Conversions have {study['num_heads']} heads, cost at most "
        f"{Budget.of(study['budget'])}, and part at {study['split_at']!r}, unless a method "
        "says otherwise.",
        *filter(None, [begins_with(study)]),
    ]
    if len(fixed) < len(rows):
        notes.append(
            f"Learning rate ({tuning['lr'][0]:g} to {tuning['lr'][1]:g}) and weight decay "
            f"({tuning['weight_decay'][0]:g} to {tuning['weight_decay'][1]:g}) are each method's best of the same "
            f"{tuning['trials']} pairs, by the {main.heading} on validation examples after one run of "
            f"{tuning.get('epochs') or study['epochs']} epochs each. All else of a method is "
            "as its paper has it."
        )
    if fixed:
        names = "all methods" if len(fixed) == len(rows) else ", ".join(row["method"] for row in fixed)
        notes.append(f"Learning rate and weight decay were given, not tuned here, for {names}.")
    settings = study["data"].get("init_args", {}).items()
    numbers = [f"{name} {value:,}" for name, value in settings if type(value) in (int, float)]
    return [
        f"Data: {', '.join([_data(study['data']), *numbers])}.",
        *notes,
        f"{main.heading[0].upper()}{main.heading[1:]}: {main.meaning}{_read_once(results)}. p: two-sided paired "
        f"t-test against the base over seeds, not corrected for {len(rows) - 1} comparisons. One head: mean over "
        "single heads, for OKDDip its leader. CPU s: processor time of one training. ms: median time of the "
        "prediction of a batch.",
        meanings(scores),
        f"Methods. {methods}.",
        f"All training together took {results['cpu_minutes']:.1f} minutes of processor time.",
        *(
            f"Failed: {trial['method']}, {trial['phase']}, seed {trial['seed']}, lr {trial['lr']:.3g}: "
            f"{trial['reason']}"
            for trial in failed[:_MOST_REASONS]
        ),
        *(
            [f"{len(failed) - _MOST_REASONS} more trials failed; results.json lists all."]
            if len(failed) > _MOST_REASONS
            else []
        ),
    ]


def _read_once(results: Mapping[str, Any]) -> str:
    if results.get("halves"):
        return ", on the half of the validation examples that tuned nothing, parted by class and a hash of their names"
    return ", on test examples that were read once"


def _data(spec: Mapping[str, Any]) -> str:
    return data_name(spec["class_path"].rpartition(".")[2], spec.get("init_args", {}).get("folder"))
