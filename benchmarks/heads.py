"""How fast heads run: one after another, fused, by vmap; against the single network, side by side in one run.

    python benchmarks/heads.py --output benchmarks/results/heads.json --figure docs/images/heads.svg \\
        --compile ResNet-18 ConvNeXt-Tiny --seconds 8
    python benchmarks/heads.py --output benchmarks/results/heads_plan.json --num_heads 2 --ways alone

The first table of docs/heads.md was taken with narrow heads behind the stem, the plan of version 0.1; the second
command takes the plan of today, and heads one after another or fused alone.

Every ratio is taken within one turn in which all methods run once, so that the load of the machine meets all of them;
the median over turns and the quartiles are written down. Parts may be run one by one: each is put in its place in the
output. Packed-Ensembles need `pip install --no-deps torch-uncertainty einops`; without it they are left out.

Where there is a CUDA device, its parts are ResNet-50 at 224 pixels in bfloat16 and channels_last, eager and compiled,
and the loss at full size: one command, made for less than ten minutes.
"""

import argparse
import copy
import json
import os
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ensemblenet import CoDistillationLoss, EnsembleNet, convert, fuse, measure_cost
from ensemblenet.functional import combine_heads
from ensemblenet.heads import choose
from ensemblenet.storage.atomic import write_json
from ensemblenet.storage.runs import environment
from ensemblenet.timing import step

NUM_HEADS, NUM_CLASSES = 4, 100
WAYS = ("alone", "others")  # the ways to run heads, or vmap, Packed-Ensembles and a deep ensemble as well
CUDA = torch.cuda.is_available()


def perceptron() -> nn.Module:
    sizes = [784, 512, 512, 512]
    layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], NUM_CLASSES))


TO_FUSE = (
    "resnet50", "densenet121", "mobilenetv3_large_100", "regnety_032", "convnext_tiny", "vit_small_patch16_224",
    "swin_tiny_patch4_window7_224", "mixer_s16_224", "coatnet_0_rw_224", "nf_resnet50", "xcit_tiny_12_p16_224",
)  # fmt: skip


@dataclass(frozen=True)
class Network:
    """How a base is made, the shape of an example, and the full batch."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int


def of_timm(name: str, size: int, batch: int, **options: Any) -> Network:
    return Network(lambda: timm.create_model(name, num_classes=NUM_CLASSES, **options), (3, size, size), batch)


NETWORKS = {"ResNet-50": of_timm("resnet50", 224, 128)} if CUDA else {
    "ResNet-18": of_timm("resnet18", 64, 64),
    "ResNet-50": of_timm("resnet50", 64, 16),
    "ConvNeXt-Tiny": of_timm("convnext_tiny", 64, 16),
    "MobileNetV3-L": of_timm("mobilenetv3_large_100", 96, 16),
    "ViT-S/16": of_timm("vit_small_patch16_224", 96, 16, img_size=96),
    "MLP": Network(perceptron, (784,), 128),
}  # fmt: skip
# K, N, C of the loss; a processor gets fewer examples
LOSSES = [(4, 1024 if CUDA else n, c) for n, c in ((1024, 1000), (128, 21841))]


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


def deep_ensemble(network: Network, num_heads: int) -> nn.Module:
    return EnsembleNet(nn.Identity(), [network.make() for _ in range(num_heads)])


def packed(name: str, num_heads: int) -> nn.Module | None:
    """Packed-Ensembles (Laurent et al. 2023) of about the base's size, where torch-uncertainty is installed."""
    if not name.startswith("ResNet"):
        return None
    try:
        from torch_uncertainty.models.classification import packed_resnet
    except ImportError as error:
        print(f"  Packed-Ensembles are left out ({error}): pip install torch-uncertainty")
        return None
    depth = int(name.removeprefix("ResNet-"))
    return packed_resnet(3, NUM_CLASSES, arch=depth, num_estimators=num_heads, alpha=2, gamma=1)


# -- what is measured


def wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


def run_in_turns(steps: dict[str, Callable[[], None]], seconds: float) -> tuple[dict[str, list[float]], int]:
    """Seconds of every step, in turns until the time is up, and how many turns others disturbed.

    Threads that wait for each other take many times as long once another process has one of the processors. A turn in
    which others had more than a twentieth of one is thrown away, as long as five turns are left in ten times as long.
    """
    turns: list[tuple[float, dict[str, float]]] = []
    for _ in range(2):
        for run in steps.values():
            run()
    start = time.perf_counter()
    while True:
        other, turn = OtherWork(), {}
        for name, run in steps.items():
            wait()
            begin = time.perf_counter()
            run()
            wait()
            turn[name] = time.perf_counter() - begin
        turns.append((other.processors(), turn))
        quiet = [turn for share, turn in turns if share < 0.05]
        taken = time.perf_counter() - start
        if taken > 10 * seconds or (taken > seconds and len(quiet) >= 5):
            break
    kept = quiet if len(quiet) >= 5 else [turn for _, turn in turns]
    return {name: [turn[name] for turn in kept] for name in steps}, len(turns) - len(kept)


def summary(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """By method: milliseconds, and the ratio to the base in the same turn."""
    row = {}
    for name, own in times.items():
        ratios = [a / b for a, b in zip(own, times["base"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        row[name] = {"ms": 1000 * statistics.median(own), "ratio": middle, "ratio_low": low, "ratio_high": high}
    return row


def peak_megabytes(run: Callable[[], None]) -> float:
    """The most memory that tensors take while something runs, beyond what was there before."""
    if CUDA:
        wait()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        wait()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    results = profile.profiler.kineto_results  # pyright: ignore
    events = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    now = peak = 0
    for _, size in events:
        now += size
        peak = max(peak, now)
    return peak / 1e6


class OtherWork:
    """How many processors other processes kept busy since this was made, as Linux counts."""

    def __init__(self) -> None:
        self.before = self._times()
        self.start = time.perf_counter()

    def _times(self) -> float:
        ticks = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
        busy = sum(ticks[:3]) + sum(ticks[5:7])
        return busy / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])

    def processors(self) -> float:
        return max(0.0, self._times() - self.before) / (time.perf_counter() - self.start)


# -- networks


def methods_of(name: str, network: Network, looped: EnsembleNet, base: nn.Module, ways: str) -> dict[str, nn.Module]:
    models: dict[str, nn.Module] = {"base": base, "looped": looped, "fused": fuse(copy.deepcopy(looped))}
    if ways == "others":
        models |= {"vmap": ByVmap(looped), "deep ensemble": deep_ensemble(network, looped.num_heads)}
        if (ensemble := packed(name, looped.num_heads)) is not None:
            models["packed"] = ensemble
    if CUDA:
        return {key: model.cuda().to(memory_format=torch.channels_last) for key, model in models.items()}
    if len(network.shape) == 3:
        for key in ("base", "looped", "fused"):
            models[f"{key}, channels_last"] = copy.deepcopy(models[key]).to(memory_format=torch.channels_last)
    return models


def inputs_of(key: str, x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if CUDA or key.endswith("channels_last") else x


def lowered(run: Callable[[], None]) -> Callable[[], None]:
    """On a CUDA device, in bfloat16."""

    def lower() -> None:
        with torch.autocast("cuda", torch.bfloat16) if CUDA else nullcontext():
            run()

    return lower


def works(key: str, run: Callable[[], None]) -> bool:
    try:
        run()
    except Exception as error:  # whatever a method cannot do is a result
        print(f"    {key} is left out: {str(error).splitlines()[0][:100]}")
        return False
    return True


def compiled(models: dict[str, nn.Module]) -> dict[str, nn.Module]:
    twins = {
        f"{key}, compiled": copy.deepcopy(models[key]) for key in ("base", "looped", "fused", "vmap") if key in models
    }
    for twin in twins.values():
        twin.compile(mode="reduce-overhead" if CUDA else None)
    return twins


def macs_of(model: nn.Module, network: Network) -> float:
    return measure_cost(copy.deepcopy(model).cpu().float(), torch.randn(1, *network.shape)).macs


def benchmark(name: str, with_compiled: bool, seconds: float, num_heads: int, ways: str) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    network = NETWORKS[name]
    base = network.make()
    looped = convert(base, torch.randn(2, *network.shape), num_heads)
    x = torch.randn(network.batch, *network.shape, device="cuda" if CUDA else "cpu")
    models = methods_of(name, network, looped, base, ways)
    base_macs = macs_of(base, network)
    assert looped.cost is not None
    shares = dict.fromkeys(models, looped.cost.macs / base_macs) | {"base": 1.0, "deep ensemble": float(num_heads)}
    shares |= {"base, channels_last": 1.0, "base, compiled": 1.0}
    if "packed" in models:
        shares["packed"] = macs_of(models["packed"], network) / base_macs
    rows = []
    for batch, training in ((1, False), (network.batch, False), (network.batch, True)):
        torch.compiler.reset()
        other, own = OtherWork(), dict(models)
        tuned = {}
        for key in [key for key in models if key.startswith("fused")]:
            with torch.autocast("cuda", torch.bfloat16) if CUDA else nullcontext():
                own[key], choice = choose(own[key].train(training), inputs_of(key, x[:batch]), "fused")
            tuned[key] = [len(choice.separate), len(own[key].convolutions)]
        chosen = {}
        for key in [key for key in models if key.startswith("looped")]:
            with torch.autocast("cuda", torch.bfloat16) if CUDA else nullcontext():
                _, choice = choose(copy.deepcopy(own[key]).train(training), inputs_of(key, x[:batch]))
            chosen[key.replace("looped", "chosen")] = choice.heads
        if training:
            own["recomputed"] = choose(copy.deepcopy(looped).train(), x, "checkpointed")[0]
        if with_compiled:
            own |= compiled(own)
        steps = {key: lowered(step(model.train(training), inputs_of(key, x[:batch]))) for key, model in own.items()}
        steps = {key: run for key, run in steps.items() if works(key, run)}
        times, disturbed = run_in_turns(steps, seconds)
        methods = summary(times)
        for key, method in methods.items():
            share = shares.get(key, shares["looped"])
            method |= {"macs_share": share, "achieved": share / method["ratio"]}
            if training:
                own[key].zero_grad(set_to_none=True)
                weights = sum(part.nbytes for part in own[key].parameters()) / 1e6
                method["peak_mb"] = weights + peak_megabytes(steps[key])
        for key in chosen:
            ways = {way: methods[key.replace("chosen", way)]["ms"] for way in ("looped", "fused")}
            chosen[key] = {"heads": chosen[key], "over_best": ways[chosen[key]] / min(ways.values())}
        rows.append({
            "model": name, "batch": batch, "training": training, "methods": methods, "chosen": chosen,
            "separate_convolutions": tuned, "turns": len(times["base"]), "disturbed_turns": disturbed,
            "other_processors": other.processors(),
        })  # fmt: skip
        shown = {key: round(value["ratio"], 2) for key, value in methods.items()}
        print(f"  {name}, batch {batch}, training {training}: {shown}", flush=True)
        print(f"    {chosen}, {len(times['base'])} turns, {disturbed} disturbed", flush=True)
    return rows


# -- the loss, and the time that fusing takes


def plain_loss(z: Tensor, y: Tensor, weight: float = 2.0) -> Tensor:
    """The same loss as autograd alone has it."""
    heads = torch.stack([F.cross_entropy(one, y) for one in z]).mean()
    return (1 - weight) * F.cross_entropy(z.mean(0), y) + weight * heads


def benchmark_loss(seconds: float) -> list[dict[str, Any]]:
    rows, device = [], "cuda" if CUDA else "cpu"
    for k, n, c in LOSSES:
        torch.compiler.reset()
        z = torch.randn(k, n, c, device=device, requires_grad=True)
        y = torch.randint(c, (n,), device=device)
        criterion = CoDistillationLoss(2.0)

        def forward_backward(loss: Callable[..., Tensor], z: Tensor = z, y: Tensor = y) -> Callable[[], None]:
            def run() -> None:
                z.grad = None
                loss(z, y).backward()

            return run

        # memory alone bounds it: forward reads the logits, backward reads them once more and writes their gradient
        source, target = torch.randn(k, n, c, device=device), torch.empty(k, n, c, device=device)

        def move(source: Tensor = source, target: Tensor = target) -> None:
            source.sum()
            target.copy_(source)

        steps = {
            "base": move,
            "eager": forward_backward(criterion),
            "compiled": forward_backward(torch.compile(criterion, fullgraph=True)),
            "autograd alone": forward_backward(plain_loss),
        }
        methods = summary(run_in_turns(steps, seconds)[0])
        for key in list(methods)[1:]:
            z.grad = None
            methods[key]["peak_copies_of_logits"] = peak_megabytes(steps[key]) * 1e6 / z.nbytes
        methods["memory bound"] = methods.pop("base")
        rows.append({"heads": k, "examples": n, "classes": c, "methods": methods})
        print(f"  loss of {k, n, c}: {methods}", flush=True)
    return rows


def benchmark_fusing() -> list[dict[str, Any]]:
    """Seconds that `fuse` takes on networks at their own size, by timm's name."""
    rows = []
    for name in TO_FUSE:
        model = convert(timm.create_model(name), torch.randn(2, 3, 224, 224), NUM_HEADS)
        begin = time.perf_counter()
        fuse(model)
        rows.append({"model": name, "seconds": time.perf_counter() - begin})
        print(f"  {rows[-1]}", flush=True)
    return rows


# -- results

KINDS = {(False, False): "prediction of one", (False, True): "prediction of a batch", (True, True): "training step"}


def kind_of(row: dict[str, Any]) -> str:
    return KINDS[row["training"], row["batch"] > 1]


def tables(parts: dict[str, Any]) -> str:
    """The results as Markdown: ratios to the base, a line for each network and each thing that it does."""
    rows = [row for part in parts.values() for row in part["rows"] if "batch" in row]
    lines = []
    for key in ("ratio", "peak_mb"):
        for ending in ("", ", channels_last", ", compiled"):
            names = ["base", "looped", "fused", *(["vmap"] if ending != ", channels_last" else [])]
            names = [f"{name}{ending}" for name in names] + (
                [] if ending else ["deep ensemble", "packed", "recomputed"]
            )
            own = [row for row in rows if key in row["methods"].get(names[0], {})]
            if own:
                lines += ["", f"| network | {key} | base ms | {' | '.join(names)} |", "|---" * (len(names) + 3) + "|"]
                lines += [line_of(row, names, key) for row in own]
    return "\n".join(lines)


def line_of(row: dict[str, Any], names: list[str], key: str) -> str:
    cells = []
    for name in names:
        method = row["methods"].get(name, {})
        spread = f" ({method['ratio_low']:.2f}–{method['ratio_high']:.2f})" if method and key == "ratio" else ""
        cells.append(f"{method[key]:.{2 if spread else 0}f}{spread}" if method else "")
    start = f"| {row['model']} | {kind_of(row)}, {row['batch']} | {row['methods']['base']['ms']:.1f} | "
    return start + " | ".join(cells) + " |"


COLORS = {
    "looped": "#999999", "fused": "#0072b2", "looped, channels_last": "#c8c8c8", "fused, channels_last": "#56b4e9",
    "vmap": "#e69f00", "packed": "#009e73", "deep ensemble": "#d55e00",
}  # fmt: skip


def draw(parts: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    rows = [row for name in NETWORKS for row in parts.get(name, {"rows": []})["rows"]]
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    for axes, kind in zip(figure.subplots(1, 3, sharey=True), KINDS.values(), strict=True):
        own = [row for row in rows if kind_of(row) == kind]
        for k, (method, color) in enumerate(COLORS.items()):
            values = [row["methods"].get(method, {"ratio": 0})["ratio"] for row in own]
            axes.bar([i + 0.12 * (k - 3) for i in range(len(own))], values, 0.11, label=method, color=color)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xticks(range(len(own)), [row["model"] for row in own], rotation=40, ha="right")
        axes.set_title(kind)
        axes.set_ylim(0, 4.5)
    figure.axes[0].set_ylabel("time, as a multiple of the base's")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(COLORS), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*NETWORKS, "loss", "fusing"]
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--seconds", type=float, default=10.0, help="of turns for each row (default: %(default)s)")
    parser.add_argument("--parts", nargs="*", default=names, choices=names)
    parser.add_argument("--num_heads", type=int, default=NUM_HEADS, help="of networks (default: %(default)s)")
    parser.add_argument("--ways", choices=WAYS, default=WAYS[1], help="of running heads that are timed")
    parser.add_argument("--compile", nargs="*", default=list(NETWORKS) if CUDA else [], choices=NETWORKS)
    options = parser.parse_args()
    parts: dict[str, Any] = json.loads(options.output.read_text()) if options.output.exists() else {}
    for name in options.parts:
        if name in NETWORKS:
            rows = benchmark(name, name in options.compile, options.seconds, options.num_heads, options.ways)
        else:
            rows = benchmark_loss(options.seconds) if name == "loss" else benchmark_fusing()
        about = {
            "environment": environment(),
            "num_heads": options.num_heads,
            "seed": 0,
            "threads": torch.get_num_threads(),
        }
        parts[f"{name}, cuda" if CUDA else name] = {**about, "rows": rows}
        write_json(options.output, parts)
    print(tables(parts))
    if options.figure:
        draw(parts, options.figure)


if __name__ == "__main__":
    main()
