"""Convert networks of timm, torchvision and transformers, and networks by hand; write docs/zoo.md.

    python benchmarks/zoo.py              # timm and torchvision: go on where the last run stopped; then the others
    python benchmarks/zoo.py --only vgg   # names that contain a string, afresh
    python benchmarks/zoo.py --group by_hand

Networks of transformers and by hand stand in tests/kinds, with inputs as their users give them and a check of its own:
at full width outputs and gradients are the base's, at other sizes and other masks too. They are run afresh each time,
with 2 heads at the whole of the base's cost.

Of a timm family it is the smallest classification network. Each is checked against all promises of a conversion
(`ensemblenet.testing.check_conversion`), for 2 heads at 0.9 of its cost and 4 heads at 1.0. What `convert` costs is
measured apart: processor seconds, which other work on the machine hardly changes, and its peak memory against that of
one training step of the base. Needs Linux, where a process can reset the peak of its memory.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import timm
import torch
import torchvision
from rich.progress import track
from torch import Tensor, nn

from ensemblenet import convert
from ensemblenet.testing import check_conversion, check_full_width

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from kinds import BY_HAND, TRANSFORMERS, Finding  # noqa: E402
from kinds import check as check_kind  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "zoo.jsonl"
SMALLEST = RESULTS.with_name("zoo_timm_smallest.json")
KINDS = {"transformers": TRANSFORMERS, "by_hand": BY_HAND}
PAGE = ROOT / "docs" / "zoo.md"
SETTINGS = ((2, 0.9), (4, 1.0))
SIZES = {"inception": 299}  # its auxiliary classifier takes no less
Entry = tuple[str, str, str, Callable[[], nn.Module], tuple[int, ...]]


def timm_entries() -> Iterator[Entry]:
    """Of each family, the classification model with the fewest parameters."""
    for family, (name, shape) in _smallest_of_families().items():
        yield "timm", family, name, lambda name=name: timm.create_model(name), tuple(shape)


def _smallest_of_families() -> dict[str, tuple[str, list[int]]]:
    """Made once for a version of timm: it takes minutes to make all its models."""
    if SMALLEST.exists() and (known := json.loads(SMALLEST.read_text()))["timm"] == timm.__version__:
        return known["smallest"]
    smallest = {}
    for family in track(timm.models.list_modules(), "Weighing timm's models"):
        sizes = []
        for name in timm.list_models(module=family):
            model = weightless(lambda name=name: timm.create_model(name))
            if model.pretrained_cfg.get("num_classes"):
                shape = list(model.pretrained_cfg["input_size"])
                sizes.append((sum(p.numel() for p in model.parameters()), name, shape))
        if sizes:
            smallest[family] = min(sizes)[1:]
    SMALLEST.write_text(json.dumps({"timm": timm.__version__, "smallest": smallest}, indent=1) + "\n")
    return smallest


def torchvision_entries() -> Iterator[Entry]:
    """Every classification model."""
    for name in torchvision.models.list_models(module=torchvision.models):
        family = torchvision.models.get_model_builder(name).__module__.rsplit(".", 1)[-1]
        # convolutional networks take any size; a small one lets the largest be run on two cores
        size = 224 if family in ("vision_transformer", "swin_transformer", "maxvit") else SIZES.get(family, 128)
        yield (
            "torchvision",
            family,
            name,
            lambda name=name: torchvision.models.get_model(name, weights=None),
            (3, size, size),
        )


def weightless(make: Callable[[], nn.Module]) -> nn.Module:
    """A network without memory for its weights, unless it computes with them when it is made."""
    try:
        with torch.device("meta"):
            return make()
    except (RuntimeError, NotImplementedError):
        return make()


def size(entry: Entry) -> int:
    """Parameters, so that small networks come first."""
    return sum(p.numel() for p in weightless(entry[3]).parameters())


def measure(entry: Entry) -> list[dict]:
    """One row for each setting."""
    library, family, name, make, shape = entry
    torch.manual_seed(0)
    resident = peak_memory(lambda: None)
    base = make()
    x = torch.randn(2, *shape)
    training = peak_memory(lambda: training_step(base, x)) - resident
    base.zero_grad(set_to_none=True)
    rows = []
    for num_heads, budget in SETTINGS:
        row = {
            "library": library,
            "family": family,
            "model": name,
            "parameters": sum(p.numel() for p in base.parameters()),
            "input": shape,
            "num_heads": num_heads,
            "budget": budget,
            "training_step_mib": training,
        }
        rows.append(row | _attempt(lambda k=num_heads, b=budget: conversion_cost(base, x, k, b, resident)))
    splits: set[str] = set()
    for row in rows:
        if "reason" not in row:
            row |= _attempt(lambda row=row: check(base, x, row["num_heads"], row["budget"], splits))
            gc.collect()
    return rows


def training_step(base: nn.Module, x: Tensor) -> None:
    outputs = base.train()(x)
    (outputs if isinstance(outputs, Tensor) else outputs[0]).square().mean().backward()  # some add auxiliary outputs


def _attempt(call: Callable[[], dict]) -> dict:
    try:
        return call()
    except Exception as error:
        return {"reason": f"{type(error).__name__}: {error}".split("\n")[0][:300]}


def conversion_cost(base: nn.Module, x: Tensor, num_heads: int, budget: float, resident: float) -> dict[str, float]:
    """What `convert` takes; `resident` is the process's memory in MiB before there was a base."""
    start = time.process_time()
    peak = peak_memory(lambda: convert(base.eval(), x, num_heads, budget)) - resident
    return {"cpu_seconds": time.process_time() - start, "peak_mib": peak}


def check(base: nn.Module, x: Tensor, num_heads: int, budget: float, splits: set[str]) -> dict:
    """What the conversion came to; at full width each of the `splits` is checked once."""
    report = check_conversion(base, x, num_heads, budget)
    if report.split_at not in splits:
        check_full_width(base, x, report.split_at)
        splits.add(report.split_at)
    return {key: value for key, value in asdict(report).items() if key != "seconds"}


def peak_memory(call: Callable[[], object]) -> float:
    """The most memory that the process had during a call, in MiB, as Linux counts it."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before does not count
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    call()
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def write_page(rows: list[dict]) -> None:
    """The table and its counts."""
    lines = [
        "# Networks that were converted",
        "",
        "Made by `python benchmarks/zoo.py`; every row was checked by `ensemblenet.testing.check_conversion`:",
        "cost within the budget and as estimated, finite outputs of shape (K, N, C), full width equal to the base, a",
        "gradient for every parameter, and `head`, `first`, `deepcopy`, `state_dict` and `save`/`load` exact. Depth",
        "is the share of the blocks that heads may drop which they keep, time the estimate for an accelerator; shares",
        "are of the base; spread is the standard deviation of a head's first outputs as a share of the base's (none",
        "where the base begins with outputs of zero). Seconds are processor time of `convert` on one thread; memory is",
        "its peak, the base included, as a share of the peak of one training step of the base on the same examples.",
        "",
        f"torch {torch.__version__}, timm {timm.__version__}, torchvision {torchvision.__version__}, "
        f"Python {platform.python_version()}, {torch.get_num_threads()} CPU threads, batches of 2.",
        "",
        "Networks are run smallest first; what is not listed has not been run yet, and rows without depth and time",
        "are from before heads could be shorter, with torch 2.15.0. torchvision's convolutional networks were given",
        "128 pixels.",
        "",
        "| networks | there are | run | K | budget | converted | share of those run |",
        "|---|---|---|---|---|---|---|",
    ]
    there = {"timm": len(_smallest_of_families()), "torchvision": len(list(torchvision_entries()))}
    for library in ("timm", "torchvision"):
        for num_heads, budget in SETTINGS:
            mine = [r for r in rows if (r["library"], r["num_heads"]) == (library, num_heads)]
            good = [r for r in mine if "reason" not in r]
            what = "timm families" if library == "timm" else "torchvision models"
            share = f"{len(good) / max(len(mine), 1):.1%}"
            lines.append(
                f"| {what} | {there[library]} | {len(mine)} | {num_heads} | {budget} | {len(good)} | {share} |"
            )
    lines += [
        "",
        "| library | family | model | parameters | K | split | width | depth | parameters share | MACs share | time "
        "| spread | s | memory |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        start = f"| {r['library']} | {r['family']} | {r['model']} | {r['parameters'] / 1e6:.2f} M | {r['num_heads']} "
        if "reason" in r:
            reason = r["reason"].replace("|", "\\|")
            lines.append(f"{start}| not converted: {reason} | | | | | | | | |")
        else:
            depth, time_share = (f"{r[name]:.2f}" if name in r else "" for name in ("depth", "time_share"))
            lines.append(
                f"{start}| {r['split_at']} | {r['width']:.3f} | {depth} | {r['parameters_share']:.3f} "
                f"| {r['macs_share']:.3f} | {time_share} "
                f"| {'' if r['spread'] is None else format(r['spread'], '.2f')} | {r['cpu_seconds']:.1f} "
                f"| {r['peak_mib'] / r['training_step_mib']:.2f} |"
            )
    PAGE.write_text("\n".join(lines) + "\n")
    write_kinds()


def write_kinds() -> None:
    """The page's tables of networks of transformers and by hand, below what stands there of the registries."""
    above, *_ = PAGE.read_text().split("\n## ")
    lines = [line for group in KINDS for line in ("", *kinds_table(group))]
    PAGE.write_text("\n".join([above.rstrip("\n"), *lines]) + "\n")


def check_kinds(group: str, only: str) -> None:
    """Check the networks of a group; where only some names are asked for, the others' results stay."""
    path = kinds_path(group)
    known = {row["name"]: row for row in json.loads(path.read_text())["rows"]} if only and path.exists() else {}
    for entry in track([entry for entry in KINDS[group] if only in entry.name], f"Converting {group}"):
        known[entry.name] = {"name": entry.name, **asdict(check_kind(entry))}
    rows = [known[entry.name] for entry in KINDS[group] if entry.name in known]
    versions = {name: version(name) for name in ("torch", "transformers", "einops")}
    path.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1, ensure_ascii=False) + "\n")


def kinds_path(group: str) -> Path:
    """The results of a group."""
    return RESULTS.with_name(f"zoo_{group}.json")


def kinds_table(group: str) -> list[str]:
    """A group's counts and rows."""
    if not kinds_path(group).exists():
        return []
    results = json.loads(kinds_path(group).read_text())
    rows = [{name: row[name] for name in ("name", *Finding.__dataclass_fields__)} for row in results["rows"]]
    titles = {
        "transformers": "Networks of transformers, called as their users call them",
        "by_hand": "Networks by hand",
    }
    verdicts = ("converted", "refused, with a way", "refused", "failed", "wrong")
    counts = {verdict: sum(row["verdict"] == verdict for row in rows) for verdict in verdicts}
    converted = [row for row in rows if row["verdict"] == "converted"]
    early = sum(row["split_at"] == "input" for row in converted)
    lines = [
        f"## {titles[group]}",
        "",
        f"`python benchmarks/zoo.py --group {group}`; "
        + ", ".join(f"{name} {number}" for name, number in results["versions"].items()) + ".",
        "Small networks with random weights, 2 heads at the whole of the base's cost. Outputs and gradients at full",
        "width are the base's, at other numbers of examples, sizes and masks; a size in the last column is refused by",
        "the model. \"With a way\": refused, and a network that does what the message proposes was converted.",
        "",
        f"| {' | '.join(['networks', *verdicts, 'converted, of all', 'of these, split at the input'])} |",
        f"|{'---|' * (len(verdicts) + 3)}",
        f"| {' | '.join(map(str, [len(rows), *counts.values()]))} | {len(converted) / len(rows):.1%} | {early} |",
        "",
        "| network | verdict | split | trunk's MACs | width | budget used | refused sizes |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        text = row["text"].replace("|", "\\|")
        if row["verdict"] in ("converted", "refused, with a way"):
            numbers = f"{row['trunk']:.2f} | {row['width']:.2f} | {row['used']:.2f} | {', '.join(row['refused_sizes'])}"
            verdict = row["verdict"] + (f": {text}" if text else "")
            lines.append(f"| {row['name']} | {verdict} | {row['split_at']} | {numbers} |")
        else:
            lines.append(f"| {row['name']} | {row['verdict']}: {text} | | | | | |")
    return lines


def main() -> None:
    """Measure what is missing and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", help="measure afresh the models whose names contain this")
    parser.add_argument("--group", choices=("timm", "torchvision", *KINDS), help="only one group")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    for group in KINDS:
        if args.group in (None, group):
            check_kinds(group, args.only or "")
            write_kinds()
    if args.group in KINDS:
        return
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    done = {(row["library"], row["model"]) for row in rows if "time_share" in row or "reason" in row}
    done = set() if args.only else done
    entries = [*timm_entries(), *torchvision_entries()]
    entries = [e for e in entries if (e[0], e[2]) not in done and (args.group or e[0]) == e[0]]
    entries = sorted((e for e in entries if (args.only or "") in e[2]), key=size)
    for entry in track(entries, "Converting"):
        others = [row for row in rows if (row["library"], row["model"]) != (entry[0], entry[2])]
        rows = others + measure(entry)
        order = sorted(rows, key=lambda r: (r["library"], r["family"], r["model"], r["num_heads"]))
        RESULTS.write_text("".join(json.dumps(row) + "\n" for row in order))
        write_page(order)


if __name__ == "__main__":
    main()
