"""How the settings of version 0.1's demo were chosen, `MNIST1DNet(64)` and its conversion, on validation examples.

python benchmarks/demo_tuning.py --output benchmarks/results/demo_tuning.json
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean

from rich.progress import track

from ensemblenet.cli.demo import demo_study
from ensemblenet.recipe import Conversion
from ensemblenet.storage.atomic import write_json
from ensemblenet.storage.runs import environment
from ensemblenet.study.task import Setup
from ensemblenet.study.trials import Trial, Workers
from ensemblenet.training.optimization import Optimization

SETUP = Setup(Conversion(num_heads=4, budget=0.95), weight=1.0)
# Learning rate and weight decay.
GRID = [(0.005, 0.3), (0.005, 1.0), (0.01, 0.1), (0.01, 0.3), (0.01, 1.0), (0.02, 0.3), (0.02, 1.0), (0.04, 0.3)]
# Of the conversion, at (0.005, 1).
VARIATIONS = [
    *(replace(SETUP, weight=weight) for weight in (2.0, 3.0)),
    *(replace(SETUP, conversion=Conversion(heads, 0.95)) for heads in (2, 6)),
    replace(SETUP, conversion=Conversion(4, 0.95, "input")),
]


BASE = {"class_path": "ensemblenet.models.MNIST1DNet", "init_args": {"width": 64}}


def trial(method: str, setup: Setup, lr: float, weight_decay: float) -> Trial:
    study = demo_study()
    optimization = Optimization("adamw", lr=lr, weight_decay=weight_decay)
    return Trial(method, method, setup, BASE, study.data, "tune", 0, optimization, study.epochs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()

    settings = [trial(method, SETUP, *point) for point in GRID for method in ("base", "codistillation")]
    settings += [trial("codistillation", variation, 0.005, 1.0) for variation in VARIATIONS]
    trials = [replace(setting, seed=seed) for setting in settings for seed in range(options.seeds)]
    with Workers(options.workers) as workers:
        errors = {one.key: outcome["error"] for one, outcome in track(workers.run(trials), total=len(trials))}
    rows = [
        {
            "setting": asdict(setting),
            "validation_errors": [errors[replace(setting, seed=seed).key] for seed in range(options.seeds)],
        }
        for setting in settings
    ]
    write_json(options.output, {"environment": environment(), "rows": rows})
    for row in sorted(rows, key=lambda row: fmean(row["validation_errors"])):
        print(f"{fmean(row['validation_errors']):.2f}", row["setting"]["method"], row["setting"]["optimization"])


if __name__ == "__main__":
    main()
