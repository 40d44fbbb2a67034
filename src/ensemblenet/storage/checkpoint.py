"""Save a converted model as safetensors and JSON, and load it again; no code that a directory names is run unasked."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_model
from torch import nn

from ensemblenet.conversion.convert import rebuild
from ensemblenet.ensemble import EnsembleNet
from ensemblenet.errors import ConversionError, LoadError
from ensemblenet.recipe import Recipe
from ensemblenet.storage.atomic import atomic_folder
from ensemblenet.storage.hub import local_folder

__all__ = ["load", "read_description", "save"]

_DESCRIPTION = "data.json"
_RECIPE = "recipe.json"
_WEIGHTS = "model.safetensors"
_MOST_TEXT_BYTES = 1 << 24


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
    if model.recipe is None:
        raise LoadError(
            "The model was built by hand and has no recipe to rebuild it by; save its state_dict() instead, or "
            "make the model with ensemblenet.convert."
        )
    target = Path(directory)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists and is not empty; save to a new directory.")
    with atomic_folder(target) as unfinished:
        (unfinished / _RECIPE).write_text(model.recipe.to_json())
        save_model(model, str(unfinished / _WEIGHTS))
        if description is not None:
            (unfinished / _DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")
    return target


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
    folder = local_folder(directory)
    recipe = Recipe.from_json(_read_recipe(folder))
    if base is None:
        if recipe.base is None:
            raise LoadError(
                f"The base of {folder} comes from no known factory: pass a fresh instance of it, "
                f"ensemblenet.load(directory, base=...)."
            )
        base = recipe.base.build(trust)
    shapes = _saved_shapes(folder / _WEIGHTS)
    if sum(name.startswith("heads.") and name.split(".")[1] == "0" for name in shapes) == 0:
        raise LoadError(f"{folder / _WEIGHTS} holds no heads; it is not one of ensemblenet's.")
    saved_heads = {name.split(".")[1] for name in shapes if name.startswith("heads.")}
    if len(saved_heads) != recipe.num_heads:
        raise LoadError(f"The recipe has {recipe.num_heads} heads, the weights have {len(saved_heads)}.")
    try:
        first = {name.removeprefix("heads.0."): shape for name, shape in shapes.items() if name.startswith("heads.0.")}
        model = rebuild(base, recipe, first)
    except ConversionError as error:
        raise LoadError(f"The base does not fit the recipe in {folder}: {error}") from error
    _check_shapes(model, shapes, folder)
    try:
        load_model(model, str(folder / _WEIGHTS))
    except (RuntimeError, SafetensorError) as error:
        raise LoadError(f"{folder / _WEIGHTS} cannot be read: {error}") from error
    return model.eval()


def read_description(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """What [`ensemblenet.save`][] was told about the data; empty where that was nothing.

    Raises:
        LoadError: `data.json` is damaged.
    """
    path = Path(directory, _DESCRIPTION)
    if not path.is_file():
        return {}
    try:
        description = json.loads(_read_text(path))
    except ValueError as error:
        raise LoadError(f"{path} is not JSON: {error}") from error
    if not isinstance(description, dict):
        raise LoadError(f"{path} must hold an object of JSON, got {type(description).__name__}.")
    return description


def _read_recipe(folder: Path) -> str:
    path = folder / _RECIPE
    if not path.is_file():
        why = f"{_RECIPE} is missing" if folder.is_dir() else "there is no such folder"
        raise LoadError(f"{folder} holds no saved model: {why}.")
    return _read_text(path)


def _read_text(path: Path) -> str:
    if path.stat().st_size > _MOST_TEXT_BYTES:
        raise LoadError(f"{path} is larger than any {path.stem}.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise LoadError(f"{path} is not text: {error}") from error


def _saved_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    if not path.is_file():
        raise LoadError(f"{path.parent} holds no weights: {path.name} is missing.")
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise LoadError(f"{path} is damaged or not a safetensors file: {error}") from error


def _check_shapes(model: EnsembleNet, saved: dict[str, tuple[int, ...]], folder: Path) -> None:
    tensors = model.state_dict()
    own = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    held = {tensors[name].data_ptr() for name in saved if name in tensors}  # tied tensors are saved once
    for name, tensor in tensors.items():
        if name not in saved and tensor.data_ptr() not in held:
            raise LoadError(f"{folder / _WEIGHTS} does not fit its recipe: {name} is missing.")
    for name, shape in saved.items():
        if own.get(name) != shape:
            wanted = own.get(name, "nothing of that name")
            raise LoadError(
                f"{folder / _WEIGHTS} holds {name} of shape {shape}, but the model of this base has {wanted}; is it "
                f"the base that was converted?"
            )
