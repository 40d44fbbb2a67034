"""What Ray adds to a study: the same trials in local processes, and on nodes of one CPU each on this machine.

python benchmarks/ray_overhead.py --trials 16 --epochs 60 --output FILE.json
"""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
from ray.cluster_utils import Cluster as Nodes

from ensemblenet.storage.atomic import write_json
from ensemblenet.storage.runs import environment
from ensemblenet.study.on_ray import RayWorkers
from ensemblenet.study.task import Setup
from ensemblenet.study.trials import Trial, Workers
from ensemblenet.training.executor import Cluster
from ensemblenet.training.optimization import Optimization

BASE = {"class_path": "ensemblenet.models.MNIST1DResNet", "init_args": {"width": 16}}
DATA = {"class_path": "ensemblenet.data.MNIST1D", "init_args": {"batch_size": 100}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=60, help="decides how long a trial takes")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    trials = [
        Trial("base", "base", Setup(), BASE, DATA, "test", seed, Optimization(), options.epochs)
        for seed in range(options.trials)
    ]
    engines = [(kind, number) for number in (1, 2) for kind in ("local processes", "Ray nodes")]
    rows = [run(kind, number, trials) for kind, number in engines]
    if options.output:
        write_json(
            options.output,
            {"environment": environment(), "trials": options.trials, "epochs": options.epochs, "rows": rows},
        )


def run(kind: str, number: int, trials: list[Trial]) -> dict[str, Any]:
    """Seconds by the clock until processes have begun and imported what they need, and of the trials from then on."""
    with ExitStack() as stack:
        if kind == "Ray nodes":
            nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
            stack.callback(nodes.shutdown)
            for _ in range(number - 1):
                nodes.add_node(num_cpus=1)
            workers = RayWorkers(Cluster(nodes.address))
        else:
            workers = Workers(number)
        began = time.perf_counter()
        stack.enter_context(workers)
        list(workers.run([replace(trial, epochs=1) for trial in trials[: 2 * number]]))
        ready, used = time.perf_counter(), cpu_seconds()
        outcomes = [outcome for _, outcome in workers.run(trials) if outcome["status"] != "running"]
        ended, used = time.perf_counter(), cpu_seconds() - used
    training = sum(outcome["seconds"] for outcome in outcomes)
    cpu = sum(outcome["cpu_seconds"] for outcome in outcomes)
    row = {
        "engine": f"{number} {kind}",
        "seconds_to_begin": ready - began,
        "seconds": ended - ready,
        "seconds_of_training": training,
        "cpu_seconds_of_training": cpu,
        "cpu_seconds_beside_training_per_trial": (used - cpu) / len(trials),
        "seconds_beside_training_per_trial": (number * (ended - ready) - training) / len(trials),
        "errors": [outcome["error"] for outcome in outcomes],
    }
    print({name: value for name, value in row.items() if name != "errors"}, flush=True)
    return row


def cpu_seconds() -> float:
    """Processor time of this process and all below it, Ray's own among them: other work on the machine does not add."""
    here = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in (here, *here.children(recursive=True)))


if __name__ == "__main__":
    main()
