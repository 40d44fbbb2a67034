"""The command `export`: write a trained model for other programs to run."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ensemblenet.cli.parsers import read
from ensemblenet.deploy.export import Exported
from ensemblenet.deploy.export import export as export_model
from ensemblenet.ensemble import EnsembleNet
from ensemblenet.errors import ExportError
from ensemblenet.heads import fuse
from ensemblenet.models.sources import create
from ensemblenet.storage.restore import restore

__all__ = ["export"]


def export(arguments: Sequence[str]) -> Path:
    """Write a trained model, check the file against PyTorch, and print how the two compare.

    Args:
        arguments: command-line arguments.

    Returns:
        The file, or the directory.

    Raises:
        ExportError: a model that the format cannot hold, or a file that differs from PyTorch.
        LoadError: there is no model to load.
        FileExistsError: the output exists.
    """
    options, _ = read("export", arguments)
    base = create(options.base) if options.base else None
    restored = restore(options.model, base, trust=options.trust)
    network = restored.network
    if options.fuse:
        if not isinstance(network, EnsembleNet):
            raise ExportError(f"{options.model} is a single network and has no heads to fuse.")
        network = fuse(network)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of exporters, about their own parts
        exported = export_model(
            network.to(options.device),
            options.output,
            options.format,
            example_inputs=None if isinstance(network, EnsembleNet) else restored.inputs.zeros(),
            head=options.head,
            first=options.first,
            batch_size=options.batch_size,
            description=restored.description,
            base=base,
        )
    _show(exported, options.device)
    return exported.path


def _show(exported: Exported, device: str) -> None:
    threads = torch.get_num_threads()
    where = f"{threads} thread{'s' * (threads > 1)}" if device == "cpu" else device
    table = Table(title=f"{exported.path.name}: {exported.size / 1e6:,.2f} MB", caption=f"medians; {where}")
    for column in ("prediction of", "PyTorch, ms", f"{exported.format}, ms"):
        table.add_column(column, justify="right")
    for size, seconds in exported.seconds.items():
        table.add_row(str(size), *(f"{1000 * value:.2f}" for value in seconds))
    console = Console()
    console.print(table)
    console.print(
        f"Outputs agree with PyTorch within {exported.difference:.1g} of the largest: {exported.path}",
        highlight=False,
        soft_wrap=True,
    )
