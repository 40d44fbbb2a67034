"""Names of networks, data and classes for people."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["data_name", "network_name", "readable_names"]

_NETWORKS = {  # whose class does not read as a name
    "CifarResNet": "ResNet-{depth}",
    "DeepBagOfFrames": "deep bag of frames",
    "GRUTagger": "GRU",
    "LogisticTagger": "logistic regression",
    "MLPTagger": "MLP",
    "MNIST1DNet": "convolutional network",
    "MNIST1DResNet": "residual network",
    "MoETagger": "mixture of experts",
    "S3D": "S3D",
}
_DATA = {"MNIST1D": "MNIST-1D", "YouTube8M": "YouTube-8M"}  # data sets; other modules read any folder of their layout


def network_name(spec: Mapping[str, Any]) -> str:
    """What a person calls a network that a configuration describes: its own name, or that of its class.

    Args:
        spec: `class_path`, of a class or of a function that makes networks by name, and perhaps `init_args`.

    Example:
        >>> network_name({"class_path": "timm.create_model", "init_args": {"model_name": "resnet50"}})
        'resnet50'
        >>> network_name({"class_path": "ensemblenet.models.create", "init_args": {"name": "torchvision:vit_b_16"}})
        'vit_b_16'
        >>> network_name({"class_path": "ensemblenet.models.CifarResNet", "init_args": {"depth": 8}})
        'ResNet-8'
    """
    made_by, arguments = spec["class_path"].rpartition(".")[2], spec.get("init_args") or {}
    if made_by in _NETWORKS and spec["class_path"].startswith("ensemblenet."):
        return _NETWORKS[made_by].format(**{"depth": 20} | arguments)
    named = next((arguments[key] for key in ("name", "model_name") if isinstance(arguments.get(key), str)), made_by)
    return named.rpartition(":")[2].rpartition("/")[2]


def data_name(module: str, folder: str | Path | None) -> str:
    """What a person calls data: the data set's name, that of the folder that holds it, or that of its class.

    Args:
        module: the name of the data module's class.
        folder: what it reads, if it reads one.

    Example:
        >>> data_name("MNIST1D", None), data_name("ImageData", "data/imagenette"), data_name("Mine", None)
        ('MNIST-1D', 'imagenette', 'Mine')
    """
    return _DATA.get(module) or (Path(folder).name if folder else "") or module


def readable_names(classes: Sequence[str]) -> list[str]:
    """Names of ImageNet's class folders by their first English word; other names as they are.

    Two classes of one word keep their folder's name behind it.

    Example:
        >>> readable_names(["n01440764", "n02102040"]), readable_names(["cat", "dog"])
        (['tench', 'English springer'], ['cat', 'dog'])
    """
    if not classes or not all(re.fullmatch(r"n\d{8}", name) for name in classes):
        return list(classes)
    from timm.data.imagenet_info import ImageNetInfo  # slow to import

    info = ImageNetInfo("imagenet-22k")
    known = set(info.label_names())
    words = [info.label_name_to_description(name).partition(",")[0] if name in known else name for name in classes]
    return [word if words.count(word) == 1 else f"{word}, {name}" for word, name in zip(words, classes, strict=True)]
