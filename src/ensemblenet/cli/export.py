"""The command `export`: write a trained model for other programs to run."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from rich.console import Console
from rich.table import Table
from torch import nn

from ensemblenet.cli.parsers import read
from ensemblenet.deploy.export import Exported, part
from ensemblenet.deploy.export import export as export_model
from ensemblenet.deploy.formats import read_onnx
from ensemblenet.ensemble import EnsembleNet
from ensemblenet.errors import ExportError
from ensemblenet.evaluation.scoring import chosen_data, in_words, score
from ensemblenet.heads import fuse
from ensemblenet.inputs import Tree, inputs_and_targets, map_tensors, num_examples
from ensemblenet.models.sources import create
from ensemblenet.reports.tables import results_table, scores_columns
from ensemblenet.storage.restore import Restored, restore
from ensemblenet.storage.runs import quiet_lightning

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
    options, changes = read("export", arguments)
    base = create(options.base) if options.base else None
    restored = restore(options.model, base, trust=options.trust)
    network = restored.network
    if options.fuse:
        if not isinstance(network, EnsembleNet):
            raise ExportError(f"{options.model} is a single network and has no heads to fuse.")
        network = fuse(network)
    data = None
    if options.int8:
        quiet_lightning()
        data = chosen_data(restored, options.config, changes, options.class_path)
    elif changes or options.config or options.class_path:
        raise ExportError("Only --int8 needs data.")
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
            all_answers=False if options.prediction_only else None,
            calibration=None if data is None else _calibration(data, options.calibration),
        )
    _show(exported, options.device)
    if data is not None:
        _show_loss(restored, part(network, options.head, options.first), exported.path, data)
    return exported.path


class _File(nn.Module):
    """An ONNX file as a network."""

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        super().__init__()
        self.predict = read_onnx(path, names)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The prediction."""
        return self.predict(kwargs or args)[0]


def _calibration(data: LightningDataModule, count: int) -> Iterator[Tree]:
    """The inputs of so many training examples, in batches."""
    data.prepare_data()
    data.setup("fit")
    for batch in data.train_dataloader():
        x, _ = inputs_and_targets(batch)
        size = min(count, num_examples(x))
        yield map_tensors(lambda tensor: tensor[:size], x)  # noqa: B023
        count -= size
        if count <= 0:
            return


def _show_loss(restored: Restored, network: nn.Module, path: Path, data: LightningDataModule) -> None:
    """Print the scores on validation data before and after quantisation."""
    file = _File(path, restored.inputs.names(network))
    before, after = (score(replace(restored, network=one), data, "val", "cpu")[0] for one in (network, file))
    costs = {name: before[name] for name in ("parameters", "macs", "activations", "time")}
    rows = [{**before, "method": "before"}, {**before, **after, **costs, "method": "8 bits"}]
    title = f"{path.name}, {in_words('val', data, 'examples')}; shares in %"
    Console().print(results_table(rows, title, scores_columns(rows)))


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
