"""Save a converted model as safetensors and JSON, and load it again; no code that a directory names is run unasked."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ensemblenet.conversion.classifier import with_classes_of
from ensemblenet.conversion.convert import rebuild
from ensemblenet.ensemble import EnsembleNet
from ensemblenet.errors import ConversionError, LoadError
from ensemblenet.models.sources import BaseSource
from ensemblenet.recipe import Recipe
from ensemblenet.storage.atomic import atomic_folder, read_text
from ensemblenet.storage.descriptions import write_description
from ensemblenet.storage.hub import local_folder
from ensemblenet.storage.limits import ACTIVATIONS, build_within, check_base, check_heads, check_inputs
from ensemblenet.storage.runs import RECIPE, check_saved
from ensemblenet.weights import Header, digest, read_header, read_weights, write_weights

__all__ = ["how_to_load", "load", "read_model", "save", "write_model"]

_WEIGHTS = "model.safetensors"
_BASE_SEAL, _RECIPE_SEAL = "base", "recipe"  # checksums in the header of the weights


def save(model: EnsembleNet, directory: str | os.PathLike[str], description: Mapping[str, Any] | None = None) -> Path:
    """Write a converted model's recipe and weights into a new directory.

    The directory gets its name when its files are written, so one of that name is always whole.

    Args:
        model: a model that [`ensemblenet.convert`][] made.
        directory: where to; it must not exist, or be empty.
        description: plain data for those who will use the model, such as `{"classes": [...]}`; it is kept as
            `data.json`, and `load` does not need it.

    Returns:
        The directory.

    Raises:
        LoadError: the model was built by hand, so it has no recipe to load it by.
        FileExistsError: the directory holds something.

    Example:
        >>> import tempfile, torch
        >>> from ensemblenet import convert
        >>> base = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
        >>> model = convert(base, torch.randn(4, 8)).eval()
        >>> directory = save(model, tempfile.mkdtemp() + "/model")
        >>> again = load(directory, base)
        >>> bool((again(torch.ones(1, 8)) == model(torch.ones(1, 8))).all())
        True
    """
    write_model(model, Path(directory), description)
    assert model.recipe is not None
    if model.recipe.base is None:
        note = "No known factory makes the base, so the saved model does not name it: load it with"
        warnings.warn(f"{note} {how_to_load(model.recipe)}.", stacklevel=2)
    return Path(directory)


def how_to_load(recipe: Recipe) -> str:
    """The call that loads a saved model, in words.

    Example:
        >>> from ensemblenet import convert
        >>> how_to_load(convert(nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3)), torch.ones(2, 8)).recipe)
        'ensemblenet.load(directory, base=...), where base is a fresh instance of the network'
    """
    if recipe.base is None:
        return "ensemblenet.load(directory, base=...), where base is a fresh instance of the network"
    if recipe.base.factory == "module":
        return f"ensemblenet.load(directory, trust=True), which imports {recipe.base.name.partition(':')[0]}"
    return "ensemblenet.load(directory)"


def write_model(model: EnsembleNet, target: Path, description: Mapping[str, Any] | None = None) -> None:
    """Do what [`ensemblenet.save`][] does, for those who know the base."""
    if model.recipe is None:
        raise LoadError(
            "The model was built by hand and has no recipe to rebuild it by; save its state_dict() instead, or "
            "make the model with ensemblenet.convert."
        )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists and is not empty; save to a new directory.")
    recipe = model.recipe.to_json()
    notes = _seals(recipe)
    if model.base_cost is not None:
        notes[ACTIVATIONS] = str(round(model.base_cost.activations))
    with atomic_folder(target) as unfinished:
        (unfinished / RECIPE).write_text(recipe)
        write_weights(model, unfinished / _WEIGHTS, notes)
        if description is not None:
            write_description(unfinished, description)


@torch.inference_mode(False)  # weights of inference mode could not be trained on
def load(directory: str | os.PathLike[str], base: nn.Module | None = None, *, trust: bool = False) -> EnsembleNet:
    """Load a saved model, in evaluation mode.

    Args:
        directory: what [`ensemblenet.save`][] wrote; or its address on the Hugging Face Hub, `hf://owner/name`, from
            which only safetensors and JSON are fetched.
        base: a fresh instance of the base; not needed where the recipe names a known factory: timm, torchvision,
            transformers or `ensemblenet.models`.
        trust: make also a base that the recipe names as `module.path:callable`, which imports and runs that code.

    Raises:
        LoadError: the directory is damaged or foreign, or the base is missing or another one.

    Example:
        >>> import tempfile, ensemblenet
        >>> base = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3))
        >>> saved = ensemblenet.save(ensemblenet.convert(base, torch.randn(4, 8)), tempfile.mkdtemp())
        >>> load(saved, base=nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3))).num_heads
        2
    """
    return read_model(local_folder(directory), base, trust)


def read_model(folder: Path, base: nn.Module | Callable[[], nn.Module] | None, trust: bool = False) -> EnsembleNet:
    """Do what [`ensemblenet.load`][] does.

    Args:
        folder: on this machine.
        base: the base, or what makes it; None makes the one that the recipe names.
        trust: run code of the model's author, and make a network of any size.
    """
    text = _read_recipe(folder)
    try:
        recipe = Recipe.from_json(text)
    except LoadError as error:
        raise LoadError(f"{folder / RECIPE}: {error}") from error
    header = read_header(folder / _WEIGHTS)
    sizes = check_heads(recipe, header)
    header.check_seal()
    is_brought = base is not None
    if not isinstance(base, nn.Module):
        make = partial(_source(recipe, folder).build, trust) if base is None else partial(_made, base, recipe, header)
        base = make() if trust else build_within(make, header, recipe)
    elif trust:
        base = _with_classes(base, recipe, header)
    else:
        check_inputs(base, header, recipe.inputs)
        base = _with_classes(base, recipe, header)
        check_base(base, header, recipe)
    try:
        model = rebuild(base, recipe, sizes)
    except ConversionError as error:
        raise LoadError(f"The base does not fit the recipe in {folder}: {error}") from error
    _check_shapes(model, header)
    _check_seals(text, header, with_base=not is_brought)
    read_weights(model, header.path)
    return model.eval()


def _made(make: Callable[[], nn.Module], recipe: Recipe, header: Header) -> nn.Module:
    return _with_classes(make(), recipe, header)


def _with_classes(base: nn.Module, recipe: Recipe, header: Header) -> nn.Module:
    """A base that the user brings, which has its own classifier, with one of the recipe's classes."""
    if recipe.num_classes is not None and all(shape[:1] != (recipe.num_classes,) for shape in header.shapes.values()):
        raise LoadError(f"{header.path} holds no classifier of the {recipe.num_classes} classes that its recipe names.")
    try:
        return with_classes_of(recipe, base)
    except ConversionError as error:
        raise LoadError(f"The base does not fit the recipe of {header.path}: {error}") from error


def _source(recipe: Recipe, folder: Path) -> BaseSource:
    if recipe.base is None:
        raise LoadError(
            f"The base of {folder} comes from no known factory: pass a fresh instance of it, "
            f"ensemblenet.load(directory, base=...)."
        )
    return recipe.base


def _read_recipe(folder: Path) -> str:
    check_saved(folder)
    return read_text(folder / RECIPE)


def _seals(recipe: str) -> dict[str, str]:
    """Checksums of what a recipe says: of the base, which a user may bring instead, and of all else."""
    said = json.loads(recipe)
    base = said.pop("base", None)
    return {name: digest(json.dumps(part, sort_keys=True)) for name, part in ((_BASE_SEAL, base), (_RECIPE_SEAL, said))}


def _check_seals(recipe: str, header: Header, with_base: bool) -> None:
    """Compare the checksums; versions up to 0.1.0 wrote none."""
    for name, found in _seals(recipe).items():
        if header.notes.get(name, found) != found and (with_base or name != _BASE_SEAL):
            raise LoadError(
                f"{header.path.with_name(RECIPE)} is damaged, or of another model: its checksum is not the one that "
                f"was saved in {_WEIGHTS}. Copy the directory again."
            )


def _check_shapes(model: EnsembleNet, header: Header) -> None:
    tensors = model.state_dict()
    own = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    held = {tensors[name].data_ptr() for name in header.shapes if name in tensors}  # tied tensors are saved once
    for name, tensor in tensors.items():
        if name not in header.shapes and tensor.data_ptr() not in held:
            raise LoadError(f"{header.path} does not fit its recipe: {name} is missing.")
    for name, shape in header.shapes.items():
        if own.get(name) != shape:
            wanted = own.get(name, "nothing of that name")
            raise LoadError(
                f"{header.path} holds {name} of shape {shape}, but the model of this base has {wanted}; is it the base "
                "that was converted?"
            )
