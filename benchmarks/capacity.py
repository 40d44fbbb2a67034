"""When a conversion pays: bases of several widths, trained for several lengths, against their own conversions.

    python benchmarks/capacity.py mnist1d
    python benchmarks/capacity.py cifar10 --data FOLDER   # with train.parquet and test.parquet

Each base, one head trained alone (the conversion's trunk and one head), and the conversion to 4 heads are trained with
every setting of a short list; the one with the lowest validation error counts. Only validation examples are read. Of
the trained base it is written down how large the part is that its features need: the share of principal components,
weighted by the layers' weights, that hold 99 % of the variance at the input of each layer. Finished runs are kept in a
file of JSON lines, and not computed again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from rich.progress import track
from torch import nn

from ensemblenet.data import MNIST1D, ParquetImages
from ensemblenet.models import CifarResNet, MNIST1DNet
from ensemblenet.study.cells import train
from ensemblenet.study.measures import Measures
from ensemblenet.study.methods import METHODS, Contender, Setup, Source
from ensemblenet.training.optimization import Optimization

RESULTS = Path(__file__).parent / "results"
METHODS_COMPARED = ("base", "head_alone", "codistillation")
SETTINGS = ((0.02, 0.3), (0.01, 1.0))
SEEDS = 2


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

    def base(self) -> nn.Module:
        return MNIST1DNet(self.width) if self.data == "mnist1d" else CifarResNet(8, self.width)

    def module(self, folder: str | None) -> LightningDataModule:
        if self.data == "mnist1d":
            return MNIST1D(num_train=self.examples, num_val=5000)
        assert folder is not None
        return ParquetImages(folder, image_size=16, num_val=5000, limit_train=self.examples, batch_size=100)


def runs(data: str) -> list[Run]:
    widths, examples, lengths = (
        ((16, 32, 64, 128), (4000,), (10, 40)) if data == "mnist1d" else ((12, 24, 48), (1000,), (60,))
    )
    return [
        Run(data, method, width, number, epochs, lr, weight_decay, seed)
        for seed in range(SEEDS)
        for epochs in lengths
        for number in examples
        for width in widths
        for lr, weight_decay in SETTINGS
        for method in METHODS_COMPARED
    ]


def finish(run: Run, folder: str | None) -> dict[str, Any]:
    """Train and measure."""
    torch.set_num_threads(1)
    data: Any = run.module(folder)
    data.prepare_data()
    data.setup()
    x = next(iter(data.val_dataloader()))[0][:2]
    split = "conv1" if run.data == "mnist1d" else "auto"
    setup = Setup(num_heads=4, budget=0.95, split_at=split, weight=2.0)
    contender = METHODS[run.method].build(Source(run.base, x, run.seed), setup)
    cost = contender.cost(x)
    optimization = Optimization("adamw", lr=run.lr, weight_decay=run.weight_decay)
    precision = "32" if run.data == "mnist1d" else "bf16"
    seconds = train(contender, data, optimization, run.epochs, run.seed, precision)["cpu_seconds"]
    found = {"parameters": cost.parameters, "macs": cost.macs, "cpu_seconds": seconds}
    found |= {"val": measure(contender, data.val_dataloader()), "train": measure(contender, data.train_dataloader())}
    if run.method == "base":
        found["spectra"] = spectra(contender.network, data.val_dataloader())
    return {"run": asdict(run)} | found


@torch.no_grad()
def measure(contender: Contender, loader: Any) -> dict[str, Any]:
    measures: Measures | None = None
    for x, y in loader:
        outputs, prediction = contender.eval()(x)
        measures = measures or Measures(outputs.shape[2], len(outputs))
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


def main() -> None:
    """Finish what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", choices=("mnist1d", "cifar10"))
    parser.add_argument("--data", dest="folder", help="the folder of CIFAR-10's parquet files")
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
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
