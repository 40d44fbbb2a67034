"""When a conversion pays: bases of several widths, trained for several lengths, against their own conversions.

    python benchmarks/capacity.py mnist1d
    python benchmarks/capacity.py cifar10 --data FOLDER     # with train.parquet and test.parquet
    python benchmarks/capacity.py youtube8m --data FOLDER   # with validate0000.tfrecord and so on
    python benchmarks/capacity.py table

Each base, one head trained alone (the conversion's trunk and one head), and the conversion are trained with every
setting of a short list; the one with the lowest validation error counts. Only validation examples are read. Of the
trained base it is written down how well it fits the examples that it was trained with, and how large the part is that
its features need: the share of principal components, weighted by the layers' weights, that hold 99 % of the variance
at the input of each layer. Finished runs are kept in a file of JSON lines, and not computed again.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from rich.progress import track
from torch import nn

from ensemblenet.data import MNIST1D, ParquetImages, YouTube8M
from ensemblenet.functional import Task
from ensemblenet.models import CifarResNet, MLPTagger, MNIST1DNet
from ensemblenet.recipe import Conversion
from ensemblenet.study.measures import Measures
from ensemblenet.study.methods import METHODS, Setup, Source, TrainingTask
from ensemblenet.study.trials import Precision, train
from ensemblenet.training.optimization import Optimization

RESULTS = Path(__file__).parent / "results"
METHODS_COMPARED = ("base", "head_alone", "codistillation")
SEEDS = 2


@dataclass(frozen=True)
class Series:
    """Bases of several widths on the same data: what is trained, and how each is converted."""

    base: Callable[[int], nn.Module]
    data: Callable[[str, int], LightningDataModule]
    setup: Setup
    widths: tuple[int, ...]
    examples: int
    lengths: tuple[int, ...]
    settings: tuple[tuple[float, float], ...] = ((0.02, 0.3), (0.01, 1.0))
    precision: Precision = "bf16"


def _youtube8m(folder: str, examples: int) -> LightningDataModule:
    return YouTube8M(
        folder,
        level="video",
        train=["validate00[01]?.tfrecord", "validate002[0-3].tfrecord"],
        val=["validate002[4-7].tfrecord"],
        test=["validate003?.tfrecord"],
        num_classes=3862,
        batch_size=256,
        num_workers=0,
    )


SERIES = {
    "mnist1d": Series(
        base=MNIST1DNet,
        data=lambda _, examples: MNIST1D(num_train=examples, num_val=5000),
        setup=Setup(Conversion(4, 0.95, "conv1")),
        widths=(16, 32, 64, 128),
        examples=4000,
        lengths=(10, 40),
        precision="32",
    ),
    "cifar10": Series(
        base=lambda width: CifarResNet(8, width),
        data=lambda folder, examples: ParquetImages(
            folder, image_size=16, num_val=5000, limit_train=examples, batch_size=100
        ),
        setup=Setup(),
        widths=(12, 24, 48),
        examples=1000,
        lengths=(20, 60),
    ),
    "youtube8m": Series(
        base=lambda width: MLPTagger(1152, 3862, [width, 2 * width], 0.3),
        data=_youtube8m,
        setup=Setup(Conversion(2, 0.95, "input"), task="multilabel"),
        widths=(256, 512, 1024),
        examples=0,  # all of the shards
        lengths=(6, 18),
        settings=((0.003, 0.05),),
    ),
}


@dataclass(frozen=True)
class Run:
    """One training."""

    data: str
    method: str
    width: int
    examples: int
    epochs: int
    lr: float
    weight_decay: float
    seed: int


def runs(data: str) -> list[Run]:
    series = SERIES[data]
    return [
        Run(data, method, width, series.examples, epochs, lr, weight_decay, seed)
        for seed in range(SEEDS)
        for epochs in series.lengths
        for width in series.widths
        for lr, weight_decay in series.settings
        for method in METHODS_COMPARED
    ]


@lru_cache(maxsize=1)
def prepared(name: str, folder: str) -> Any:
    """The data, read once by a process."""
    series = SERIES[name]
    data: Any = series.data(folder, series.examples)
    data.prepare_data()
    data.setup()
    return data


def finish(run: Run, folder: str) -> dict[str, Any]:
    """Train and measure."""
    torch.set_num_threads(1)
    series = SERIES[run.data]
    data = prepared(run.data, folder)
    x = next(iter(data.val_dataloader()))[0][:2]
    training = METHODS[run.method].build(Source(lambda: series.base(run.width), x, run.seed), series.setup)
    cost = training.cost(x)
    optimization = Optimization("adamw", lr=run.lr, weight_decay=run.weight_decay)
    data.reseed(run.seed)
    seconds = train(training, data, optimization, run.epochs, run.seed, series.precision)["cpu_seconds"]
    found: dict[str, Any] = {"parameters": cost.parameters, "macs": cost.macs, "cpu_seconds": seconds}
    for part, loader in (("val", data.val_dataloader()), ("train", data.train_dataloader())):
        found[part] = measure(training, loader, series.setup.task)
    if run.method == "base":
        found["spectra"] = spectra(training.network, data.val_dataloader())
    return {"run": asdict(run)} | found


@torch.no_grad()
def measure(training: TrainingTask, loader: Any, task: Task) -> dict[str, Any]:
    measures: Measures | None = None
    for x, y, *_ in loader:
        outputs, prediction = training.eval()(x)
        measures = measures or Measures(outputs.shape[2], len(outputs), task)
        measures.update(outputs, prediction, y)
    assert measures is not None
    return measures.compute()


@torch.no_grad()
def spectra(network: nn.Module, loader: Any) -> dict[str, Any]:
    """Of every layer but the first: its weights, channels, and how many principal components hold which variance."""
    sums: dict[str, list[Any]] = {}

    def keep(name: str, x: torch.Tensor) -> None:
        rows = x.movedim(1, -1).reshape(-1, x.shape[1]).double()
        entry = sums.setdefault(name, [0, 0.0, 0.0])
        sums[name] = [entry[0] + len(rows), entry[1] + rows.sum(0), entry[2] + rows.T @ rows]

    layers = {n: m for n, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d)}
    hooks = [
        layer.register_forward_pre_hook(lambda module, inputs, name=name: keep(name, inputs[0]))
        for name, layer in list(layers.items())[1:]
    ]
    for (x, *_), _ in zip(loader, range(10), strict=False):
        network.eval()(x)
    for hook in hooks:
        hook.remove()
    found = {}
    for name, (number, total, products) in sums.items():
        mean = total / number
        values = torch.linalg.eigvalsh(products / number - mean[:, None] * mean).flip(0).clamp(min=0)
        held = values.cumsum(0) / values.sum()
        found[name] = {
            "weights": layers[name].weight.numel(),
            "channels": len(values),
            "participation": (values.sum() ** 2 / values.square().sum()).item(),
            **{f"components_{share}": int((held < share / 100).sum()) + 1 for share in (90, 95, 99)},
        }
    return found


def read(path: Path) -> Iterator[dict[str, Any]]:
    if path.exists():
        yield from map(json.loads, path.read_text().splitlines())


def table() -> str:
    """All bases, ordered by their spare capacity, against their conversions: means over seeds at the better setting."""
    cells: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for name in SERIES:
        for row in read(RESULTS / f"capacity_{name}.jsonl"):
            run = row["run"]
            cells[name, run["epochs"], run["width"], run["method"], run["lr"], run["weight_decay"]].append(row)
    best: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for key, found in cells.items():
        if key[:4] not in best or _error(found) < _error(best[key[:4]]):
            best[key[:4]] = found
    lines = []
    for name, epochs, width in {key[:3] for key in best}:
        base, head, conversion = (best[name, epochs, width, method] for method in METHODS_COMPARED)
        ratio = mean(row["train"]["nll"] for row in base) / mean(row["val"]["nll"] for row in base)
        filled = mean(_filled(row["spectra"]) for row in base)
        errors = " | ".join(f"{_error(rows):.2f}" for rows in (base, conversion, head))
        lines.append((ratio, f"| {name} | {epochs} | {width} | {ratio:.3f} | {errors} | {filled:.2f} |"))
    head = "| data | epochs | width | training / validation loss | base, % | conversion, % | one head alone, % | "
    return "\n".join([f"{head}99 % of variance |", "|" + "---|" * 8, *(line for _, line in sorted(lines))])


def _error(rows: list[dict[str, Any]]) -> float:
    return mean(row["val"]["error"] for row in rows)


def _filled(layers: dict[str, Any]) -> float:
    """The share of channels that hold 99 % of the variance, mean over layers weighted by their weights."""
    weights = sum(layer["weights"] for layer in layers.values())
    return sum(layer["weights"] * layer["components_99"] / layer["channels"] for layer in layers.values()) / weights


def main() -> None:
    """Finish what is missing, or print what there is."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", choices=(*SERIES, "table"))
    parser.add_argument("--data", dest="folder", help="the folder of CIFAR-10's or YouTube-8M's files", default="")
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    if args.data == "table":
        print(table())
        return
    path = RESULTS / f"capacity_{args.data}.jsonl"
    done = {json.dumps(row["run"]) for row in read(path)}
    missing = [run for run in runs(args.data) if json.dumps(asdict(run)) not in done]
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool, path.open("a") as file:
        pending = [pool.submit(finish, run, args.folder) for run in missing]
        for future in track(as_completed(pending), "Training", total=len(pending)):
            file.write(json.dumps(future.result()) + "\n")
            file.flush()


if __name__ == "__main__":
    main()
