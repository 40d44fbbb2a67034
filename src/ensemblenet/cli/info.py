"""The command `info`: the cost of a network, its split points, and the head width that a budget allows at each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ensemblenet.cli.options import add_base, add_trust, base_of, command_parser
from ensemblenet.conversion.capacity import Capacity, spare_capacity
from ensemblenet.conversion.convert import plans
from ensemblenet.cost import Budget, measure_cost
from ensemblenet.ensemble import EnsembleNet
from ensemblenet.errors import ConversionError
from ensemblenet.inputs import inputs_and_targets, num_examples
from ensemblenet.reports.tables import COST_NOTE

__all__ = ["info"]

_EXAMPLES = 10_000


def info(arguments: Sequence[str]) -> None:
    """Print a network's cost, its split points, and the head width that a budget allows at each.

    Args:
        arguments: command-line arguments.

    Raises:
        ConversionError: there is no such network, or it cannot be converted.
    """
    parser = command_parser(
        "info",
        "Show where a network can be split, and how wide heads could be. It trains nothing, and needs no data unless "
        "MODEL is the folder of a base's run of `fit`, of which it also says whether it has capacity to spare.",
        COST_NOTE,
    )
    add_base(parser)
    add_trust(parser)
    options = parser.parse_args(arguments)
    run = Path(options.model)
    capacity = None
    if (run / "config.yaml").is_file():
        base, x, capacity = _trained(run, options.trust)
    else:
        base, x = base_of(options)
    cost = measure_cost(base, x)
    table = Table(title=f"{options.model}: {cost.parameters:,} parameters, {cost.macs:,.0f} MACs", caption=COST_NOTE)
    for column in ("split point", "tensor (N, ...)"):
        table.add_column(column, overflow="fold")
    for column in (
        "trunk's\nparam.",
        "trunk's\nMACs",
        f"width of\n{options.num_heads} heads",
        "cost, %",
    ):
        table.add_column(column, justify="right", overflow="fold")
    for plan in plans(base, x, options.num_heads, options.budget):
        point = plan.split
        shape = ", ".join(("N", *map(str, point.shape[1:])))
        width = "does not fit" if plan.width is None else f"{plan.width:.3f}"
        percent = [f"{100 * share:.0f}" for share in plan.cost.shares_of(cost)]
        shares = "" if plan.width is None else "{}/{} {}/{}".format(*percent)
        trunk = (f"{point.parameters_share:.1%}", f"{point.macs_share:.1%}")
        table.add_row(point.name, f"({shape})", *trunk, width, shares)
    console = Console()
    console.print(table)
    console.print(
        f"width: the share of its channels that each of {options.num_heads} heads keeps when all may cost "
        f"{Budget.of(options.budget)}; cost: the whole model's parameters/MACs and activations/time against "
        "the base's.",
        style="dim",
        highlight=False,
    )
    if capacity is not None:
        console.print(str(capacity), highlight=False)


def _trained(run: Path, trust: bool) -> tuple[nn.Module, Tensor, Capacity]:
    """A run's base, an input for it, and its spare capacity."""
    from ensemblenet.storage.restore import data_module, restore  # slow to import

    restored = restore(run, trust=trust)
    if isinstance(restored.network, EnsembleNet):
        raise ConversionError(f"{run} trained a conversion; spare capacity is a base's: give the run of one.")
    data: Any = data_module(restored)
    data.prepare_data()
    data.setup("fit")
    train, validation = (_some(loader) for loader in (data.train_dataloader(), data.val_dataloader()))
    capacity = spare_capacity(restored.network, train, validation, restored.task)
    return restored.network, restored.inputs.random(), capacity


def _some(batches: Iterable[Any]) -> Iterator[Any]:
    """Batches until there are examples enough for a mean loss."""
    left = _EXAMPLES
    for batch in batches:
        if left <= 0:
            return
        yield batch
        left -= num_examples(inputs_and_targets(batch)[0])
