"""The guide's commands and code run as they stand, one after another, with one epoch instead of forty."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from ensemblenet import convert, export
from ensemblenet.cli import main

ROOT = Path(__file__).parents[1]


def blocks(text):
    """The code blocks that are meant to run, `sh` and `python`, each with its language."""
    return re.findall(r"^```(sh|python)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def run_line(line, variables):
    """Run one line of a shell: a command of ours in this process, which saves its start-up, or an assignment."""
    name, _, command = line.partition(" ")
    if name == "ensemblenet":
        arguments = [variables.get(word.removeprefix("$"), word) for word in shlex.split(command)]
        assert main(arguments) == 0, line
        return
    name, _, value = line.partition("=")
    done = subprocess.run(["bash", "-c", f"set -e; echo {value}"], capture_output=True, text=True, check=True)
    variables[name] = done.stdout.strip()


def test_the_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    guide = (ROOT / "docs" / "guide.md").read_text()
    small = guide.replace("--epochs 40", "--epochs 1")
    assert small != guide
    variables = {}
    for language, code in blocks(small):
        if language == "python":
            exec(compile(code, "guide.md", "exec"), {"__name__": "guide"})
        else:
            for line in code.splitlines():
                run_line(line, variables)
    assert set(variables) == {"BASE", "HEADS"}
    printed = capsys.readouterr().out
    assert "Cost(parameters=78858, macs=78336.0, activations=" in printed
    assert "torch.Size([64, 10])" in printed
    assert "first 2" in printed  # of `test`
    assert "torch.Size([100, 10]) torch.Size([100, 10]) torch.Size([100, 10])" in printed
    assert "MACs an example" in printed
    made = {"predictions.csv", "report.html", "digits.onnx", "digits-2.onnx", "digits", "runs"}
    assert made <= {path.name for path in tmp_path.iterdir()}


def test_the_readers_of_the_export_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = nn.Sequential(nn.Linear(40, 16), nn.ReLU(), nn.Linear(16, 3))
    model = convert(base, torch.randn(2, 40), task="multilabel")
    for path, format in (("model.onnx", "onnx"), ("model.pt2", "torch"), ("compiled.pt2", "aot")):
        export(model, path, format, description={"classes": ["a", "b", "c"]})
    [(_, code)] = blocks((ROOT / "docs" / "export.md").read_text())
    read = [(part + "\nresult = classes, tuple(logits.shape)") for part in code.split("\n\n")[1:]]
    namespace = {}
    exec(code.split("\n\n")[0], namespace)
    for part in read:
        exec(part, namespace)
        assert namespace["result"] == (["a", "b", "c"], (3, 3))
