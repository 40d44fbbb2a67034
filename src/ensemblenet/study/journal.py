"""The journal of a study: its finished trials, appended to a file."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ensemblenet.errors import TrainingError
from ensemblenet.metrics.scores import current_name
from ensemblenet.storage.atomic import errors_name
from ensemblenet.storage.bucket import push
from ensemblenet.study.trials import Outcome, Trial, trial_key

__all__ = ["Journal"]

_STATUSES = ("done", "failed")


class Journal:
    """The finished trials of a study, one line of JSON each, written as soon as they are finished.

    A trial is found by all that it depends on, so that a study whose settings were changed recomputes what the change
    touches and nothing else.

    Args:
        path: the file, `cells.jsonl` in a run folder; it need not exist.

    Raises:
        TrainingError: a line that is no finished trial; a last line that a kill cut off is none, and dropped.

    Example:
        >>> import tempfile
        >>> from ensemblenet.study.task import Setup
        >>> from ensemblenet.training.optimization import Optimization
        >>> path = Path(tempfile.mkdtemp(), "cells.jsonl")
        >>> trial = Trial("base", "base", Setup(), {}, {}, "test", 0, Optimization(), epochs=1)
        >>> Journal(path).add(trial, {"status": "done", "error": 1.5})
        >>> Journal(path)[trial]["error"]
        1.5
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.outcomes: dict[str, Outcome] = {}
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        if lines and lines.pop():
            with path.open("r+b") as file:
                file.truncate(sum(len(line) + 1 for line in lines))
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                outcome: dict[str, Any] = entry["outcome"]
                if outcome["status"] not in _STATUSES or (outcome["status"] == "done" and "error" not in outcome):
                    raise ValueError(outcome["status"])
                self.outcomes[trial_key(entry["cell"])] = {current_name(k): value for k, value in outcome.items()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise TrainingError(f"{path}, line {number} is no finished trial; remove that line.") from error

    def __getitem__(self, trial: Trial) -> Outcome:
        return self.outcomes[trial.key]

    def __contains__(self, trial: Trial) -> bool:
        return trial.key in self.outcomes

    def add(self, trial: Trial, outcome: Outcome) -> None:
        """Keep a finished trial, in a bucket, too, if the study is kept in one."""
        line = json.dumps({"cell": asdict(trial), "outcome": outcome}) + "\n"  # "cell": as version 0.1 wrote it
        with errors_name(self.path, self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self.outcomes[trial.key] = outcome
        push(self.path)
