"""Folders that are damaged in hundreds of ways: a `LoadError` or the same values, soon and in little memory."""

from __future__ import annotations

import json
from pathlib import Path

from commands import run_apart, script

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "damaged_directories.py"


def test_damage_is_found_or_does_no_harm(tmp_path: Path) -> None:
    """The script's short form, in a process of its own, whose memory nothing else has filled."""
    done = run_apart(tmp_path / "printed", script, SCRIPT, "--count", "70")
    assert done.code == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["kind"] for line in lines] == ["saved", "older", "run", "checkpoint"]
    for line in lines:
        assert line["LoadError"] + line["same values"] + line.get("other values", 0) == 70
        assert line["LoadError"] >= 35
        assert line["seconds"] < 5
        assert line["MB"] < 200
