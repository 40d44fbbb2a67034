"""Names of version 0.1 that are others now still work, with a warning that names the new one."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from torch import nn

from ensemblenet import EnsembleNet
from ensemblenet._moved import MOVED
from ensemblenet.heads import choose
from ensemblenet.recipe import Conversion
from ensemblenet.training.module import Classifier

NAMES = {
    "ensemblenet.functional:agreement": "ensemblenet.functional:divergence",
    "ensemblenet.heads:measure": "ensemblenet.timing:measure",
    "ensemblenet.heads:step": "ensemblenet.timing:step",
    "ensemblenet.recipe:find_source": "ensemblenet.models.sources:find_source",
}


def find(name: str) -> object:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize("name", NAMES)
def test_moved_names(name: str) -> None:
    with pytest.deprecated_call(match=f"is now {NAMES[name].replace(':', '.')}"):
        assert find(name) is find(NAMES[name])


def test_a_name_that_never_was_is_missing_still() -> None:
    with pytest.raises(AttributeError, match=r"module 'ensemblenet\.functional' has no attribute 'disagreement'"):
        find("ensemblenet.functional:disagreement")


@pytest.mark.parametrize("old", MOVED)
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
