"""Lay out what the site is built from in `.site/`: pages, and what they link to in the repository.

Links are those of the repository, so that pages are read there as well. On the site a link to a module leads to the
reference, one to another text to a page with that text, and one to a folder to a page that lists it.
"""

import json
import os
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / ".site"
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")
RESULTS = ROOT / "benchmarks" / "results"
PAGES = {
    ROOT / "README.md": "index.md",
    **{ROOT / f"{name}.md": f"{name.lower()}.md" for name in ("CHANGELOG", "CONTRIBUTING")},
    **{path: path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")},
    ROOT / "examples" / "from_timm_to_a_report.ipynb": "notebook.md",
}
LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml"}


def lay_out() -> None:
    """Write all pages, and copy the pages of studies."""
    shutil.rmtree(SITE, ignore_errors=True)
    shutil.copytree(ROOT / "docs", SITE, ignore=shutil.ignore_patterns("*.md", "__pycache__"))
    for study in RESULTS.glob("*/index.html"):
        shutil.copytree(study.parent, SITE / "results" / study.parent.name)
    for source, page in PAGES.items():
        write(page, LINK.sub(lambda link: on_site(link, source, page), text_of(source)))  # noqa: B023
    home = SITE / "index.md"  # its picture, for light and dark, is HTML
    home.write_text(re.sub(r'((?:src|srcset)=")docs/', r"\1", home.read_text()))


def text_of(source: Path) -> str:
    """The text of a page; of a notebook that of its cells."""
    if source.suffix != ".ipynb":
        return source.read_text()
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(source.read_text())["cells"]]
    return "\n\n".join(text if kind == "markdown" else f"```python\n{text}\n```" for kind, text in cells)


def on_site(link: re.Match[str], source: Path, page: str) -> str:
    """A link of a page in the repository as one of the site."""
    text, target, anchor = link[1], (source.parent / link[2]).resolve(), link[3] or ""
    if target.is_relative_to(ROOT / "src"):
        module = target.with_suffix("").relative_to(ROOT / "src").as_posix().replace("/", ".")
        return f"[{text}][{module.removesuffix('.__init__')}]"
    place = os.path.relpath(placed(target), Path(page).parent)
    if target in PAGES and text.endswith(".md"):  # a page is called by its title
        text = target.read_text().partition("\n")[0].removeprefix("# ")
    return f"[{text}]({place}{anchor})"


def placed(target: Path) -> str:
    """Where a file or a folder of the repository is on the site; it is put there."""
    if target in PAGES:
        return PAGES[target]
    if target == RESULTS:
        return "results.md"
    path = target.relative_to(ROOT).as_posix()
    if target.is_relative_to(RESULTS) and target.parent != RESULTS:
        return path.removeprefix("benchmarks/")
    if target.is_dir():
        files = sorted(file for file in target.rglob("*") if file.suffix in LANGUAGES)
        page = f"files/{path}/index.md"
        lines = [f"- [{file.name}]({os.path.relpath(placed(file), Path(page).parent)})" for file in files]
        return write(page, f"# {path}\n\n" + "\n".join(lines))
    if target.suffix in LANGUAGES:
        return write(f"files/{path}.md", f"# {path}\n\n```{LANGUAGES[target.suffix]}\n{target.read_text()}```\n")
    copy = SITE / "files" / path
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(target, copy)
    return f"files/{path}"


def write(page: str, text: str) -> str:
    """Write a page, and say where."""
    file = SITE / page
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return page


if __name__ == "__main__":
    lay_out()
