"""How fast heads run: one after another, fused, by vmap; against the single network, side by side in one run.

    python benchmarks/heads.py --output benchmarks/results/heads.json --figure docs/images/heads.svg

Every ratio is taken within one turn in which all methods run once, so that the load of the machine meets all of them;
the median over turns and the quartiles are written down. With one thread, time is the processor time of the process,
which other processes disturb less than the clock; with more threads it is the clock. Memory is what autograd keeps
from the forward for the backward pass, parameters included.
"""

import argparse
import copy
import os
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.func import functional_call

from ensemblenet import EnsembleNet, convert, fuse
from ensemblenet.functional import combine_heads
from ensemblenet.heads import step, tune
from ensemblenet.training.run import environment, write_json

NUM_HEADS, NUM_CLASSES = 4, 100


def perceptron() -> nn.Module:
    sizes = [784, 512, 512, 512]
    layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], NUM_CLASSES))


# name: how it is made, the shape of an example, the full batch
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "ResNet-18": (lambda: timm.create_model("resnet18", num_classes=NUM_CLASSES), (3, 64, 64), 64),
    "ResNet-50": (lambda: timm.create_model("resnet50", num_classes=NUM_CLASSES), (3, 64, 64), 16),
    "ConvNeXt-Tiny": (lambda: timm.create_model("convnext_tiny", num_classes=NUM_CLASSES), (3, 64, 64), 16),
    "MobileNetV3-L": (lambda: timm.create_model("mobilenetv3_large_100", num_classes=NUM_CLASSES), (3, 96, 96), 16),
    "ViT-S/16": (
        lambda: timm.create_model("vit_small_patch16_224", img_size=96, num_classes=NUM_CLASSES),
        (3, 96, 96),
        16,
    ),
    "MLP": (perceptron, (784,), 128),
}


class ByVmap(nn.Module):
    """The heads by `torch.vmap` over their stacked parameters and buffers, as PyTorch's documentation has it."""

    def __init__(self, model: EnsembleNet) -> None:
        super().__init__()
        self.trunk = model.trunk
        heads = [(dict(head.named_parameters()), dict(head.named_buffers())) for head in model.heads]
        parameters, buffers = (
            {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
            for parts in zip(*heads, strict=True)
        )
        self.names = list(parameters)
        self.stacks = nn.ParameterList(stack.detach() for stack in parameters.values())
        self.stacked_buffers = buffers
        self.heads = [model.heads[0]]  # in a list: only its code is used

    def forward(self, x: Tensor) -> Tensor:
        def one(parameters: Any, buffers: Any, features: Tensor) -> Tensor:
            return functional_call(self.heads[0], (parameters, buffers), features)

        self.heads[0].train(self.training)
        parameters = dict(zip(self.names, self.stacks, strict=True))
        outputs = torch.vmap(one, in_dims=(0, 0, None), randomness="different")(
            parameters, self.stacked_buffers, self.trunk(x)
        )
        return outputs if self.training else combine_heads(outputs)


def kept_for_backward(model: nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps from a forward pass in training mode."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = max(kept.get(storage.data_ptr(), 0), storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = model.train()(x)  # its graph must live while pointers are counted
    del outputs
    return sum(kept.values())


def run_in_turns(steps: dict[str, Callable[[], None]], seconds: float) -> dict[str, list[float]]:
    """Times of every step, in turns until the time is up; three turns at least."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in steps}
    for run in steps.values():
        run()
    start = time.perf_counter()
    while len(times["base"]) < 3 or time.perf_counter() - start < seconds:
        for name, run in steps.items():
            begin = clock()
            run()
            times[name].append(clock() - begin)
    return times


def summary(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """By method: milliseconds, and the ratio to the base in the same turn."""
    row = {}
    for name, own in times.items():
        ratios = [a / b for a, b in zip(own, times["base"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        row[name] = {
            "ms": 1000 * statistics.median(own), "ratio": middle, "ratio_low": low, "ratio_high": high,
        }  # fmt: skip
    return row


def works(run: Callable[[], None]) -> bool:
    try:
        run()
    except RuntimeError as error:
        print(f"    left out: {str(error).splitlines()[0][:100]}")
        return False
    return True


def benchmark(name: str, threads: int, seconds: float) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    make, shape, full = MODELS[name]
    base = make()
    looped = convert(base, torch.randn(2, *shape), NUM_HEADS)
    begin = time.process_time()
    fused = fuse(copy.deepcopy(looped))
    fusing = time.process_time() - begin
    models: dict[str, nn.Module] = {"base": base, "looped": looped, "fused": fused, "vmap": ByVmap(looped)}
    x = torch.randn(full, *shape)
    assert looped.cost is not None
    assert looped.base_cost is not None
    _, macs_share = looped.cost.share_of(looped.base_cost)
    memory = {key: kept_for_backward(models[key], x) for key in ("base", "looped", "fused")}
    rows = []
    for batch, training in ((1, False), (full, False), (full, True)):
        separate = tune(fused.train(training), x[:batch], repeats=3)
        steps = {key: step(model.train(training), x[:batch]) for key, model in models.items()}
        if not works(steps["vmap"]):
            del steps["vmap"]
        times = run_in_turns(steps, seconds)
        methods = summary(times)
        chosen = "looped" if methods["fused"]["ms"] > 1.05 * methods["looped"]["ms"] else "fused"
        gain = statistics.median(a / b for a, b in zip(times["looped"], times[chosen], strict=True))
        row = {
            "model": name, "threads": threads, "batch": batch, "training": training, "turns": len(times["base"]),
            "macs_share": macs_share, "methods": methods, "chosen": chosen, "looped_over_chosen": gain,
            "separate_convolutions": [len(separate), len(fused.convolutions)], "seconds_to_fuse": fusing,
            "mb_kept_for_backward": {key: value / 1e6 for key, value in memory.items()}, "load": os.getloadavg()[0],
        }  # fmt: skip
        rows.append(row)
        ratios = {key: round(value["ratio"], 2) for key, value in methods.items()}
        print(f"  {name}, {threads} threads, batch {batch}, training {training}: {ratios}, {chosen}", flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The results as Markdown: ratios to the base."""
    lines = [
        "| network | threads | what | base ms | looped | fused | vmap | chosen |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        methods = row["methods"]
        cells = [
            f"{methods[key]['ratio']:.2f} ({methods[key]['ratio_low']:.2f}–{methods[key]['ratio_high']:.2f})"
            if key in methods
            else "fails"
            for key in ("looped", "fused", "vmap")
        ]
        what = f"{'training step' if row['training'] else 'prediction'}, {row['batch']}"
        start = f"| {row['model']} | {row['threads']} | {what} | {methods['base']['ms']:.1f}"
        lines.append(" | ".join([start, *cells, f"{row['chosen']} |"]))
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["threads"] == 1]
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    kinds = ["prediction of one", "prediction of a batch", "training step"]
    for axes, kind, part in zip(figure.subplots(1, 3, sharey=True), kinds, (rows[0::3], rows[1::3], rows[2::3])):  # noqa: B905
        for k, (method, color) in enumerate((("looped", "#999999"), ("fused", "#0072b2"), ("vmap", "#e69f00"))):
            values = [row["methods"].get(method, {"ratio": 0})["ratio"] for row in part]
            axes.bar([i + 0.27 * (k - 1) for i in range(len(part))], values, 0.25, label=method, color=color)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xticks(range(len(part)), [row["model"] for row in part], rotation=40, ha="right")
        axes.set_title(kind)
        axes.set_ylim(0, 4)
    figure.axes[0].set_ylabel("time, as a multiple of the base's")
    figure.axes[0].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--seconds", type=float, default=4.0, help="of turns for each row (default: %(default)s)")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--two-threads", nargs="*", default=["ResNet-18"], choices=MODELS, metavar="MODEL")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in options.models:
        for threads in (1, 2) if name in options.two_threads else (1,):
            rows += benchmark(name, threads, options.seconds)
            write_json(options.output, {"environment": environment(), "num_heads": NUM_HEADS, "seed": 0, "rows": rows})
    print(table(rows))
    if options.figure:
        draw(rows, options.figure)


if __name__ == "__main__":
    main()
