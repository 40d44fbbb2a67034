"""The journal of finished trials, that of version 0.1 included."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from studies import trial

from ensemblenet.errors import TrainingError
from ensemblenet.study.journal import Journal


def test_a_journal_reads_what_it_wrote(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    journal = Journal(path)
    assert trial() not in journal
    journal.add(trial(), {"status": "done", "error": 1.5})
    again = Journal(path)
    assert again[trial()] == {"status": "done", "error": 1.5}
    assert trial(seed=1) not in again


def test_a_damaged_journal_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    path.write_text('{"cell": {}, "outcome": {}}\n{"cell"\n')
    with pytest.raises(TrainingError, match=re.escape("cells.jsonl, line 2 is no finished trial; remove that line.")):
        Journal(path)
