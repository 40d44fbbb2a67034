"""The command `report`: one page about trained networks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ensemblenet.cli.parsers import read
from ensemblenet.evaluation.scoring import chosen_data
from ensemblenet.reports.networks import write_report
from ensemblenet.storage.restore import restore
from ensemblenet.storage.runs import quiet_lightning

__all__ = ["report"]


def report(arguments: Sequence[str]) -> Path:
    """Evaluate trained networks and write a page about them.

    Args:
        arguments: command-line arguments.

    Returns:
        The page's file.

    Raises:
        LoadError: there is no model, no data, or the networks do not belong on one page.
        FileExistsError: the file to write exists.
    """
    options, changes = read("report", arguments)
    quiet_lightning()
    networks = [restore(folder, trust=options.trust) for folder in options.models]
    data = [chosen_data(restored, options.config, changes, options.class_path) for restored in networks]
    write_report(options.output, networks, data, options.split, options.device)
    Console().print(f"Report: {options.output}", highlight=False, soft_wrap=True)
    return options.output
