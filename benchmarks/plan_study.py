"""Which plan is best at equal cost: early or late split, narrow or short heads, 2 or 3 of them, and for which bases.

    python benchmarks/plan_study.py run --data FOLDER --seconds N   # with cifar10/ and youtube8m/video_level/
    python benchmarks/plan_study.py table

Four bases with blocks to drop, each with a training that overfits and one that does not; of the residual network also a
long one that does not, with one learning rate. Every plan stays within 0.95 of the base's parameters and MACs; the
ensemble of two whole bases, at twice the cost, is there to compare with.

Learning rate and weight decay: the base tries four pairs with seed 0, and its two best by validation error are tried by
every plan with seed 0. The better of these two, again by validation error, is taken for the other seeds and for the
other lambda. All else is measured on test examples.

Seeds are the outermost loop, so that what is finished is balanced. Each finished run is a line of
results/plan_study.jsonl, and not computed again; a run that was killed begins anew.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import torch
from capacity import RESULTS, measure, read
from timm.models import VisionTransformer
from torch import Tensor, nn

from ensemblenet import Capacity, EnsembleNet, convert, spare_capacity
from ensemblenet.cost import Shares
from ensemblenet.data import MNIST1D, DataModule, ParquetImages, YouTube8M
from ensemblenet.errors import BudgetError, EnsembleNetError
from ensemblenet.functional import Task
from ensemblenet.models import CifarResNet, MLPTagger, MNIST1DResNet
from ensemblenet.recipe import Shape
from ensemblenet.study.task import TrainingTask, codistilled
from ensemblenet.study.trials import Precision, train
from ensemblenet.training.optimization import Optimization, build_optimizer

FILE = RESULTS / "plan_study.jsonl"
SEEDS = (0, 1, 2)
BUDGET = 0.95
TRAINING_EXAMPLES = 4000  # that the training loss is measured on, at most
TIMED_STEPS = 15

# -- bases, data and trainings


def vit(width: int, depth: int) -> nn.Module:
    return VisionTransformer(
        img_size=16,
        patch_size=4,
        embed_dim=width,
        depth=depth,
        num_heads=4,
        num_classes=10,
        class_token=False,
        global_pool="avg",
    )


def cifar10(folder: Path, examples: int, augment: bool = True) -> DataModule:
    return ParquetImages(
        folder / "cifar10", image_size=16, batch_size=100, num_val=5000, limit_train=examples, augment=augment
    )


def youtube8m(folder: Path) -> DataModule:
    return YouTube8M(
        str(folder / "youtube8m" / "video_level"),
        level="video",
        train=["validate00[01]?.tfrecord", "validate002[0-3].tfrecord"],
        val=["validate002[4-7].tfrecord"],
        test=["validate002[89].tfrecord", "validate003?.tfrecord"],
        num_classes=3862,
        batch_size=256,
        num_workers=0,
    )


@dataclass(frozen=True)
class Setting:
    """A base and its training."""

    base: Callable[[], nn.Module]
    data: Callable[[Path], DataModule]
    epochs: int
    early: str  # the split that shares the stem, or nothing where there is none
    late: str  # the one that shares about half of the network
    grid: tuple[tuple[float, float], ...]  # pairs of learning rate and weight decay of AdamW
    task: Task = "multiclass"
    precision: Precision = "32"
    skips: tuple[str, ...] = ()  # plans that are not tried


CONVOLUTIONS = ((0.01, 0.05), (0.01, 0.5), (0.005, 0.5), (0.02, 0.3))
TRANSFORMERS = ((0.001, 0.05), (0.003, 0.05), (0.001, 0.5), (0.003, 0.5))
TAGGERS = ((0.001, 0.05), (0.003, 0.05), (0.003, 0.2), (0.01, 0.05))

SIGNALS = Setting(
    base=lambda: MNIST1DResNet(32),
    data=lambda _: MNIST1D(num_train=4000, num_val=5000),
    epochs=40,
    early="stem",
    late="stages.1",
    grid=CONVOLUTIONS,
)
IMAGES = Setting(
    base=lambda: CifarResNet(20, 16),
    data=lambda folder: cifar10(folder, 1000),
    epochs=80,
    early="stem",
    late="stages.1",
    grid=CONVOLUTIONS,
    precision="bf16",
)
VIDEOS = Setting(
    base=lambda: MLPTagger(1152, 3862, [512] * 5, 0.1),
    data=youtube8m,
    epochs=20,
    early="input",
    late="hidden.1",
    grid=TAGGERS,
    task="multilabel",
    precision="bf16",
)
PATCHES = Setting(
    base=lambda: vit(64, 6),
    data=lambda folder: cifar10(folder, 1500, augment=False),
    epochs=45,
    early="patch_embed",
    late="blocks.2",
    grid=TRANSFORMERS,
)
SETTINGS = {
    "MNIST-1D, overfits": SIGNALS,
    "MNIST-1D, does not": replace(SIGNALS, data=lambda _: MNIST1D(num_train=20000, num_val=5000), epochs=6),
    "ResNet, overfits": IMAGES,
    "ResNet, does not": replace(IMAGES, data=lambda folder: cifar10(folder, 15000), epochs=5),
    "ResNet, long": replace(
        IMAGES,
        data=lambda folder: cifar10(folder, 45000),
        epochs=20,
        grid=CONVOLUTIONS[1:2],
        skips=("2 narrow early", "3 short early", "2 narrow late"),
    ),
    "YouTube-8M, overfits": VIDEOS,
    "YouTube-8M, does not": replace(VIDEOS, epochs=6),
    "ViT, overfits": PATCHES,
    "ViT, does not": replace(PATCHES, data=lambda folder: cifar10(folder, 15000), epochs=3),
}


# -- plans and runs


@dataclass(frozen=True)
class Plan:
    """How the base is converted."""

    heads: int
    shape: Shape
    weight: float  # the lambda that is tried first; of 1 and 2 the other comes later
    split: str = "early"  # a setting's, or a name
    depth: float | None = None


PLANS = {
    "reshaped": Plan(1, "auto", 1.0, split="input", depth=0.0),
    "2 narrow early": Plan(2, "narrow", 2.0),
    "2 short early": Plan(2, "short", 2.0),
    "2 auto early": Plan(2, "auto", 2.0),
    "3 short early": Plan(3, "short", 2.0),
    "2 narrow late": Plan(2, "narrow", 1.0, split="late"),
    "2 short late": Plan(2, "short", 1.0, split="late"),
}
BASE, PAIR, AUTO = "base", "two bases", "2 auto early"


@dataclass(frozen=True)
class Run:
    """One training; or an ensemble of the bases of two seeds, which needs none."""

    setting: str
    plan: str
    weight: float
    lr: float
    weight_decay: float
    seed: int
    second_seed: int | None = None


class Results:
    """The finished runs, and the file that keeps them."""

    def __init__(self, path: Path = FILE) -> None:
        self.path = path
        self.rows = list(read(path))

    def add(self, run: Any, outcome: dict[str, Any]) -> None:
        """Keep what a run, a dataclass, has found."""
        self.rows.append({"run": asdict(run), **outcome})
        with self.path.open("a") as file:
            file.write(json.dumps(self.rows[-1], ensure_ascii=False) + "\n")

    def of(self, **wanted: Any) -> list[dict[str, Any]]:
        """Rows whose runs have these values."""
        return [row for row in self.rows if wanted.items() <= row["run"].items()]

    def best(self, number: int, **wanted: Any) -> list[tuple[float, float]]:
        """The pairs of learning rate and weight decay with the lowest validation errors, of runs with seed 0."""
        done = [row for row in self.of(seed=0, second_seed=None, **wanted) if "val" in row]
        done.sort(key=lambda row: row["val"]["error"])
        return [(row["run"]["lr"], row["run"]["weight_decay"]) for row in done[:number]]


def runs(names: list[str], results: Results) -> Iterator[Run]:
    """All runs in order; which settings are taken depends on the results so far."""
    for other in (False, True):  # lambda
        for seed in SEEDS:
            for setting in names:
                if not other:
                    yield from _bases(setting, seed, results)
                for plan, how in PLANS.items():
                    if plan in SETTINGS[setting].skips or (other and how.heads == 1):
                        continue
                    tried = results.best(2, setting=setting, plan=BASE)
                    if other or seed > 0:
                        tried = results.best(1, setting=setting, plan=plan, weight=how.weight)
                    weight = 3.0 - how.weight if other else how.weight
                    yield from (Run(setting, plan, weight, *pair, seed) for pair in tried)


def _bases(setting: str, seed: int, results: Results) -> Iterator[Run]:
    if seed == 0:
        yield from (Run(setting, BASE, 1.0, *pair, seed) for pair in SETTINGS[setting].grid)
        return
    for pair in results.best(1, setting=setting, plan=BASE):
        run = Run(setting, BASE, 1.0, *pair, seed)
        yield run
        yield from (replace(run, plan=PAIR, seed=earlier, second_seed=seed) for earlier in range(seed))


# -- one run


@cache
def prepared(name: str, folder: Path) -> DataModule:
    """The data, read once."""
    data = SETTINGS[name].data(folder)
    data.prepare_data()
    data.setup()
    return data


def finish(run: Run, results: Results, folder: Path, kept: Path) -> dict[str, Any]:
    """Train and measure; or take over what a plan with the same heads has shown."""
    setting, data = SETTINGS[run.setting], prepared(run.setting, folder)
    data.reseed(run.seed)
    x, y = next(iter(data.train_dataloader()))
    network = base = base_of(run)
    found: dict[str, Any] = {"shares": dict.fromkeys(Shares._fields, 1.0)}
    if run.plan == PAIR:
        seeds = (run.seed, run.second_seed or 0)
        bases = [trained_base(replace(run, plan=BASE, seed=seed), data, kept).network for seed in seeds]
        network = EnsembleNet(nn.Identity(), bases)
        found["shares"] = dict.fromkeys(Shares._fields, 2.0)
    elif run.plan != BASE:
        network = converted(base, x[:2], run)
        found = described(network)
        alike = asdict(run) | {"plan": None}
        for row in results.rows:
            if alike == row["run"] | {"plan": None} and row.get("heads") == found["heads"]:
                return {key: value for key, value in row.items() if key != "run"} | {"same_as": row["run"]["plan"]}
    task = in_layout(codistilled(network, run.weight, setting.task), x)
    if run.plan != PAIR:
        found |= train(task, data, optimization(run), setting.epochs, run.seed, setting.precision)
    if run.plan == BASE:
        keep(network, run, kept)
    found["val"] = measure(task, data.val_dataloader(), setting.task)
    found["test"] = measure(task, data.test_dataloader(), setting.task)
    training = islice(data.train_dataloader(), TRAINING_EXAMPLES // len(x))
    found["capacity"] = asdict(spare_capacity(network, training, data.val_dataloader(), setting.task))
    if run.plan != BASE:
        found["step"] = step_ratio(task, in_layout(codistilled(base, 1.0, setting.task), x), x, y, run)
    return found


def base_of(run: Run) -> nn.Module:
    torch.manual_seed(run.seed)
    return SETTINGS[run.setting].base()


def trained_base(run: Run, data: DataModule, kept: Path) -> TrainingTask:
    """The base as its own run left it; trained anew, with the same result, where that file is gone."""
    setting = SETTINGS[run.setting]
    data.reseed(run.seed)
    x, _ = next(iter(data.train_dataloader()))
    task = in_layout(codistilled(base_of(run), run.weight, setting.task), x)
    path = kept_at(run, kept)
    if path.exists():
        task.network.load_state_dict(torch.load(path, weights_only=True))
    else:
        train(task, data, optimization(run), setting.epochs, run.seed, setting.precision)
        keep(task.network, run, kept)
    return task


def keep(base: nn.Module, run: Run, kept: Path) -> None:
    kept.mkdir(parents=True, exist_ok=True)
    torch.save(base.state_dict(), kept_at(run, kept))


def kept_at(run: Run, kept: Path) -> Path:
    return kept / f"{run.setting}, {run.lr:g}, {run.weight_decay:g}, {run.seed}.pt"


def converted(base: nn.Module, x: Tensor, run: Run) -> EnsembleNet:
    setting, plan = SETTINGS[run.setting], PLANS[run.plan]
    options: dict[str, Any] = {
        "num_heads": plan.heads,
        "budget": BUDGET,
        "split_at": {"early": setting.early, "late": setting.late}.get(plan.split, plan.split),
        "seed": run.seed,
        "task": setting.task,
    }
    if plan.shape == "short":
        try:
            return convert(base, x, shape="short", **options)
        except BudgetError:  # not at full width: the shortest heads, with the width that fits
            return convert(base, x, depth=0.0, **options)
    return convert(base, x, shape=plan.shape, depth=plan.depth, **options)


def described(model: EnsembleNet) -> dict[str, Any]:
    """What heads a model has, and its costs as shares of its base's."""
    assert model.recipe is not None
    assert model.cost is not None
    assert model.base_cost is not None
    head = model.recipe.head
    heads = {"number": model.num_heads, "split_at": model.recipe.split_at, "width": head.width, "depth": head.depth}
    return {
        "heads": heads | {"dropped": [list(block) for block in head.dropped]},
        "shares": model.cost.shares_of(model.base_cost)._asdict(),
    }


def in_layout(task: TrainingTask, x: Tensor) -> TrainingTask:
    """With the memory format in which convolutions of images are fast."""
    return task.to(memory_format=torch.channels_last) if x.ndim == 4 else task


def optimization(run: Run) -> Optimization:
    return Optimization("adamw", lr=run.lr, weight_decay=run.weight_decay)


def step_ratio(task: TrainingTask, base: TrainingTask, x: Tensor, y: Tensor, run: Run) -> float:
    """The time of a training step beside the base's: medians of steps that take turns. Both are trained by it."""
    times: dict[TrainingTask, list[float]] = {task: [], base: []}
    optimizers = {one: build_optimizer(one.train(), optimization(run)) for one in times}
    for _ in range(TIMED_STEPS):
        for one, optimizer in optimizers.items():
            started = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=SETTINGS[run.setting].precision == "bf16"):
                loss = one.loss(x, y, 0.5)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            times[one].append(time.perf_counter() - started)
    return median(times[task]) / median(times[base])


# -- the command line


def run_all(names: list[str], folder: Path, kept: Path, seconds: float) -> None:
    torch.set_num_threads(1)
    results, started = Results(), time.monotonic()
    for run in runs(names, results):
        if results.of(**asdict(run)):
            continue
        if time.monotonic() - started > seconds:
            print("The time is up.")
            return
        begun = time.monotonic()
        try:
            outcome = finish(run, results, folder, kept)
        except EnsembleNetError as error:  # no such plan, or a loss that became infinite: the study goes on
            outcome = {"failed": f"{type(error).__name__}: {error}"}
        results.add(run, outcome)
        print(summary(results.rows[-1]), f"{time.monotonic() - begun:.0f} s", flush=True)


def summary(row: dict[str, Any]) -> str:
    """A finished run in a line."""
    run = row["run"]
    name = f"{run['setting']} | {run['plan']} λ={run['weight']:g} "
    name += f"({run['lr']:g}, {run['weight_decay']:g}) s{run['seed']} |"
    if "failed" in row:
        return f"{name} {row['failed']}"
    scores = f"test {row['test']['error']:.2f} val {row['val']['error']:.2f} nll {row['test']['nll']:.3f}"
    costs = " ".join(f"{share:.2f}" for share in (*row["shares"].values(), row.get("step", 1.0)))
    capacity = Capacity(**row["capacity"])
    return f"{name} {shape_of(row)} | costs {costs} | {scores} train {capacity.train_loss:.3f}, {capacity.ratio:.3f}"


def shape_of(row: dict[str, Any]) -> str:
    heads = row.get("heads")
    return "" if heads is None else f"{heads['split_at']}, {heads['width']:.3g}, {heads['depth']:.3g}"


def table(name: str, results: Results) -> str:
    """One setting: every plan with both lambdas, each with its better learning rate and weight decay."""
    chosen = {(BASE, 1.0): BASE, (PAIR, 1.0): BASE}
    chosen |= {(plan, weight): plan for plan, how in PLANS.items() for weight in (how.weight, 3.0 - how.weight)}
    lines = []
    for (plan, weight), like in chosen.items():
        first = weight if like == BASE else PLANS[like].weight
        pair = results.best(1, setting=name, plan=like, weight=first)
        rows = [
            row
            for lr, decay in pair
            for row in results.of(setting=name, plan=plan, weight=weight, lr=lr, weight_decay=decay)
            if "test" in row
        ]
        if rows:
            lines.append(line(plan, weight, rows))
        failed = {row["failed"] for row in results.of(setting=name, plan=plan, weight=weight) if "failed" in row}
        lines += [f"| {plan} | {weight:g} | {reason} |" + " |" * (len(HEADINGS) - 3) for reason in sorted(failed)]
    return "\n".join([f"### {name}\n", f"| {' | '.join(HEADINGS)} |", "|---" * len(HEADINGS) + "|", *lines])


HEADINGS = ("plan", "λ", "width, depth", "seeds", "error, %", "one head, %", "NLL", "ECE")
HEADINGS += ("parameters", "MACs", "activations", "time", "step")


def line(plan: str, weight: float, rows: list[dict[str, Any]]) -> str:
    columns: list[tuple[list[float], str]] = [
        ([row["test"]["error"] for row in rows], ".2f"),
        ([fmean(row["test"]["head_errors"]) for row in rows], ".2f"),
        ([row["test"]["nll"] for row in rows], ".3f"),
        ([row["test"]["ece"] for row in rows if "ece" in row["test"]], ".3f"),  # tagging has none
    ]
    cells = [_mean_and_spread(values, form) for values, form in columns]
    costs = [f"{fmean(values):.2f}" for values in zip(*(row["shares"].values() for row in rows), strict=True)]
    step = fmean(row.get("step", 1.0) for row in rows)
    name = f"**{plan}**" if plan == AUTO else plan
    first = (name, f"{weight:g}", shape_of(rows[0]).partition(", ")[2], str(len(rows)))
    return f"| {' | '.join((*first, *cells, *costs, f'{step:.2f}'))} |"


def _mean_and_spread(values: list[float], form: str) -> str:
    if not values:
        return ""
    return f"{fmean(values):{form}}" + (f" ± {stdev(values):{form}}" if len(values) > 1 else "")


def main() -> None:
    """Finish what is missing, or print what there is."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("action", choices=("run", "table"))
    parser.add_argument("--data", type=Path, help="a folder with cifar10/ and youtube8m/video_level/", default=Path())
    parser.add_argument("--seconds", type=float, help="begin no run after so many", default=float("inf"))
    parser.add_argument("--setting", choices=tuple(SETTINGS), help="this one alone")
    parser.add_argument(
        "--kept", type=Path, help="has the trained bases, which their ensembles need", default=Path("runs/plan_study")
    )
    args = parser.parse_args()
    names = [args.setting] if args.setting else list(SETTINGS)
    if args.action == "run":
        run_all(names, args.data, args.kept, args.seconds)
    else:
        print("\n\n".join(table(name, Results()) for name in names))


if __name__ == "__main__":
    main()
