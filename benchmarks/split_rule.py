"""Where to split: validation error against the trunk's share of MACs, on MNIST-1D and CIFAR-10.

    python benchmarks/split_rule.py mnist1d
    python benchmarks/split_rule.py cifar10 --data FOLDER   # with train.parquet and test.parquet

Every split point at the end of a stage, 2 and 4 heads, all with the base's settings (tuned for the base), within 0.95
of its parameters and MACs. Only validation examples are read; the test set stays unseen.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from ensemblenet import CoDistillationLoss, convert
from ensemblenet.data import MNIST1D, ParquetImages
from ensemblenet.models import CifarResNet, MNIST1DNet
from ensemblenet.training.optimization import Optimization, build_optimizer, build_schedule

RESULTS = Path(__file__).parent / "results"
BUDGET = 0.95
STAGES = {
    "mnist1d": ["input", "conv1", "conv2", "conv3"],
    "cifar10": ["input", "stages.0", "stages.1"],
}


def error(network: nn.Module, loader: object) -> float:
    """Error in percent."""
    network.eval()
    with torch.no_grad():
        wrong = [(network(x).argmax(1) != y).float() for x, y in loader]  # type: ignore[attr-defined]
    return 100 * torch.cat(wrong).mean().item()


def train(network: nn.Module, loader: object, epochs: int, settings: Optimization, weight: float) -> None:
    """Train in place."""
    criterion = CoDistillationLoss(weight)
    optimizer = build_optimizer(network, settings)
    schedule = build_schedule(optimizer, epochs * len(loader), settings)  # type: ignore[arg-type]
    network.train()
    for _ in range(epochs):
        for x, y in loader:  # type: ignore[attr-defined]
            outputs = network(x)
            loss = criterion(outputs if outputs.ndim == 3 else outputs[None], y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def main() -> None:
    """Train everything, print the table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=sorted(STAGES))
    parser.add_argument("--data", type=Path, help="the folder of CIFAR-10's parquet files")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--weight", type=float, default=3.0, help="the co-distillation weight")
    args = parser.parse_args()
    torch.set_num_threads(1)
    make: Callable[[], nn.Module]
    if args.name == "mnist1d":
        data = MNIST1D(num_val=5000)
        make, shape, epochs = (lambda: MNIST1DNet(32)), (2, 40), 40
        settings = Optimization("adamw", lr=0.01, weight_decay=0.3)
    else:
        data = ParquetImages(args.data, image_size=16, num_val=5000, limit_train=6000)
        make, shape, epochs = (lambda: CifarResNet(8, 12)), (2, 3, 16, 16), 24
        settings = Optimization("adamw", lr=0.01, weight_decay=0.05)
    data.setup()
    example: Tensor = torch.zeros(shape)
    cells = [(0, "")] + [(k, split) for k in (2, 4) for split in STAGES[args.name]]
    rows = []
    for num_heads, split in track(cells, f"Training on {args.name}"):
        errors = []
        for seed in range(args.seeds):
            torch.manual_seed(seed)
            data.reseed(seed)
            network = make()
            share = 1.0
            if num_heads:
                network = convert(network, example, num_heads, BUDGET, split, seed)
                assert network.base_cost is not None
                assert network.trunk_cost is not None
                share = network.trunk_cost.macs / network.base_cost.macs
            train(network, data.train_dataloader(), epochs, settings, args.weight)
            errors.append(error(network, data.val_dataloader()))
        row = {"num_heads": num_heads, "split_at": split, "trunk_macs": share, "errors": errors}
        rows.append(row | {"mean": fmean(errors), "std": stdev(errors)})
    record = {
        "command": "python benchmarks/" + " ".join([Path(sys.argv[0]).name, args.name]),
        "environment": {"torch": torch.__version__, "python": platform.python_version(), "cpus": os.cpu_count()},
        "weight": args.weight,
        "budget": BUDGET,
        "epochs": epochs,
        "optimization": vars(settings),
        "rows": rows,
    }
    (RESULTS / f"split_rule_{args.name}.json").write_text(json.dumps(record, indent=1) + "\n")
    table = Table("heads", "split", "trunk's MACs", "validation error, %", title=args.name)
    for row in rows:
        table.add_row(
            str(row["num_heads"] or "base"),
            row["split_at"],
            f"{row['trunk_macs']:.2f}",
            f"{row['mean']:.2f} ± {row['std']:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
