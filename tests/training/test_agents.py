"""Two nodes: a run that loses one of them ends as if it had not."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import accuracy_score, log_loss

from ensemblenet.cli.main import main
from ensemblenet.training.processes import goes_on_unasked

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "two_agents.py"


def test_a_lost_node_that_comes_back_changes_nothing(tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, "node", "--folder", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    whole, lost = map(json.loads, done.stdout.splitlines())
    assert whole["exit_codes"] == lost["exit_codes"] == [0, 0]
    [said] = lost["it_said"]  # of two epochs or more, as the blow came after two
    epoch, steps = map(int, re.findall(r"\d+", said))
    assert epoch >= 3
    assert steps == 17 * (epoch - 1)
    assert lost["same_as_whole"]

    [run] = (tmp_path / "node" / "runs").iterdir()  # what two processes scored, by one and by another library
    assert main(["predict", str(run), "--output", str(tmp_path / "said.parquet"), "--split", "test"]) == 0
    said = pq.read_table(tmp_path / "said.parquet").to_pydict()
    labels, probabilities = said["label"], np.array(said["probabilities"])
    probabilities /= probabilities.sum(1, keepdims=True)  # in float64
    assert len(labels) == 501
    scores = json.loads((run / "results.json").read_text())["rows"][0]["test"]
    assert scores["accuracy"] == pytest.approx(accuracy_score(labels, said["predicted"]), abs=1e-7)
    assert scores["nll"] == pytest.approx(log_loss(labels, probabilities), rel=1e-5)
    squares = (probabilities - np.eye(10)[[int(label) for label in labels]]) ** 2
    assert scores["brier"] == pytest.approx(squares.sum(1).mean(), rel=1e-5)


@pytest.mark.parametrize(
    ("nodes", "shared", "warns"), [("2", "True", True), ("2", "False", False), ("1", "True", False)]
)
def test_a_store_that_lost_nodes_cannot_join_is_told_of(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder, nodes: str, shared: str, warns: bool
) -> None:
    assert not goes_on_unasked()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    for restarts in (0, 3):
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", str(restarts))
        monkeypatch.setenv("GROUP_WORLD_SIZE", nodes)
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", shared)
        assert goes_on_unasked() == (restarts > 0)
    said = [str(warning.message) for warning in recwarn]
    assert ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in line for line in said] == [True] * warns
