"""A tiny study, and its trials, for the tests of `study`, `reports` and `cli`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from ensemblenet.recipe import Conversion
from ensemblenet.study.methods import Setup
from ensemblenet.study.settings import Study, Tuning, Variant
from ensemblenet.study.trials import Trial
from ensemblenet.training.optimization import Optimization

BASE = {"class_path": "ensemblenet.models.MNIST1DNet", "init_args": {"width": 8}}
DATA = {
    "class_path": "ensemblenet.data.MNIST1D",
    "init_args": {"batch_size": 20, "num_train": 60, "num_val": 40, "num_test": 50},
}
STUDY = Study(
    BASE,
    DATA,
    methods=["base", "codistillation", "one", Variant("codistillation", name="no trunk", split_at="input", weight=1.0)],
    num_heads=2,
    weight=3.0,
    epochs=1,
    seeds=3,
    tuning=Tuning(trials=2),
)
NAMES = ["base", "co-distillation, λ = 3", "ONE", "no trunk"]


def trial(phase: str = "tune", **changes: Any) -> Trial:
    setup = Setup(Conversion(num_heads=2, budget=0.95), weight=3.0)
    made = Trial("ours", "codistillation", setup, BASE, DATA, phase, 0, Optimization(), epochs=1)  # pyright: ignore
    return replace(made, **changes)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "cells.jsonl").read_text().splitlines()]
