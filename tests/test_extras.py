"""The wheel works with the core's dependencies alone; what needs more says in one line which extra to install."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from ensemblenet.cli.options import configs

ROOT = Path(__file__).parents[1]
CORE = ("torch", "numpy", "safetensors")


def needs(library: str, found: set[str]) -> set[str]:
    """A library and all that it declares without a condition, by the names of their distributions."""
    name = re.sub(r"[-_.]+", "-", library).lower()
    if name in found:
        return found
    found.add(name)
    for requirement in map(Requirement, distribution(library).requires or []):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            needs(requirement.name, found)
    return found


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed wheel, its core dependencies, and nothing else that is installed here."""
    folder = tmp_path_factory.mktemp("site")
    wheels = tmp_path_factory.mktemp("wheels")
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", wheels, ROOT], check=True)
    subprocess.run([*pip, "install", "--no-deps", "--target", folder, *wheels.iterdir()], check=True)
    libraries: set[str] = set()
    for library in CORE:
        needs(library, libraries)
    for library in libraries:
        installed = distribution(library)
        tops = {file.parts[0] for file in installed.files or [] if file.parts[0] not in ("..", "__pycache__")}
        for top in tops:
            if not (folder / top).exists():
                (folder / top).symlink_to(Path(str(installed.locate_file(top))).resolve())
    return folder


def run(bare: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    # -S: without this environment's own packages; -P: nor the folder that the test runs in
    command = [sys.executable, "-S", "-P", "-c", f"import sys; sys.path.insert(0, {str(bare)!r})\n{code}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env={"OMP_NUM_THREADS": "1"})


def test_every_public_name_is_there(bare: Path) -> None:
    done = run(bare, "from ensemblenet import *; print(callable(push_to_hub) and callable(register_timm))")
    assert done.stdout == "True\n", done.stderr


def test_the_core_converts_trains_saves_and_loads(bare: Path, tmp_path: Path) -> None:
    code = """
import importlib.util
libraries = ("lightning", "timm", "matplotlib", "torchmetrics", "rich")
assert not [name for name in libraries if importlib.util.find_spec(name)]
import torch, ensemblenet
base = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 3))
x, y = torch.randn(16, 8), torch.arange(16) % 3
model = ensemblenet.convert(base, x, num_heads=2)
criterion = ensemblenet.CoDistillationLoss(weight=2.0)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
losses = []
for _ in range(20):
    loss = criterion(model.train()(x), y)
    optimizer.zero_grad(); loss.backward(); optimizer.step()
    losses.append(float(loss))
assert losses[-1] < losses[0]
folder = ensemblenet.save(ensemblenet.unfuse(ensemblenet.fuse(model)), sys.argv[1])
torch.testing.assert_close(ensemblenet.load(folder, base)(x), model.eval()(x))
print("done")
"""
    done = run(bare, code, str(tmp_path / "model"))
    assert done.stdout == "done\n", done.stderr


@pytest.mark.parametrize(
    ("use", "extra"),
    [
        ("from ensemblenet.metrics import HeadMetrics", "train"),
        ("import ensemblenet.data", "train"),
        ("import ensemblenet.training.module", "train"),
        ("from ensemblenet.evaluation import scoring", "train"),
        ("import ensemblenet.study.compare", "study"),
        ("import ensemblenet; ensemblenet.push_to_hub('model', 'owner/name')", "hub"),
        ("import ensemblenet; ensemblenet.load('hf://owner/name')", "hub"),
        ("import ensemblenet.models; ensemblenet.models.create('resnet18')", "timm"),
        ("import ensemblenet.models; ensemblenet.models.create('torchvision:resnet18')", "timm"),
    ],
)
def test_what_needs_more_says_which_extra(bare: Path, use: str, extra: str) -> None:
    done = run(bare, use)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert re.search(rf"is not installed: pip install 'ensemblenet\[{extra}\]'$", last), done.stderr


def test_the_wheel_brings_the_configurations_and_its_types(bare: Path) -> None:
    done = run(bare, "from ensemblenet.cli.main import main\nsys.exit(main(['configs', 'list']))")
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(configs()), done.stderr
    assert (bare / "ensemblenet" / "py.typed").is_file()


@pytest.mark.parametrize("command", ["info", "fit", "test", "compare", "demo", "report"])
def test_a_command_that_needs_more_is_one_line(bare: Path, command: str) -> None:
    code = f"from ensemblenet.cli.main import main\nsys.exit(main([{command!r}, 'resnet18']))"
    done = run(bare, code)
    assert done.returncode == 2, done.stderr
    assert re.fullmatch(
        rf"ensemblenet {command}: \S+ is not installed: pip install 'ensemblenet\[\w+\]'\n", done.stderr
    )
