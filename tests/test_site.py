"""The site has every page in its navigation, and every public name in its reference."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

import ensemblenet

ROOT = Path(__file__).parents[1]
SOURCES = Path(ensemblenet.__file__).parent


@pytest.fixture
def site(tmp_path: Path) -> ModuleType:
    """The script that lays out the site, which here does so in a folder of the test."""
    spec = importlib.util.spec_from_file_location("site_pages", ROOT / ".ci" / "site.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.SITE = tmp_path / "site"
    return module


def pages_of(navigation: Any) -> list[str]:
    if isinstance(navigation, str):
        return [navigation]
    return [
        page
        for part in (navigation.values() if isinstance(navigation, dict) else navigation)
        for page in pages_of(part)
    ]


def test_the_navigation_has_every_page_once(site: ModuleType) -> None:
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert sorted(pages_of(navigation)) == sorted(site.PAGES.values())


def test_every_public_module_is_in_the_reference() -> None:
    written = "\n".join(page.read_text() for page in (ROOT / "docs" / "reference").glob("*.md"))
    referred = re.findall(r"^::: ensemblenet\.(\w+)$", written, re.MULTILINE)
    tops = {path.stem for path in SOURCES.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert sorted(referred) == sorted(name for name in tops if not name.startswith("_"))
    assert "\n::: ensemblenet\n" in written


def test_links_of_the_repository_lead_somewhere_on_the_site(site: ModuleType) -> None:
    site.lay_out()
    for page, link in {
        "contributing.md": "[functional.py][ensemblenet.functional]",
        "results.md": "(results/compare_mnist1d/index.html)",
        "loss.md": "[The procedure](procedure.md#gradient-scale-over-heads)",
        "loops.md": "(files/examples/graphs.py.md)",
    }.items():
        assert link in (site.SITE / page).read_text()
    assert (site.SITE / "results/compare_mnist1d/index.html").is_file()
    assert "```python\n" in (site.SITE / "files/examples/graphs.py.md").read_text()
    for page in (site.SITE / name for name in [*site.PAGES.values(), "files/examples/index.md"]):
        for _, target, _ in site.LINK.findall(page.read_text()):
            assert (page.parent / target).is_file(), f"{page}: {target}"
