"""The commands `info`, `convert` and `benchmark`."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ensemblenet import Capacity, Cost, EnsembleNet, fuse, measure_cost, plans, save, spare_capacity
from ensemblenet import convert as convert_network
from ensemblenet.cli.main import positive_integer
from ensemblenet.errors import ConversionError
from ensemblenet.heads import tune
from ensemblenet.inputs import InputSpec
from ensemblenet.models.sources import create, default_input_shape
from ensemblenet.timing import measure, step

__all__ = ["benchmark", "convert", "info"]

_MODEL_HELP = (
    "a timm name such as resnet18, torchvision:NAME, or module.path:callable, a callable that returns a network"
)
_EXAMPLES = 10_000
_MACS_NOTE = "MACs are multiply-adds for one example: half of what torch.utils.flop_counter counts."


def info(arguments: Sequence[str]) -> None:
    """Print a network's cost, its split points, and the head width that a budget allows at each."""
    parser = _parser(
        "info",
        "Show where a network can be split, and how wide heads could be. It trains nothing, and needs no data unless "
        "MODEL is the folder of a base's run of `fit`, of which it also says whether it has capacity to spare.",
    )
    options = parser.parse_args(arguments)
    run = Path(options.model)
    capacity = None
    if (run / "config.yaml").is_file():
        base, x, capacity = _trained(run)
    else:
        base, x = _load(options)
    cost = measure_cost(base, x)
    table = Table(title=f"{options.model}: {_describe(cost)}", caption=_MACS_NOTE)
    for column in ("split point", "tensor (N, ...)"):
        table.add_column(column, overflow="fold")
    for column in (
        "trunk's\nparameters",
        "trunk's\nMACs",
        f"width of\n{options.num_heads} heads",
        "total\ncost",
    ):
        table.add_column(column, justify="right")
    for plan in plans(base, x, options.num_heads, options.budget):
        point = plan.split
        shape = ", ".join(("N", *map(str, point.shape[1:])))
        width = "does not fit" if plan.width is None else f"{plan.width:.3f}"
        shares = "" if plan.width is None else " / ".join(f"{share:.0%}" for share in plan.cost.share_of(cost))
        trunk = (f"{point.parameters_share:.1%}", f"{point.macs_share:.1%}")
        table.add_row(point.name, f"({shape})", *trunk, width, shares)
    console = Console()
    console.print(table)
    console.print(
        f"width: the share of its channels that each of {options.num_heads} heads keeps when all may cost "
        f"{options.budget:g} of the base; total cost: the whole model's parameters / MACs against the base's.",
        style="dim",
        highlight=False,
    )
    if capacity is not None:
        console.print(str(capacity), highlight=False)


def convert(arguments: Sequence[str]) -> None:
    """Convert a network and save it."""
    parser = _parser(
        "convert", "Convert a network into a multi-headed one with fresh weights, and save it. It needs no data."
    )
    parser.add_argument("--output", type=Path, required=True, help="the folder to create")
    parser.add_argument("--split-at", default="auto", help="a split point that `info` lists (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.output.exists():
        raise ConversionError(f"{options.output} exists already; --output needs a new folder.")
    base, x = _load(options)
    model = convert_network(base, x, options.num_heads, options.budget, options.split_at, options.seed)
    save(model, options.output)
    assert model.cost is not None
    assert model.base_cost is not None
    assert model.recipe is not None
    table = Table(title=f"{options.model}, split at {model.recipe.split_at}", caption=_MACS_NOTE)
    table.add_column()
    table.add_column("parameters", justify="right")
    table.add_column("MACs", justify="right")
    table.add_row("base", f"{model.base_cost.parameters:,}", f"{model.base_cost.macs:,.0f}")
    table.add_row(f"{model.num_heads} heads", f"{model.cost.parameters:,}", f"{model.cost.macs:,.0f}")
    table.add_row("share", *(f"{share:.1%}" for share in model.cost.share_of(model.base_cost)))
    console = Console()
    console.print(table)
    console.print(f"Saved to {options.output}; load it with ensemblenet.load.", highlight=False)


def benchmark(arguments: Sequence[str]) -> None:
    """Measure a network, and the model that it converts to with its heads run in each way."""
    parser = _parser(
        "benchmark",
        "Time a network and its conversion, whose heads run one after another (looped) or as one (fused), in turns "
        "on random inputs. It trains nothing.",
    )
    parser.add_argument("--batch-size", type=positive_integer, default=64, help="N (default: %(default)s)")
    parser.add_argument("--repeats", type=positive_integer, default=7, help="of each (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="also under torch.compile, which takes minutes")
    parser.add_argument("--device", default="cpu", help="such as cuda (default: %(default)s)")
    options = parser.parse_args(arguments)
    base, x = _load(options)
    looped = convert_network(base, x, options.num_heads, options.budget).to(options.device)
    models: dict[str, nn.Module] = {"base": base.to(options.device), "looped": looped}
    models["fused"] = fused = fuse(copy.deepcopy(looped))
    batch = InputSpec.of(x).random(options.batch_size).to(options.device)
    table = Table(title=f"{options.model}, {options.num_heads} heads, {torch.get_num_threads()} threads")
    table.add_column("")
    names = [*models, *(f"{name}, compiled" for name in models if options.compile)]
    for name in names:
        table.add_column(f"{name}\nms", justify="right")
    for title, inputs, training in (
        ("prediction of 1", batch[:1], False),
        (f"prediction of {len(batch)}", batch, False),
        (f"training step of {len(batch)}", batch, True),
    ):
        tune(fused.train(training), inputs)
        steps = {name: step(model.train(training), inputs) for name, model in models.items()}
        if options.compile:
            torch.compiler.reset()
            for name, model in models.items():
                twin = copy.deepcopy(model)
                twin.compile()
                steps[f"{name}, compiled"] = step(twin, inputs)
        seconds = measure(steps, options.repeats)
        cells = (f"{1000 * seconds[name]:.1f} ({seconds[name] / seconds['base']:.2f}x)" for name in names)
        table.add_row(title, *cells)
    console = Console()
    console.print(table)
    note = f"medians of {options.repeats}, taken in turns; in brackets: against the base. fit chooses by itself."
    console.print(note, style="dim", highlight=False)


def _parser(command: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"ensemblenet {command}", description=description, epilog=_MACS_NOTE)
    parser.add_argument("model", metavar="MODEL", help=_MODEL_HELP)
    parser.add_argument("--num-heads", type=positive_integer, default=2, help="K (default: %(default)s)")
    parser.add_argument(
        "--budget",
        type=float,
        default=1.0,
        help="the most all may cost, as a share of the base's parameters and of its MACs (default: %(default)s)",
    )
    parser.add_argument("--num-classes", type=int, help="outputs of the network (default: its own)")
    parser.add_argument(
        "--input-shape",
        type=_shape,
        metavar="C,H,W",
        help="shape of one example, such as 3,32,32; needed where the network does not say it",
    )
    return parser


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(size) for size in text.split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"must be positive integers such as 3,32,32; got {text!r}")
    return shape


def _load(options: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    base = create(options.model, options.num_classes)
    shape = options.input_shape or default_input_shape(base)
    if shape is None:
        raise ConversionError(f"{options.model} does not say what inputs it takes: give --input-shape.")
    return base, InputSpec(shape).random()


def _trained(run: Path) -> tuple[nn.Module, Tensor, Capacity]:
    """A run's base, an input for it, and its spare capacity."""
    from ensemblenet.storage.restore import data_module, restore

    restored = restore(run)
    if isinstance(restored.network, EnsembleNet):
        raise ConversionError(f"{run} trained a conversion; spare capacity is a base's: give the run of one.")
    data: Any = data_module(restored)
    data.prepare_data()
    data.setup("fit")
    train, validation = (_some(loader) for loader in (data.train_dataloader(), data.val_dataloader()))
    capacity = spare_capacity(restored.network, train, validation, restored.task)
    return restored.network, InputSpec(restored.input_shape).random(), capacity


def _some(batches: Iterable[Sequence[Tensor]]) -> Iterator[Sequence[Tensor]]:
    """Batches until there are examples enough for a mean loss."""
    left = _EXAMPLES
    for batch in batches:
        if left <= 0:
            return
        yield batch
        left -= len(batch[0])


def _describe(cost: Cost) -> str:
    return f"{cost.parameters:,} parameters, {cost.macs:,.0f} MACs"
