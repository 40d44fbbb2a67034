"""Networks by name, as the command line, configurations and stored recipes give them."""

from __future__ import annotations

import difflib
import importlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from ensemblenet.errors import EnsembleNetError, LoadError, MissingExtraError
from ensemblenet.extras import require
from ensemblenet.weights import read_checkpoint, read_header

__all__ = [
    "TIMM_WORDS",
    "BaseSource",
    "ModelNameError",
    "create",
    "default_input_shape",
    "is_known",
    "is_plain",
    "made_with",
    "note_classes",
    "source_of",
]

_OWN = "ensemblenet.models"
_LONGEST = 300  # of what another library says
_MADE_BY = "_ensemblenet_source"  # an attribute of the networks that `create` made

# arguments of timm's networks that are words, which it looks up in tables of its own
TIMM_WORDS = ("act_layer", "norm_layer", "aa_layer", "global_pool", "pool_type", "stem_type", "pos_embed")
# of transformers' configurations: what may be any text, and what fetches more
_LABELS = ("id2label", "label2id")
_MOST = 1 << 24  # of an integer: a list of so many parts is still made in no time
_FETCHING = ("auto_map", "backbone", "quantization_config", "use_pretrained_backbone")


class ModelNameError(EnsembleNetError, ValueError):
    """A name that no network goes by."""


def create(
    name: str,
    num_classes: int | None = None,
    weights: str | None = None,
    options: dict[str, Any] | None = None,
) -> nn.Module:
    """Make a network, with random weights unless others are asked for; it remembers how it was made.

    Args:
        name: a name of timm's, such as `resnet18`; `torchvision:NAME`, of images or videos; or
            `module.path:callable`, a callable that returns a network.
        num_classes: outputs; None leaves the network's own default.
        weights: for timm's networks: "pretrained" downloads timm's weights; else a file of them, safetensors or a
            PyTorch state dict. A classifier of another number of classes begins anew.
        options: further arguments of the network, such as `{"drop_path_rate": 0.1}`.

    Raises:
        ModelNameError: there is no such network, what the callable returns is none, or the weights do not fit.

    Example:
        >>> type(create("ensemblenet.models:MNIST1DNet", num_classes=3)).__name__
        'MNIST1DNet'
    """
    arguments = ({} if num_classes is None else {"num_classes": num_classes}) | (options or {})
    source, _, rest = name.partition(":")
    if rest and weights is not None:
        raise ModelNameError(f"weights are for timm's networks only, not for {name}.")
    network = _from_factory(name, source, rest, arguments) if rest else _from_timm(name, arguments, weights)
    setattr(network, _MADE_BY, _source_of(name, source, rest, arguments))
    return network


def _from_factory(name: str, source: str, rest: str, arguments: dict[str, Any]) -> nn.Module:
    factory = _from_torchvision(rest) if source == "torchvision" else _from_module(source, rest)
    try:
        network = factory(**arguments)
    except TypeError as error:
        raise ModelNameError(f"{name} cannot be called with {arguments or 'no arguments'}: {error}") from error
    if not isinstance(network, nn.Module):
        raise ModelNameError(f"{name} must return an nn.Module, got {type(network).__name__}.")
    return network


def is_known(name: object) -> bool:
    """Whether a name is one of timm's, torchvision's or this project's own networks; other names run what they name.

    Example:
        >>> [is_known(name) for name in ("resnet18", "ensemblenet.models:S3D", "os:system", "hf-hub:timm/resnet18")]
        [True, True, False, False]
    """
    if not isinstance(name, str):
        return False
    source, colon, rest = name.partition(":")
    if not colon:
        require("timm", "timm")
        import timm  # slow to import

        return re.fullmatch(r"\w+(\.\w+)?", name) is not None and timm.is_model(name)
    if source == "torchvision":
        return rest in _torchvision_names()
    own = importlib.import_module(_OWN)
    return source == _OWN and rest in own.__all__ and isinstance(getattr(own, rest), type)


def default_input_shape(network: nn.Module) -> tuple[int, ...] | None:
    """The shape of one input that the network was made for, where it says so.

    Example:
        >>> default_input_shape(create("resnet18"))
        (3, 224, 224)
    """
    if size := (getattr(network, "pretrained_cfg", None) or {}).get("input_size"):
        return tuple(size)
    module = type(network).__module__
    if module.startswith("torchvision.models.video."):
        size = 112 if module.endswith(".resnet") else 224
        return (3, 16, size, size)
    if module.startswith("torchvision."):
        return (3, 224, 224)
    return getattr(network, "input_shape", None)


def _from_timm(name: str, arguments: dict[str, Any], weights: str | None) -> nn.Module:
    require("timm", "timm")
    import timm  # slow to import, and only needed for its own names

    if not timm.is_model(name):
        raise ModelNameError(
            f"timm has no model {name!r}.{_suggest(name, timm.list_models())} Other networks are named "
            "torchvision:NAME or module.path:callable."
        )
    if weights not in (None, "pretrained"):
        _check_weights(Path(weights))
        arguments = arguments | {"pretrained_cfg_overlay": {"file": weights}}
    try:
        return timm.create_model(name, pretrained=weights is not None, **arguments)
    except TypeError as error:
        raise ModelNameError(f"{name} cannot be made with {arguments}: {error}") from error
    except Exception as error:  # no network, or whatever weights of another network make of it
        if weights is None:
            raise
        raise ModelNameError(f"{weights} cannot be had as weights of {name}: {_in_one_line(error)}") from error


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:_LONGEST]


def _check_weights(path: Path) -> None:
    """Refuse a damaged file, and a pickle that holds more than tensors: not every version of timm does."""
    if not path.is_file():
        raise ModelNameError(f"There is no file {path} with weights.")
    if path.suffix == ".safetensors":
        read_header(path).check_seal()
        return
    try:
        loaded = read_checkpoint(path, "meta")
    except LoadError as error:
        raise ModelNameError(
            f"{path} is not a state dict of tensors alone: it is damaged, or holds other objects, which run code. "
            "Save the state_dict() of its network as safetensors."
        ) from error
    if not isinstance(loaded, Mapping):
        raise ModelNameError(f"{path} is not a state dict of tensors: it holds a {type(loaded).__name__}.")


def _from_torchvision(name: str) -> Callable[..., nn.Module]:
    known = _torchvision_names()
    if name not in known:
        raise ModelNameError(f"torchvision has no classification model {name!r}.{_suggest(name, known)}")
    from torchvision import models

    return lambda **arguments: models.get_model(name, weights=None, **arguments)


def _torchvision_names() -> list[str]:
    require("timm", "torchvision")
    from torchvision import models

    return models.list_models(module=models) + models.list_models(module=models.video)


def _from_module(module: str, name: str) -> Callable[..., Any]:
    try:
        factory = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        raise ModelNameError(f"{module}:{name}: {error}. Is its folder on PYTHONPATH?") from error
    if not callable(factory):
        raise ModelNameError(f"{module} has no callable {name!r}.")
    return factory


def _suggest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    return f" Did you mean {', '.join(near)}?" if near else ""


# -- where a base came from


def made_with(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a network, as plain data, for [`find_source`][ensemblenet.models.finding.find_source].

    Args:
        given: the `locals()` of its constructor before it sets others.

    Example:
        >>> made_with({"self": None, "width": 8, "hidden": (16, 16)})
        {'width': 8, 'hidden': [16, 16]}
    """
    arguments = {name: value for name, value in given.items() if name not in ("self", "__class__")}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in arguments.items()}


@dataclass(frozen=True)
class BaseSource:
    """Who makes a base.

    Attributes:
        factory: "timm", "torchvision", "transformers" or "ensemblenet"; or "module" for code of the model's author.
        name: the model's name there; of "transformers", its class; of "module", `module.path:callable`.
        arguments: keyword arguments, plain numbers, words and lists; of "transformers", `config` as plain data, and
            `attn_implementation`.

    Example:
        >>> type(BaseSource("ensemblenet", "MNIST1DNet", {"width": 8}).build()).__name__
        'MNIST1DNet'
    """

    factory: str
    name: str
    arguments: dict[str, Any]

    def build(self, trust: bool = False) -> nn.Module:
        """Make the base, with random weights.

        Args:
            trust: run code of the model's author, too.

        Raises:
            LoadError: the factory does not know it, or it is code that is not trusted.
        """
        if self.factory == "module" and not trust:
            raise LoadError(
                f"The base {self.name!r} is code of the model's author. If you trust whoever saved the model, pass "
                "trust=True (on the command line --trust); else pass base, a fresh instance."
            )
        makers = {
            "timm": lambda: _from_timm(self.name, self.arguments, None),
            "torchvision": lambda: create(f"torchvision:{self.name}", options=self.arguments),
            "transformers": self._build_transformers,
            "ensemblenet": self._build_own,
            "module": lambda: create(self.name, options=self.arguments),
        }
        if self.factory not in makers:
            raise LoadError(f"Unknown base factory {self.factory!r}: expected one of {sorted(makers)}.")
        try:
            return makers[self.factory]()
        except MissingExtraError:
            raise
        except Exception as error:  # a library of another version, or arguments that it does not take
            raise LoadError(
                f"The base {self.name!r} of {self.factory} cannot be built: {_in_one_line(error)}"
            ) from error

    def _build_transformers(self) -> nn.Module:
        import transformers  # slow to import, and only needed for its own networks

        kind = getattr(transformers, self.name, None)
        if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
            raise ModelNameError(f"transformers has no model {self.name!r}.")
        config = kind.config_class.from_dict(self.arguments["config"])  # pyright: ignore[reportOptionalMemberAccess]
        return kind._from_config(config, attn_implementation=self.arguments["attn_implementation"])

    def _build_own(self) -> nn.Module:
        if not is_known(f"{_OWN}:{self.name}"):
            raise ModelNameError(f"{_OWN} has {importlib.import_module(_OWN).__all__}.")
        return create(f"{_OWN}:{self.name}", options=self.arguments)


def is_plain(source: Mapping[str, Any]) -> bool:
    """Whether the fields of a stored source are such that building it runs nothing but the factory's own code.

    Numbers are; a text must be a single word, neither an address nor a path, at a place where the factory looks words
    up; labels of transformers' classes may be any text, for they are only shown.

    Example:
        >>> is_plain({"factory": "timm", "name": "resnet18", "arguments": {"num_classes": 10}})
        True
        >>> is_plain({"factory": "timm", "name": "resnet18", "arguments": {"checkpoint_path": "weights.bin"}})
        False
    """
    factory, name, arguments = source["factory"], source["name"], source["arguments"]
    if not (isinstance(factory, str) and isinstance(name, str) and isinstance(arguments, dict)):
        return False
    if factory == "transformers":
        try:
            return set(arguments) == {"config", "attn_implementation"} and _is_plain_config(arguments)
        except RecursionError:
            return False
    if factory == "module":
        return _is_json(arguments)  # nothing is built without trust
    return all(
        _is_number(item) or (factory == "timm" and key in TIMM_WORDS and _is_word(item))
        for key, value in arguments.items()
        for item in (value if isinstance(value, list) else [value])
    )


def _is_number(value: Any) -> bool:
    """Also a flag. A network of a huge number of layers would take for ever to make."""
    return isinstance(value, float) or (isinstance(value, int) and abs(value) <= _MOST)


def _is_json(value: Any) -> bool:
    try:
        return json.loads(json.dumps(value)) == value
    except (TypeError, ValueError, RecursionError):
        return False


def _is_plain_config(value: Any) -> bool:
    if isinstance(value, dict):
        if any(value.get(key) for key in _FETCHING):
            return False
        return all(key in _LABELS or _is_plain_config(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(_is_plain_config, value))
    return value is None or _is_number(value) or _is_word(value)


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[\w.+-]*", value) is not None


def _source_of(name: str, source: str, rest: str, arguments: dict[str, Any]) -> BaseSource:
    if not rest:
        return BaseSource("timm", name, arguments)
    if is_known(name):
        return BaseSource("ensemblenet" if source == _OWN else source, rest, arguments)
    return BaseSource("module", name, arguments)


def source_of(network: nn.Module) -> BaseSource | None:
    """How [`create`][ensemblenet.models.create] made a network; None for one that it did not make.

    Example:
        >>> source_of(create("torchvision:resnet18", 10))
        BaseSource(factory='torchvision', name='resnet18', arguments={'num_classes': 10})
    """
    return getattr(network, _MADE_BY, None)


def note_classes(network: nn.Module, num_classes: int) -> None:
    """Let a network whose classifier was replaced say that it has so many classes, wherever it says how it was made.

    Example:
        >>> network = create("torchvision:resnet18", 10)
        >>> note_classes(network, 4)
        >>> source_of(network)
        BaseSource(factory='torchvision', name='resnet18', arguments={'num_classes': 4})
    """
    now = {"num_classes": num_classes}
    if (source := source_of(network)) is not None:
        setattr(network, _MADE_BY, replace(source, arguments=source.arguments | now))
    if isinstance(arguments := getattr(network, "arguments", None), dict) and "num_classes" in arguments:
        setattr(network, "arguments", arguments | now)  # noqa: B010  of `made_with`, and no part of its type
    for owner in (network, getattr(network, "config", None)):  # transformers' have it in their configuration
        for name in ("num_classes", "num_labels"):
            if isinstance(getattr(owner, name, None), int):
                setattr(owner, name, num_classes)
