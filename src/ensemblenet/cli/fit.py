"""The command `fit`: train from a YAML file, and show the results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ensemblenet.reports.tables import results_table
from ensemblenet.storage.runs import RESULTS
from ensemblenet.training.fit import fit as train
from ensemblenet.training.processes import is_first_process

__all__ = ["fit"]


def fit(arguments: Sequence[str]) -> Path:
    """Train, test, and print the results, see [`ensemblenet.training.fit.fit`][].

    Args:
        arguments: command-line arguments.

    Returns:
        The run's folder.
    """
    folder = train(arguments)
    if is_first_process():
        console = Console()
        console.print(results_table(json.loads((folder / RESULTS).read_text())["rows"]))
        console.print(f"Results and logs: {folder}", highlight=False, soft_wrap=True)
    return folder
