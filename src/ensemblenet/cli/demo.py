"""The command `demo`: the main job, end to end, on a data set that this machine generates."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from ensemblenet import CoDistillationLoss, Cost, convert, measure_cost
from ensemblenet.cli.main import positive_integer
from ensemblenet.data.mnist1d import generate_mnist1d
from ensemblenet.functional import combine_heads, divergence
from ensemblenet.inputs import InputSpec
from ensemblenet.models import MNIST1DNet
from ensemblenet.reports.tables import Figure, draw_costs, draw_pairs, draw_weights, results_table, write_page
from ensemblenet.storage.runs import (
    ENVIRONMENT,
    RESULTS,
    create_run_folder,
    environment,
    result_row,
    write_json,
)
from ensemblenet.training.module import head_outputs
from ensemblenet.training.optimization import Optimization, build_optimizer, build_schedule

__all__ = ["PAGE", "Job", "Method", "demo", "demo_methods", "evaluate", "run_demo", "run_job", "train"]

PAGE = "index.html"

# Base and conversion have each their own best on validation examples: benchmarks/demo_tuning.py.
_SIZES = (4000, 5000, 5000)
_TEST = 2
_BASE_WIDTH = 64
_BATCH = 100
_EPOCHS = 40
_BASE_OPTIMIZATION = Optimization("adamw", lr=0.02, weight_decay=0.3)
_OPTIMIZATION = Optimization("adamw", lr=0.01, weight_decay=1.0)
_WEIGHT = 2.0
_OTHER_WEIGHTS = (0.0, 10.0)
_FEWER_SEEDS = 1


@dataclass(frozen=True)
class Job:
    """One network to train.

    Args:
        seed: of its weights and of the order of examples.
        num_heads: K; 0 trains the base itself.
        budget: the share of the base's cost.
        split_at: a split point of the base.
        weight: lambda, the co-distillation weight.
        base_width: of the base.
        epochs: passes over the training examples, the same for every method.
        optimization: optimizer and learning rate.
    """

    seed: int = 0
    num_heads: int = 0
    budget: float = 0.95
    split_at: str = "auto"
    weight: float = _WEIGHT
    base_width: int = _BASE_WIDTH
    epochs: int = _EPOCHS
    optimization: Optimization = _BASE_OPTIMIZATION

    def network(self) -> nn.Module:
        """The untrained network."""
        torch.manual_seed(self.seed)
        base = MNIST1DNet(self.base_width)
        if self.num_heads == 0:
            return base
        example = InputSpec(tuple(base.input_shape)).zeros(2)
        return convert(base, example, self.num_heads, self.budget, self.split_at, self.seed)


def train(
    network: nn.Module,
    examples: tuple[Tensor, Tensor],
    optimization: Optimization,
    weight: float,
    epochs: int,
    seed: int,
) -> None:
    """Train on tensors, without Lightning's cost per step, which is larger than a step of so small a network.

    Args:
        network: a base or its conversion; it is trained in place.
        examples: inputs (N, *) and class indices (N,).
        optimization: optimizer and learning rate.
        weight: lambda, the co-distillation weight.
        epochs: passes over the examples; the last, smaller batch of each is left out.
        seed: of the order of examples.
    """
    inputs, targets = examples
    steps = len(inputs) // _BATCH
    criterion = CoDistillationLoss(weight)
    optimizer = build_optimizer(network, optimization)
    schedule = build_schedule(optimizer, epochs * steps, optimization)
    order = torch.Generator().manual_seed(seed)
    network.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(inputs), generator=order)[: steps * _BATCH].view(steps, _BATCH):
            loss = criterion(head_outputs(network, inputs[batch]), targets[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def evaluate(network: nn.Module, examples: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """Errors of the ensemble and of each head in percent, and how often each pair of heads agrees."""
    inputs, targets = examples
    outputs = head_outputs(network.eval(), inputs)
    votes = outputs.argmax(2)
    heads = 100 * (votes != targets).float().mean(1)
    pairs = 100 * (votes[:, None] == votes).float().mean(2)
    return {
        "error": 100 * (combine_heads(outputs).argmax(1) != targets).float().mean().item(),
        "head_errors": heads.tolist(),
        "agreement": divergence(outputs).item(),
        "pairs": pairs.tolist(),
    }


def run_job(job: Job, sizes: tuple[int, int, int] = _SIZES, split: int = _TEST) -> dict[str, Any]:
    """Train one network and test it.

    Args:
        job: what to train.
        sizes: training, validation and test examples.
        split: which of the three to test on, by its index.

    Returns:
        What [`evaluate`][] gives, and the `seconds` of training.
    """
    splits = generate_mnist1d(sizes)
    network = job.network()
    started = time.perf_counter()
    train(network, splits[0], job.optimization, job.weight, job.epochs, job.seed)
    seconds = time.perf_counter() - started
    return evaluate(network, splits[split]) | {"seconds": seconds}


@dataclass
class Method:
    """One row of the table: jobs that differ only in their seed, and what they gave."""

    name: str
    job: Job
    seeds: int
    outcomes: list[dict[str, Any]] = field(default_factory=list)
    cost: Cost = field(default_factory=lambda: Cost(0, 0.0))
    milliseconds: float = 0.0

    def row(self) -> dict[str, Any]:
        """What `results.json` keeps of it."""
        errors = [outcome["error"] for outcome in self.outcomes]
        head_errors = [fmean(outcome["head_errors"]) for outcome in self.outcomes]
        more: dict[str, Any] = {"num_heads": max(1, self.job.num_heads), "milliseconds": self.milliseconds}
        if self.job.num_heads:
            more |= {"budget": self.job.budget, "split_at": self.job.split_at, "weight": self.job.weight}
            more["agreement_mean"] = fmean(outcome["agreement"] for outcome in self.outcomes)
            more["pairs"] = torch.tensor([outcome["pairs"] for outcome in self.outcomes]).mean(0).tolist()
        more |= {"epochs": self.job.epochs, "optimization": asdict(self.job.optimization)}
        more["training_seconds"] = sum(outcome["seconds"] for outcome in self.outcomes)
        return result_row(self.name, self.cost, errors, head_errors, **more)


def run_demo(
    folder: Path, methods: Sequence[Method], *, workers: int = 2, sizes: tuple[int, int, int] = _SIZES
) -> list[dict[str, Any]]:
    """Train every method in worker processes, and write results, figures and the page.

    Args:
        folder: an empty run folder.
        methods: what to train; the first is the base, the second what the demo is about.
        workers: processes of one thread each.
        sizes: training, validation and test examples; the validation examples served to choose the settings.

    Returns:
        The rows of `results.json`.
    """
    started = time.perf_counter()
    _train_all(methods, workers, sizes)
    _measure(methods)
    rows = [method.row() for method in methods]
    seconds = time.perf_counter() - started
    settings = {"sizes": sizes, "batch_size": _BATCH}
    write_json(folder / ENVIRONMENT, environment())
    write_json(folder / RESULTS, {"settings": settings, "seconds": seconds, "rows": rows})
    _write_page(folder, rows, sizes)
    return rows


def _train_all(methods: Sequence[Method], workers: int, sizes: tuple[int, int, int]) -> None:
    jobs = [(method, replace(method.job, seed=seed)) for method in methods for seed in range(method.seeds)]
    outcomes = run_jobs([job for _, job in jobs], workers, sizes)
    for (method, _), outcome in zip(jobs, outcomes, strict=True):
        method.outcomes.append(outcome)


def run_jobs(
    jobs: Sequence[Job], workers: int, sizes: tuple[int, int, int] = _SIZES, split: int = _TEST
) -> list[dict[str, Any]]:
    """What [`run_job`][] gives for each job, run in worker processes of one thread each."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    spawn = get_context("spawn")
    with (
        ProcessPoolExecutor(workers, mp_context=spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool,
        Progress(*columns) as progress,
    ):
        task = progress.add_task("Training networks", total=len(jobs))
        outcomes = [pool.submit(run_job, job, sizes, split) for job in jobs]
        for _ in as_completed(outcomes):
            progress.advance(task)
    return [outcome.result() for outcome in outcomes]


def _measure(methods: Sequence[Method]) -> None:
    """Cost and inference time, of which only the structure matters; taken when no worker runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    batch = torch.zeros(100, 40)
    for method in methods:
        network = method.job.network().eval()
        method.cost = measure_cost(network, batch[:1])
        method.milliseconds = _milliseconds(lambda network=network: network(batch))
    torch.set_num_threads(threads)


@torch.inference_mode()
def _milliseconds(call: Callable[[], Any], repeats: int = 50) -> float:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - started))
    return median(times)


def _summary(base: dict[str, Any], ours: dict[str, Any]) -> str:
    """The demo's result in one sentence."""
    parameters, macs = (ours[key] / base[key] for key in ("parameters", "macs"))
    change = ours["error_mean"] / base["error_mean"] - 1
    return (
        f"{ours['num_heads']} heads at {parameters:.2f} of the base's parameters and {macs:.2f} of its MACs: "
        f"test error {ours['error_mean']:.2f} ± {ours['error_std']:.2f} % instead of {base['error_mean']:.2f} ± "
        f"{base['error_std']:.2f} % ({change:+.0%}), {ours['seeds']} seeds each."
    )


def _write_page(folder: Path, rows: Sequence[dict[str, Any]], sizes: tuple[int, int, int]) -> None:
    base, ours = rows[:2]
    swept = sorted((row for row in rows if _differs_in("weight", row, ours)), key=lambda row: row["weight"])
    costs = [base, *(row for row in rows[1:] if "weight" not in row or row["weight"] == ours["weight"])]
    fewer = f"{swept[0]['seeds']} seed each, {ours['seeds']} at λ = {ours['weight']:g}"
    figures = [
        Figure(
            "error_against_cost",
            "Test error against what a model costs; bars are the standard deviation of a seed.",
            lambda: draw_costs(costs),
        ),
        Figure(
            "error_against_lambda",
            f"Test error of the ensemble and of its single heads against the co-distillation weight; {fewer}.",
            lambda: draw_weights(swept, base),
        ),
        Figure(
            "agreement_of_heads",
            f"How often two heads of the {ours['num_heads']}-headed model predict the same class. Heads that "
            "are always of one mind would gain nothing from being several.",
            lambda: draw_pairs(ours),
        ),
    ]
    train_size, _, test_size = sizes
    notes = [
        f"MNIST-1D (Greydanus and Kobak 2020), generated on this machine: {train_size:,} training and {test_size:,} "
        f"test examples. Every network was trained for {base['epochs']} epochs by AdamW with batches of {_BATCH} and a "
        "cosine schedule; the last weights count.",
        "Learning rate and weight decay are the best of the same 8 pairs on validation examples, 2 seeds a pair: "
        f"{_describe(_BASE_OPTIMIZATION)} for bases, {_describe(_OPTIMIZATION)} for conversions (found at λ = 1).",
        "K: heads. Error: share of test examples, mean ± standard deviation of a seed, over so many runs. One head: "
        "the mean error of a single head with the trunk. ms: median inference time for a batch of 100 on one thread.",
    ]
    title = "EnsembleNet on MNIST-1D"
    write_page(folder / PAGE, title, _summary(base, ours), rows, {"Figures": figures}, notes, environment())


def _describe(optimization: Optimization) -> str:
    return f"{optimization.lr:g} and {optimization.weight_decay:g}"


def _differs_in(name: str, row: dict[str, Any], ours: dict[str, Any]) -> bool:
    """Whether a row is ours, or ours with another value of that setting only."""
    settings = {"num_heads", "budget", "split_at", "weight"} - {name}
    return all(row.get(setting) == ours[setting] for setting in settings)


def demo(arguments: Sequence[str]) -> Path:
    """Run the demo.

    Args:
        arguments: command-line arguments.

    Returns:
        The run's folder.
    """
    options = _parser().parse_args(arguments)
    folder = create_run_folder(options.runs, "demo")
    console = Console()
    methods = demo_methods(options.seeds, options.epochs)
    rows = run_demo(folder, methods, workers=options.workers)
    console.print(results_table(rows, title="MNIST-1D: a base and its conversions"))
    console.print(_summary(*rows[:2]), highlight=False, soft_wrap=True)
    console.print(f"Page, figures and results.json: {folder / PAGE}", highlight=False, soft_wrap=True)
    return folder


def demo_methods(seeds: int = 5, epochs: int = _EPOCHS) -> list[Method]:
    """What the demo trains: the base, its conversion, cheaper versions of both, and other values of lambda."""
    base = Job(epochs=epochs)
    ours = replace(base, num_heads=4, optimization=_OPTIMIZATION)
    fewer = min(seeds, _FEWER_SEEDS)
    return [
        Method("base", base, seeds),
        Method("ensemblenet", ours, seeds),
        Method("narrow base", replace(base, base_width=_BASE_WIDTH * 3 // 4), fewer),
        Method("ensemblenet, half", replace(ours, budget=0.5), fewer),
        *(Method(f"ensemblenet, λ={weight:g}", replace(ours, weight=weight), fewer) for weight in _OTHER_WEIGHTS),
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ensemblenet demo",
        description="Train a 1-d convolutional base and its multi-headed conversions on MNIST-1D, which this "
        "machine generates; show a table and write figures, results.json and a page. It needs no data, no "
        "network and no GPU, and takes about 3 minutes on 2 cores.",
    )
    parser.add_argument("--seeds", type=positive_integer, default=5, help="of each method (default: %(default)s)")
    parser.add_argument("--epochs", type=positive_integer, default=_EPOCHS, help="of a training (default: %(default)s)")
    parser.add_argument("--workers", type=positive_integer, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="for run folders (default: %(default)s)")
    return parser
