"""What is read from source is what the libraries themselves say."""

from __future__ import annotations

import inspect
import sys
from importlib import import_module

import pytest
import timm
from timm.models._registry import _model_entrypoints
from torchvision import models

from ensemblenet.errors import ModelNameError
from ensemblenet.names import check_class, check_network


def test_every_network_of_timm_and_torchvision_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    own = [name for name, made in _model_entrypoints.items() if made.__module__.startswith("timm.")]
    pretrained = [name for name in timm.list_pretrained() if name.partition(".")[0] in own]
    monkeypatch.delitem(sys.modules, "timm")  # as before it is imported
    for name in (*own, *pretrained):
        check_network(name)
    for name in models.list_models(module=models) + models.list_models(module=models.video):
        check_network(f"torchvision:{name}")


def test_a_network_that_was_registered_here_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_model_entrypoints, "of_this_test", timm.models.resnet18)
    check_network("of_this_test")


@pytest.mark.parametrize("name", ["resnett50", "resnett50.a1_in1k", "torchvision:fcn_resnet50", "torchvision:"])
def test_others_are_not(name: str) -> None:
    with pytest.raises(ModelNameError, match="has no"):
        check_network(name)


@pytest.mark.parametrize("room", ["ensemblenet.data", "ensemblenet.models"])
def test_classes_take_the_arguments_that_they_take(room: str) -> None:
    rooms = import_module(room)
    for name in rooms.__all__:
        for argument in inspect.signature(getattr(rooms, name)).parameters:
            check_class(f"{room}.{name}", argument)
        with pytest.raises(ModelNameError, match=f"{name} takes no nonsense"):
            check_class(f"{room}.{name}", "nonsense")


@pytest.mark.parametrize("path", ["own.Net", "MNIST1D", "torch.nn.Linear", "ensemblenet.data.mnist1d.MNIST1D"])
def test_nothing_is_said_of_other_classes(path: str) -> None:
    check_class(path, "anything")
