"""Names of version 0.1 that are others now still work, with a warning that names the new one."""

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from torch import nn

from ensemblenet import EnsembleNet, cli
from ensemblenet._moved import MOVED
from ensemblenet.heads import choose
from ensemblenet.metrics import HeadMetrics
from ensemblenet.metrics.tagging import TaggingMetrics
from ensemblenet.recipe import Conversion
from ensemblenet.training.module import Classifier

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
    "ensemblenet.functional.agreement": "ensemblenet.functional.divergence",
    "ensemblenet.heads.measure": "ensemblenet.timing.measure",
    "ensemblenet.heads.step": "ensemblenet.timing.step",
    "ensemblenet.recipe.find_source": "ensemblenet.models.finding.find_source",
    "ensemblenet.evaluation.findings.pairs": "ensemblenet.metrics.diversity.same_class",
    "ensemblenet.evaluation.predictions.predict": "ensemblenet.cli.predict.predict",
    "ensemblenet.evaluation.scoring.test": "ensemblenet.cli.test.test",
    "ensemblenet.evaluation.scoring.validate": "ensemblenet.cli.validate.validate",
    "ensemblenet.storage.runs.AsideCheckpointIO": "ensemblenet.training.checkpoints.AtomicCheckpointIO",
    "ensemblenet.storage.runs.aside": "ensemblenet.storage.atomic.atomic_path",
    "ensemblenet.storage.runs.write_json": "ensemblenet.storage.atomic.write_json",
    "ensemblenet.study.compare.Ledger": "ensemblenet.study.journal.Journal",
    "ensemblenet.study.compare.compare": "ensemblenet.cli.compare.compare",
    "ensemblenet.study.compare.read_study": "ensemblenet.cli.compare.read_study",
    "ensemblenet.study.compare.Tuning": "ensemblenet.study.settings.Tuning",
    "ensemblenet.study.compare.Variant": "ensemblenet.study.settings.Variant",
    "ensemblenet.study.methods.Contender": "ensemblenet.study.methods.TrainingTask",
    "ensemblenet.study.trials.Cell": "ensemblenet.study.trials.Trial",
    "ensemblenet.study.trials.run_cell": "ensemblenet.study.trials.run_trial",
}


@pytest.mark.parametrize("old", [old for old, new in MOVED.items() if isinstance(new, str)])
def test_moved_modules(old: str) -> None:
    new = importlib.import_module(MOVED[old])
    sys.modules.pop(old, None)
    with pytest.deprecated_call(match=rf"{old} is now {MOVED[old]}"):
        assert importlib.import_module(old) is new


def model() -> EnsembleNet:
    return EnsembleNet(nn.Linear(8, 16), [nn.Linear(16, 3) for _ in range(2)])


def set_old(network: EnsembleNet) -> None:
    network.recompute = True


@pytest.mark.parametrize("use", [set_old, lambda network: network.recompute], ids=["set", "read"])
def test_recompute_is_checkpoint_activations(use: Callable[[EnsembleNet], object]) -> None:
    network = model()
    with pytest.deprecated_call(match="recompute is now EnsembleNet.checkpoint_activations"):
        assert not use(network)
    assert network.checkpoint_activations == (use is set_old)


def test_recomputed_heads_are_checkpointed() -> None:
    with pytest.deprecated_call(match="heads='recomputed' is now heads='checkpointed'"):
        chosen, choice = choose(model(), torch.randn(4, 8), "recomputed")
    assert (chosen.checkpoint_activations, choice.heads) == (True, "checkpointed")
    with pytest.deprecated_call(match="checkpointed"):
        assert Classifier(nn.Linear(8, 3), heads="recomputed").heads == "checkpointed"


def test_a_stored_configuration_with_an_old_mode_is_read(tmp_path: Path) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Classifier, "model")
    config = tmp_path / "config.yaml"
    config.write_text(
        "model:\n  base: {class_path: torch.nn.Linear, init_args: {in_features: 8, out_features: 3}}\n"
        "  heads: recomputed\n  conversion: {num_heads: 3, budget: 0.9, seed: null}\n"
    )
    made = parser.instantiate(parser.parse_object(yaml.safe_load(config.read_text())))
    assert made.model.heads == "checkpointed"
    assert made.model.conversion == Conversion(num_heads=3, budget=0.9)


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


@pytest.mark.parametrize(("kind", "target"), [(HeadMetrics, [0]), (TaggingMetrics, [[1, 0, 0]])])
def test_values_are_found_by_the_old_names_of_their_scores(
    kind: type[HeadMetrics | TaggingMetrics], target: list[object]
) -> None:
    metrics = kind(3, 2, prefix="val/")
    batch = metrics(torch.randn(2, 1, 3), torch.tensor(target))
    for values in (batch, metrics.compute()):
        with pytest.warns(DeprecationWarning, match="val/agreement is now val/divergence"):
            assert values["val/agreement"] == values["val/divergence"] > 0
        with pytest.raises(KeyError, match="val/nothing"):
            values["val/nothing"]


def test_the_command_line_is_called_as_before(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert "ensemblenet COMMAND --help" in capsys.readouterr().out
    with pytest.warns(DeprecationWarning, match="cli.positive_integer is now ensemblenet.cli.options.positive_integer"):
        assert cli.positive_integer("8") == 8


def test_names_that_never_were_are_errors() -> None:
    with pytest.raises(AttributeError, match=re.escape("module 'ensemblenet.study.trials' has no attribute 'Nothing'")):
        importlib.import_module("ensemblenet.study.trials").Nothing  # noqa: B018
