"""What training on JPEGs decoded at half their size costs in accuracy: `ImageData(draft=True)` beside the usual.

    OMP_NUM_THREADS=1 python benchmarks/draft_accuracy.py --data FOLDER    # of class folders, or train.tar and val.tar

A small network is trained on random crops of S pixels. Seed by seed both ways take turns: the same network, order of
images and random numbers. Validation images are decoded whole.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
from timm import create_model
from torch import nn

from ensemblenet.data import ImageData
from ensemblenet.storage.atomic import write_json
from ensemblenet.storage.runs import environment

RESULTS = Path(__file__).parent / "results" / "draft_accuracy.json"


def accuracy(options: argparse.Namespace, draft: bool, seed: int) -> float:
    """Per cent of the validation images."""
    data = ImageData(options.data, image_size=options.size, batch_size=64, num_workers=0, seed=seed, draft=draft)
    data.setup("fit")
    data.keep_examples("train", range(0, len(data.examples("train")), options.every))
    torch.manual_seed(seed)
    network = create_model(options.network, num_classes=len(data.classes or ()))
    loader = data.train_dataloader()
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, options.epochs * len(loader))
    for _ in range(options.epochs):
        for x, y in loader:
            loss = nn.functional.cross_entropy(network(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    network.eval()
    with torch.no_grad():
        hits = [(network(x).argmax(1) == y) for x, y in data.val_dataloader()]
    return 100 * torch.cat(hits).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--size", type=int, default=32, help="S")
    parser.add_argument("--network", default="resnet10t")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--every", type=int, default=1, help="train on each n-th image")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    found: dict[str, list[float]] = {"whole": [], "draft": []}
    for seed in range(options.seeds):
        for name in found:
            found[name].append(accuracy(options, name == "draft", seed))
        apart = [draft - whole for whole, draft in zip(found["whole"], found["draft"], strict=True)]
        print(found, "mean difference", statistics.mean(apart), flush=True)
        settings = {name: value for name, value in vars(options).items() if name not in ("output", "data")}
        write_json(options.output, {"environment": environment(), "settings": settings, "accuracy": found})


if __name__ == "__main__":
    main()
