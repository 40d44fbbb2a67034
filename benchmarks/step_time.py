"""What exchanging gradients adds to a training step of DistributedDataParallel: on paper, and of two processes here.

    OMP_NUM_THREADS=1 python benchmarks/step_time.py --output benchmarks/results/step_time.json

The model: gradients become ready during backward, in an order that one backward pass here shows, with the share of its
time that has passed. DDP collects them in buckets (1 MiB first, then 25 MiB) and sums one bucket after another over the
processes. What is not done when backward ends is added to the step.

- paper: ResNet-50 at 224 pixels on 1 to 512 GPUs, with the bandwidths that stand under `GPUS`, for the base and for
  conversions to 2 narrow and 2 short heads with its parameters; all are given the base's time without exchange.
  `ms_head_parallel`: each head on half of the GPUs of a node, which sums half as many bytes of heads, but waits for the
  trunk's features of the others' images (2 bytes a number) and later for their gradients.
- measured: ResNet-18 at 64 pixels in two processes of one thread over Gloo; all ways take turns. The time of a sum
  follows from sums of two sizes, measured between. The processor that computes also sums, so nothing may be hidden:
  a step without hiding is predicted as well, as the upper bound.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ensemblenet import Budget, CoDistillationLoss, EnsembleNet, convert
from ensemblenet.storage.atomic import write_json
from ensemblenet.storage.runs import environment

MIB = 2**20
GPUS = {
    "a step without exchange, s": 0.028,  # ResNet-50, 128 images, bfloat16, H200: docs/heads.md
    "share of it that is backward": 2 / 3,
    "images of a GPU": 128,
    "GPUs of a node": 8,
    "NVLink of a GPU, bytes/s": 0.8 * 450e9,  # 80 % of what stands on paper, here and below
    "InfiniBand of a node, bytes/s": 0.8 * 8 * 50e9,  # 400 Gbit/s for each GPU
    "Ethernet of a node, bytes/s": 0.8 * 12.5e9,  # 100 Gbit/s for all 8
    "latency of a stage, s": 10e-6,
    "small sums of a step": 3,  # of Lightning and `fit`: loss, divergence, and whether SIGTERM came
}
Ready = list[tuple[float, int]]  # of each gradient: the share of backward after which it is there, and its bytes


# -- the model


def buckets(ready: Ready, first: float = MIB, other: float = 25 * MIB) -> Ready:
    """The same of each bucket, as DDP fills them in the order in which gradients came."""
    filled: Ready = []
    size, limit = 0, first
    for share, count in sorted(ready):
        size += count
        if size >= limit:
            filled.append((share, size))
            size, limit = 0, other
    return [*filled, (1.0, size)] if size else filled


def step_time(forward: float, backward: float, ready: Ready, sum_time: Callable[[float], float]) -> float:
    """Seconds of a step in which each bucket is summed as soon as it is full and the one before is done."""
    end = 0.0
    for share, count in ready:
        end = max(end, share * backward) + sum_time(count)
    return forward + max(backward, end)


def gpu_sum(count: float, gpus: int, network: str) -> float:
    """Seconds in which GPUs sum so many bytes: within nodes and between them, by a ring or a tree."""
    inside = min(gpus, GPUS["GPUs of a node"])
    nodes = gpus / inside
    seconds = 2 * (inside - 1) / inside * count / GPUS["NVLink of a GPU, bytes/s"]
    seconds += 2 * (nodes - 1) / nodes * count / GPUS[f"{network} of a node, bytes/s"]
    return seconds + 2 * math.log2(gpus) * GPUS["latency of a stage, s"]


def on_paper(ready: Ready, gpus: int, network: str, *, cap: float = 25 * MIB) -> float:
    """Seconds of a step."""
    if gpus == 1:
        return GPUS["a step without exchange, s"]
    whole, share = GPUS["a step without exchange, s"], GPUS["share of it that is backward"]
    filled = buckets(ready, first=min(MIB, cap), other=cap)
    small = GPUS["small sums of a step"] * gpu_sum(4, gpus, network)
    return small + step_time(whole * (1 - share), whole * share, filled, lambda count: gpu_sum(count, gpus, network))


def head_parallel(model: EnsembleNet, ready: Ready, x: Tensor, gpus: int, network: str) -> float:
    """Seconds of a step where each head is on its own share of the GPUs of a node."""
    of_heads = sum(4 * own.numel() for head in model.heads for own in head.parameters())
    share = of_heads / sum(count for _, count in ready) / model.num_heads  # of all bytes: one head's
    kept = 1 - (model.num_heads - 1) * share
    with torch.no_grad():
        features = model.trunk(x)[0].numel() * 2 * GPUS["images of a GPU"]
    waits = 2 * (model.num_heads - 1) * features / GPUS["NVLink of a GPU, bytes/s"]
    return waits + on_paper([(when, round(kept * count)) for when, count in ready], gpus, network)


# -- what is measured


def networks(name: str, x: Tensor) -> dict[str, nn.Module]:
    """A base, and conversions to 2 narrow and 2 short heads with as many parameters."""
    torch.manual_seed(0)
    base = timm.create_model(name)
    made: dict[str, nn.Module] = {"base": base}
    for shape in ("narrow", "short"):
        made[f"2 {shape} heads"] = convert(base, x, num_heads=2, shape=shape, budget=Budget(parameters=1.0, macs=1.2))
    return {kind: network.train() for kind, network in made.items()}


def loss_of(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """As a plain classifier has it, or co-distillation."""
    outputs = network(x)
    return CoDistillationLoss()(outputs if outputs.ndim == 3 else outputs.unsqueeze(0), y)


def timed(network: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Seconds of forward and of backward."""
    began = time.perf_counter()
    loss = loss_of(network, x, y)
    middle = time.perf_counter()
    loss.backward()
    return middle - began, time.perf_counter() - middle


def order(network: nn.Module, x: Tensor, y: Tensor) -> Ready:
    """When each gradient is ready."""
    came: list[tuple[float, int]] = []

    def note(parameter: Tensor) -> None:
        came.append((time.perf_counter(), 4 * parameter.numel()))

    hooks = [own.register_post_accumulate_grad_hook(note) for own in network.parameters()]
    loss = loss_of(network, x, y)
    began = time.perf_counter()
    loss.backward()
    took = time.perf_counter() - began
    for hook in hooks:
        hook.remove()
    network.zero_grad()
    return [((when - began) / took, count) for when, count in came]


def paper() -> list[dict[str, Any]]:
    """A row for each network, number of GPUs and kind of connection between nodes."""
    x, y = torch.randn(2, 3, 224, 224), torch.randint(1000, (2,))
    rows = []
    for kind, network in networks("resnet50", x).items():
        order(network, x, y)  # the first pass takes longer
        ready = order(network, x, y)
        row = {"network": kind, "megabytes": round(sum(count for _, count in ready) / 1e6, 1)}
        row["bytes_in_the_first_half_of_backward"] = round(
            sum(count for share, count in ready if share < 0.5) / sum(count for _, count in ready), 2
        )
        for gpus, between in ((1, "InfiniBand"), (8, "InfiniBand"), *((g, n) for g in (64, 512) for n in NETWORKS)):
            seconds = on_paper(ready, gpus, between)
            caps = {f"{cap} MiB": 1000 * on_paper(ready, gpus, between, cap=cap * MIB) for cap in (1, 5, 25, 100)}
            apart = {}
            if isinstance(network, EnsembleNet) and gpus > 1:
                apart["ms_head_parallel"] = round(1000 * head_parallel(network, ready, x[:1], gpus, between), 2)
            rows.append(
                row
                | {"gpus": gpus, "between_nodes": between if gpus > 8 else None, "ms": round(1000 * seconds, 2)}
                | {"efficiency": round(GPUS["a step without exchange, s"] / seconds, 3)}
                | {"ms_by_bucket": {cap: round(ms, 2) for cap, ms in caps.items()}}
                | apart
            )
    return rows


NETWORKS = ("InfiniBand", "Ethernet")
WAYS: dict[str, dict[str, Any]] = {
    "buckets of 25 MiB": {},
    "static graph": {"static_graph": True},
    "buckets of 1 MiB": {"bucket_cap_mb": 1},
    "buckets of 100 MiB": {"bucket_cap_mb": 100},
}


def process(rank: int, store: str, rounds: int, output: Path) -> None:
    """One of two that train together."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    x, y = torch.randn(2, 3, 64, 64), torch.randint(1000, (2,))  # a short step: exchange is half of it
    rows = [compare(kind, network, x, y, rounds) for kind, network in networks("resnet18", x[:2]).items()]
    if rank == 0:
        write_json(output, rows)
    dist.destroy_process_group()


def compare(kind: str, network: nn.Module, x: Tensor, y: Tensor, rounds: int) -> dict[str, Any]:
    """A step without and with exchange, and what the model says of it."""
    wrapped = {way: DistributedDataParallel(copy.deepcopy(network), **options) for way, options in WAYS.items()}
    if isinstance(network, EnsembleNet):
        plain = DistributedDataParallel(copy.deepcopy(network))
        plain.module.balance_gradients = False
        wrapped["gradients not balanced"] = plain
    for model in wrapped.values():
        for _ in range(2):  # DDP orders its buckets anew after the first step
            timed(model, x, y)
    times: dict[str, list[float]] = {way: [] for way in wrapped}
    alone: list[tuple[float, float]] = []
    small, large = torch.zeros(MIB // 4), torch.zeros(25 * MIB // 4)
    sums: dict[int, list[float]] = {small.nbytes: [], large.nbytes: []}
    came = []
    for _ in range(rounds):
        dist.barrier()
        with next(iter(wrapped.values())).no_sync():
            alone.append(timed(next(iter(wrapped.values())), x, y))
        dist.barrier()
        came.append(order(network, x, y))
        for flat in (small, large):
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(flat)
            sums[flat.nbytes].append(time.perf_counter() - began)
        for way, model in wrapped.items():
            dist.barrier()
            times[way].append(sum(timed(model, x, y)))
    return summary(kind, alone, came[len(came) // 2], sums, times)


def summary(
    kind: str,
    alone: Sequence[tuple[float, float]],
    ready: Ready,
    sums: dict[int, list[float]],
    times: dict[str, list[float]],
) -> dict[str, Any]:
    """The fastest of all rounds, as other work on the machine only adds, and their ratios to the model."""
    forward, backward = min(f for f, _ in alone), min(b for _, b in alone)
    (small, quick), (large, slow) = ((count, min(seconds)) for count, seconds in sums.items())
    speed = (large - small) / max(slow - quick, 1e-9)

    def sum_time(count: float) -> float:
        return max(0.0, quick - small / speed) + count / speed

    found = {way: min(seconds) for way, seconds in times.items()}
    filled = buckets(ready)
    hidden = step_time(forward, backward, filled, sum_time)
    unhidden = forward + backward + sum(sum_time(count) for _, count in filled)
    step = found["buckets of 25 MiB"]
    return {
        "network": kind,
        "megabytes": round(sum(count for _, count in ready) / 1e6, 1),
        "ms_without_exchange": round(1000 * (forward + backward), 1),
        "gigabytes_a_second": round(speed / 1e9, 2),
        "ms": {way: round(1000 * seconds, 1) for way, seconds in found.items()},
        "ms_predicted": round(1000 * hidden, 1),
        "ms_predicted_if_nothing_is_hidden": round(1000 * unhidden, 1),
        "measured_by_predicted": round(step / hidden, 2),
        "measured_by_unhidden": round(step / unhidden, 2),
    }


def main() -> None:
    """Print both parts, and keep them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--output", type=Path, help="JSON")
    options = parser.parse_args()
    found = {"environment": environment(), "constants": GPUS, "paper": paper()}
    with tempfile.TemporaryDirectory() as folder:
        measured = Path(folder, "measured.json")
        mp.spawn(process, (str(Path(folder, "store")), options.rounds, measured), nprocs=2)  # pyright: ignore
        found["measured"] = json.loads(measured.read_text())
    for row in [*found["paper"], *found["measured"]]:
        print(json.dumps(row))
    if options.output:
        write_json(options.output, found)


if __name__ == "__main__":
    main()
