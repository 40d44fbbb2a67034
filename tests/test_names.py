"""What is read from source is what the libraries themselves say."""

from __future__ import annotations

import inspect
import sys
from importlib import import_module
from pathlib import Path

import pytest
import timm
from lightning.pytorch.callbacks import EarlyStopping
from timm.models._registry import _model_entrypoints
from torchvision import models

from ensemblenet.errors import ModelNameError
from ensemblenet.names import arguments_of, check_class, check_network


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


@pytest.mark.parametrize("path", ["own.Net", "MNIST1D", "torch.nn.Linear", "__main__.Net"])
def test_nothing_is_said_of_other_classes(path: str) -> None:
    check_class(path, "anything")


@pytest.mark.parametrize("room", ["callbacks", "loggers", "profilers", "strategies", "plugins"])
def test_what_is_said_of_lightnings_classes_is_what_they_take(room: str) -> None:
    package = import_module(f"lightning.pytorch.{room}")
    said = 0
    for name in package.__all__:
        taken = arguments_of(path := f"lightning.pytorch.{room}.{name}")
        check_class(path)
        if taken is not None:
            parameters = set(inspect.signature(getattr(package, name).__init__).parameters)
            assert set(taken) >= parameters - {"self", "args", "kwargs"}
            said += 1
    assert said > len(package.__all__) / 3


OWN = """
from dataclasses import dataclass

from lightning.pytorch import Callback, callbacks
from lightning.pytorch.callbacks import EarlyStopping as Early
from torch import nn

class Plain(Callback):
    def __init__(self, step: int, *, often: bool = False): pass
class Silent(Callback): pass
class Passes(Early):
    def __init__(self, more: int, **options):
        super().__init__(**options)
class Heir(Passes): pass
class Elsewhere(Early):
    def __init__(self, more: int, **options):
        self.options = options
class Reads(Early):
    def __init__(self, more: int, **options):
        options.pop("patience")
        super().__init__(**options)
class OfModule(nn.Module): pass
class Attribute(callbacks.EarlyStopping): pass
class Two(Early, Silent): pass
class New:
    def __new__(cls, *given): pass
@dataclass
class Fields:
    a: int
    b: int = 3
def factory(width: int, depth: int = 2): pass
def any_factory(width: int, **more): pass
"""


@pytest.mark.parametrize(
    ("name", "taken"),
    [
        ("Plain", ["step", "often"]),
        ("Silent", []),
        ("Passes", ["more", *list(inspect.signature(EarlyStopping).parameters)]),
        ("Heir", ["more", *list(inspect.signature(EarlyStopping).parameters)]),
        ("Fields", ["a", "b"]),
        ("factory", ["width", "depth"]),
        *((name, None) for name in ("Elsewhere", "Reads", "OfModule", "Attribute", "Two", "New", "any_factory")),
    ],
)
def test_classes_of_ones_own_are_read_and_not_run(
    name: str, taken: list[str] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "package_of_mine").mkdir()
    (tmp_path / "package_of_mine" / "__init__.py").write_text("from .parts import *\nraise SystemExit")
    (tmp_path / "package_of_mine" / "parts.py").write_text(OWN + "\nraise SystemExit")
    monkeypatch.syspath_prepend(tmp_path)
    assert arguments_of(f"package_of_mine.parts.{name}") == taken
    check_class(f"package_of_mine.{name}")  # a star shows no names
    with pytest.raises(ModelNameError, match=r"parts has no Nothing\.$"):
        check_class("package_of_mine.parts.Nothing")
    assert "package_of_mine" not in sys.modules
