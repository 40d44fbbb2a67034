"""Images a second of `fit` against a bare PyTorch loop with the same loader, and whether training waits for images.

    OMP_NUM_THREADS=1 python benchmarks/images_throughput.py --data FOLDER    # Imagenette: train.tar and val.tar

The network is that of configs/imagenette at 96 pixels, the base and its conversion. Both loops take turns, so that the
load of the machine meets both; the median over rounds and all values are written down. A turn begins anew, leaves out
its first step, and takes as many steps as asked. Rates are taken by the clock, and by the processor time of the process
that trains, which other programs disturb less. `waiting` is the share of the bare loop's time in which it waits for a
batch. `loader` is what the loader's workers give when nothing trains.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml
from lightning.pytorch import Callback
from torch import nn

from ensemblenet import CoDistillationLoss
from ensemblenet.data import ImageData
from ensemblenet.models import create
from ensemblenet.storage.atomic import write_json
from ensemblenet.storage.runs import environment
from ensemblenet.training.fit import fit
from ensemblenet.training.module import Conversion, head_outputs
from ensemblenet.training.optimization import Optimization, build_optimizer

CONFIGS = Path(__file__).parents[1] / "configs" / "imagenette"
RESULTS = Path(__file__).parent / "results" / "images_throughput.json"
LOADING = {"image_size": 96, "batch_size": 32, "num_workers": 2}


def configuration(method: str) -> dict[str, Any]:
    return yaml.safe_load((CONFIGS / f"{method}.yaml").read_text())


def images(folder: Path) -> ImageData:
    settings = configuration("base")["data"]["init_args"] | LOADING | {"folder": folder}
    data = ImageData(**settings, seed=0)
    data.setup("fit")
    return data


def network(method: str) -> nn.Module:
    model = configuration(method)["model"]
    base = create(**model["base"]["init_args"])
    if model["conversion"] is None:
        return base
    size = LOADING["image_size"]
    return Conversion(**model["conversion"]).apply(base, torch.zeros(2, 3, size, size))


class Clock(Callback):
    """The time after each step of the run that is the latest, by the clock and of the process."""

    ticks: ClassVar[list[tuple[float, float]]] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.ticks.append((time.perf_counter(), time.process_time()))

    @classmethod
    def rates(cls) -> tuple[float, float]:
        """Images a second of both kinds of time, without the first step."""
        steps = len(cls.ticks) - 1
        clock, process = (
            steps * LOADING["batch_size"] / (last - first)
            for first, last in zip(cls.ticks[0], cls.ticks[-1], strict=True)
        )
        return clock, process


def bare_loop(method: str, folder: Path, steps: int) -> float:
    """Tick after each step; returns the share of the time that passed in waiting for images."""
    settings = configuration(method)["model"]
    model, criterion = network(method).train(), CoDistillationLoss(2.0, label_smoothing=settings["label_smoothing"])
    optimizer = build_optimizer(model, Optimization(**settings["optimization"]))
    batches = iter(images(folder).train_dataloader())
    clock, waited = Clock(), []
    for _ in range(steps + 1):
        asked = time.perf_counter()
        x, y = next(batches)
        waited.append(time.perf_counter() - asked)
        loss = criterion(head_outputs(model, x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        clock.on_train_batch_end()
    return sum(waited[1:]) / (clock.ticks[-1][0] - clock.ticks[0][0])


def by_fit(method: str, folder: Path, steps: int) -> None:
    """The same with `fit`."""
    settings = {
        "trainer.max_epochs": 1,
        "trainer.limit_train_batches": steps + 1,
        "trainer.limit_val_batches": 0,
        "trainer.limit_test_batches": 1,
        "trainer.accelerator": "cpu",
        "trainer.callbacks": f"{Clock.__module__}.Clock",
        "model.heads": "looped",
        **{f"data.init_args.{name}": value for name, value in LOADING.items()},
    }
    options = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    with tempfile.TemporaryDirectory() as runs:
        fit(["--config", str(CONFIGS / f"{method}.yaml"), "--data", str(folder.resolve()), "--runs", runs, *options])


def loader_alone(folder: Path, steps: int) -> float:
    """Images a second of the loader."""
    batches = iter(images(folder).train_dataloader())
    next(batches)
    began = time.perf_counter()
    for _ in range(steps):
        next(batches)
    return steps * LOADING["batch_size"] / (time.perf_counter() - began)


def measure(method: str, folder: Path, steps: int, rounds: int) -> dict[str, Any]:
    columns: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        Clock.ticks.clear()
        columns["waiting"].append(bare_loop(method, folder, steps))
        bare, bare_process = Clock.rates()
        Clock.ticks.clear()
        by_fit(method, folder, steps)
        ours, ours_process = Clock.rates()
        turn = {"bare": bare, "fit": ours, "ratio": ours / bare, "ratio_of_processor_time": ours_process / bare_process}
        for name, value in turn.items():
            columns[name].append(value)
    medians = {name: statistics.median(values) for name, values in columns.items()}
    print(method, medians, flush=True)
    return {"method": method, **medians, "rounds": columns}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="Imagenette's folder, with train.tar and val.tar")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of a turn; at most 49")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()

    alone = [loader_alone(options.data, 2 * options.steps) for _ in range(options.rounds)]
    rows = [measure(method, options.data, options.steps, options.rounds) for method in ("base", "ensemblenet")]
    settings = LOADING | {"steps": options.steps, "rounds": options.rounds}
    results = {"settings": settings, "loader": statistics.median(alone), "loader_values": alone, "rows": rows}
    write_json(options.output, {"environment": environment(), **results})


if __name__ == "__main__":
    from images_throughput import main  # under its own name, by which `fit` finds the clock

    main()
