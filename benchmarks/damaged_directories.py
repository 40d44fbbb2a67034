"""What loading makes of damaged and hostile folders: a `LoadError`, or the same values, within seconds and megabytes.

    python benchmarks/damaged_directories.py --count 2000

damages copies of a saved directory, of one without checksums as older versions wrote them, of a run's folder and of a
checkpoint, the same way for the same seed. It prints one line of JSON a kind: how often what happened, the most
seconds that one took, and by how many megabytes the peak of the process' memory rose over all of them. It ends with
exit code 1 where a promise was broken; docs/storage.md makes them.
"""

from __future__ import annotations

import argparse
import copy
import faulthandler
import json
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file

from ensemblenet import EnsembleNetError, convert, save
from ensemblenet.inputs import Inputs
from ensemblenet.models import MNIST1DNet
from ensemblenet.storage.restore import restore, store
from ensemblenet.weights import read_checkpoint

MOST_SECONDS, MOST_MEGABYTES = 5.0, 200.0
HANGS_AFTER = 60  # seconds: the process ends, and says where it was

Damage = Callable[[Path, random.Random], str]

NUMBERS = [-1, 0, 1, 2, 7, 1000, 10**5, 10**9, 2**63, 10**30, 10**400, -(10**6), 0.1, 3.5, 1e308]
VALUES = [
    *(
        None,
        True,
        False,
        float("nan"),
        float("inf"),
        *NUMBERS,
        "",
        "x",
        "../a",
        "a" * 1000,
        "0",
        "float64",
        "__class__",
    ),
    *("probabilities", "timm", "resnet50", "os.system", [], {}, [[]], [0], [1, 2], [10**9], {"a": 1}),
]
TEXTS = [
    "",
    "{",
    "[" * 100_000,
    '{"a":' * 100_000,
    "\0",
    "1e999",
    "null",
    "!!timestamp x",
    "!!int ''",
    "a: &a [*a]",
    "9" * 10_000,
]


def main() -> None:
    """Damage, load, count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000, help="of each kind (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    broken = False
    with tempfile.TemporaryDirectory() as folder:
        for name, (whole, read, damage) in kinds(Path(folder)).items():
            # without checksums nobody can know
            promised = {"LoadError", "same values", *(["other values"] if name == "older" else [])}
            found = run(name, whole, read, damage, promised, options.count, options.seed)
            broken |= found.pop("broken")
            print(json.dumps({"kind": name, **found}), flush=True)
    sys.exit(int(broken))


def kinds(root: Path) -> dict[str, tuple[Path, Callable[[Path], torch.Tensor], Damage]]:
    """What is damaged, how it is read, and how it is damaged."""
    torch.manual_seed(0)
    x = torch.randn(3, 40)
    description = {"classes": list("0123456789"), "preprocessing": {"mean": [0.5], "std": [0.5], "crop_pct": 1.0}}

    def outputs(folder: Path) -> torch.Tensor:
        with torch.no_grad():
            return restore(folder).network(x)

    saved = save(convert(MNIST1DNet(8), x).eval(), root / "saved", description)
    older = shutil.copytree(saved, root / "older")
    forget_checksums(older / "model.safetensors")
    base = {"class_path": "ensemblenet.models.MNIST1DNet", "init_args": {"width": 8}}
    data = {"class_path": "ensemblenet.data.MNIST1D", "init_args": {"num_train": 60}}
    (root / "run").mkdir()
    store(MNIST1DNet(8), "multiclass", Inputs.of(x), description, root / "run")
    (root / "run" / "config.yaml").write_text(yaml.safe_dump({"model": {"base": base}, "data": data}))
    (root / "checkpoint").mkdir()
    torch.save({"state_dict": {"weight": x}, "epoch": 3}, root / "checkpoint" / "last.ckpt")
    return {
        "saved": (saved, outputs, damage_any),
        "older": (older, outputs, damage_any),
        "run": (root / "run", outputs, damage_any),
        "checkpoint": (
            root / "checkpoint",
            lambda folder: read_checkpoint(folder / "last.ckpt")["state_dict"]["weight"],
            lambda folder, chance: damage_bytes(folder / "last.ckpt", chance),
        ),
    }


def run(
    name: str,
    whole: Path,
    read: Callable[[Path], torch.Tensor],
    damage: Damage,
    promised: set[str],
    count: int,
    seed: int,
) -> dict[str, Any]:
    """Damage copies, read them, and say what happened."""
    expected = read(whole)
    outcomes: Counter[str] = Counter()
    slowest, broken = 0.0, False
    before = peak_megabytes()
    for number in range(count):
        folder = whole.with_name("damaged")
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        what = damage(folder, random.Random(f"{name} {seed} {number}"))
        faulthandler.dump_traceback_later(HANGS_AFTER, exit=True)
        begin = time.perf_counter()
        try:
            outcome = compared(read(folder), expected)
        except EnsembleNetError as error:
            outcome = type(error).__name__ if "\n" not in str(error) else "several lines"
        except BaseException as error:
            outcome = type(error).__name__
            traceback.print_exc()
        seconds = time.perf_counter() - begin
        faulthandler.cancel_dump_traceback_later()
        slowest = max(slowest, seconds)
        outcomes[outcome] += 1
        if outcome not in promised or seconds > MOST_SECONDS:
            broken = True
            print(f"{name} {number}: {outcome} after {seconds:.1f} s: {what}", file=sys.stderr)
    rise = peak_megabytes() - before
    return {**outcomes, "seconds": round(slowest, 2), "MB": round(rise), "broken": broken or rise > MOST_MEGABYTES}


def compared(found: torch.Tensor, expected: torch.Tensor) -> str:
    """What the rows that were read are: the expected ones, some of them, or others."""
    if torch.equal(found, expected):
        return "same values"
    known = {row.numpy().tobytes() for row in expected}
    return "fewer values" if all(row.numpy().tobytes() in known for row in found) else "other values"


def peak_megabytes() -> float:
    """The most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def forget_checksums(path: Path) -> None:
    """Leave out of a file of weights what versions up to 0.1.0 did not write."""
    with safe_open(str(path), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path)


# -- damage


def damage_any(folder: Path, chance: random.Random) -> str:
    """Damage one of a folder's files."""
    path = chance.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    if path.suffix == ".safetensors" or chance.random() < 0.2:
        return damage_bytes(path, chance)
    return damage_text(path, chance)


def damage_bytes(path: Path, chance: random.Random, seal: Callable[[bytearray], None] | None = None) -> str:
    """Cut a file, flip bits in it, lengthen it, put zeros or other bytes in its place, or repeat a part of it.

    `seal` then makes checksums fit again, so that what they protect is read too.
    """
    data = bytearray(path.read_bytes())
    kind = chance.choice(["cut", "flip", "flip", "flip", "flip", "zeros", "repeated", "longer", "noise", "gone"])
    begin, end = sorted(chance.randrange(len(data) + 1) for _ in range(2))
    if kind == "zeros":
        data[begin:end] = bytes(end - begin)
    elif kind == "repeated":
        data[end:end] = data[begin:end]
    elif kind == "cut":
        data = data[: chance.randrange(len(data))]
    elif kind == "flip":  # half of them in the first bytes, where headers are
        for _ in range(chance.choice([1, 1, 1, 8])):
            data[chance.randrange(chance.choice([len(data), min(len(data), 2000)]))] ^= 1 << chance.randrange(8)
    elif kind == "longer":
        data += bytes(chance.randrange(1, 1000))
    elif kind == "noise":
        data = bytearray(chance.randbytes(chance.randrange(1000)))
    if seal is not None:
        seal(data)
    path.write_bytes(data)
    if kind == "gone":
        path.unlink()
    return f"{path.name}: {kind}"


def damage_text(path: Path, chance: random.Random) -> str:
    """Give an entry of JSON or YAML another value, name or depth, or leave it out."""
    if chance.random() < 0.1:
        text = chance.choice(TEXTS)
        path.write_text(text)
        return f"{path.name}: {text[:20]!r}"
    is_yaml = path.suffix == ".yaml"
    data = yaml.safe_load(path.read_text()) if is_yaml else json.loads(path.read_text())
    *upper, last = place = chance.choice([place for place in places(data) if place])
    parent = data
    for step in upper:
        parent = parent[step]
    kind, value = chance.choice(["value"] * 6 + ["name", "gone", "deep"]), copy.deepcopy(chance.choice(VALUES))
    if kind == "name" and isinstance(parent, dict):
        parent[str(value)[:20]] = parent.pop(last)
    elif kind == "gone":
        del parent[last]
    else:
        for _ in range(chance.choice([10, 100, 900]) if kind == "deep" else 0):
            value = [value] if chance.random() < 0.5 else {"a": value}
        parent[last] = value
    try:
        path.write_text(yaml.safe_dump(data) if is_yaml else json.dumps(data))
    except (RecursionError, ValueError):  # as deep as JSON goes
        path.write_text("[" * 900 + "]" * 900)
    return f"{path.name}: {place} {kind} {str(value)[:40]}"


def places(data: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where values stand in plain data."""
    yield at
    for key, value in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        yield from places(value, (*at, key))


if __name__ == "__main__":
    main()
