"""The command `info`: the cost of a network, its split points, and the heads that a budget allows at each."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ensemblenet.cli.options import base_of, conversion_of
from ensemblenet.cli.parsers import read
from ensemblenet.conversion.capacity import Capacity
from ensemblenet.conversion.convert import convert_as, plans_as
from ensemblenet.conversion.measuring import time_share
from ensemblenet.conversion.planning import Plan
from ensemblenet.cost import Budget, measure_cost
from ensemblenet.heads import choose
from ensemblenet.inputs import InputSpec
from ensemblenet.recipe import Conversion
from ensemblenet.reports.tables import COST_NOTE
from ensemblenet.storage.hub import local_folder

__all__ = ["info"]


def info(arguments: Sequence[str]) -> None:
    """Print a network's cost, its split points, and the heads that a budget allows at each.

    Args:
        arguments: command-line arguments.

    Raises:
        ConversionError: there is no such network, or it cannot be converted.
    """
    options, _ = read("info", arguments)
    capacity = None
    if (local_folder(options.model) / "config.yaml").is_file():
        base, x, capacity = _trained(options.model, options.trust)
    else:
        base, x = base_of(options)
    wanted = conversion_of(options)
    found = plans_as(wanted, base, x)
    cost = measure_cost(base, x)
    table = Table(title=f"{options.model}: {cost.parameters:,} parameters, {cost.macs:,.0f} MACs", caption=COST_NOTE)
    table.add_column("split point", overflow="fold", min_width=20)
    for column in ("trunk's\nMACs, %", "width", "depth", "par.\n%", "MACs\n%", "act.\n%", "time\n%"):
        table.add_column(column, justify="right")
    for plan in found:
        fits = plan.head is not None
        shape = [f"{plan.width:.2f}", f"{plan.depth:.2f}"] if fits else ["-", "-"]
        shares = [f"{100 * share:.0f}" for share in (plan.split.macs_share, *plan.cost.shares_of(cost))]
        name = f"{plan.split.name} *" if plan.rank == 0 else plan.split.name
        table.add_row(name, shares[0], *shape, *shares[1:], style="bold" if plan.rank == 0 else None if fits else "dim")
    console = Console()
    console.print(table)
    console.print(_legend(wanted), style="dim", highlight=False)
    if options.measure:
        console.print(_measured(found, wanted, base, x, options))
    if capacity is not None:
        console.print(str(capacity), highlight=False)


def _legend(wanted: Conversion) -> str:
    """What the columns say."""
    heads = "the heads" if wanted.num_heads == "auto" else f"{wanted.num_heads} heads"
    return (
        f"width, depth: the shares of its channels, and of the blocks that it may drop, that each of {heads} keeps "
        f"when all may cost {Budget.of(wanted.budget)}; - does not fit, and what follows is the least. The rest: what "
        "the whole model costs, of the base. * is the plan that --split-at auto takes."
    )


def _measured(
    found: Iterable[Plan], wanted: Conversion, base: nn.Module, x: Tensor, options: argparse.Namespace
) -> Table:
    """What a training step and a prediction of the plans that come first take of the base's time."""
    layout = torch.channels_last if options.channels_last and x.dim() == 4 else torch.preserve_format
    batch = InputSpec.of(x).random(options.batch_size).to(options.device, memory_format=layout)
    base = base.to(options.device).to(memory_format=layout)  # pyright: ignore[reportCallIssue]
    what = f"Time of {len(batch)} examples on {batch.device}{', bfloat16' * options.bf16}, of the base's"
    table = Table(title=what, caption="Heads run in the faster way, as `fit` runs them.")
    for column in ("split point", "training step", "prediction"):
        table.add_column(column, justify="left" if column == "split point" else "right")
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=options.bf16):
        for plan in sorted((plan for plan in found if plan.rank is not None), key=lambda plan: plan.rank or 0):
            model = convert_as(replace(wanted, split_at=plan.split.name), base, x.to(batch))
            cells = []
            for training in (True, False):
                faster, choice = choose(model.train(training), batch)
                cells.append(f"{time_share(base, faster, batch, training=training):.2f} ({choice.heads})")
            table.add_row(plan.split.name, *cells)
    return table


def _trained(run: str, trust: bool) -> tuple[nn.Module, Tensor, Capacity]:
    """A run's base, an input for it, and its spare capacity."""
    from ensemblenet.storage.restore import restore  # slow to import
    from ensemblenet.training.capacity import capacity_of

    restored = restore(run, trust=trust)
    return restored.network, restored.inputs.random(), capacity_of(restored)
