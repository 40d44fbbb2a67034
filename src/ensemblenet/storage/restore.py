"""What a run of `fit` left, or a saved directory, as a network that is ready to use."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch import LightningDataModule
from torch import nn

from ensemblenet.data import load_all
from ensemblenet.data.classes import KnownClasses, refuse_other_classes
from ensemblenet.ensemble import EnsembleNet
from ensemblenet.errors import EnsembleNetError, LoadError, first_line
from ensemblenet.functional import ClassifierTask
from ensemblenet.inputs import Inputs, InputSpec, call, tensors_in
from ensemblenet.storage.atomic import atomic_folder, read_json
from ensemblenet.storage.checkpoint import load, read_model, write_model
from ensemblenet.storage.descriptions import DESCRIPTION, check_classes, read_description, write_description
from ensemblenet.storage.hub import PREFIX, local_folder
from ensemblenet.storage.limits import ACTIVATIONS, build_within, check_inputs, written
from ensemblenet.storage.runs import CONFIG, ENVIRONMENT, MODEL, RESULTS, check_trained
from ensemblenet.storage.specs import instantiate
from ensemblenet.storage.trust import read_config
from ensemblenet.weights import read_header, read_weights, write_weights

__all__ = [
    "Describes",
    "Restored",
    "compare_classes",
    "data_module",
    "expect_classes",
    "restore",
    "store",
    "stored_classes",
]

_WEIGHTS = "model.safetensors"


@runtime_checkable
class Describes(Protocol):
    """A data module that can say what a trained network needs to be told of its data."""

    def description(self) -> dict[str, Any]:
        """Plain data, after `setup`: `classes`, the names in the order of the outputs, and `preprocessing`."""
        ...


@dataclass(frozen=True)
class Restored:
    """A trained network and what is known of its data.

    Args:
        network: a base or a multi-headed model, on the CPU and in evaluation mode.
        task: what its targets are.
        inputs: what the network takes.
        description: what the data module said of its data when the network was trained: `classes`, the names in the
            order of the outputs, and `preprocessing`, both where known.
        config: the run's configuration; None for a saved directory.
        folder: of the run, or the saved directory.
        address: on the hub or in a bucket, where it came from there.
    """

    network: nn.Module
    task: ClassifierTask
    inputs: Inputs
    description: Mapping[str, Any]
    config: Mapping[str, Any] | None
    folder: Path
    address: str | None = None

    @property
    def name(self) -> str:
        """What to call it in tables and figures."""
        if self.address is not None and self.address.startswith(PREFIX):
            return self.address.removeprefix(PREFIX)
        return self.folder.resolve().name

    @property
    def classes(self) -> list[str] | None:
        """The names of the outputs, where the data named them."""
        return self.description.get("classes")

    def num_classes(self) -> int:
        """C, by a forward pass of zeros."""
        with torch.inference_mode():
            return tensors_in(call(self.network, self.inputs.zeros()))[0].shape[1]


def store(
    network: nn.Module,
    task: ClassifierTask,
    inputs: Inputs,
    description: Mapping[str, Any],
    folder: Path,
) -> None:
    """Keep a trained network in its run's folder, in place of what a killed run left there.

    Args:
        network: a base or a conversion of one; it is left in evaluation mode.
        task: what its targets are.
        inputs: the one tensor that it takes.
        description: what [`Describes`][ensemblenet.storage.restore.Describes] gives of its data; empty where unknown.
        folder: the run's.
    """
    shutil.rmtree(folder / MODEL, ignore_errors=True)
    network.eval()
    description = {"task": task, "input_shape": list(inputs.shape), "input_dtype": inputs.dtype, **description}
    if isinstance(network, EnsembleNet):
        write_model(network, folder / MODEL, description)
        return
    with atomic_folder(folder / MODEL) as unfinished:
        write_description(unfinished, description)
        count = written(network, inputs)
        write_weights(network, unfinished / _WEIGHTS, {ACTIVATIONS: str(count)} if count else {})


def restore(directory: str | os.PathLike[str], base: nn.Module | None = None, *, trust: bool = False) -> Restored:
    """The network of a finished run, or of a directory that [`ensemblenet.save`][] wrote.

    Nothing there is run: what is stored may name networks and data modules that are known, and no others.

    Args:
        directory: a run's folder or a saved directory, or its address: `s3://bucket/run`, `hf://owner/name`.
        base: a fresh instance of the base, for a saved directory whose base no known factory makes; a run knows its
            own.
        trust: run what the directory names of its author's own code.

    Raises:
        LoadError: there is no model, it is damaged, or its base is not known.
    """
    folder = local_folder(directory)
    address = None if folder == Path(directory) else str(directory)
    if str(directory).startswith(PREFIX) or not (folder / CONFIG).is_file():  # none belongs on the hub
        network = load(folder, base, trust=trust)
        assert network.recipe is not None
        return _restored(network, {"task": network.task} | read_description(folder), None, folder, address)
    config = read_config(folder / CONFIG, trust)
    check_trained(folder)
    match config:
        case {"model": {"base": {"class_path": str()} as spec} as model, "data": {"class_path": str()} as data} if all(
            isinstance(part.get("init_args") or {}, dict) for part in (spec, data)
        ):
            make = partial(_made, nn.Module, _without_weights(spec), folder)
        case _:
            raise LoadError(f"{folder / CONFIG} does not say by class_path what model.base and data are.")
    _check_kept(folder)
    if model.get("conversion") is not None:
        network = read_model(folder / MODEL, make, trust)
    else:
        header = read_header(folder / MODEL / _WEIGHTS)
        header.check_seal()
        network = make() if trust else build_within(make, header)
        read_weights(network, header.path)
        inputs = _inputs(read_description(folder / MODEL))
        if inputs is not None and not trust:
            check_inputs(network, header, inputs)
    return _restored(network, read_description(folder / MODEL), config, folder, address)


def data_module(restored: Restored, changes: Mapping[str, Any] | None = None) -> LightningDataModule:
    """The data module that a run was trained on, made anew.

    Args:
        restored: a run.
        changes: arguments to make it with in place of the run's own, such as `{"folder": "elsewhere"}`.

    Raises:
        LoadError: no run's folder, which alone knows its data, or arguments that the data module does not take.
    """
    if restored.config is None:
        raise LoadError(f"{restored.folder} is no run's folder and so does not know its data.")
    load_all()
    data = dict(restored.config["data"])
    data["init_args"] = {**(data.get("init_args") or {}), **(changes or {})}
    made = _made(LightningDataModule, data, restored.folder)
    expect_classes(restored.classes, made)
    return made


def stored_classes(folder: Path) -> list[str] | None:
    """The classes that a run began its training with, in the order of the outputs, where its data named them.

    Raises:
        LoadError: the file that keeps them is damaged.
    """
    return read_description(folder).get("classes")


def expect_classes(known: Sequence[str] | None, data: LightningDataModule) -> None:
    """Have data label its examples as a network was trained, where the classes are known and the data can."""
    if known is not None and isinstance(data, KnownClasses):
        data.expect_classes(known)


def compare_classes(known: Sequence[str] | None, data: LightningDataModule) -> None:
    """Compare the classes that a network was trained on with those of data, after its `setup`, where both have names.

    Raises:
        ClassesError: the first difference.
    """
    found = data.description().get("classes") if isinstance(data, Describes) else None
    if known is not None and found is not None:
        refuse_other_classes("The data", known, found)


def _restored(
    network: nn.Module, described: Mapping[str, Any], config: Any, folder: Path, address: str | None
) -> Restored:
    inputs = network.recipe.inputs if isinstance(network, EnsembleNet) and network.recipe else _inputs(described)
    if described.get("task") is None or inputs is None:
        raise LoadError(f"{folder}: {DESCRIPTION} does not name task and input_shape.")
    restored = Restored(network.eval(), described["task"], inputs, described, config, folder, address)
    if restored.classes is not None:
        try:
            num_classes = restored.num_classes()
        except Exception as error:  # whatever a network makes of inputs that are none
            raise LoadError(f"{folder}: the network does not take the inputs that are stored: {error}") from error
        check_classes(described, num_classes, f"{folder}: {DESCRIPTION}")
    return restored


def _check_kept(folder: Path) -> None:
    """Refuse a run whose results or descriptions are damaged, as the rest of it may be, too."""
    read_description(folder)
    for path in (folder / ENVIRONMENT, folder / RESULTS):
        if path.is_file():
            kept = read_json(path)
            if path.name == RESULTS and not isinstance(kept.get("rows"), list):
                raise LoadError(f"{path} must hold the rows of a run, got {', '.join(map(repr, kept)) or 'nothing'}.")


def _inputs(described: Mapping[str, Any]) -> Inputs | None:
    """What the base of a run takes; runs of older versions do not name its dtype."""
    shape, dtype = described.get("input_shape"), described.get("input_dtype")
    return None if shape is None else Inputs((InputSpec(tuple(shape), dtype or "float32"),))


def _without_weights(base: Mapping[str, Any]) -> Mapping[str, Any]:
    """The base, which need not look for the weights that it was trained from: those it was trained to are loaded."""
    arguments = base.get("init_args") or {}
    if not str(base.get("class_path")).startswith("ensemblenet.models.") or "weights" not in arguments:
        return base
    return {**base, "init_args": {**arguments, "weights": None}}


def _made(kind: type[Any], spec: Mapping[str, Any], folder: Path) -> Any:
    """What a run's configuration describes."""
    try:
        return instantiate(kind, spec)
    except EnsembleNetError:
        raise
    except Exception as error:  # whatever a class makes of arguments that are none
        raise LoadError(f"{folder / CONFIG}: {spec['class_path']} cannot be made: {first_line(error)}") from error
