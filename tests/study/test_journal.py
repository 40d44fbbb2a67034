"""The journal of finished trials, that of version 0.1 included."""

from __future__ import annotations

import errno
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from studies import lines, trial

from ensemblenet.cli.compare import compare
from ensemblenet.errors import TrainingError
from ensemblenet.study import trials as trials_module
from ensemblenet.study.journal import Journal


def test_a_journal_reads_what_it_wrote(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    journal = Journal(path)
    assert trial() not in journal
    journal.add(trial(), {"status": "done", "error": 1.5})
    again = Journal(path)
    assert again[trial()] == {"status": "done", "error": 1.5}
    assert trial(seed=1) not in again


@pytest.mark.parametrize(
    "line", ['{"cell"', "3", '{"cell": {}, "outcome": {}}', '{"cell": {}, "outcome": {"status": "done"}}', "\xff"]
)
def test_a_damaged_journal_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    path.write_text(f'{{"cell": {{}}, "outcome": {{"status": "failed"}}}}\n{line}\n', encoding="latin-1")
    with pytest.raises(TrainingError, match=re.escape("cells.jsonl, line 2 is no finished trial; remove that line.")):
        Journal(path)


def test_a_journal_on_a_full_disk_names_its_file_and_goes_on(tmp_path: Path, small_files: None) -> None:
    path = tmp_path / "cells.jsonl"
    journal = Journal(path)
    journal.add(trial(), {"status": "done", "error": 1.5})
    with pytest.raises(OSError, match="File too large") as caught:
        journal.add(trial(seed=1), {"status": "done", "reason": 20_000 * "x"})
    assert caught.value.filename == str(path)
    again = Journal(path)
    assert trial() in again
    assert trial(seed=1) not in again


@pytest.mark.parametrize("full", ["teachers", "data"])
def test_a_full_disk_is_no_failure_of_a_method(full: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "a file")

    monkeypatch.setattr(trials_module, {"teachers": "keep_weights", "data": "open_data"}[full], no_space)
    with pytest.raises(OSError, match="No space left"):
        trials_module.run_trial(trial(method="base"), tmp_path)


STORED = Path(__file__).parent / "stored"  # a finished study, as version 0.1 left it


def test_a_stored_study_goes_on_where_it_stopped(tmp_path: Path) -> None:
    folder = tmp_path / "stored"
    shutil.copytree(STORED, folder)
    old = json.loads((folder / "results.json").read_text())["rows"]
    compare(["--resume", str(folder), "--workers", "0"])
    assert (folder / "cells.jsonl").read_text() == (STORED / "cells.jsonl").read_text()  # nothing was trained again
    new = json.loads((folder / "results.json").read_text())["rows"]
    for row, expected in zip(new, old, strict=True):
        assert row.pop("milliseconds") > 0
        assert row.pop("divergence_mean") == expected.pop("agreement_mean")
        assert row.pop("divergence_std") == expected.pop("agreement_std")
        setup, before = row.pop("setup"), expected.pop("setup")
        assert (setup | setup["conversion"]).items() >= before.items()
        assert row.pop("activations") > 0
        assert row.pop("time") > 0
        assert 0 < row.pop("memory_bytes") <= expected.pop("memory_bytes")  # the loss of today keeps less
        assert row == expected

    compare(["--resume", str(folder), "--workers", "0", "--seeds", "3"])
    assert [line["cell"]["seed"] for line in lines(folder)[len(lines(STORED)) :]] == [2, 2]  # one more for each method


def test_a_trial_without_an_argument_that_a_class_has_got_since_is_found(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    Journal(path).add(trial(), {"status": "done", "error": 1.5})
    line = json.loads(path.read_text())
    assert "data_seed" not in line["cell"]["data"]["init_args"]
    line["cell"]["data"]["init_args"]["data_seed"] = 42  # the default, written out
    del line["cell"]["optimization"]["layer_decay"], line["cell"]["precision"]
    del line["cell"]["setup"]["conversion"]["min_width"]
    path.write_text(json.dumps(line) + "\n")
    assert trial() in Journal(path)
    other = {**trial().data, "init_args": {**trial().data["init_args"], "data_seed": 7}}
    assert trial(data=other) not in Journal(path)
    wider = replace(trial().setup, conversion=replace(trial().setup.conversion, min_width=0.5))
    assert trial(setup=wider) not in Journal(path)
