"""Networks by name, as the command line, configurations and stored recipes give them."""

from __future__ import annotations

import importlib
import json
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.error import URLError

from torch import Tensor, nn

from ensemblenet.errors import LoadError, MissingExtraError, ModelNameError, did_you_mean
from ensemblenet.extras import require
from ensemblenet.names import no_such_network
from ensemblenet.weights import read_state

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
_SHOWN = 3  # names of tensors in a message
_LONGEST = 300  # of what another library says
_MADE_BY = "_ensemblenet_source"  # an attribute of the networks that `create` made

# arguments of timm's networks that are words, which it looks up in tables of its own
TIMM_WORDS = ("act_layer", "norm_layer", "aa_layer", "global_pool", "pool_type", "stem_type", "pos_embed")
# of transformers' configurations: what may be any text, and what fetches more
_LABELS = ("id2label", "label2id")
_MOST = 1 << 24  # of an integer: a list of so many parts is still made in no time
_FETCHING = ("auto_map", "backbone", "quantization_config", "use_pretrained_backbone")


def create(
    name: str,
    num_classes: int | None = None,
    weights: str | None = None,
    options: dict[str, Any] | None = None,
) -> nn.Module:
    """Make a network, with random weights unless others are asked for; it remembers how it was made.

    Args:
        name: a name of timm's, such as `resnet18`; `torchvision:NAME`, of images or videos; or
            `transformers:NAME`, a folder or a name on the Hugging Face Hub, whose configuration says what it is; or
            `module.path:callable`, a callable that returns a network.
        num_classes: outputs; None leaves the network's own default.
        weights: "pretrained" takes those of timm, torchvision or transformers, which may download them; else a file,
            safetensors or a state dict of PyTorch, see [`read_state`][ensemblenet.weights.read_state]. Of `num_classes`
            other than the file has, the classifier begins anew.
        options: further arguments of the network, such as `{"drop_path_rate": 0.1}`.

    Raises:
        ModelNameError: there is no such network, what the callable returns is none, or the weights do not fit.

    Example:
        >>> type(create("ensemblenet.models:MNIST1DNet", num_classes=3)).__name__
        'MNIST1DNet'
    """
    arguments = ({} if num_classes is None else {"num_classes": num_classes}) | (options or {})
    source, _, rest = name.partition(":")
    pretrained = weights == "pretrained"
    if source == "transformers":
        network = _from_transformers(rest, arguments, pretrained)
    elif rest:
        network = _from_factory(name, source, rest, arguments, pretrained)
    else:
        network = _from_timm(name, arguments, pretrained)
    if source != "transformers":  # whose networks say it themselves
        setattr(network, _MADE_BY, _source_of(name, source, rest, arguments))
    if weights is not None and not pretrained:
        _take_weights(network, Path(weights), name, num_classes)
    return network


def _take_weights(network: nn.Module, path: Path, name: str, num_classes: int | None) -> None:
    """Load a file of weights; a classifier that has other classes begins anew."""
    if not path.is_file():
        raise ModelNameError(f"There is no file {path} with weights.")
    try:
        state = read_state(path, network)
    except LoadError as error:
        if path.suffix == ".safetensors":  # which holds nothing but tensors: it is damaged
            raise
        raise ModelNameError(
            f"{path} is not a state dict of tensors alone: {error} Save the state_dict() of its network as safetensors."
        ) from error
    wanted = network.state_dict()
    if _listed(state, wanted) and type(network).__module__.startswith("timm."):
        convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
        with suppress(Exception):  # of a layout that timm does not know either: what follows says it
            state = convert(state, network) if convert else state
    other = {key for key in state.keys() & wanted.keys() if state[key].shape != wanted[key].shape}
    rows = {(len(state[key]), len(wanted[key])) for key in other if state[key].ndim and wanted[key].ndim}
    is_classifier = len(rows) == 1 and next(iter(rows))[1] == num_classes
    if is_classifier and all(state[key].shape[1:] == wanted[key].shape[1:] for key in other):
        first = min(other)
        warnings.warn(
            f"{path} has {len(state[first])} classes and {name} {num_classes}: {first} begins anew.", stacklevel=3
        )
        state |= {key: wanted[key] for key in other}
    counters = {key: own for key, own in wanted.items() if key.endswith("num_batches_tracked")}  # old files have none
    state = counters | state
    odd = [_listed(one, another) for one, another in ((state, wanted), (wanted, state))]
    if any(odd):
        raise ModelNameError(
            f"{path} does not fit {name}: the file has {odd[0] or 'nothing else'}; the network has "
            f"{odd[1] or 'nothing else'}. Name the network that was trained, with its num_classes and options."
        )
    network.load_state_dict(state)


def _listed(own: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> str:
    """The first tensors that others have not, or have of another shape, in words."""
    odd = [key for key, value in own.items() if key not in others or others[key].shape != value.shape]
    more = f" and {len(odd) - _SHOWN:,} more" if len(odd) > _SHOWN else ""
    return ", ".join(f"{key} {tuple(own[key].shape)}" for key in odd[:_SHOWN]) + more


def _from_factory(name: str, source: str, rest: str, arguments: dict[str, Any], pretrained: bool) -> nn.Module:
    if pretrained and source != "torchvision":
        raise ModelNameError(f"{name} has no weights that could be downloaded: give a file of them, or none.")
    factory = _from_torchvision(rest, pretrained) if source == "torchvision" else _from_module(source, rest)
    try:
        network = factory(**arguments)
    except (URLError, ValueError) as error:
        if not pretrained:
            raise
        raise ModelNameError(f"The weights of {name} cannot be had: {_in_one_line(error)}") from error
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
    if source == "transformers":  # only its configuration and tensors are read
        return re.fullmatch(r"[\w./ -]+", rest) is not None
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
    if module.startswith("transformers."):
        config: Any = network.config
        size = getattr(config, "image_size", None)
        return (getattr(config, "num_channels", 3), size, size) if isinstance(size, int) else None
    return getattr(network, "input_shape", None)


def _from_timm(name: str, arguments: dict[str, Any], pretrained: bool) -> nn.Module:
    require("timm", "timm")
    import timm  # slow to import, and only needed for its own names

    if not timm.is_model(name):
        raise no_such_network("timm", name, timm.list_models())
    try:
        return timm.create_model(name, pretrained=pretrained, **arguments)
    except TypeError as error:
        raise ModelNameError(f"{name} cannot be made with {arguments}: {error}") from error
    except Exception as error:  # no connection, or a name that has no weights
        if not pretrained:
            raise
        raise ModelNameError(f"The weights of {name} cannot be had: {_in_one_line(error)}") from error


def _from_transformers(name: str, arguments: dict[str, Any], pretrained: bool) -> nn.Module:
    """A classifier of transformers by its folder or name; no code from there is run, and no pickle is read."""
    try:
        import transformers  # slow to import, and only needed for its own networks
    except ImportError as error:
        raise MissingExtraError(f"transformers:{name} needs a library: pip install transformers") from error
    options = dict(arguments)
    if (num_classes := options.pop("num_classes", None)) is not None:
        options["num_labels"] = num_classes
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False, **options)
        kind: Any = getattr(transformers, (config.architectures or [""])[0], None)
        if not (isinstance(kind, type) and kind.__name__.endswith("Classification")):
            kind = transformers.AutoModelForImageClassification._model_mapping[type(config)]
        if not pretrained:
            return kind._from_config(config)
        return kind.from_pretrained(name, config=config, use_safetensors=True, ignore_mismatched_sizes=True).train()
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise ModelNameError(f"transformers:{name} cannot be made: {_in_one_line(error)}") from error


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:_LONGEST]


def _from_torchvision(name: str, pretrained: bool = False) -> Callable[..., nn.Module]:
    known = _torchvision_names()
    if name not in known:
        raise no_such_network("torchvision", name, known)
    from torchvision import models

    weights = "DEFAULT" if pretrained else None
    return lambda **arguments: models.get_model(name, weights=weights, **arguments)


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
        callables = [one for one, value in vars(sys.modules[module]).items() if callable(value)]
        raise ModelNameError(f"{module} has no callable {name!r}.{did_you_mean(name, callables)}")
    return factory


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
            "timm": lambda: _from_timm(self.name, self.arguments, False),
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
