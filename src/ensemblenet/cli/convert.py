"""The command `convert`: convert a network and save it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ensemblenet.cli.options import add_base, base_of, check_new, command_parser, conversion_of
from ensemblenet.conversion.convert import convert_as
from ensemblenet.ensemble import EnsembleNet
from ensemblenet.evaluation.scoring import chosen_data, score
from ensemblenet.inputs import Inputs, inputs_and_targets
from ensemblenet.recipe import Conversion, Criterion, Freeze, Init
from ensemblenet.reports.tables import COST_NOTE, results_table, scores_columns
from ensemblenet.storage.checkpoint import how_to_load, save
from ensemblenet.storage.restore import Restored
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
    parser = command_parser(
        "convert",
        "Convert a network into a multi-headed one, and save it: with fresh weights, which needs no data, or with "
        "those of a trained network.",
        COST_NOTE,
        allow_abbrev=False,
    )
    add_base(parser)
    parser.add_argument("--output", type=Path, required=True, help="the folder to create")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default: %(default)s)")
    inherit = parser.add_argument_group("of a trained network")
    inherit.add_argument(
        "--init",
        choices=get_args(Init),
        default="fresh",
        help="fresh weights, or inherit those that MODEL comes with (default: %(default)s)",
    )
    inherit.add_argument(
        "--importance",
        choices=get_args(Criterion),
        help="which channels and blocks heads inherit (default: taylor with --calibrate, else magnitude)",
    )
    inherit.add_argument("--freeze", choices=get_args(Freeze), help="train the heads alone, behind a trunk that stays")
    inherit.add_argument(
        "--calibrate",
        metavar="DATA",
        help="a data module such as ensemblenet.data.ImageData, or a YAML file with class_path and init_args; "
        "--data.KEY VALUE is an argument of it. Some training batches repair inherited heads; what the network, each "
        "head and their mean reach on validation data before any training is printed",
    )
    options, changes = parser.parse_with_data(arguments)
    if options.calibrate is None and changes:
        parser.error(f"{' '.join(changes)} needs --calibrate, which names the data")
    if options.calibrate is not None and options.init != "inherit":
        parser.error("--calibrate needs --init inherit")
    check_new(options.output, "folder")
    base, x = base_of(options)
    inherited = {"init": options.init, "importance": options.importance, "freeze": options.freeze}
    wanted = replace(conversion_of(options), **inherited)
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
