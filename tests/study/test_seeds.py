"""Trials of one process whose data takes the seed of the trial."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from made_images import make_folders
from torch import nn

from ensemblenet.study.methods import METHODS, Setup, Source
from ensemblenet.study.trials import Trial, train
from ensemblenet.training.optimization import Optimization


def data_of(name: str, folder: Path) -> dict[str, Any]:
    arguments: dict[str, Any] = {"batch_size": 4, "num_train": 20, "num_val": 10, "num_test": 10}
    if name == "ImageData":
        make_folders(folder)
        arguments = {"folder": str(folder), "image_size": 8, "batch_size": 4, "num_workers": 0, "seed": None}
    return {"class_path": f"ensemblenet.data.{name}", "init_args": arguments}


@pytest.mark.parametrize("name", ["MNIST1D", "ImageData"])
def test_each_seed_trains_on_batches_of_its_own(tmp_path: Path, name: str) -> None:
    first = Trial("base", "base", Setup(), {}, data_of(name, tmp_path), "test", 0, Optimization(), epochs=1)
    found: dict[int, list[torch.Tensor]] = {}
    for seed in (1, 2, 1):
        data = replace(first, seed=seed).data_module()
        example = next(iter(data.train_dataloader()))[0]
        base = nn.Sequential(nn.Flatten(), nn.Linear(example[0].numel(), 10))
        task = METHODS["base"].build(Source(lambda base=base: base, example, seed), Setup())
        seen: list[torch.Tensor] = []
        task.loss = lambda x, y, progress, seen=seen, loss=task.loss: seen.append(x) or loss(x, y, progress)
        train(task, data, Optimization(), 1, seed)
        assert seed not in found or all(map(torch.equal, seen, found[seed]))
        found[seed] = seen
    assert len(found[1]) > 1
    assert not all(map(torch.equal, found[1], found[2]))
