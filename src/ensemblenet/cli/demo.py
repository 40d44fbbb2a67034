"""The command `demo`: a small preset of `compare` on a data set that this machine generates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from ensemblenet.cli.compare import progress
from ensemblenet.cli.parsers import DEMO_EPOCHS, read
from ensemblenet.reports.comparison import PAGE, comparison_table, noise
from ensemblenet.reports.tables import with_spread
from ensemblenet.storage.runs import create_run_folder, resumable
from ensemblenet.study.compare import JOURNAL, run_study
from ensemblenet.study.settings import Study, Variant

__all__ = ["demo", "demo_study"]


def demo(arguments: Sequence[str]) -> Path:
    """Run the demo.

    Args:
        arguments: command-line arguments.

    Returns:
        The run's folder.
    """
    options, _ = read("demo", arguments)
    folder = create_run_folder(options.runs, "demo")
    with resumable(folder, None, (folder / JOURNAL).exists), progress() as watch:
        study = demo_study(options.seeds, options.epochs)
        rows = run_study(folder, study, options.workers, headline=_headline, watch=watch)
    console = Console()
    console.print(comparison_table(rows, "MNIST-1D: a base and its conversions"))
    console.print(_headline(rows), highlight=False, soft_wrap=True)
    console.print(f"Page, figures and results.json: {folder / PAGE}", highlight=False, soft_wrap=True)
    return folder


def demo_study(seeds: int = 5, epochs: int = DEMO_EPOCHS) -> Study:
    """The demo's study: the base, its conversion to short heads, one network of the same cost, and other conversions.

    Args:
        seeds: the number of runs of the base, of its conversion and of the one network; the others have one.
        epochs: the length of a training.

    Example:
        >>> list(demo_study().candidates())[:3]
        ['base', 'ensemblenet', 'shorter, wider base']
    """
    # each has its own best on validation examples: benchmarks/plan_study.py, MNIST-1D that overfits
    ours = partial(Variant, "codistillation", lr=0.01, weight_decay=0.5)
    return Study(
        {"class_path": "ensemblenet.models.MNIST1DResNet", "init_args": {"width": 32}},
        {
            "class_path": "ensemblenet.data.MNIST1D",
            "init_args": {"batch_size": 100, "num_train": 4000, "num_val": 5000, "num_test": 5000},
        },
        methods=[
            Variant("base", lr=0.01, weight_decay=0.5),
            ours("ensemblenet"),
            Variant("reshaped", "shorter, wider base", lr=0.005, weight_decay=0.5),
            ours("ensemblenet, half", budget=0.5, seeds=1),
            ours("ensemblenet, λ=0", weight=0.0, seeds=1),
            ours("ensemblenet, λ=10", weight=10.0, seeds=1),
        ],
        num_heads=2,
        epochs=epochs,
        seeds=seeds,
    )


def _headline(rows: Sequence[Mapping[str, Any]], task: str = "multiclass") -> str:
    """The demo's result in one sentence."""
    base, ours = rows[:2]
    costs = ("parameters", "macs", "milliseconds", "cpu_seconds_mean")
    parameters, macs, prediction, training = (ours[key] / base[key] for key in costs)
    change = ours["error_mean"] / base["error_mean"] - 1
    return (
        f"{ours['num_heads']} heads at {parameters:.2f} of the base's parameters and {macs:.2f} of its MACs, with "
        f"{prediction:.2f} of its time for a prediction and {training:.2f} for training, both on this machine's "
        f"processor: test error {with_spread(ours, 'error')} % instead of "
        f"{with_spread(base, 'error')} % ({100 * change:+.0f} %); {noise(ours, base)}."
    )
