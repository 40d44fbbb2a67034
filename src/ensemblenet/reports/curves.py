"""The training curves that a run of `fit` logged."""

from __future__ import annotations

import csv
from pathlib import Path

from ensemblenet.errors import LoadError
from ensemblenet.metrics.scores import current_name

__all__ = ["Curve", "read_curves"]

Curve = list[tuple[float, float]]


def read_curves(folder: Path) -> dict[str, Curve]:
    """Points (step, value) of each name that a run logged; empty for a folder without logs.

    A resumed run logs some steps again; their last values count. A last line that a kill cut off is left out. Names
    that old logs have are given as they are today.

    Args:
        folder: the run's folder.

    Raises:
        LoadError: a log is damaged.

    Example:
        >>> read_curves(Path("nowhere"))
        {}
    """
    curves: dict[str, dict[int, float]] = {}
    files = sorted(folder.glob("csv/version_*/metrics.csv"), key=lambda path: int(path.parent.name.split("_")[1]))
    for path in files:
        whole, _, _ = path.read_bytes().rpartition(b"\n")
        rows = csv.DictReader(whole.decode(errors="replace").splitlines())
        try:
            if rows.fieldnames is not None and "step" not in rows.fieldnames:
                raise ValueError("no step")
            for row in rows:
                for name, value in row.items():
                    if value and name not in ("step", "epoch"):
                        curves.setdefault(current_name(name), {})[int(row["step"])] = float(value)
        except (ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
            raise LoadError(f"{path}, line {rows.line_num} is not of a log: it is damaged, remove it.") from error
    return {name: sorted(points.items()) for name, points in curves.items()}
