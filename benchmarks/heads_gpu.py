"""How fast heads run on a GPU, against the single network, side by side in one run of less than eight minutes.

    python benchmarks/heads_gpu.py --output benchmarks/results/heads_gpu.json

In bfloat16 and channels_last at 224 pixels, for K = 2 and 4 heads behind the stem, as `convert` places them: one image,
the prediction of a full batch, and a training step of it. Every row has two kinds of times. "eager" is what a training
run without `torch.compile` takes: the processor tells the GPU every operation, and may be the slower of the two.
"graph" is what the GPU takes alone: the same step replayed as a CUDA graph. All methods take turns.

The parts "split" divide a base at the end of each stage, with K = 2: time, activations (numbers that operations write)
and peak memory of a training step as multiples of the base's, to compare an estimate of the cost with.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ensemblenet import EnsembleNet, convert, fuse
from ensemblenet.heads import capture, choose, tune
from ensemblenet.storage.atomic import write_json
from ensemblenet.storage.runs import environment
from ensemblenet.timing import measure, step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Network:
    """A base by timm's name, its full batch, the ends of its stages, and the size of its images."""

    name: str
    batch: int
    stages: tuple[str, ...] = ()
    size: int = 224


NETWORKS = {
    "ResNet-50": Network("resnet50", 128, ("maxpool", "layer1", "layer2", "layer3")),
    "ConvNeXt-Tiny": Network("convnext_tiny", 64, ("stem", "stages.0", "stages.1", "stages.2")),
    "ViT-S/16": Network("vit_small_patch16_224", 128),
    "ResNet-18": Network("resnet18", 256),
    "Swin-T": Network("swin_tiny_patch4_window7_224", 64),
    "EfficientNet-B0": Network("efficientnet_b0", 128),
}
SMOKE = {
    "ResNet-50": Network("test_resnet", 2, ("maxpool", "layer1"), 32),
    "ConvNeXt-Tiny": Network("convnext_atto", 2, (), 32),
}


# -- models


def make(network: Network, num_heads: int, split_at: str) -> tuple[nn.Module, EnsembleNet]:
    torch.manual_seed(0)
    base = timm.create_model(network.name)
    looped = convert(base, torch.randn(2, 3, network.size, network.size), num_heads, split_at=split_at)
    for model in (base, looped):
        model.to(DEVICE, memory_format=torch.channels_last)
    return base, looped


def images(network: Network, count: int) -> Tensor:
    x = torch.randn(count, 3, network.size, network.size, device=DEVICE)
    return x.contiguous(memory_format=torch.channels_last)


# -- time


def lowered(cache: bool = True) -> torch.autocast:
    return torch.autocast(DEVICE, torch.bfloat16, cache_enabled=cache)


def eager(model: nn.Module, x: Tensor) -> Callable[[], None]:
    run = step(model, x)

    def one() -> None:
        with lowered():
            run()

    return one


def graph(model: nn.Module, x: Tensor, pool: Any) -> Callable[[], object]:
    """A step as a CUDA graph. Graphs of one pool share their memory: they are never run at once."""
    training = model.training

    def run() -> None:
        with lowered(cache=False), torch.set_grad_enabled(training):
            out = model(x)
        if training:
            out.float().square().mean().backward()

    model.zero_grad(set_to_none=True)
    if DEVICE == "cpu":
        return run
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(2):
            model.zero_grad(set_to_none=True)
            run()
    torch.cuda.current_stream().wait_stream(aside)
    model.zero_grad(set_to_none=True)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded, pool=pool):
        run()
    return recorded.replay


def in_turns(runs: dict[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Milliseconds of the GPU for every turn, of which there are five at least."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    end, turn = time.perf_counter() + seconds, 0
    while turn < 6 or (turn < 60 and time.perf_counter() < end):
        for name, run in runs.items():
            if DEVICE == "cpu":
                start = time.perf_counter()
                run()
                taken = 1000 * (time.perf_counter() - start)
            else:
                before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                before.record()
                run()
                after.record()
                after.synchronize()
                taken = before.elapsed_time(after)
            if turn:
                times[name].append(taken)
        turn += 1
    return times


def against_base(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """By method: milliseconds, and the quartiles of the ratio to the base in the same turn."""
    rows = {}
    for name, own in times.items():
        ratios = [a / b for a, b in zip(own, times["base"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        rows[name] = {"ms": statistics.median(own), "ratio": middle, "ratio_low": low, "ratio_high": high}
    return rows


# -- memory


def peak_megabytes(run: Callable[[], object]) -> float:
    """The most memory that a step takes beyond what was there before."""
    if DEVICE == "cpu":
        return 0.0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


class Written(TorchDispatchMode):
    """Counts the numbers that operations write."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        returned = outputs if isinstance(outputs, (tuple, list)) else [outputs]
        for output, about in zip(returned, func._schema.returns, strict=False):
            is_view = about.alias_info is not None and not about.alias_info.is_write
            if isinstance(output, Tensor) and not is_view:
                self.count += output.numel()
        return outputs


def activations(model: nn.Module, x: Tensor) -> int:
    """Of a prediction of such a batch, for one example."""
    with Written() as written, torch.no_grad():
        model.eval()(x)
    return written.count // len(x)


# -- what is measured


def row(base: nn.Module, looped: EnsembleNet, x: Tensor, training: bool, seconds: float) -> dict[str, Any]:
    for model in (base, looped):
        model.train(training)
    with lowered():
        _, choice = choose(copy.deepcopy(looped), x)
        fused = fuse(looped).train(training)
        separate = tune(fused, x)
    models = {"base": base, "looped": looped, "fused": fused}
    steps = {name: eager(model, x) for name, model in models.items()}
    taken = {name: 1000 * own for name, own in measure(steps, 7).items()}
    memory = {}
    for name in models if training else ():
        looped.zero_grad(set_to_none=True)
        memory[name] = peak_megabytes(steps[name])
    pool = torch.cuda.graph_pool_handle() if DEVICE == "cuda" else None
    runs = {name: graph(model, x, pool) for name, model in models.items()}
    if DEVICE == "cuda" and not training:
        with lowered():
            runs["side by side"] = partial(capture(looped, x), x)
    times = in_turns(runs, seconds)
    for model in (base, looped):
        model.zero_grad(set_to_none=True)
    return {
        "batch": len(x), "training": training, "graph": against_base(times), "turns": len(times["base"]),
        "eager": {name: {"ms": own, "ratio": own / taken["base"]} for name, own in taken.items()},
        "choice": {
            "heads": choice.heads, "reason": choice.reason,
            "over_best": taken[choice.heads] / min(taken["looped"], taken["fused"]),
        },
        "separate": len(separate), "convolutions": len(fused.convolutions), "peak_mb": memory,
    }  # fmt: skip


def split_row(base: nn.Module, looped: EnsembleNet, network: Network, seconds: float) -> dict[str, Any]:
    x = images(network, network.batch)
    found: dict[str, Any] = {}
    for training in (False, True):
        pool = torch.cuda.graph_pool_handle() if DEVICE == "cuda" else None
        models = {"base": base.train(training), "looped": looped.train(training)}
        runs = {name: graph(model, x, pool) for name, model in models.items()}
        found["training step" if training else "prediction"] = against_base(in_turns(runs, seconds))
        del runs
    peaks = {}
    for name, model in (("base", base), ("looped", looped)):
        model.zero_grad(set_to_none=True)
        peaks[name] = peak_megabytes(eager(model.train(), x))
        model.zero_grad(set_to_none=True)
    written = {name: activations(model, x[:2]) for name, model in (("base", base), ("looped", looped))}
    assert looped.cost is not None
    assert looped.base_cost is not None
    shares = looped.cost.shares_of(looped.base_cost)
    return {
        **found, "peak_mb": peaks, "activations": written, "activations_ratio": written["looped"] / written["base"],
        "parameters_share": shares[0], "macs_share": shares[1],
    }  # fmt: skip


# -- results


def shown(found: dict[str, Any]) -> str:
    kind = f"{'training step' if found['training'] else 'prediction'}, {found['batch']}"
    cells = [f"{found['graph']['base']['ms']:.2f}"]
    for name in ("looped", "fused", "side by side"):
        own = found["graph"].get(name)
        cells.append(f"{own['ratio']:.2f} ({own['ratio_low']:.2f}–{own['ratio_high']:.2f})" if own else "")
    cells.append(f"{found['eager']['base']['ms']:.1f}")
    cells += [f"{found['eager'][name]['ratio']:.2f}" for name in ("looped", "fused")]
    return f"| {kind} | {' | '.join(cells)} | {found['choice']['heads']} ({found['choice']['over_best']:.2f}) |"


def shown_split(found: dict[str, Any]) -> str:
    ratios = [found[kind]["looped"]["ratio"] for kind in ("prediction", "training step")]
    memory = found["peak_mb"]["looped"] / (found["peak_mb"]["base"] or 1)
    numbers = (*ratios, found["activations_ratio"], memory, found["parameters_share"], found["macs_share"])
    return "| " + " | ".join(f"{number:.2f}" for number in numbers) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="parts that it has already are kept")
    parser.add_argument("--limit", type=float, default=460, help="seconds; no row starts later (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=0.5, help="of turns for each row (default: %(default)s)")
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--smoke", action="store_true", help="tiny networks, on any machine: does it run at all?")
    options = parser.parse_args()
    start = time.perf_counter()
    networks = {name: own for name, own in (SMOKE if options.smoke else NETWORKS).items() if name in options.networks}
    jobs = [(name, k, "auto") for name in networks for k in (4, 2)]
    splits = [(name, 2, stage) for name, network in networks.items() for stage in network.stages]
    jobs = jobs[:4] + splits + jobs[4:]  # the networks that are split are the first two
    about = {"environment": environment(), "seed": 0}
    parts: dict[str, Any] = json.loads(options.output.read_text()) if options.output.exists() else {}
    for name, k, split in jobs:
        key = f"{name}, {k} heads, {split}"
        if "error" not in parts.get(key, {"error": "is missing"}):
            continue
        if time.perf_counter() - start > options.limit:
            print(f"no time is left for {key}")
            continue
        try:
            network = networks[name]
            base, looped = make(network, k, split)
            if split != "auto":
                found = split_row(base, looped, network, options.seconds)
                print(f"[{time.perf_counter() - start:.0f} s] {key}: {shown_split(found)}", flush=True)
                parts[key] = {**about, **found}
            else:
                parts[key] = {**about, "rows": []}
                for batch, training in ((1, False), (network.batch, False), (network.batch, True)):
                    found = row(base, looped, images(network, batch), training, options.seconds)
                    parts[key]["rows"].append(found)
                    print(f"[{time.perf_counter() - start:.0f} s] {key}: {shown(found)}", flush=True)
        except Exception as error:  # one network that fails is a result, and the others go on
            parts[key] = {"error": f"{type(error).__name__}: {error}"}
            print(f"{key} failed: {parts[key]['error'][:300]}", flush=True)
        write_json(options.output, parts)
        if DEVICE == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
