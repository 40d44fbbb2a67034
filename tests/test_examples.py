"""Every example runs as it stands, and learns; the notebook ends with a report."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path

import pytest
from commands import run_apart, script

EXAMPLES = [  # tests/deploy/test_serving.py runs the server
    path for path in sorted((Path(__file__).parents[1] / "examples").glob("*.py")) if path.stem != "serve_fastapi"
]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_and_learns(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    done = run_apart(tmp_path / "printed", script, path)
    assert done.code == 0, done.stderr
    accuracy = re.search(r"^accuracy: (0\.\d+|1\.0+)$", done.stdout, re.MULTILINE)
    assert accuracy is not None, done.stdout
    assert float(accuracy[1]) > 0.6
    assert list(folder.iterdir()) == []  # leaves nothing behind


def test_the_notebook_leads_to_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    notebook = json.loads((Path(__file__).parents[1] / "examples/from_timm_to_a_report.ipynb").read_text())
    names: dict[str, object] = {"__name__": "notebook"}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    [page] = tmp_path.glob("*/report.html")
    assert "045 degrees" in page.read_text()
    [results] = page.parent.glob("runs/ensemblenet-*/results.json")
    assert json.loads(results.read_text())["rows"][0]["error_mean"] < 40  # percent, of four classes


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 60
