"""When heads help: against the width of the base, and against the length of training, on MNIST-1D.

    python benchmarks/capacity.py     # writes benchmarks/results/capacity.json and docs/images/capacity.svg

Base and conversion (4 heads within 0.95 of the base's cost, split "auto", λ = 2) have the settings of the demo, tuned
at width 64 and 40 epochs, at every width and length. Test examples, 3 seeds. Finished runs are kept.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from matplotlib.figure import Figure

from ensemblenet.study.demo import Job, demo_methods, run_jobs
from ensemblenet.training.run import environment, write_json

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "capacity.json"
FIGURE = ROOT / "docs" / "images" / "capacity.svg"
SEEDS = range(3)
BASE, OURS = (method.job for method in demo_methods()[:2])
WIDTHS = (16, 32, 64, 96)
EPOCHS = (10, 20, 40, 80)


def jobs() -> list[Job]:
    swept = [replace(job, base_width=width) for width in WIDTHS for job in (BASE, OURS)]
    swept += [replace(job, epochs=epochs) for epochs in EPOCHS for job in (BASE, OURS)]
    return list(dict.fromkeys(replace(job, seed=seed) for job in swept for seed in SEEDS))


def key(job: Job) -> str:
    return json.dumps(asdict(job), sort_keys=True)


def draw(errors: dict[str, float]) -> None:
    figure = Figure((8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_sweep(left, errors, "base_width", WIDTHS, "channels of the base")
    _draw_sweep(right, errors, "epochs", EPOCHS, "epochs")
    left.set_ylabel("test error, %")
    left.legend(frameon=False)
    figure.savefig(FIGURE)


def _draw_sweep(axes: Any, errors: dict[str, float], name: str, values: tuple[int, ...], label: str) -> None:
    for job, title, colour in ((BASE, "base", "#f59e0b"), (OURS, "4 heads, 0.95 of its cost", "#3b82f6")):
        runs = [[errors[key(replace(job, **{name: value, "seed": seed}))] for seed in SEEDS] for value in values]
        means, spreads = [fmean(run) for run in runs], [stdev(run) for run in runs]
        axes.errorbar(values, means, spreads, label=title, color=colour, marker="o", capsize=3)
        shown = zip(values, means, spreads, strict=True)
        print(name, title, ", ".join(f"{value}: {mean:.2f} ± {spread:.2f}" for value, mean, spread in shown))
    axes.set_xscale("log", base=2)
    axes.set_xticks(values, [str(value) for value in values])
    axes.set_xlabel(label)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    errors = {json.dumps(row["setting"], sort_keys=True): row["error"] for row in rows}
    missing = [job for job in jobs() if key(job) not in errors]
    for first in range(0, len(missing), 6):  # what is finished is kept
        some = missing[first : first + 6]
        for job, outcome in zip(some, run_jobs(some, options.workers), strict=True):
            errors[key(job)] = outcome["error"]
            rows.append({"setting": asdict(job), "error": outcome["error"], "head_errors": outcome["head_errors"]})
        write_json(RESULTS, {"environment": environment(), "rows": rows})
    draw(errors)


if __name__ == "__main__":
    main()
