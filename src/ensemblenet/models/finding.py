"""Find out where a base came from, so that a recipe can say how to make it again."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict
from itertools import chain
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from ensemblenet.errors import LoadError, MissingExtraError
from ensemblenet.models.sources import BaseSource, is_plain, source_of

__all__ = ["find_source"]

# arguments that timm's networks keep as attributes
_TIMM_ARGUMENTS = (
    *("num_classes", "in_chans", "img_size", "global_pool", "class_token", "no_embed_class", "dynamic_img_size"),
    *("drop_rate", "drop_path_rate"),
)
# what names people, places and tasks in a configuration of transformers
_ORIGIN = ("_name_or_path", "architectures", "task_specific_params", "transformers_version")
# attributes that are no settings of a layer; transformers keep where weights came from
_STATES = ("training", "grad_checkpointing", "gradient_checkpointing", "name_or_path")


def find_source(base: nn.Module, input_shape: tuple[int, ...]) -> BaseSource | None:
    """Where a base comes from, if a known factory makes one that is the same in all but the values of its weights.

    Args:
        base: the network.
        input_shape: of one example.

    Returns:
        The source, after building it once; None where none gives the same layers with the same settings.

    Example:
        >>> from ensemblenet.models import MNIST1DNet
        >>> find_source(MNIST1DNet(8), (40,))
        BaseSource(factory='ensemblenet', name='MNIST1DNet', arguments={'width': 8, 'num_classes': 10})
    """
    candidates = chain(filter(None, [source_of(base)]), _candidates(base, input_shape))
    with torch.random.fork_rng([]):
        return next((source for source in candidates if is_plain(asdict(source)) and _makes(source, base)), None)


def _candidates(base: nn.Module, input_shape: tuple[int, ...]) -> Iterable[BaseSource]:
    """Who could have made a base that nobody kept a record of."""
    module = type(base).__module__
    if module.startswith("timm.") and getattr(base, "pretrained_cfg", None):
        return _timm_candidates(base, input_shape)
    if module.startswith("torchvision.models."):
        return _torchvision_candidates(base, module)
    if module.startswith("transformers.models."):
        return [_transformers_source(base)]
    if module.startswith("ensemblenet.models.") and isinstance(getattr(base, "arguments", None), dict):
        return [BaseSource("ensemblenet", type(base).__name__, dict(base.arguments))]  # pyright: ignore[reportArgumentType, reportCallIssue]
    return []


def _torchvision_candidates(base: nn.Module, module: str) -> Iterator[BaseSource]:
    """torchvision's networks keep no name: those of the same file that have tensors of the same shapes."""
    from torchvision import models

    sizes = [getattr(layer, "out_features", getattr(layer, "out_channels", None)) for layer in base.modules()]
    num_classes = next((size for size in reversed(sizes) if size is not None), None)
    shapes = _shapes(base)
    for name in models.list_models():
        if models.get_model_builder(name).__module__ == module:
            source = BaseSource("torchvision", name, {} if num_classes is None else {"num_classes": num_classes})
            with torch.device("meta"), suppress(LoadError), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if _shapes(source.build()) == shapes:
                    yield source


def _shapes(network: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in network.state_dict().items()}


def _timm_candidates(base: nn.Module, input_shape: tuple[int, ...]) -> Iterator[BaseSource]:
    """timm's networks do not keep the arguments that they were made with: what can be seen of them is tried."""
    name = str(base.pretrained_cfg["architecture"])  # pyright: ignore[reportIndexIssue, reportArgumentType]
    arguments: dict[str, Any] = {"num_classes": base.num_classes}
    if input_shape[0] != 3:
        arguments["in_chans"] = input_shape[0]
    yield BaseSource("timm", name, arguments)
    of_input = {"img_size": [*input_shape[1:]]}
    yield BaseSource("timm", name, arguments | of_input)
    try:
        default = _seen_arguments(BaseSource("timm", name, arguments).build())
    except LoadError:
        return
    seen = {key: value for key, value in _seen_arguments(base).items() if value != default.get(key)}
    yield BaseSource("timm", name, arguments | seen)
    yield BaseSource("timm", name, arguments | of_input | seen)


def _seen_arguments(network: nn.Module) -> dict[str, Any]:
    """Arguments that a network of timm's shows in its attributes and layers."""
    seen = {key: getattr(network, key) for key in _TIMM_ARGUMENTS if _is_setting(getattr(network, key, nn.Module))}
    if (size := getattr(getattr(network, "patch_embed", None), "img_size", None)) is not None:
        seen["img_size"] = [*size] if isinstance(size, tuple) else size
    layer: Any
    for layer in network.modules():
        kind = type(layer).__name__
        if kind == "SelectAdaptivePool2d":
            seen["global_pool"] = layer.pool_type
        elif kind == "DropPath":
            seen["drop_path_rate"] = max(seen.get("drop_path_rate", 0.0), round(layer.drop_prob, 6))
    if hasattr(network, "has_class_token"):
        seen["class_token"] = network.has_class_token
    return seen


def _transformers_source(base: Any) -> BaseSource:
    def without_origin(value: Any) -> Any:
        if isinstance(value, list):
            return [without_origin(item) for item in value]
        if isinstance(value, dict):
            return {key: without_origin(item) for key, item in value.items() if key not in _ORIGIN}
        return value

    config = without_origin(json.loads(base.config.to_json_string()))
    how = {"config": config, "attn_implementation": base.config._attn_implementation}
    return BaseSource("transformers", type(base).__name__, how)


def _makes(source: BaseSource, base: nn.Module) -> bool:
    """Whether a source makes the same layers with the same settings, shapes and dtypes."""
    try:
        made = source.build(trust=True)  # it is the user's own code that has made the base
    except (LoadError, MissingExtraError):
        return False
    if type(made) is not type(base) or repr(made) != repr(base) or _facts(made) != _facts(base):
        return False
    fixed = _fixed_buffers(base)
    return all(torch.equal(own, fixed[name].to(own.device)) for name, own in _fixed_buffers(made).items())


def _fixed_buffers(network: nn.Module) -> dict[str, Tensor]:
    """Those that are not stored: no weights that are loaded later make them equal."""
    stored = network.state_dict()
    return {name: buffer for name, buffer in network.named_buffers() if name not in stored}


def _facts(network: nn.Module) -> dict[str, Any]:
    """The shapes and dtypes of all tensors of a network, and the settings of all of its layers."""
    facts: dict[str, Any] = {
        name: (tensor.shape, tensor.dtype)
        for name, tensor in (*network.state_dict().items(), *network.named_parameters(), *network.named_buffers())
    }
    for path, layer in network.named_modules():
        for name, value in vars(layer).items():
            if _is_setting(value) and not name.startswith("_") and name not in _STATES:
                facts[f"{path}:{name}"] = value
        facts[f"{path}:attention"] = getattr(getattr(layer, "config", None), "_attn_implementation", None)
    return facts


def _is_setting(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_setting, value))
    return value is None or isinstance(value, (int, float, str, torch.dtype, FunctionType, BuiltinFunctionType))
