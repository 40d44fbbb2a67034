"""The command `benchmark`: how fast the heads of a network run, one by one, fused, and compiled."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from ensemblenet.cli.options import base_of, conversion_of, converted
from ensemblenet.cli.parsers import read
from ensemblenet.conversion.convert import convert_as
from ensemblenet.heads import capture, fuse, tune
from ensemblenet.inputs import InputSpec
from ensemblenet.timing import measure, step

__all__ = ["benchmark"]


def benchmark(arguments: Sequence[str]) -> None:
    """Time a network, and the model that it converts to with its heads run in each way.

    Args:
        arguments: command-line arguments.

    Raises:
        ConversionError: there is no such network, or it cannot be converted.
    """
    options, _ = read("benchmark", arguments)
    looped = converted(options)
    base, x = base_of(options)
    if looped is None:
        looped = convert_as(conversion_of(options), base, x)
    looped = looped.to(options.device)
    models: dict[str, nn.Module] = {"base": base.to(options.device), "looped": looped}
    models["fused"] = fused = fuse(copy.deepcopy(looped))
    batch = InputSpec.of(x).random(options.batch_size).to(options.device)
    table = Table(title=f"{options.model}, {looped.num_heads} heads, {torch.get_num_threads()} threads")
    table.add_column("")
    names = [
        *models,
        *(f"{name}, graph" for name in models if batch.is_cuda),
        *(f"{name}, compiled" for name in models if options.compile),
    ]
    for name in names:
        table.add_column(f"{name}\nms", justify="right")
    for title, inputs, training in (
        ("prediction of 1", batch[:1], False),
        (f"prediction of {len(batch)}", batch, False),
        (f"training step of {len(batch)}", batch, True),
    ):
        tune(fused.train(training), inputs)
        steps: dict[str, Callable[[], object]] = {
            name: step(model.train(training), inputs) for name, model in models.items()
        }
        if batch.is_cuda and not training:
            steps |= {f"{name}, graph": partial(capture(model, inputs), inputs) for name, model in models.items()}
        if options.compile:
            torch.compiler.reset()
            for name, model in models.items():
                twin = copy.deepcopy(model)
                twin.compile()
                steps[f"{name}, compiled"] = step(twin, inputs)
        seconds = measure(steps, options.repeats)
        cells = {name: f"{1000 * own:.1f} ({own / seconds['base']:.2f}x)" for name, own in seconds.items()}
        table.add_row(title, *(cells.get(name, "") for name in names))
    console = Console()
    console.print(table)
    note = f"medians of {options.repeats}, taken in turns; in brackets: against the base. fit chooses by itself."
    if batch.is_cuda:
        note += " graph: a prediction by ensemblenet.heads.capture."
    console.print(note, style="dim", highlight=False)
