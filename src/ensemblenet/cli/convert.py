"""The command `convert`: convert a network and save it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ensemblenet.cli.options import base_of, conversion_of
from ensemblenet.cli.parsers import read
from ensemblenet.conversion.convert import convert_as
from ensemblenet.ensemble import EnsembleNet
from ensemblenet.inputs import Inputs, inputs_and_targets
from ensemblenet.recipe import Conversion
from ensemblenet.reports.tables import COST_NOTE, results_table, scores_columns
from ensemblenet.storage.checkpoint import how_to_load, save
from ensemblenet.storage.runs import quiet_lightning

__all__ = ["convert"]

_BATCHES = 8


def convert(arguments: Sequence[str]) -> None:
    """Convert a network and save it.

    Args:
        arguments: command-line arguments.

    Raises:
        FileExistsError: the output exists.
        ConversionError: there is no such network, or it cannot be converted.
    """
    options, changes = read("convert", arguments)
    base, x = base_of(options)
    wanted = conversion_of(options)
    if options.weights == "pretrained":  # each head gets a classifier of its own
        wanted = replace(wanted, num_classes=options.num_classes)
    rows: list[dict[str, Any]] = []
    if options.calibrate is None:
        model = convert_as(wanted, base, x)
    else:
        model, rows = _calibrated(wanted, base, x, options, changes)
    assert model.cost is not None
    assert model.base_cost is not None
    assert model.recipe is not None
    save(model, options.output)
    head = model.recipe.head
    found = f"split at {model.recipe.split_at}, heads of width {head.width:.2f} and depth {head.depth:.2f}"
    table = Table(title=f"{options.model}, {found}", caption=COST_NOTE)
    table.add_column()
    for heading in ("parameters", "MACs", "activations", "time"):
        table.add_column(heading, justify="right")
    for name, cost in (("base", model.base_cost), (f"{model.num_heads} heads", model.cost)):
        table.add_row(name, f"{cost.parameters:,}", f"{cost.macs:,.0f}", f"{cost.activations:,.0f}", "")
    table.add_row("share", *(f"{share:.1%}" for share in model.cost.shares_of(model.base_cost)))
    console = Console()
    console.print(table)
    if rows:
        title = f"{options.model}, val, before any training; shares in %"
        console.print(results_table(rows, title, scores_columns(rows)))
    console.print(f"Saved to {options.output}; load it with {how_to_load(model.recipe)}.", highlight=False)


def _calibrated(
    wanted: Conversion, base: nn.Module, x: Tensor, options: argparse.Namespace, changes: Sequence[str]
) -> tuple[EnsembleNet, list[dict[str, Any]]]:
    """Convert by some batches of data, and score the base, the heads and their mean on its validation split."""
    from ensemblenet.evaluation.scoring import chosen_data, score  # slow to import
    from ensemblenet.storage.restore import Restored

    named = options.calibrate
    file, class_path = (Path(named), None) if named.endswith((".yaml", ".yml")) else (None, named)
    restored = Restored(base.eval(), "multiclass", Inputs.of(x), {}, None, Path(options.model))
    data = chosen_data(restored, file, changes, class_path)
    quiet_lightning()
    data.setup("fit")
    batches = [batch for batch in islice(data.train_dataloader(), _BATCHES) if batch is not None]
    if batches and inputs_and_targets(batches[0])[1].ndim > 1:
        restored = replace(restored, task="multilabel")
    model = convert_as(wanted, base, x, restored.task, calibration=batches)
    scored = score(restored, data, "val") + score(replace(restored, network=model.eval()), data, "val")
    return model, scored
