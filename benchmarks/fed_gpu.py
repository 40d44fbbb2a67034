"""Images a second and core of the loader beside timm's and torchvision's, and how long training waits for images.

    OMP_NUM_THREADS=1 python benchmarks/fed_gpu.py            # a minute on a CPU, at toy sizes; under three on a GPU

JPEGs of 500 x 375 pixels are made. Every loader cuts random parts out of them at random sizes (bicubic), mirrors them,
changes their colours (0.4), and collates batches. `loaders` counts the processor time of one worker of each, without
its start; batch by batch they take turns, so that the load of the machine meets all. `bytes` is what goes to a GPU;
`numbers` are normalized by the worker, as torchvision's usual transforms do.

`waiting` trains for some steps on a batch that stays on the device, and then on images that workers load, with
normalization on the device and in the process that trains. What the second takes longer is waiting.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from timm import create_model
from timm.data import create_dataset, create_loader
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from ensemblenet.data import ImageData
from ensemblenet.storage.atomic import write_json
from ensemblenet.storage.runs import environment

RESULTS = Path(__file__).parent / "results" / "fed_gpu.json"
WIDTH, HEIGHT = 500, 375
CLASSES = 4
FEW = 640  # images for a round of a loader


def make_images(folder: Path, number: int) -> None:
    """Smooth colours with some noise, 66 KB each, as many of each class."""
    rng = np.random.default_rng(0)
    for index in range(number):
        colours = Image.fromarray(rng.integers(256, size=(24, 32, 3), dtype=np.uint8))
        smooth = np.asarray(colours.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), np.int16)
        pixels = (smooth + rng.integers(-12, 13, size=smooth.shape)).clip(0, 255).astype(np.uint8)
        for split in ("train", "val") if index < 2 * CLASSES else ("train",):
            path = folder / split / str(index % CLASSES) / f"{index}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path, quality=90)


def our_data(folder: Path, size: int, batch_size: int, workers: int) -> ImageData:
    data = ImageData(folder, image_size=size, batch_size=batch_size, num_workers=workers, seed=0)
    data.setup("fit")
    return data


# -- loaders


def ours(folder: Path, size: int, batch_size: int) -> DataLoader[Any]:
    return our_data(folder, size, batch_size, 1).train_dataloader()._loader  # batches as workers give them


def timms(folder: Path, size: int, batch_size: int) -> DataLoader[Any]:
    data = create_dataset("", root=folder / "train")
    options: dict[str, Any] = {"interpolation": "bicubic", "num_workers": 1, "persistent_workers": False}
    loader: Any = create_loader(data, (3, size, size), batch_size, True, device=torch.device("cpu"), **options)
    return loader.loader  # the one in workers, before bytes go to the device


def torchvisions(folder: Path, size: int, batch_size: int, as_bytes: bool) -> DataLoader[Any]:
    end = (
        [transforms.PILToTensor()] if as_bytes else [transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.2] * 3)]
    )
    steps = [
        transforms.RandomResizedCrop(size, interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(),
        transforms.ColorJitter(0.4, 0.4, 0.4),
    ]
    data = ImageFolder(str(folder / "train"), transforms.Compose([*steps, *end]))
    return DataLoader(data, batch_size, shuffle=True, num_workers=1, drop_last=True)


def rates(loaders: dict[str, DataLoader[Any]], batch_size: int) -> dict[str, float]:
    """Images a second of each worker's processor time, without its start; batch by batch the loaders take turns."""
    running: dict[str, Any] = {name: iter(loader) for name, loader in loaders.items()}
    for batches in running.values():
        next(batches)
    time.sleep(2)  # until each worker has fetched ahead what it may, and waits
    ahead = 1 + loaders["timm, bytes"].prefetch_factor
    images = batch_size * (len(loaders["timm, bytes"]) - ahead)
    workers = {name: psutil.Process(batches._workers[0].pid) for name, batches in running.items()}
    before = {name: sum(worker.cpu_times()[:2]) for name, worker in workers.items()}
    for _ in range(len(loaders["timm, bytes"]) - 1 - ahead):
        for batches in running.values():
            next(batches)
    time.sleep(2)
    found = {name: images / (sum(worker.cpu_times()[:2]) - before[name]) for name, worker in workers.items()}
    del running, batches
    gc.collect()  # ends the workers
    return found


def loaders(folder: Path, batch_size: int, rounds: int) -> dict[str, Any]:
    values: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        made = {
            "ensemblenet, bytes": ours(folder, 224, batch_size),
            "timm, bytes": timms(folder, 224, batch_size),
            "torchvision, bytes": torchvisions(folder, 224, batch_size, as_bytes=True),
            "torchvision, numbers": torchvisions(folder, 224, batch_size, as_bytes=False),
        }
        for name, value in rates(made, batch_size).items():
            values[name].append(value)
    first, *others = values
    ratios = {
        name: statistics.median(a / b for a, b in zip(values[first], values[name], strict=True)) for name in others
    }
    found = {"medians": {name: statistics.median(row) for name, row in values.items()}, f"{first} against": ratios}
    print(found, flush=True)
    return {**found, "rounds": values}


# -- waiting


def step_of(network: nn.Module, device: torch.device) -> Callable[[torch.Tensor, torch.Tensor], None]:
    optimizer = torch.optim.SGD(network.parameters(), 0.01)

    def step(x: torch.Tensor, y: torch.Tensor) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = nn.functional.cross_entropy(network(x.contiguous(memory_format=torch.channels_last)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def seconds(work: Callable[[], None]) -> float:
    """By the clock, until the device has done it."""
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def waiting(folder: Path, size: int, batch_size: int, name: str, workers: int, rounds: int) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = create_model(name, num_classes=CLASSES).to(device, memory_format=torch.channels_last).train()
    step = step_of(network, device)

    def moved(batch: Any) -> list[torch.Tensor]:
        return [part.to(device, non_blocking=True) for part in batch]

    data = our_data(folder, size, batch_size, workers)
    resident = moved(next(iter(data.train_dataloader())))
    for _ in range(3):
        step(*resident)
    values: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        for way in ("on the device", "in the process"):
            loader: Any = data.train_dataloader()
            finish, loader.finish = loader.finish, None if way == "on the device" else loader.finish
            batches = iter(loader)
            step(*finish(moved(next(batches))))  # until the workers run

            def fed(batches: Any = batches, finish: Any = finish) -> None:
                for batch in batches:
                    step(*finish(moved(batch)))

            def unfed(steps: int = len(loader) - 1) -> None:
                for _ in range(steps):
                    step(*resident)

            alone, with_images = seconds(unfed), seconds(fed)
            values[f"images a second, {way}"].append((len(loader) - 1) * batch_size / with_images)
            values["images a second, one batch"].append((len(loader) - 1) * batch_size / alone)
            values[f"share of waiting, {way}"].append(1 - alone / with_images)
    medians = {name: statistics.median(row) for name, row in values.items()}
    print(medians, flush=True)
    settings = {
        "network": name,
        "image_size": size,
        "batch_size": batch_size,
        "workers": workers,
        "device": str(device),
    }
    return {"settings": settings, "medians": medians, "rounds": values}


def main() -> None:
    has_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4096 if has_gpu else 64, help="JPEGs to train on")
    parser.add_argument("--batch_size", type=int, default=128 if has_gpu else 16)
    parser.add_argument("--workers", type=int, default=os.cpu_count() if has_gpu else 1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    name, size = ("resnet50", 224) if has_gpu else ("resnet10t", 64)
    with tempfile.TemporaryDirectory() as few, tempfile.TemporaryDirectory() as made:
        make_images(Path(few), FEW)
        make_images(Path(made), options.images)
        results = {
            "loaders": loaders(Path(few), 16, options.rounds),
            "waiting": waiting(Path(made), size, options.batch_size, name, options.workers, options.rounds),
        }
    write_json(
        options.output,
        {"environment": environment(), "settings": {"loaders": FEW, "waiting": options.images}, **results},
    )


if __name__ == "__main__":
    main()
