"""Networks and data modules as plain data: a `class_path` with `init_args`, which options of a command may change."""

from __future__ import annotations

import difflib
import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch import LightningDataModule

from ensemblenet import models
from ensemblenet.data import __all__ as data_modules
from ensemblenet.errors import EnsembleNetError, LoadError

__all__ = ["changed_data", "instantiate", "plain", "with_data_folder", "with_defaults"]


def instantiate(kind: type[Any], spec: Mapping[str, Any]) -> Any:
    """Make what a `class_path` with `init_args` describes.

    Args:
        kind: what it must be an instance of.
        spec: plain data with the two keys.

    Raises:
        LoadError: there is no such class, or it does not take these arguments; user errors of its own pass.

    Example:
        >>> from torch import nn
        >>> instantiate(nn.Module, {"class_path": "torch.nn.ReLU", "init_args": {"inplace": True}})
        ReLU(inplace=True)
    """
    parser = _parser(kind, kind.__name__)
    try:
        return parser.instantiate(parser.parse_object({kind.__name__: dict(spec)}))[kind.__name__]
    except (ArgumentError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, EnsembleNetError):
            raise
        raise LoadError(plain(error)) from error


def with_defaults(kind: type[Any], spec: Mapping[str, Any]) -> dict[str, Any]:
    """The same description with the arguments that it leaves to their defaults.

    What was stored before a class got another argument is then the same as what is read today.

    Raises:
        LoadError: there is no such class, or it does not take these arguments.

    Example:
        >>> from torch import nn
        >>> with_defaults(nn.Module, {"class_path": "torch.nn.ReLU"})
        {'class_path': 'torch.nn.ReLU', 'init_args': {'inplace': False}}
    """
    parser = _parser(kind, kind.__name__)
    try:
        return parser.parse_object({kind.__name__: dict(spec)}).as_dict()[kind.__name__]
    except (ArgumentError, ValueError) as error:
        raise LoadError(plain(error)) from error


def changed_data(spec: Mapping[str, Any], options: Sequence[str]) -> dict[str, Any]:
    """The description of a data module with what options of a command change.

    Args:
        spec: plain data with the two keys.
        options: `--data.KEY VALUE`, where a KEY is an argument of the data module, and `--data FOLDER`.

    Raises:
        LoadError: there is no such class, or it does not take these options.

    Example:
        >>> changed_data({"class_path": "ensemblenet.data.MNIST1D"}, ["--data.num_test", "20"])["init_args"]["num_test"]
        20
    """
    parser = _parser(LightningDataModule, "data")
    arguments = ["--data", yaml.safe_dump(dict(spec), sort_keys=False), *with_data_folder(options)]
    try:
        return parser.parse_args(arguments).as_dict()["data"]
    except ArgumentError as error:
        raise LoadError(plain(error, parser)) from error


def with_data_folder(arguments: Sequence[str]) -> list[str]:
    """The arguments with `--data FOLDER` written out.

    Example:
        >>> with_data_folder(["--data", "some/folder", "--data=MNIST1D"])
        ['--data.init_args.folder', 'some/folder', '--data=MNIST1D']
    """
    written = list(arguments)
    for place, (argument, following) in enumerate(pairwise([*arguments, ""])):
        option, equals, text = argument.partition("=")
        if option == "--data" and _is_folder(text if equals else following):
            written[place] = f"--data.init_args.folder{equals}{text}"
    return written


_PLAIN = r"(?:<class '\w+'>|typing\.Literal\[[^\]]*\])"
_NONE_OF_THEM = (
    rf"Does not validate against any of the Union subtypes Subtypes: \[({_PLAIN}(?:, {_PLAIN})*)\] "
    r"Errors: (?:(?!Problem|Errors).)*? Given value type: <[^>]*> Given value: (\S+)"
)

_NO_SUCH_VALUE = r"^Parser key \"([\w.]+)\": Expected (?:an? |one of )(.+?)\. Got value: (.*)$"
_IN_WORDS = {"float": "a number", "int": "an integer", "bool": "true or false", "str": "a text", "NoneType": "null"}

_REFUSED = r"^Does not validate against any of the Union subtypes .*? Errors: - (.+?) - Expected a .*: Namespace\(.*$"


def _expected(found: re.Match[str]) -> str:
    return f"Expected one of {_types(found[1])}. Got value: {found[2]}"


def _must_be(found: re.Match[str]) -> str:
    key, types, value = found.groups()
    words = [_IN_WORDS.get(one, one) for one in _types(types).split(", ")]
    return f"{key} must be {'one of ' * (len(words) > 1)}{', '.join(words)}; got {value}."


def _types(text: str) -> str:
    return re.sub(r"<class '(\w+)'>", r"\1", re.sub(r"typing\.Literal\[(.*?)\]", r"\1", text))


def plain(error: Exception, parser: ArgumentParser | None = None) -> str:
    r"""What jsonargparse says, in one line, without the other types that it tried, and what was perhaps meant.

    Args:
        error: names an option or a class that there is not, or a value that cannot be.
        parser: whose options these are.

    Example:
        >>> tried = "Problem with given class_path 'a.Data': 'b' is not accepted - Expected a <class 'NoneType'>"
        >>> plain(ValueError(f'Parser key "data":\n  Errors:\n    - {tried}'))
        "data: a.Data cannot be made: 'b' is not accepted"
        >>> plain(ValueError("Parser key \"ema\": Expected a <class 'float'>. Got value: x"))
        'ema must be a number; got x.'
        >>> plain(ValueError("Problem with given class_path 'torch.nn.ReLU': Option 'inplce' is not accepted"))
        "Problem with given class_path 'torch.nn.ReLU': Option 'inplce' is not accepted. Did you mean inplace?"
    """
    text = re.sub(_NONE_OF_THEM, _expected, " ".join(str(error).split()))
    text = re.sub(_REFUSED, r"\1", text)
    text = re.sub(
        r"^(Parser key \"[\w.]+\"): .*Expected a dot import path string: (\w+).*$", r"\1: there is no class '\2'", text
    )
    end = r"(?= - (?:Expected a <class|Not a valid|Problem)| Given value type|$)"
    found = re.match(rf"Parser key \"([\w.]+)\": .*?Problem with given class_path '([^']*)': (.+?){end}", text)
    shown = "{}: {} cannot be made: {}".format(*found.groups()) if found else re.sub(_NO_SUCH_VALUE, _must_be, text)
    near = _near(text, parser)
    return f"{shown.removesuffix('.')}. Did you mean {', '.join(near)}?" if near else shown


def _near(text: str, parser: ArgumentParser | None) -> list[str]:
    """The names closest to the one that a message says there is not."""
    if strange := re.search(r"there is no class '(\w+)'", text):
        callbacks = sys.modules.get("lightning.pytorch.callbacks")
        known = [*models.__all__, *data_modules, *getattr(callbacks, "__all__", ())]
        return difflib.get_close_matches(strange[1], known, n=1)
    if strange := re.search(r"module '([\w.]+)' has no attribute '(\w+)'", text):
        module, name = strange.groups()
        return difflib.get_close_matches(name, dir(sys.modules.get(module)), n=1)
    strange = re.search(r"unrecognized arguments: --([\w.]+)|(?:Group '([\w.]+)'.*?option|Option) '([\w.]+)'", text)
    if strange is None:
        return []
    key = strange[1] or ".".join(filter(None, (strange[2], strange[3])))
    *_, kind = [None, *re.findall(r"class_path '([\w.]+)'", text[: strange.start()])]
    if kind is not None:
        module, _, name = kind.rpartition(".")  # imported by the parser, if it can be
        made = getattr(sys.modules.get(module), name, None)
        known = [] if made is None else list(inspect.signature(made).parameters)
    else:
        known = [] if parser is None else list(parser.get_defaults().keys())
    return difflib.get_close_matches(key, known, n=1, cutoff=0.7)


def _parser(kind: type[Any], name: str) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(kind, name, required=True)
    return parser


def _is_folder(text: str) -> bool:
    """Whether `--data` means a folder, there or not; else it is a file of settings, or the name of a class."""
    if not text or Path(text).suffix in (".yaml", ".yml", ".json"):
        return False
    return "/" in text or Path(text).is_dir() or not ("." in text or text in data_modules)
