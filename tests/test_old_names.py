"""What version 0.1 called modules and names of studies, reports and commands: they work still, with a warning."""

from __future__ import annotations

import importlib
import re
import sys

import pytest

OLD = {
    "ensemblenet.commands": ["benchmark", "convert", "info"],
    "ensemblenet.losses.codistillation": ["CoDistillationLoss"],
    "ensemblenet.losses.peers": [
        "co_training",
        "gated_mean",
        "kdcl",
        "log_probabilities",
        "mutual",
        "okddip",
        "one",
        "ramp_up",
    ],
    "ensemblenet.study.cells": ["Outcome", "Precision", "Workers", "instantiate", "train", "training_memory"],
    "ensemblenet.study.demo": ["demo"],
    "ensemblenet.study.findings": ["Findings", "agreeing", "reliability", "stopping"],
    "ensemblenet.study.pages": ["PAGE", "comparison_table", "ranked", "summary", "write_comparison"],
    "ensemblenet.study.report": ["Card", "Cards", "Column", "Figure", "draw_heads", "draw_pairs", "write_page"],
    "ensemblenet.study.run_figures": ["Looks", "draw_curves"],
    "ensemblenet.study.thumbnails": ["glimpse", "thumbnail"],
}
RENAMED = {
    "ensemblenet.evaluation.findings.pairs": "ensemblenet.metrics.diversity.same_class",
    "ensemblenet.evaluation.predictions.predict": "ensemblenet.cli.predict.predict",
    "ensemblenet.evaluation.scoring.test": "ensemblenet.cli.test.test",
    "ensemblenet.evaluation.scoring.validate": "ensemblenet.cli.validate.validate",
    "ensemblenet.study.compare.Ledger": "ensemblenet.study.journal.Journal",
    "ensemblenet.study.compare.compare": "ensemblenet.cli.compare.compare",
    "ensemblenet.study.compare.read_study": "ensemblenet.cli.compare.read_study",
    "ensemblenet.study.compare.Tuning": "ensemblenet.study.settings.Tuning",
    "ensemblenet.study.compare.Variant": "ensemblenet.study.settings.Variant",
    "ensemblenet.study.methods.Contender": "ensemblenet.study.methods.TrainingTask",
    "ensemblenet.study.trials.Cell": "ensemblenet.study.trials.Trial",
    "ensemblenet.study.trials.run_cell": "ensemblenet.study.trials.run_trial",
}


@pytest.mark.parametrize("module", OLD)
def test_old_modules_have_their_names(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.warns(DeprecationWarning, match=f"{re.escape(module)} is now ensemblenet\\."):
        found = importlib.import_module(module)
    for name in OLD[module]:
        assert getattr(found, name) is not None


@pytest.mark.parametrize("old", RENAMED)
def test_old_names_lead_to_the_new_ones(old: str) -> None:
    module, name = old.rsplit(".", 1)
    home, new = RENAMED[old].rsplit(".", 1)
    with pytest.warns(DeprecationWarning, match=f"{re.escape(old)} is now {re.escape(RENAMED[old])}"):
        found = getattr(importlib.import_module(module), name)
    assert found is getattr(importlib.import_module(home), new)


def test_names_that_never_were_are_errors() -> None:
    with pytest.raises(AttributeError, match=re.escape("module 'ensemblenet.study.trials' has no attribute 'Nothing'")):
        importlib.import_module("ensemblenet.study.trials").Nothing  # noqa: B018
