"""Small questions about the procedure, each answered by training variants side by side with the same settings.

    python benchmarks/questions.py mnist1d
    python benchmarks/questions.py youtube8m --data FOLDER   # with validate0000.tfrecord and so on

Does lambda gain from a ramp? Do heads gain from orders, or draws, of the data of their own? Should the output layer be
factored, or shared, instead of narrowed? Are logits to be averaged, or probabilities? Settings are near those that the
studies of `configs/compare` chose. Only validation examples are read. Finished runs are kept in a file of JSON lines,
and not computed again.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from statistics import mean
from typing import Any

import torch
from capacity import RESULTS, SERIES, Series, measure, prepared, read
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from ensemblenet import EnsembleNet
from ensemblenet.functional import codistillation
from ensemblenet.models import MLPTagger
from ensemblenet.study.methods import METHODS, Source, TrainingTask
from ensemblenet.study.trials import train
from ensemblenet.training.optimization import Optimization

SEEDS = 3
WIDTHS = {"mnist1d": 64, "youtube8m": 512}
EPOCHS = {"mnist1d": 40, "youtube8m": 18}
OPTIMIZATION = {
    "mnist1d": Optimization("adamw", lr=0.01, weight_decay=1.0),
    "youtube8m": Optimization("adamw", lr=0.003, weight_decay=0.05),
}
WEIGHT = 2.0
RAMP = 0.25  # of the run


def converted(series: Series, source: Source) -> EnsembleNet:
    network = METHODS["codistillation"].build(source, series.setup).network
    assert isinstance(network, EnsembleNet)
    return network


def fixed(weight: float) -> Callable[[Series, Source], TrainingTask]:
    """Co-distillation with a constant lambda."""

    def make(series: Series, source: Source) -> TrainingTask:
        return TrainingTask(
            converted(series, source), lambda z, y, progress: codistillation(z, y, weight, series.setup.task)
        )

    return make


def ramped(start: float) -> Callable[[Series, Source], TrainingTask]:
    """Lambda rises in a line from `start` to its value in the first quarter of the run."""

    def make(series: Series, source: Source) -> TrainingTask:
        def objective(z: Tensor, y: Tensor, progress: float) -> Tensor:
            weight = start + (WEIGHT - start) * min(1.0, progress / RAMP)
            return codistillation(z, y, weight, series.setup.task)

        return TrainingTask(converted(series, source), objective)

    return make


def same_weights(series: Series, source: Source) -> TrainingTask:
    """All heads begin as copies of the first."""
    task = fixed(WEIGHT)(series, source)
    assert isinstance(task.network, EnsembleNet)
    first, *others = task.network.heads
    for head in others:
        head.load_state_dict(first.state_dict())
    return task


class OwnOrders(TrainingTask):
    """lambda = 1, and every head sees batches of its own: those of K loaders, one after another in x."""

    def loss(self, x: Tensor, target: Tensor, progress: float) -> Tensor:
        # x: (K·N, *), target: (K·N,)
        assert isinstance(self.network, EnsembleNet)
        heads = self.network.heads
        features = self.network.trunk(x).chunk(len(heads))
        targets = target.chunk(len(heads))
        losses = [F.cross_entropy(head(f), y) for head, f, y in zip(heads, features, targets, strict=True)]
        return torch.stack(losses).mean()


class OwnDraws(TrainingTask):
    """Every head's own loss weighs the examples by a bootstrap of its own, the same in every epoch."""

    weight = 1.0

    def loss(self, x: Tensor, target: Tensor, progress: float) -> Tensor:
        z = self.network(x)  # (K, N, C)
        own = F.cross_entropy(z.flatten(0, 1), target.repeat(len(z)), reduction="none").view(len(z), -1)
        ensemble = F.cross_entropy(z.mean(0), target)
        return (1 - self.weight) * ensemble + self.weight * (draws(x, len(z)) * own).mean()


class OwnDrawsDistilled(OwnDraws):
    weight = WEIGHT


def draws(x: Tensor, num_heads: int) -> Tensor:
    """How often each head draws each example, (K, N): Poisson with mean 1, decided by the example itself."""
    seeds = (x.flatten(1).double().sum(1) * 1e6).long().abs()
    counts = [
        torch.poisson(torch.ones(num_heads), generator=torch.Generator().manual_seed(int(seed))) for seed in seeds
    ]
    return torch.stack(counts, 1)


def own_orders(series: Series, source: Source) -> TrainingTask:
    return OwnOrders(converted(series, source), codistillation)


def own_draws(kind: type[OwnDraws]) -> Callable[[Series, Source], TrainingTask]:
    return lambda series, source: kind(converted(series, source), codistillation)


def tagger_heads(widths: tuple[int, int], bottleneck: int = 0, shared: bool = False) -> Callable[..., TrainingTask]:
    """Two taggers of these widths; with a bottleneck before the classes, or with one layer of classes for both."""

    def make(series: Series, source: Source) -> TrainingTask:
        torch.manual_seed(source.seed)
        heads = [MLPTagger(1152, 3862, list(widths), 0.3) for _ in range(2)]
        for head in heads:
            if bottleneck:
                squeeze = nn.Linear(widths[1], bottleneck, bias=False)
                outputs = MLPTagger(1152, 3862, [bottleneck]).classifier  # which begins with every class rare
                head.classifier = nn.Sequential(squeeze, outputs)
            if shared:
                head.classifier = heads[0].classifier
        network = EnsembleNet(nn.Identity(), heads, task="multilabel")
        return TrainingTask(network, lambda z, y, progress: codistillation(z, y, WEIGHT, "multilabel"))

    return make


RAMPS = {"λ ramps from 0 to 2": ramped(0.0), "λ ramps from 1 to 2": ramped(1.0)}
VARIANTS: dict[str, dict[str, Callable[[Series, Source], TrainingTask]]] = {
    "mnist1d": {
        "λ = 2": fixed(WEIGHT),
        **RAMPS,
        "λ = 2, heads begin alike": same_weights,
        "λ = 2, own draws": own_draws(OwnDrawsDistilled),
        "λ = 1": fixed(1.0),
        "λ = 1, own orders": own_orders,
        "λ = 1, own draws": own_draws(OwnDraws),
    },
    "youtube8m": {
        "λ = 2": fixed(WEIGHT),
        **RAMPS,
        "factored outputs": tagger_heads((512, 1024), bottleneck=265),
        "shared outputs": tagger_heads((360, 850), shared=True),
    },
}


class Together:
    """Data whose training batches are those of several loaders with orders of their own, one after another in each."""

    sampler = None

    def __init__(self, data: Any, number: int, seed: int) -> None:
        self.loaders = []
        for loader in range(number):
            data.reseed(1000 * loader + seed)
            self.loaders.append(data.train_dataloader())

    def train_dataloader(self) -> Together:
        return self

    def __len__(self) -> int:
        return len(self.loaders[0])

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batches in zip(*self.loaders, strict=True):
            yield torch.cat([x for x, *_ in batches]), torch.cat([y for _, y, *_ in batches])


class Averaged(nn.Module):
    """A task that predicts the mean of its heads' probabilities."""

    def __init__(self, task: TrainingTask, multilabel: bool) -> None:
        super().__init__()
        self.task, self.multilabel = task, multilabel

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z, _ = self.task(x)
        return z, torch.logit(z.double().sigmoid().mean(0)) if self.multilabel else z.softmax(-1).mean(0).log()


def finish(name: str, variant: str, seed: int, folder: str) -> dict[str, Any]:
    """Train and measure."""
    torch.set_num_threads(1)
    series = SERIES[name]
    data = prepared(name, folder)
    x = next(iter(data.val_dataloader()))[0][:2]
    task = VARIANTS[name][variant](series, Source(lambda: series.base(WIDTHS[name]), x, seed))
    cost = task.cost(x)
    data.reseed(seed)
    source: Any = Together(data, series.setup.conversion.num_heads, seed) if isinstance(task, OwnOrders) else data
    train(task, source, OPTIMIZATION[name], EPOCHS[name], seed, series.precision)
    kind = series.setup.task
    found: dict[str, Any] = {"parameters": cost.parameters, "macs": cost.macs}
    found["logits"] = measure(task, data.val_dataloader(), kind)
    found["probabilities"] = measure(Averaged(task, kind == "multilabel"), data.val_dataloader(), kind)
    return {"run": {"data": name, "variant": variant, "seed": seed}} | found


def show(rows: list[dict[str, Any]]) -> None:
    """Print a table: validation error, a single head's, and the error of averaged probabilities."""
    by_variant: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_variant[row["run"]["variant"]].append(row)
    print(
        "| variant | error, % | NLL | one head, % | error of mean probabilities, % | NLL |\n|---|---|---|---|---|---|"
    )
    for variant, found in by_variant.items():
        columns = [
            [row["logits"]["error"] for row in found],
            [row["logits"]["nll"] for row in found],
            [mean(row["logits"]["head_errors"]) for row in found],
            [row["probabilities"]["error"] for row in found],
            [row["probabilities"]["nll"] for row in found],
        ]
        cells = [f"{mean(values):.4g} ± {torch.tensor(values).std():.2g}" for values in columns]
        print(f"| {variant} | {' | '.join(cells)} |")


def main() -> None:
    """Finish what is missing, and show all."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", choices=tuple(VARIANTS))
    parser.add_argument("--data", dest="folder", help="the folder of YouTube-8M's files", default="")
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    path = RESULTS / f"questions_{args.data}.jsonl"
    done = {(row["run"]["variant"], row["run"]["seed"]) for row in read(path)}
    pairs = [(variant, seed) for seed in range(SEEDS) for variant in VARIANTS[args.data]]
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool, path.open("a") as file:
        missing = [pair for pair in pairs if pair not in done]
        pending = [pool.submit(finish, args.data, *pair, args.folder) for pair in missing]
        for future in track(as_completed(pending), "Training", total=len(pending)):
            file.write(json.dumps(future.result(), ensure_ascii=False) + "\n")
            file.flush()
    show(list(read(path)))


if __name__ == "__main__":
    main()
