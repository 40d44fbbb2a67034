"""The command `test`: how good a trained network is on test data, its heads alone, and its first heads together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ensemblenet.cli.parsers import read
from ensemblenet.ensemble import EnsembleNet
from ensemblenet.evaluation.findings import Findings
from ensemblenet.evaluation.scoring import Seen, Split, chosen_data, in_words, score
from ensemblenet.evaluation.stopping import savings
from ensemblenet.reports.tables import results_table, scores_columns, short_number
from ensemblenet.storage.atomic import write_json
from ensemblenet.storage.restore import restore
from ensemblenet.storage.runs import environment, quiet_lightning

__all__ = ["score_split", "test"]


def test(arguments: Sequence[str]) -> list[dict[str, Any]]:
    """Score a trained network on test examples, print a table, and write a file if asked.

    Args:
        arguments: command-line arguments.

    Returns:
        The rows of the table, see [`ensemblenet.evaluation.scoring.score`][].

    Raises:
        LoadError: there is no model, no data, or the data has other classes.
        FileExistsError: the file to write exists.
    """
    return score_split("test", "test", arguments)


def score_split(name: str, split: Split, arguments: Sequence[str]) -> list[dict[str, Any]]:
    """The commands `test` and `validate`.

    Args:
        name: the command's name.
        split: "val" or "test".
        arguments: command-line arguments.
    """
    options, changes = read(name, arguments)
    restored = restore(options.model, trust=options.trust)
    quiet_lightning()
    data = chosen_data(restored, options.config, changes, options.class_path)
    network = restored.network
    findings = None
    if isinstance(network, EnsembleNet) and network.num_heads > 1 and restored.task == "multiclass":
        findings = Findings(network.combine, most=0)

    def saw(seen: Seen) -> None:
        if findings is not None:
            findings.update(None, seen.outputs, seen.targets)

    rows = score(restored, data, split, options.device, saw)
    console = Console()
    console.print(
        results_table(rows, f"{restored.name}, {in_words(split, data, 'examples')}; shares in %", scores_columns(rows))
    )
    saved = []
    if findings is not None:
        saved = savings(findings, {row["num_heads"]: row["macs"] for row in rows})
        console.print(_stopping_table(saved))
    if options.output:
        scores = {"split": split, "rows": rows, "early_stopping": saved, "environment": environment()}
        write_json(options.output, scores)
        console.print(f"Scores: {options.output}", highlight=False, soft_wrap=True)
    return rows


def _stopping_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """What stop rules save."""
    note = "each rule at a setting that lost nothing on the other half of the examples; docs/evaluate.md"
    table = Table(title="stopping early", caption=note, box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for k, heading in enumerate(("stops by", "heads", "MACs", "saved", "error")):
        table.add_column(heading, justify="right" if k else "left")
    for row in rows:
        saved, error = f"{row['saved']:.0%}", f"{100 * (1 - row['accuracy']):.2f}"
        table.add_row(row["rule"], f"{row['heads']:.2f}", short_number(row["macs"]), saved, error)
    return table
