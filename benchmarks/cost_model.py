"""The estimate of time, `Cost.time`, against what a GPU took: it needs no GPU, only the measurements of heads_gpu.py.

    python benchmarks/cost_model.py --output benchmarks/results/cost_model.json

Every conversion of benchmarks/results/heads_gpu.json is planned again. Of each, the estimated time as a multiple of the
base's stands beside the measured one, of looped heads, replayed as a CUDA graph, in the prediction of a full batch and
in a training step; activations and MACs stand beside them, as estimates that are simpler still.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from heads_gpu import NETWORKS

from ensemblenet import convert
from ensemblenet.cost import ROOFLINE
from ensemblenet.storage.atomic import write_json
from ensemblenet.storage.runs import environment

MEASURED = Path(__file__).parent / "results" / "heads_gpu.json"
KINDS = ("prediction", "training step")
ESTIMATES = ("time", "activations", "macs")


def measured_ratios(part: dict[str, Any]) -> dict[str, float]:
    """Looped heads against the base, for a full batch."""
    if "rows" not in part:
        return {kind: part[kind]["looped"]["ratio"] for kind in KINDS}
    _, *rows = part["rows"]  # the first is of one image
    return {KINDS[row["training"]]: row["graph"]["looped"]["ratio"] for row in rows}


def estimated_ratios(name: str, num_heads: int, split_at: str) -> dict[str, float]:
    torch.manual_seed(0)
    network = NETWORKS[name]
    x = torch.randn(2, 3, network.size, network.size)
    model = convert(timm.create_model(network.name), x, num_heads, split_at=split_at)
    assert model.cost is not None
    assert model.base_cost is not None
    return model.cost.shares_of(model.base_cost)._asdict()


def ranks(values: list[float]) -> np.ndarray:
    return np.argsort(np.argsort(values)).astype(float)


def agreement(rows: list[dict[str, Any]], estimate: str, kind: str) -> dict[str, float]:
    """Spearman's rank correlation, and the largest deviation of an estimate from what was measured."""
    guessed, true = ([row[name] for row in rows] for name in (estimate, kind))
    deviations = [guess / found - 1 for guess, found in zip(guessed, true, strict=True)]
    return {
        "rank_correlation": float(np.corrcoef(ranks(guessed), ranks(true))[0, 1]),
        "largest_deviation": max(deviations, key=abs),
        "within_20_percent": sum(abs(deviation) <= 0.2 for deviation in deviations),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    rows = []
    print(f"| network | K | split at | {' | '.join((*KINDS, *ESTIMATES))} |")
    for key, part in json.loads(MEASURED.read_text()).items():
        name, heads, split_at = key.split(", ")
        num_heads = int(heads.removesuffix(" heads"))
        row = {"network": name, "num_heads": num_heads, "split_at": split_at, **measured_ratios(part)}
        row |= estimated_ratios(name, num_heads, split_at)
        rows.append(row)
        numbers = " | ".join(f"{row[kind]:.2f}" for kind in (*KINDS, *ESTIMATES))
        print(f"| {name} | {num_heads} | `{split_at}` | {numbers} |", flush=True)
    found = {estimate: {kind: agreement(rows, estimate, kind) for kind in KINDS} for estimate in ESTIMATES}
    for estimate, kinds in found.items():
        for kind, own in kinds.items():
            print(
                f"{estimate} against a {kind}: rank correlation {own['rank_correlation']:.2f}, largest deviation "
                f"{own['largest_deviation']:+.0%}, within 20 %: {own['within_20_percent']} of {len(rows)}"
            )
    about = {"environment": environment(), "seed": 0, "measured": MEASURED.name, "roofline": vars(ROOFLINE)}
    write_json(options.output, {**about, "rows": rows, "agreement": found})


if __name__ == "__main__":
    main()
