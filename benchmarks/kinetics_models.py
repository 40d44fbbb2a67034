"""Convert torchvision's video networks and this project's S3D, and check every promise of a conversion.

    python benchmarks/kinetics_models.py             # all of them, 20 minutes on one core
    python benchmarks/kinetics_models.py r3d_18      # some

Each is converted to 2 and to 4 heads at no more than its cost, and checked by `ensemblenet.testing.check_conversion`:
cost, shapes, finite outputs, a gradient for every parameter, and `head`, `first`, `deepcopy`, `state_dict` and
`save`/`load` exact; full width at its split point is the base (`check_full_width`). Clips are small where the network
takes them: what is checked does not depend on their size.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
import torchvision
from torch import nn

from ensemblenet import measure_cost
from ensemblenet.models import S3D
from ensemblenet.testing import check_conversion

RESULTS = Path(__file__).parent / "results" / "kinetics_models.json"
SETTINGS = ((2, 1.0), (4, 1.0))
SMALL = (3, 8, 64, 64)
WHOLE = (3, 16, 224, 224)
SHAPES = {"s3d": WHOLE, "mvit_v1_b": WHOLE, "mvit_v2_s": WHOLE}  # made for one size


def entries() -> Iterator[tuple[str, Callable[[], nn.Module], tuple[int, ...]]]:
    for name in torchvision.models.list_models(module=torchvision.models.video):
        make = lambda name=name: torchvision.models.get_model(name, weights=None)  # noqa: E731
        yield name, make, SHAPES.get(name, SMALL)
    yield "S3D", lambda: S3D(), SMALL
    yield "S3D-G", lambda: S3D(gating=True), SMALL


def check(make: Callable[[], nn.Module], shape: tuple[int, ...], num_heads: int, budget: float) -> dict:
    torch.manual_seed(0)
    base, x = make(), torch.randn(2, *shape)
    cost = measure_cost(base, x)
    row = {"input": shape, "parameters": cost.parameters, "macs": cost.macs, "num_heads": num_heads, "budget": budget}
    start = time.process_time()
    try:
        report = check_conversion(base, x, num_heads, budget)
    except Exception as error:
        return row | {"reason": f"{type(error).__name__}: {error}".split("\n")[0][:300]}
    return row | asdict(report) | {"cpu_seconds_with_checks": round(time.process_time() - start, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows = json.loads(options.output.read_text())["rows"] if options.output.exists() else []
    for name, make, shape in entries():
        if options.names and name not in options.names:
            continue
        rows = [row for row in rows if row["model"] != name]
        for num_heads, budget in SETTINGS:
            rows.append({"model": name} | check(make, shape, num_heads, budget))
            print(rows[-1], flush=True)
            packages = {package: version(package) for package in ("torch", "torchvision")}
            environment = {"python": platform.python_version(), "packages": packages}
            options.output.write_text(json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
