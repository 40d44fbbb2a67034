"""Curves from the logs of a run, those of version 0.1 included."""

from __future__ import annotations

from pathlib import Path

import pytest

from ensemblenet.errors import LoadError
from ensemblenet.reports.curves import read_curves


def write_log(folder: Path, version: int, text: str) -> None:
    log = folder / "csv" / f"version_{version}" / "metrics.csv"
    log.parent.mkdir(parents=True)
    log.write_text(text)


def test_a_run_that_an_older_version_began(tmp_path: Path) -> None:
    write_log(
        tmp_path,
        0,
        "epoch,step,train/agreement,train/loss,val/agreement,val/disagreement\n"
        "0,9,0.5,2.0,,\n"
        "0,19,0.4,1.5,,\n"
        "0,19,,,0.3,0.1\n",
    )
    write_log(tmp_path, 1, "epoch,step,train/divergence,val/divergence\n1,19,0.25,\n1,29,,0.2\n")
    assert read_curves(tmp_path) == {
        "train/divergence": [(9, 0.5), (19, 0.25)],
        "train/loss": [(9, 2.0), (19, 1.5)],
        "val/divergence": [(19, 0.3), (29, 0.2)],
        "val/disagreement": [(19, 0.1)],
    }


def test_a_line_that_a_kill_cut_off_is_left_out(tmp_path: Path) -> None:
    write_log(tmp_path, 0, "epoch,step,train/loss\n0,9,2.0\n0,19,1.5\n1,29,0.3")  # perhaps of 0.35
    assert read_curves(tmp_path) == {"train/loss": [(9, 2.0), (19, 1.5)]}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("epoch,step,train/loss\n0,9,2.0\n0,x9,1.0\n", 3),
        ("epoch,step,a\n0,9,\0\xff\n", 2),
        ("\0\1\2\n3\n", 1),
        ("a,b\n1,2\n", 1),
    ],
)
def test_a_damaged_log_is_named(text: str, line: int, tmp_path: Path) -> None:
    write_log(tmp_path, 0, text)
    with pytest.raises(LoadError, match=f"metrics.csv, line {line} is not of a log"):
        read_curves(tmp_path)
