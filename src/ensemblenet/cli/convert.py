"""The command `convert`: convert a network and save it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ensemblenet.cli.options import add_base, base_of, command_parser, conversion_of
from ensemblenet.conversion.convert import convert_as
from ensemblenet.errors import ConversionError
from ensemblenet.reports.tables import COST_NOTE
from ensemblenet.storage.checkpoint import how_to_load, save

__all__ = ["convert"]


def convert(arguments: Sequence[str]) -> None:
    """Convert a network and save it.

    Args:
        arguments: command-line arguments.

    Raises:
        ConversionError: the output exists, there is no such network, or it cannot be converted.
    """
    parser = command_parser(
        "convert",
        "Convert a network into a multi-headed one with fresh weights, and save it. It needs no data.",
        COST_NOTE,
    )
    add_base(parser)
    parser.add_argument("--output", type=Path, required=True, help="the folder to create")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.output.exists():
        raise ConversionError(f"{options.output} exists already; --output needs a new folder.")
    base, x = base_of(options)
    model = convert_as(conversion_of(options), base, x)
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
    console.print(f"Saved to {options.output}; load it with {how_to_load(model.recipe)}.", highlight=False)
