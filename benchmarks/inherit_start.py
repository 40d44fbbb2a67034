"""How good heads are that inherit from a trained base, before any training.

A residual network of three blocks a stage with batch normalisation, and a residual perceptron without, both for
MNIST-1D. Heads inherit channels or blocks by each importance: the same in all heads, dealt out in turns, or drawn by
each head for itself.

    python benchmarks/inherit_start.py --output benchmarks/results/inherit_start.json
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ensemblenet
from ensemblenet.conversion import importance
from ensemblenet.data.mnist1d import generate_mnist1d
from ensemblenet.storage.runs import environment

Choice = Callable[[Sequence[int], int, int, int], list[int]]
EPOCHS, BATCH, CALIBRATION = 30, 100, 8
# by name, options of `convert`: heads as wide in two as in four, and heads without half of the blocks they may drop
PLANS: dict[str, dict[str, Any]] = {
    "2 narrow": {"num_heads": 2, "budget": 1.0, "shape": "narrow"},
    "4 narrow": {"num_heads": 4, "budget": 2.0, "shape": "narrow"},
    "2 short": {"num_heads": 2, "budget": 4.0, "depth": 0.5, "width": 1.0},
    "4 short": {"num_heads": 4, "budget": 4.0, "depth": 0.5, "width": 1.0},
}


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm1d(outputs),
            nn.ReLU(),
            nn.Conv1d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm1d(outputs),
        )
        self.skip = nn.Identity() if inputs == outputs else nn.Conv1d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.skip(x))


class Signals(nn.Module):
    """A residual network: a stem and three stages of three blocks."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(1, width, 5, 1, 2, bias=False), nn.BatchNorm1d(width), nn.ReLU())
        sizes = [(width, width, 1), (width, 2 * width, 2), (2 * width, 4 * width, 2)]
        stages = [[Block(a, b, stride), Block(b, b, 1), Block(b, b, 1)] for a, b, stride in sizes]
        self.stages = nn.Sequential(*(nn.Sequential(*blocks) for blocks in stages))
        self.classifier = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.stages(self.stem(x.unsqueeze(1))).mean(-1))


class Layers(nn.Module):
    """A perceptron whose layers are added to what they read."""

    def __init__(self, width: int = 256, depth: int = 6) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(40, width), nn.Linear(width, 10)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)) for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = x + layer(x)
        return self.last(torch.relu(x))


def train(base: nn.Module, x: Tensor, y: Tensor, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(base.parameters(), 2e-3, weight_decay=0.05)
    steps = EPOCHS * (len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for _ in range(EPOCHS):
        for places in torch.randperm(len(x), generator=generator).split(BATCH):
            loss = F.cross_entropy(base(x[places]), y[places])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def same(order: Sequence[int], number: int, head: int, num_heads: int) -> list[int]:
    return sorted(order[:number])


def by_chance(order: Sequence[int], number: int, head: int, num_heads: int) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * head + len(order) + sum(order[:3]))
    return torch.randperm(len(order), generator=generator)[:number].sort().values.tolist()


CHOICES: dict[str, Choice] = {"same": same, "dealt": importance.deal, "chance": by_chance}


@contextmanager
def choosing(name: str) -> Iterator[None]:
    with mock.patch.object(importance, "deal", CHOICES[name]):
        yield


def error(outputs: Tensor, y: Tensor) -> float:
    return 100 * (outputs.argmax(-1) != y).float().mean().item()


def measure(model: ensemblenet.EnsembleNet, x: Tensor, y: Tensor) -> dict[str, float]:
    with torch.no_grad():
        outputs = model.eval()(x, per_head=True)
    heads = [error(own, y) for own in outputs]
    mean = outputs.mean(0)
    return {"error": error(mean, y), "nll": F.cross_entropy(mean, y).item(), "head": sum(heads) / len(heads)}


def run(seed: int, rows: list[dict[str, Any]]) -> None:
    (x, y), test = generate_mnist1d((4000, 4000))
    for name, make in (("ResNet", Signals), ("perceptron", Layers)):
        torch.manual_seed(seed)
        base = make()
        train(base, x, y, seed)
        base.eval()
        with torch.no_grad():
            rows.append({"base": name, "seed": seed, "error": error(base(test[0]), test[1])})
        print(rows[-1], flush=True)
        batches = list(zip(x.split(BATCH), y.split(BATCH), strict=True))[:CALIBRATION]
        for plan, kind in product(PLANS, ("random", "magnitude", "scale", "taylor")):
            if name == "perceptron" and kind == "scale":  # it has no normalisation
                continue
            for choice in CHOICES if kind == "random" else ("same", "dealt"):
                options = {"init": "inherit", "importance": kind, "seed": seed, **PLANS[plan]}
                with choosing(choice):
                    model = ensemblenet.convert(base, x[:2], **options, calibration=batches)
                row = {"base": name, "seed": seed, "plan": plan, "importance": kind, "choice": choice}
                rows.append(row | measure(model, *test))
                if kind == "magnitude":
                    with choosing(choice):
                        model = ensemblenet.convert(base, x[:2], **options)
                    rows.append(row | {"choice": f"{choice}, not repaired"} | measure(model, *test))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Error of the mean of heads and of single heads, in %, mean over seeds."""
    lines = [
        "| base | heads | importance | choice | error of the mean | NLL | error of a head |",
        "|---|---|---|---|---|---|---|",
    ]
    keys = dict.fromkeys((row["base"], row["plan"], row["importance"], row["choice"]) for row in rows if "plan" in row)
    for key in keys:
        own = [row for row in rows if (row["base"], row.get("plan"), row.get("importance"), row.get("choice")) == key]
        values = [sum(row[score] for row in own) / len(own) for score in ("error", "nll", "head")]
        lines.append(f"| {' | '.join(key)} | {values[0]:.1f} | {values[1]:.2f} | {values[2]:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    start, rows = time.perf_counter(), []
    for seed in range(options.seeds):
        run(seed, rows)
    found = {"seconds": time.perf_counter() - start, "environment": environment(), "rows": rows}
    options.output.write_text(json.dumps(found, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
