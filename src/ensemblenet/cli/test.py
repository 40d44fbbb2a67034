"""The command `test`: how good a trained network is on test data, its heads alone, and its first heads together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from ensemblenet.cli.parsers import read
from ensemblenet.evaluation.scoring import Split, chosen_data, in_words, score
from ensemblenet.reports.tables import results_table, scores_columns
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
    rows = score(restored, data, split, options.device)
    console = Console()
    console.print(
        results_table(rows, f"{restored.name}, {in_words(split, data, 'examples')}; shares in %", scores_columns(rows))
    )
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.output, {"split": split, "rows": rows, "environment": environment()})
        console.print(f"Scores: {options.output}", highlight=False, soft_wrap=True)
    return rows
