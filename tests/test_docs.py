"""Every path, link and name that the documentation mentions is there."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
FILES = [*PAGES, *sorted(ROOT.glob("benchmarks/*.py")), *sorted(ROOT.glob("configs/**/*.yaml"))]
LINK = re.compile(r"\[([^\]]*)\]\((?!https?://)([^)\s]*)\)")
PATH = re.compile(r"(?<![\w./-])(?:src|docs|configs|benchmarks|tests|examples)/[\w./*-]*[\w/*]")
NAME = re.compile(r"(?<![\w/.-])ensemblenet(?!\.yaml)(?:\.[A-Za-z]\w*)+")
SUFFIXES = (".html", ".json", ".md", ".py", ".yaml")


def each(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("file", paths, ids=[str(path.relative_to(ROOT)) for path in paths])


def broken_links(text: str, folder: Path) -> list[str]:
    """The targets of links that are not there, or that the link calls by another file's name."""
    broken = []
    for called, target in LINK.findall(text):
        name, _, anchor = target.partition("#")
        path = (folder / name).resolve() if name else None
        called = called.strip("`")
        if path is not None and not path.exists():
            broken.append(target)
        elif path is not None and called.endswith(SUFFIXES) and path.name != Path(called).name:
            broken.append(f"{called} for {target}")
        elif anchor and anchor not in anchors(path.read_text() if path else text):
            broken.append(target)
    return broken


def anchors(text: str) -> set[str]:
    """What the headings of a page are called in links."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def missing_paths(text: str) -> list[str]:
    """The paths of this repository that are not there; one with a star needs one file that fits."""
    return [path for path in PATH.findall(text) if not next(ROOT.glob(path.rstrip("/")), None)]


def unknown_names(text: str) -> list[str]:
    """The dotted names that Python does not find."""
    return [name for name in NAME.findall(text) if not is_known(name)]


def is_known(name: str) -> bool:
    value: Any = import_module("ensemblenet")
    for length, part in enumerate(name.split(".")[1:], 2):
        try:
            value = getattr(value, part)
        except AttributeError:
            try:
                value = import_module(".".join(name.split(".")[:length]))
            except ImportError:
                return False
    return True


@each(PAGES)
def test_links_lead_where_they_say(file: Path) -> None:
    assert broken_links(file.read_text(), file.parent) == []


@each(FILES)
def test_paths_are_there(file: Path) -> None:
    assert missing_paths(file.read_text()) == []


@each(FILES)
def test_names_can_be_imported(file: Path) -> None:
    assert unknown_names(file.read_text()) == []


def test_what_is_not_there_is_found() -> None:
    text = "[a](README.md) [errors.py](src/ensemblenet/cost.py) [b](gone.md#x) [c](README.md#no) [d](https://x.org)"
    assert broken_links(text, ROOT) == ["errors.py for src/ensemblenet/cost.py", "gone.md#x", "README.md#no"]
    assert missing_paths("`tests/test_docs.py`, docs/*.md. src/gone.py; see benchmarks/gone_*.json") == [
        "src/gone.py",
        "benchmarks/gone_*.json",
    ]
    assert unknown_names("ensemblenet.load, ensemblenet.cost.Budget.of ensemblenet.gone.x") == ["ensemblenet.gone.x"]
