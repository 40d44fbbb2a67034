"""Imports go one way, as the folders say."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ensemblenet

ROOT = Path(ensemblenet.__file__).parent
HEAVY = (
    "lightning",
    "pytorch_lightning",
    "timm",
    "torchvision",
    "torchmetrics",
    "pyarrow",
    "mnist1d",
    "matplotlib",
    "fsspec",
    "google_crc32c",
)

# What each part may import of the others; the package's own top is always lazy.
MAY_IMPORT = {
    "_moved": set(),
    "errors": set(),
    "weights": {"errors"},
    "names": {"errors"},
    "extras": {"errors"},
    "inputs": {"errors"},
    "functional": set(),
    "work": set(),
    "cost": {"errors", "inputs", "work"},
    "timing": {"inputs"},
    "losses": {"functional"},
    "metrics": {"functional"},
    "models": {"errors", "names", "weights"},
    "data": {"errors"},
    "recipe": {"errors", "functional", "inputs", "cost", "models", "operations"},
    "families": {"errors", "functional", "inputs", "ensemble"},
    "ensemble": {"functional", "cost", "families", "recipe"},
    "operations": {"errors", "work"},
    "conversion": {
        *(
            "errors",
            "families",
            "functional",
            "inputs",
            "cost",
            "timing",
            "ensemble",
            "recipe",
            "operations",
            "models",
            "work",
        ),
    },
    "heads": {"errors", "functional", "inputs", "timing", "ensemble", "operations"},
    "deploy": {
        "errors",
        "families",
        "losses",
        "functional",
        "inputs",
        "cost",
        "ensemble",
        "conversion",
        "heads",
        "storage",
        "timing",
        "metrics",
    },
    "testing": {"storage", "conversion", "cost", "ensemble", "inputs", "recipe"},
    "storage": {
        "errors",
        "functional",
        "inputs",
        "cost",
        "models",
        "recipe",
        "ensemble",
        "conversion",
        "data",
        "weights",
    },
    "training": {
        "errors",
        "functional",
        "inputs",
        "cost",
        "recipe",
        "ensemble",
        "losses",
        "conversion",
        "heads",
        "metrics",
        "data",
        "storage",
        "weights",
    },
    "evaluation": {
        "errors",
        "functional",
        "inputs",
        "cost",
        "ensemble",
        "metrics",
        "data",
        "storage",
        "training",
    },
    "reports": {"errors", "functional", "inputs", "cost", "ensemble", "metrics", "storage", "evaluation"},
    "study": {
        "data",
        "recipe",
        "conversion",
        "timing",
        "cost",
        "ensemble",
        "errors",
        "functional",
        "inputs",
        "heads",
        "metrics",
        "reports",
        "storage",
        "training",
    },
    "cli": {
        "errors",
        "names",
        "recipe",
        "inputs",
        "cost",
        "timing",
        "models",
        "ensemble",
        "conversion",
        "heads",
        "metrics",
        "data",
        "storage",
        "training",
        "evaluation",
        "deploy",
        "reports",
        "study",
    },
}


def part_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """The parts of the package that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ensemblenet"):
            _, _, rest = (node.module or "").partition(".")
            found |= {rest.split(".")[0]} if rest else {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_imports_go_one_way(part: str) -> None:
    for path in [path for path in ROOT.rglob("*.py") if part_of(path) == part]:
        strangers = imports(path) - MAY_IMPORT[part] - {part, "_moved", "extras"}  # what every room may ask
        assert not strangers, f"{path.relative_to(ROOT)} imports {sorted(strangers)}"


def test_every_part_is_listed() -> None:
    assert {part_of(path) for path in ROOT.rglob("*.py")} - {"__init__", "__main__"} == set(MAY_IMPORT)


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert run("import sys, ensemblenet; print('torch' in sys.modules)") == "False"
    use = "import sys, ensemblenet as e; [getattr(e, n) for n in e.__all__]; print([m for m in %r if m in sys.modules])"
    assert run(use % (HEAVY,)) == "[]"


def test_the_function_is_not_hidden_by_a_module_of_its_name() -> None:
    code = "import ensemblenet.conversion.convert, ensemblenet; print(callable(ensemblenet.convert))"
    assert run(code) == "True"


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_nobody_imports_the_command_line_or_a_page_that_comes_behind_it(path: Path) -> None:
    part = part_of(path)
    if part not in ("cli", "__main__"):
        assert "cli" not in imports(path)
    if part not in ("cli", "__main__", "study"):
        assert "study" not in imports(path)
    if part not in ("cli", "__main__", "study", "reports"):
        assert "reports" not in imports(path)


def test_help_needs_no_library() -> None:
    code = "import sys; from ensemblenet.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    heavy = (*HEAVY, "torch", "rich", "yaml", "jinja2", "jsonargparse")
    assert run(f"{code}print([m for m in {heavy!r} if m in sys.modules])").endswith("[]")
