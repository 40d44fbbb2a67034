"""How the demo's settings were chosen, for the base and for its conversion, on validation examples.

python benchmarks/demo_tuning.py --output benchmarks/results/demo_tuning.json
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean

from ensemblenet.cli.demo import Job, run_jobs
from ensemblenet.storage.runs import environment, write_json
from ensemblenet.training.optimization import Optimization

VALIDATION = 1  # its index among the splits
BASE = Job()
OURS = Job(num_heads=4, budget=0.95, split_at="auto", weight=1.0)
# Learning rate and weight decay.
GRID = [(0.005, 0.3), (0.005, 1.0), (0.01, 0.1), (0.01, 0.3), (0.01, 1.0), (0.02, 0.3), (0.02, 1.0), (0.04, 0.3)]
# Of the conversion, at (0.005, 1).
VARIATIONS = [{"weight": 2.0}, {"weight": 3.0}, {"num_heads": 2}, {"num_heads": 6}, {"split_at": "input"}]


def with_optimization(job: Job, lr: float, weight_decay: float) -> Job:
    return replace(job, optimization=Optimization("adamw", lr=lr, weight_decay=weight_decay))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()

    settings = [with_optimization(job, *point) for point in GRID for job in (BASE, OURS)]
    settings += [with_optimization(replace(OURS, **variation), 0.005, 1.0) for variation in VARIATIONS]
    seeds = range(options.seeds)
    jobs = [replace(job, seed=seed) for job in settings for seed in seeds]
    outcomes = iter(run_jobs(jobs, options.workers, split=VALIDATION))
    rows = [{"setting": asdict(job), "validation_errors": [next(outcomes)["error"] for _ in seeds]} for job in settings]
    write_json(options.output, {"environment": environment(), "rows": rows})
    for row in sorted(rows, key=lambda row: fmean(row["validation_errors"])):
        print(f"{fmean(row['validation_errors']):.2f}", row["setting"])


if __name__ == "__main__":
    main()
