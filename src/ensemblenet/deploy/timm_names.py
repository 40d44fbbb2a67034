"""Saved models under names of their own in timm: timm takes the functions of a module for its models."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ensemblenet.conversion.classifier import with_classes_of
from ensemblenet.conversion.convert import rebuild
from ensemblenet.ensemble import EnsembleNet
from ensemblenet.errors import LoadError
from ensemblenet.families import Timm
from ensemblenet.storage.checkpoint import load
from ensemblenet.storage.descriptions import read_description
from ensemblenet.storage.hub import local_folder

__all__ = ["register_timm"]

default_cfgs: dict[str, Any] = {}  # timm reads it

_PREPROCESSING = ("mean", "std", "interpolation", "crop_pct", "crop_mode")


def register_timm(
    name: str, directory: str | os.PathLike[str], base: nn.Module | None = None, *, trust: bool = False
) -> None:
    """Let `timm.create_model(name, pretrained=True)` load a saved model, for as long as this process runs.

    What it returns is an [`ensemblenet.EnsembleNet`][]: in evaluation (N, C), as timm's models; in training (K, N, C),
    which wants [`ensemblenet.CoDistillationLoss`][]. `timm.data.resolve_model_data_config` finds the preprocessing that
    was saved with it, and `timm.list_models` the name. With `pretrained=False` it is the same model with the weights
    that it began with. Where the base is one of timm's, it has what [`ensemblenet.families.FamilyModel`][] lists, and
    another `num_classes` gives it fresh classifiers, and 0 none, with `global_pool=""` unpooled features; else its
    classes are fixed. Its channels always are: `in_chans` may only repeat them.

    Args:
        name: one that timm does not have.
        directory: a saved directory, or an address such as `hf://owner/name`.
        base: a fresh instance of the base, where no known factory makes it.
        trust: as for [`ensemblenet.load`][].

    Raises:
        LoadError: the directory cannot be loaded, or timm has a model of that name.

    Example:
        >>> import ensemblenet, tempfile, timm
        >>> net = timm.create_model("test_resnet", num_classes=5)
        >>> model = ensemblenet.convert(net, torch.randn(2, 3, 32, 32))
        >>> register_timm("my_two_heads", ensemblenet.save(model, tempfile.mkdtemp() + "/saved"))
        >>> timm.create_model("my_two_heads", pretrained=True).eval()(torch.randn(4, 3, 32, 32)).shape
        torch.Size([4, 5])
    """
    import timm  # slow to import

    module = sys.modules[__name__]
    if not name.isidentifier() or timm.is_model(name) or hasattr(module, name):
        raise LoadError(f"A model needs a name of its own, made of letters, digits and _; got {name!r}.")
    folder = local_folder(directory)
    saved = load(folder, base, trust=trust)
    config = _pretrained_config(saved, read_description(folder), str(folder))
    can_reset = isinstance(saved.family, Timm)

    def make(pretrained: bool = False, **options: Any) -> EnsembleNet:
        _check_options(name, options, config, can_reset)
        model = load(folder, base, trust=trust)
        if not pretrained:
            assert model.recipe is not None
            made = base or model.recipe.base.build(trust)  # pyright: ignore[reportOptionalMemberAccess]
            model = rebuild(with_classes_of(model.recipe, made), model.recipe)
        known = config | {"architecture": name}
        if isinstance(model.family, Timm):
            model.family = replace(model.family, cfg={**model.family.cfg, **known})
            if (classes := options.get("num_classes")) not in (None, config["num_classes"]):
                model.reset_classifier(classes, options.get("global_pool"))
            return model.train()
        attributes = {"pretrained_cfg": known, "default_cfg": known, "num_classes": config["num_classes"]}
        for attribute, value in attributes.items():
            setattr(model, attribute, value)  # where timm's own models have them
        return model.train()  # as timm's models begin

    make.__name__ = make.__qualname__ = name
    default_cfgs.update(timm.models.generate_default_cfgs({name: config}))
    setattr(module, name, timm.models.register_model(make))


def _pretrained_config(model: EnsembleNet, description: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """What timm wants to know of a model."""
    assert model.recipe is not None
    shape = model.recipe.inputs.shape  # refuses models of several inputs, which timm has none of
    with torch.no_grad():
        outputs = model(model.recipe.inputs.zeros())
    if not isinstance(outputs, torch.Tensor):
        raise LoadError(f"Models of timm give one output, and this one gives {len(outputs)}.")
    preprocessing = description.get("preprocessing") or {}
    known = {key: preprocessing[key] for key in _PREPROCESSING if preprocessing.get(key) is not None}
    family = model.family
    of_base = model.pretrained_cfg if isinstance(family, Timm) else {}
    if isinstance(family, Timm) and family.features is not None:
        features = model.forward_features(model.recipe.inputs.zeros())
        of_base["pool_size"] = tuple(size for dim, size in enumerate(features.shape) if dim not in (0, family.dim))
    return {
        **of_base,
        "file": folder,
        "input_size": shape,
        "num_classes": outputs.shape[1],
        "label_names": description.get("classes"),
        **{key: tuple(value) if isinstance(value, list) else value for key, value in known.items()},
    }


def _check_options(name: str, options: Mapping[str, Any], config: Mapping[str, Any], can_reset: bool) -> None:
    """Refuse what would change more of the model than its classifier; timm passes its own options along."""
    own = {"pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", *(["num_classes"] if can_reset else [])}
    if can_reset and options.get("num_classes") == 0 and options.get("global_pool") == "":
        own.add("global_pool")  # unpooled features
    fixed = {"num_classes": config["num_classes"], "in_chans": config["input_size"][0], "drop_rate": 0.0}
    for key, value in options.items():
        if key not in own and (key not in fixed or value != fixed[key]):
            may = f"must be {fixed[key]}" if key in fixed else "is not one of its options"
            raise LoadError(f"{name} is a saved model: {key}={value!r} {may}. Convert and train another one.")
